"""The report of an addition experiment: a run folder as plots (PNG) and one self-contained HTML page.

This module reads, computes and draws; text and tables are in `addition.html.jinja`. It does not import jax, and imports
matplotlib only to draw. Every number of the page comes from the run folder. A missing or non-finite number is shown as
–.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill.errors import MissingFile, UserError
from distill.reports.page import (
    canvas,
    data_uri,
    legend,
    number,
    percent,
    plain,
    ratio,
    read_json,
    read_metrics,
    series,
    template,
    total,
)

MODELS = ("teacher", "student", "baseline")
# Okabe and Ito's palette is safe for colour-blind readers; a marker per series works without colour too.
COLOURS = {"teacher": "#3d434b", "student": "#0072B2", "baseline": "#D55E00"}
MARKERS = {"teacher": "s", "student": "o", "baseline": "^"}
ARMS = {  # arm of the protocol -> name on the page, colour, marker; in the order of the table
    "alone": ("Alone, on labels", "#D55E00", "^"),
    "same_prompts": ("Distilled, same prompts", "#56B4E9", "D"),
    "unlabelled": ("Distilled, unlabelled", "#0072B2", "o"),
    "skyline": ("Skyline, true labels", "#009E73", "P"),
    "permuted_teacher": ("Permuted teacher", "#CC79A7", "X"),
    "independent_teacher": ("Independent teacher", "#E69F00", "d"),
}


@dataclass(frozen=True)
class Run:
    """The files of one run folder; a missing optional file reads as empty."""

    folder: Path
    config: dict[str, Any]
    evaluation: dict[str, Any]
    summary: dict[str, Any]
    arms: dict[str, Any]
    metrics: dict[str, list[dict]]  # by model

    @property
    def name(self) -> str:
        """Name of the experiment, or of the folder where the configuration has none."""
        return str(self.config.get("name") or self.folder.resolve().name)

    @property
    def models(self) -> list[str]:
        """Evaluated models, in the order teacher, student, baseline."""
        return [model for model in MODELS if self.evaluation.get(model)]


def write_report(runs: Sequence[Path]) -> Path:
    """Writes `report.html` and its PNGs into the first run folder and compares the others; returns its path.

    Raises FileNotFoundError for a missing folder or file, ValueError for no run or a file that lacks required values.
    """
    if not runs:
        raise UserError("no run folder was given; expected one or more, as in scripts/report.py --run runs/addition")
    read = [_read_run(Path(folder)) for folder in runs]
    page = template("addition.html.jinja").render(_context(read, _draw_figures(read)))
    path = read[0].folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


# ---- reading


def _read_run(folder: Path) -> Run:
    if not folder.is_dir():
        raise MissingFile(f"run folder {folder} does not exist; run scripts/distill.py --run {folder} first")
    train, evaluate = f"run scripts/distill.py --run {folder} first", f"run scripts/evaluate.py --run {folder} first"
    where = {"teacher": folder / "teacher", "student": folder, "baseline": folder / "baseline"}
    run = Run(
        folder,
        config=read_json(folder / "config.json", train),
        evaluation=read_json(folder / "evaluation.json", evaluate),
        summary=read_json(folder / "summary.json", train, optional=True),
        arms=read_json(folder / "arms.json", "run scripts/reproduce.py again", optional=True),
        metrics={model: read_metrics(path / "metrics.jsonl") for model, path in where.items()},
    )
    if not run.metrics["student"]:
        raise MissingFile(f"{folder / 'metrics.jsonl'} is missing or empty; {train}")
    _check_evaluation(run.evaluation, folder / "evaluation.json", evaluate)
    return run


def _check_evaluation(evaluation: dict, path: Path, remedy: str) -> None:
    for model in ("teacher", "student", *(["baseline"] if evaluation.get("baseline") else [])):
        scores = evaluation.get(model)
        known = isinstance(scores, dict) and isinstance(scores.get("exact_match", "absent"), int | float | None)
        if not known or not number(scores.get("parameters")) > 0:
            wanted = f"expected {model!r} to hold the numbers 'parameters' (1 or more) and 'exact_match'"
            raise UserError(f"{path}: {wanted}, got {json.dumps(scores)[:120]}; {remedy}")


def _dark_knowledge(run: Run) -> dict[str, Any]:
    """Facts for the caption of the soft targets, about the wrong digits, to which a label gives probability 0."""
    soft, reverse = run.evaluation["soft_targets"], (run.config.get("data") or {}).get("reverse", True)
    symbols, truth = soft["symbols"], soft["symbols"].index(soft["truth"])
    others = [i for i in range(len(symbols)) if i != truth]
    wrong = [i for i in others if symbols[i].isdigit()] or others
    chances = {model: np.array([number(soft[model][i]) for i in wrong]) for model in MODELS if soft.get(model)}
    order = np.argsort(-chances["teacher"], kind="stable")
    first, last = wrong[order[0]], wrong[order[-1]]
    ranks = {model: _rank_correlation(chances["teacher"], chances[model]) for model in chances if model != "teacher"}
    known = {model: rank for model, rank in ranks.items() if not math.isnan(rank)}
    slip = reverse and symbols[first] == _carry_slip(soft)
    return {"truth": truth, "first": first, "last": last, "slip": slip, "ranks": known, "reverse": reverse}


def _carry_slip(soft: dict) -> str | None:
    """The digit that a missed or superfluous carry would write; None where the prompt is no addition."""
    terms = re.fullmatch(r"(\d+)\+(\d+)=", soft.get("prompt", ""))
    if not terms or not soft["truth"].isdigit():
        return None
    unit = 10 ** soft.get("position", 0)
    carried = sum(int(term) % unit for term in terms.groups()) >= unit
    return str((int(soft["truth"]) + (-1 if carried else 1)) % 10)


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation, ties at their mean rank; NaN where one side is constant or holds a NaN."""
    ranks = [(x[:, None] > x).sum(1) + (x[:, None] == x).sum(1) / 2 for x in (a, b)]
    ordered = np.isfinite([a, b]).all() and min(np.std(rank) for rank in ranks) > 0
    return float(np.corrcoef(*ranks)[0, 1]) if ordered else math.nan


# ---- figures


def _draw_figures(runs: list[Run]) -> dict[str, str]:
    """Draws every figure whose data exist; returns name -> data URI of the PNG."""
    evaluation, student = runs[0].evaluation, runs[0].evaluation["student"]
    figures: dict[str, tuple[object, Callable[[list[Run], Path], None]]] = {
        "curves": (True, _draw_curves),
        "parameters": (True, _draw_parameters),
        "carries": (student.get("exact_match_by_carries"), _draw_carries),
        "soft_targets": (evaluation.get("soft_targets"), _draw_soft_targets),
        "calibration": (student.get("calibration"), _draw_calibration),
        "arms": (runs[0].arms.get("rows"), _draw_arms),
    }
    return {name: _drawn(name, draw, runs) for name, (data, draw) in figures.items() if data}


def _drawn(name: str, draw: Callable[[list[Run], Path], None], runs: list[Run]) -> str:
    path = runs[0].folder / f"{name}.png"
    try:
        draw(runs, path)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        source = {"curves": "metrics.jsonl", "arms": "arms.json"}.get(name, "evaluation.json")
        raise UserError(
            f"{path.with_name(source)} lacks what the figure {name!r} shows ({type(error).__name__}: {error}); "
            f"expected the format of scripts/evaluate.py: run it with --run {path.parent} again"
        ) from error
    return data_uri(path)


def _look(model: str, **more: Any) -> dict[str, Any]:
    return {"color": COLOURS[model], "marker": MARKERS[model], "label": model, **more}


def _draw_curves(runs: list[Run], path: Path) -> None:
    with canvas(path, 5.0, rows=2) as (above, below):
        for model, records in runs[0].metrics.items():
            line = _look(model, linestyle="--" if model == "baseline" else "-")
            if records:
                steps, scores = series(records, "eval", "exact_match")
                above.plot(steps, 100 * scores, markersize=4, **line)
                steps, losses = series(records, "train", "loss")
                below.plot(steps, np.where(losses > 0, losses, np.nan), **line | {"marker": "", "linewidth": 1.2})
        above.set(ylabel="exact match (%)", ylim=(-4, 104))
        below.set(ylabel="training loss (nats)", xlabel="optimizer step")
        below.set_yscale("log" if any((line.get_ydata() > 0).any() for line in below.lines) else "linear")
        legend(above)


def _draw_parameters(runs: list[Run], path: Path) -> None:
    with canvas(path, 3.5) as axes:
        for run, model in [(each, model) for each in reversed(runs) for model in each.models]:
            size, match = (run.evaluation[model][key] for key in ("parameters", "exact_match"))
            point, fill = (size, 100 * number(match)), COLOURS[model] if run is runs[0] else "white"
            axes.plot(*point, **_look(model, markersize=10, markerfacecolor=fill))
            if run is runs[0] and not math.isnan(point[1]):
                below = {"xytext": (0, -9), "va": "top"} if model == "baseline" else {"xytext": (0, 9), "va": "bottom"}
                name = f"{model} {percent(match)}"
                axes.annotate(name, point, textcoords="offset points", ha="center", **below)
        axes.set(xscale="log", xlabel="parameters", ylabel="exact match (%)", ylim=(-16, 118), yticks=range(0, 101, 25))
        low, high = axes.get_xlim()
        axes.set_xlim(low / 2, high * 2)


def _draw_carries(runs: list[Run], path: Path) -> None:
    evaluation, models = runs[0].evaluation, runs[0].models
    carries = sorted(evaluation["student"]["exact_match_by_carries"], key=int)
    with canvas(path, 3.5) as axes:
        for place, model in enumerate(models):
            by_carries = evaluation[model].get("exact_match_by_carries") or {}
            scores = [100 * number(by_carries.get(count, {}).get("exact_match")) for count in carries]
            x = np.arange(len(carries)) + (place - (len(models) - 1) / 2) * 0.27
            bars = axes.bar(x, scores, width=0.25, color=COLOURS[model], label=model)
            texts = ["" if math.isnan(s) else "100" if s >= 100 else f"{min(s, 99.9):.1f}" for s in scores]
            axes.bar_label(bars, texts, padding=2, fontsize=11)
        axes.set(ylabel="exact match (%)", xlabel="number of carries", ylim=(0, 112), yticks=range(0, 101, 25))
        axes.set_xticks(range(len(carries)), carries)
        axes.grid(axis="x", visible=False)
        legend(axes)


def _draw_soft_targets(runs: list[Run], path: Path) -> None:
    soft = runs[0].evaluation["soft_targets"]
    x, truth = np.arange(len(soft["symbols"])), soft["symbols"].index(soft["truth"])
    with canvas(path, 5.6, rows=2) as (above, below):
        above.bar(x - 0.2, soft["teacher"], width=0.38, color=COLOURS["teacher"], label="teacher, T = 1")
        softened = f"teacher, T = {plain(soft['temperature'])}"
        above.bar(x + 0.2, soft["teacher_softened"], width=0.38, color="#a9b1bb", label=softened)
        for place, model in enumerate(model for model in MODELS if soft.get(model)):
            heights = np.maximum(np.array(soft[model], float), 1e-20)  # a logarithmic axis needs values above 0
            below.plot(x + 0.22 * (place - 1), heights, **_look(model, linestyle="", markersize=6))
        above.set(ylabel="probability", ylim=(0, 1.04))
        below.set(ylabel="probability at T = 1", yscale="log", xlabel="next symbol (shaded: the truth)")
        below.set_xticks(x, [symbol.strip("<>") for symbol in soft["symbols"]], fontsize=10)
        for axes in (above, below):
            axes.axvspan(truth - 0.5, truth + 0.5, color="#fff1cc", zorder=0)
            axes.grid(axis="x", visible=False)
            legend(axes)


def _draw_calibration(runs: list[Run], path: Path) -> None:
    with canvas(path, 4.4) as axes:
        axes.plot([0, 100], [0, 100], color="#8a9099", linewidth=1, linestyle=":")
        for model in runs[0].models:
            bins = (runs[0].evaluation[model].get("calibration") or {}).get("bins", [])
            full = [b for b in bins if number(b["count"]) > 0]
            share = np.array([b["count"] for b in full]) / sum(b["count"] for b in full)
            x, y = ([100 * number(b[key]) for b in full] for key in ("confidence", "accuracy"))
            axes.plot(x, y, color=COLOURS[model], linewidth=1, alpha=0.4)
            axes.scatter(x, y, 18 + 160 * share, **_look(model, alpha=0.85))
        axes.set(xlabel="confidence (%)", ylabel="accuracy (%)", xlim=(-3, 104), ylim=(-3, 104))
        legend(axes)


def _draw_arms(runs: list[Run], path: Path) -> None:
    rows, teacher = runs[0].arms["rows"], runs[0].arms.get("teacher") or {}
    sizes = sorted({row["parameters"] for row in rows})
    with canvas(path, 5.0) as axes:
        if teacher.get("seeds"):
            axes.axhline(100 * np.mean(teacher["seeds"]), color=COLOURS["teacher"], linewidth=1, label="Teacher")
        for slot, size in enumerate(sizes):
            here = _in_order(row for row in rows if row["parameters"] == size)
            for place, row in enumerate(here):
                _draw_arm(axes, row, slot + 0.8 * ((place + 0.5) / len(here) - 0.5))
            axes.axvline(slot + 0.5, color="#e8eaed", linewidth=1)
        axes.set_xticks(range(len(sizes)), [plain(size) for size in sizes])
        axes.grid(axis="x", visible=False)
        axes.set(xlabel="student parameters", ylabel="exact match (%)", ylim=(-4, 104), xlim=(-0.5, len(sizes) - 0.5))
        legend(axes, columns=2)


def _draw_arm(axes: Any, row: dict, x: float) -> None:
    name, colour, marker = ARMS[row["arm"]]
    axes.plot([x] * len(row["seeds"]), 100 * np.array(row["seeds"], float), ".", color=colour, alpha=0.35)
    axes.vlines(x, *(100 * number(bound) for bound in row.get("interval") or (None, None)), color=colour, linewidth=2)
    axes.plot(x, 100 * number(row["mean"]), marker, color=colour, markersize=8, label=name)


def _context(runs: list[Run], figures: dict[str, str]) -> dict[str, Any]:
    rows = runs[0].arms.get("rows") or []
    students = dict.fromkeys(row["student"] for row in rows)
    return {
        **{"runs": runs, "figures": figures, "arms": ARMS},
        **{"number": number, "ratio": ratio, "total": total},
        "knowledge": _dark_knowledge(runs[0]) if "soft_targets" in figures else {},
        "arm_groups": [_in_order(row for row in rows if row["student"] == student) for student in students],
        "config_text": json.dumps(runs[0].config, indent=2, ensure_ascii=False),
    }


def _in_order(rows: Iterable[dict]) -> list[dict]:
    return sorted(rows, key=lambda row: (list(ARMS).index(row["arm"]), row.get("labels") or 0))
