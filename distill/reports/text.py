"""The report of a distillation on text: curves, tables and generated texts on one self-contained HTML page.

Its text is in ``text.html.jinja``. This module does not import jax.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill.errors import UserError
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
    "split": "they continue in further rows",
    "keep_start": "their start is kept, their end is cut off",
    "keep_end": "their end is kept, their start is cut off",
}
"""Value of ``data.overflow`` → what the page says about documents longer than a row."""


def write_report(runs: Sequence[Path]) -> Path:
    """Writes ``report.html`` and its PNGs into the first run folder; further runs are rows of the table.

    Raises FileNotFoundError for a missing folder or file, ValueError for a file that lacks required values.
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
            raise UserError(f"{folder / 'evaluation.json'}: no {name!r}; run scripts/evaluate.py --run {folder}.")
    config = page.read_json(folder / "config.json", train)
    arms = {name: folder if name == "student" else folder / name for name in ("student", "equal_tokens", "equal_time")}
    metrics = {name: page.read_metrics(path / "metrics.jsonl") for name, path in arms.items()}
    name = str(config.get("name") or folder.name)
    return {"folder": folder, "name": name, "config": config, "evaluation": evaluation, "metrics": metrics}


def _figure(run: dict[str, Any]) -> str:
    """Draws held-out KL and nats per token by seconds of training, without evaluation and compilation."""
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
        above.plot([], [], color=NAMES["teacher"][1], linewidth=1, label="teacher")  # an entry for the one legend
        page.legend(above, columns=1)  # two columns of these names are wider than the figure
    return page.data_uri(path)
