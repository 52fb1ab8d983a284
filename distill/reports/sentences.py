"""The report of a distilled sentence encoder: scores, curves and neighbours on one self-contained HTML page.

Its text is in ``sentences.html.jinja``. This module does not import jax.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.reports import page

NAMES = {  # model -> name on the page, colour, marker; in the order of the table
    "teacher": ("teacher", "#3d434b", "s"),
    "untrained": ("student, untrained", "#8a9099", "x"),
    "student": ("student", "#0072B2", "o"),
    "control": ("control, from random weights", "#D55E00", "^"),
}
FIGURES = {"spearman": "Spearman of similarities", "cosine": "cosine to the teacher"}
FOLDERS = {"student": "", "control": "random"}
"""Trained model → sub-folder of its metrics."""


def write_report(runs: Sequence[Path]) -> Path:
    """Writes ``report.html`` and its PNG into the first run folder; further runs are rows of the table.

    Raises FileNotFoundError for a missing folder or file, ValueError for a file that lacks required values.
    """
    read = [_read(Path(run)) for run in runs]
    first = read[0]
    context = {"run": first, "others": read[1:], "names": NAMES, "figure": _figure(first)}
    context["config_text"] = json.dumps(first["config"], indent=2, ensure_ascii=False)
    path = first["folder"] / "report.html"
    path.write_text(page.template("sentences.html.jinja").render(context), encoding="utf-8")
    return path


def _read(folder: Path) -> dict[str, Any]:
    again = f"run scripts/evaluate.py --run {folder}"
    evaluation = page.read_json(folder / "evaluation.json", f"{again} first")
    for name in NAMES:
        if not isinstance(evaluation.get(name), dict):
            raise UserError(f"{folder / 'evaluation.json'}: no scores of {name!r}; {again}.")
    train = f"run scripts/distill.py --config minilm --run {folder} first"
    config = page.read_json(folder / "config.json", train)
    metrics = {name: page.read_metrics(folder / place / "metrics.jsonl") for name, place in FOLDERS.items()}
    name = str(config.get("name") or folder.name)
    return {"folder": folder, "name": name, "config": config, "evaluation": evaluation, "metrics": metrics}


def _figure(run: dict[str, Any]) -> str:
    """Draws the similarity of student and control to the teacher by step."""
    path = run["folder"] / "curves.png"
    with page.canvas(path, 5.0, rows=2) as (above, below):
        for axes, (key, label) in zip((above, below), FIGURES.items(), strict=True):
            for name, records in run["metrics"].items():
                title, colour, marker = NAMES[name]
                style = "-" if name == "student" else "--"
                steps, values = page.series(records, "eval", key)
                axes.plot(steps, values, color=colour, marker=marker, markersize=4, linestyle=style, label=title)
            axes.set(ylabel=label)
        below.set(xlabel="optimizer step")
        page.legend(above, columns=2)
    return page.data_uri(path)
