"""The report of a distillation on text: a run folder → curves, tables and texts on one self-contained page.

Its text is in ``text.html.jinja``; page, canvas and numbers are those of ``page.py``. No jax is imported.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill.reports import page

NAMES = {  # model -> name on the page, colour, marker; in the order of the table
    "teacher": ("teacher", "#3d434b", "s"),
    "student": ("distilled", "#0072B2", "o"),
    "equal_tokens": ("cross-entropy, equal tokens", "#D55E00", "^"),
    "equal_time": ("cross-entropy, equal time", "#E69F00", "v"),
    "start": ("untrained start", "#8a9099", "x"),
}
COLUMNS = {
    "KL": ("kl", ".4f"),
    "nats/token": ("nll", ".4f"),
    "perplexity": ("perplexity", ",.1f"),
    "agreement": ("agreement", ".2%"),
    "parameters": ("parameters", ",.0f"),
    "FLOPs/token": ("flops_per_token", ".3g"),
    "tokens/s": ("tokens_per_second", ",.0f"),
    "trained on": ("training_tokens", ",.0f"),
    "seconds": ("training_seconds", ",.0f"),
}
"""Column of the table → key and format."""
FIGURES = {"kl": "KL to the teacher (nats)", "nll": "nats per token"}

OVERFLOW = {
    "split": "they go on in further rows",
    "keep_start": "their start is kept, their end is cut off",
    "keep_end": "their end is kept, their start is cut off",
}
"""What became of documents longer than a row, by ``data.overflow``."""


def write_report(runs: Sequence[Path]) -> Path:
    """Writes ``report.html`` and its PNGs into the first run folder; further ones are columns of the table.

    Raises FileNotFoundError for a missing folder or file, ValueError for one that lacks what is needed.
    """
    read = [_read(Path(run)) for run in runs]
    first = read[0]
    context = {"run": first, "others": read[1:], "names": NAMES, "figure": _figure(first)}
    context["overflow"] = OVERFLOW.get((first["config"].get("data") or {}).get("overflow"), "–")
    context |= {"total": page.total, "config_text": json.dumps(first["config"], indent=2, ensure_ascii=False)}
    path = first["folder"] / "report.html"
    path.write_text(page.template("text.html.jinja").render(context), encoding="utf-8")
    return path


def _read(folder: Path) -> dict[str, Any]:
    train = f"run scripts/distill.py --config smollm2_text --run {folder} first"
    evaluation = page.read_json(folder / "evaluation.json", f"run scripts/evaluate.py --run {folder} first")
    for name in ("teacher", "student", "start", "verdict", "prompts", "ledger"):
        if name not in evaluation:
            raise ValueError(f"{folder / 'evaluation.json'}: no {name!r}; run scripts/evaluate.py --run {folder}.")
    config = page.read_json(folder / "config.json", train)
    arms = {name: folder if name == "student" else folder / name for name in ("student", "equal_tokens", "equal_time")}
    metrics = {name: page.read_metrics(path / "metrics.jsonl") for name, path in arms.items()}
    name = str(config.get("name") or folder.name)
    return {"folder": folder, "name": name, "config": config, "evaluation": evaluation, "metrics": metrics}


def _figure(run: dict[str, Any]) -> str:
    """Held-out KL and nats per token by seconds of training, evaluation and compilation left out."""
    path = run["folder"] / "curves.png"
    with page.canvas(path, 5.6, rows=2) as (above, below):
        for axes, (key, label) in zip((above, below), FIGURES.items(), strict=True):
            for name, records in run["metrics"].items():
                if records and name in run["evaluation"]:
                    steps, values = page.series(records, "eval", key)
                    trained = run["evaluation"][name]
                    seconds = steps * trained["training_seconds"] / trained["steps"]
                    title, colour, marker = NAMES[name]
                    axes.plot(seconds, values, color=colour, marker=marker, markersize=4, label=title)
            axes.set(ylabel=label)
        nll = run["evaluation"]["teacher"].get("nll")
        below.axhline(np.nan if nll is None else nll, color=NAMES["teacher"][1], linewidth=1, label="teacher")
        below.set(xlabel="seconds of training")
        above.plot([], [], color=NAMES["teacher"][1], linewidth=1, label="teacher")  # named above as well
        page.legend(above, columns=1)  # two columns of such names are wider than the page
    return page.data_uri(path)
