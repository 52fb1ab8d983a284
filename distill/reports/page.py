"""What the pages of all experiments share: readers, numbers, figures, templates. No jax is imported."""

import base64
import json
import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

STYLE: Any = {  # matplotlib settings
    **{"font.size": 12, "legend.fontsize": 11.5, "xtick.labelsize": 11.5, "ytick.labelsize": 11.5},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#8a9099"},
    **{"axes.grid": True, "axes.axisbelow": True, "grid.color": "#e8eaed"},
    **{"legend.frameon": False, "legend.handletextpad": 0.5, "legend.columnspacing": 1.0},
}


def read_json(path: Path, remedy: str, optional: bool = False) -> dict[str, Any]:
    """A JSON object; a file that must be there and is not, or holds something else, is an error with its remedy."""
    if not path.is_file():
        if optional:
            return {}
        raise FileNotFoundError(f"{path} does not exist; {remedy}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}; {remedy}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected a JSON object; {remedy}")
    return value


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl, none where there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append({"step": None, **json.loads(line)})
        except (ValueError, TypeError) as error:
            if number == len(lines):  # a run killed in the middle of a line is still worth a report
                break
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {line[:60]!r}; remove it") from error
    return records


# ---- numbers


def number(value: object) -> float:
    """The value as a float; NaN for everything that is not a finite number."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def ratio(numerator: object, denominator: object) -> float:
    """A quotient; NaN where one side is unknown or the denominator is 0."""
    return number(numerator) / number(denominator) if denominator else math.nan


def plain(value: object) -> str:
    """The number as a person writes it; – where it is unknown."""
    known = number(value)
    if math.isnan(known):
        return "–"
    return f"{known:,.0f}" if abs(known) >= 1000 or known == int(known) else f"{known:.3g}"


def percent(value: object, decimals: int = 1) -> str:
    """A share in per cent."""
    known = 100 * number(value)
    while decimals < 3 and known < 100 and round(known, decimals) == 100:  # what is not all is not shown as all
        decimals += 1
    return "–" if math.isnan(known) else f"{known:.{decimals}f} %"


def scientific(value: object) -> str:
    """The number, with a power of ten where it is large or small."""
    known = number(value)
    if math.isnan(known) or known == 0 or 1e-3 <= abs(known) < 1e6:
        return plain(known)
    mantissa, exponent = f"{known:.2e}".split("e")
    return f"{mantissa} × 10" + str(int(exponent)).translate(str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"))


def times(value: object) -> str:
    """A factor, such as 2.5×."""
    known = number(value)
    return "–" if math.isnan(known) else f"{known:.1f}×" if 1 <= known < 1000 else f"{scientific(known)}×"


def total(rows: list[dict], key: str) -> str:
    """A sum, written; of those that are known."""
    known = [value for value in (number(row.get(key)) for row in rows) if not math.isnan(value)]
    return ("≥ " if len(known) < len(rows) else "") + scientific(sum(known)) if known else "–"


def series(records: list[dict], kind: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one measure."""
    # A resumed run writes some steps again: the later record of a step is the one that led to the weights.
    by_step = {r["step"]: number(r[key]) for r in records if r.get("kind") == kind and key in r}
    steps = sorted(step for step in by_step if not math.isnan(number(step)))
    return np.array(steps, float), np.array([by_step[step] for step in steps], float)


def data_uri(path: Path) -> str:
    """A PNG as it stands in a page."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


@contextmanager
def canvas(path: Path, height: float, rows: int = 1) -> Generator[Any, None, None]:
    """Axes to draw on, written to `path`: same bytes for same numbers, whatever the user's matplotlibrc."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(5.6, height), layout="constrained")
        yield figure.subplots(rows, sharex=True)
        figure.savefig(path, format="png", dpi=200, metadata={"Software": None})


def legend(axes: Any, columns: int = 3) -> None:
    """Above the axes, each label once."""
    entries = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    place = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "borderaxespad": 0.2}
    axes.legend(entries.values(), entries, ncols=columns, **place)


def curves(path: Path, x: Sequence[float], lines: dict[str, Sequence[float]], x_label: str, y_label: str) -> None:
    """One PNG of named curves over the same x, for measurements that belong to no run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with canvas(path, 3.2) as axes:
        for name, y in lines.items():
            axes.plot(x, y, marker="o", label=name)
        axes.set(xlabel=x_label, ylabel=y_label, ylim=(0, None))
        axes.legend(frameon=False)


# ---- the page


def template(name: str) -> jinja2.Template:
    """A page of this folder, with the filters of numbers."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    filters = (number, plain, percent, scientific, times)
    environment.filters |= {function.__name__: function for function in filters}
    return environment.get_template(name)
