"""Tables in the terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def print_summary(summary: dict[str, Any], run: Path) -> None:
    """Teacher, student and baseline, a row each."""
    table = Table(title=f"{run}", title_justify="left")
    for name in ("model", "parameters", "exact match", "agreement", "FLOPs/token", "answer alone", "tokens/s"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for name in ("teacher", "student", "baseline"):
        if name in summary:
            table.add_row(*_row(name, summary))
    console = Console(width=100)
    console.print(table)
    ratio = summary["teacher"]["parameters"] / summary["student"]["parameters"]
    gap = summary.get("gap_closed")
    closed = "" if gap is None else f", gap closed {gap:.1%}"
    console.print(f"student {ratio:.1f}x smaller{closed}, {summary['seconds']:.0f} s of computing", highlight=False)


def _row(name: str, summary: dict[str, Any]) -> list[str]:
    values = summary[name]
    label = f"{name} (alone, {values['labels']} labels)" if "labels" in values else name
    agreement = f"{values['agreement']:.2%}" if "agreement" in values else "–"
    return [
        label,
        f"{values['parameters']:,}",
        f"{values['exact_match']:.2%}",
        agreement,
        f"{values['flops_per_token']:,.0f}",
        f"{values['latency_seconds'] * 1e3:.2f} ms",
        f"{values['tokens_per_second']:,.0f}",
    ]


def print_rows(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table: the first column is a name, the others are numbers."""
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=130).print(table)


def print_answers(rows: list[dict[str, str]]) -> None:
    """Prompts and what each model answers, with the truth."""
    table = Table()
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row.values())
    Console().print(table)
