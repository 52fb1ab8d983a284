"""Tables for the terminal."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Columns = Mapping[str, tuple[str, str | Callable[[Any], str]]]
"""Title of a column → key of its values, and their format: a format specification or a function."""


def cells(values: Mapping[str, Any], columns: Columns) -> list[str]:
    """Formats the values of one row; – for a missing one.

    Example:
      >>> cells({"kl": 0.5}, {"KL": ("kl", ".2f"), "seconds": ("seconds", ".0f")})
      ['0.50', '–']
    """
    return [written(values[key], how) if key in values else "–" for key, how in columns.values()]


def written(value: Any, how: str | Callable[[Any], str]) -> str:
    """Formats one value by an entry of ``Columns``."""
    return how(value) if callable(how) else format(value, how)


def print_rows(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table with names in the first column and numbers in the others."""
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=130).print(table)


def print_answers(rows: list[dict[str, str]]) -> None:
    """Prints prompts with the answer of each model."""
    table = Table()
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row.values())
    Console().print(table)
