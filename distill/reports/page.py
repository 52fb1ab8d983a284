"""Shared parts of the reports: readers, number formats, figures, templates. This module does not import jax."""

import base64
import json
import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from distill.errors import MissingFile, UserError

STYLE: Any = {  # matplotlib settings
    **{"font.size": 12, "legend.fontsize": 11.5, "xtick.labelsize": 11.5, "ytick.labelsize": 11.5},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#8a9099"},
    **{"axes.grid": True, "axes.axisbelow": True, "grid.color": "#e8eaed"},
    **{"legend.frameon": False, "legend.handletextpad": 0.5, "legend.columnspacing": 1.0},
}


def read_json(path: Path, remedy: str, optional: bool = False) -> dict[str, Any]:
    """Reads a JSON object. The errors, for a missing file or other content, end with ``remedy``.

    A missing ``optional`` file reads as an empty object.
    """
    if not path.is_file():
        if optional:
            return {}
        raise MissingFile(f"{path} does not exist; {remedy}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}; {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, expected a JSON object; {remedy}")
    return value


def read_metrics(path: Path) -> list[dict]:
    """Reads the records of a metrics.jsonl; none where the file does not exist."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append({"step": None, **json.loads(line)})
        except (ValueError, TypeError) as error:
            if number == len(lines):  # a run killed in the middle of a line is still worth a report
                break
            raise UserError(f"{path}, line {number}: expected a JSON object, got {line[:60]!r}; remove it") from error
    return records


# ---- numbers


def number(value: object) -> float:
    """The value as a float; NaN for everything that is not a finite number."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def ratio(numerator: object, denominator: object) -> float:
    """A quotient; NaN where one side is unknown or the denominator is 0."""
    return number(numerator) / number(denominator) if denominator else math.nan


def plain(value: object) -> str:
    """Formats a number with thousands separators or three significant digits; – where it is unknown."""
    known = number(value)
    if math.isnan(known):
        return "–"
    return f"{known:,.0f}" if abs(known) >= 1000 or known == int(known) else f"{known:.3g}"


def percent(value: object, decimals: int = 1) -> str:
    """Formats a share in per cent; – where it is unknown."""
    known = 100 * number(value)
    while decimals < 3 and known < 100 and round(known, decimals) == 100:  # 99.96 % must not be shown as 100.0 %
        decimals += 1
    return "–" if math.isnan(known) else f"{known:.{decimals}f} %"


def scientific(value: object) -> str:
    """Formats a number with a power of ten where it is large or small."""
    known = number(value)
    if math.isnan(known) or known == 0 or 1e-3 <= abs(known) < 1e6:
        return plain(known)
    mantissa, exponent = f"{known:.2e}".split("e")
    return f"{mantissa} × 10" + str(int(exponent)).translate(str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"))


def times(value: object) -> str:
    """Formats a factor, such as 2.5×."""
    known = number(value)
    return "–" if math.isnan(known) else f"{known:.1f}×" if 1 <= known < 1000 else f"{scientific(known)}×"


def total(rows: list[dict], key: str) -> str:
    """Formats the sum of the known values, with ≥ where some are unknown."""
    known = [value for value in (number(row.get(key)) for row in rows) if not math.isnan(value)]
    return ("≥ " if len(known) < len(rows) else "") + scientific(sum(known)) if known else "–"


def series(records: list[dict], kind: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one metric."""
    # A resumed run logs some steps again. The later record of a step belongs to the final weights.
    by_step = {r["step"]: number(r[key]) for r in records if r.get("kind") == kind and key in r}
    steps = sorted(step for step in by_step if not math.isnan(number(step)))
    return np.array(steps, float), np.array([by_step[step] for step in steps], float)


def data_uri(path: Path) -> str:
    """A PNG as data URI, so that the page needs no other file."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


@contextmanager
def canvas(path: Path, height: float, rows: int = 1) -> Generator[Any, None, None]:
    """Yields axes and writes them to `path`; equal numbers give equal bytes, independent of the user's matplotlibrc."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(5.6, height), layout="constrained")
        yield figure.subplots(rows, sharex=True)
        figure.savefig(path, format="png", dpi=200, metadata={"Software": None})


def legend(axes: Any, columns: int = 3) -> None:
    """Draws a legend above the axes, with each label once."""
    entries = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    place = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "borderaxespad": 0.2}
    axes.legend(entries.values(), entries, ncols=columns, **place)


def curves(path: Path, x: Sequence[float], lines: dict[str, Sequence[float]], x_label: str, y_label: str) -> None:
    """Draws named curves over the same x to a PNG, for measurements without a run folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with canvas(path, 3.2) as axes:
        for name, y in lines.items():
            axes.plot(x, y, marker="o", label=name)
        axes.set(xlabel=x_label, ylabel=y_label, ylim=(0, None))
        axes.legend(frameon=False)


# ---- the page


def template(name: str) -> jinja2.Template:
    """Loads a template of this folder with the number formats as filters."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    filters = (number, plain, percent, scientific, times)
    environment.filters |= {function.__name__: function for function in filters}
    return environment.get_template(name)
