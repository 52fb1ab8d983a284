"""The table of the addition experiment."""

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
