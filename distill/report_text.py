"""The report of a distillation on text."""

from collections.abc import Sequence
from pathlib import Path


def write_report(runs: Sequence[Path]) -> Path:
    """Later."""
    raise NotImplementedError
