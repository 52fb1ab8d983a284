"""What a person sees while a model trains: one live line in a terminal, one line per evaluation elsewhere."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rich import progress as rich_progress
from rich.console import Console


class Progress:
    """Loss, what was last measured, tokens per second and time left of one training."""

    def __init__(self, label: str, steps: int, start: int = 0, show: bool = True):
        console = Console(quiet=not show)
        self._label, self._steps = label, steps
        self._console = console
        self._lines = not console.is_terminal
        self._bar = rich_progress.Progress(
            rich_progress.TextColumn("{task.description:>8}"),
            rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TextColumn("{task.fields[text]}"),
            rich_progress.TimeRemainingColumn(),
            console=console,
            disable=self._lines,
        )
        self._fields: dict[str, Any] = {}
        self._task = self._bar.add_task(label, total=steps, completed=start, text="")

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def update(self, step: int, **fields: Any) -> None:
        """After a dispatch: ``loss``, ``tokens_per_second``, and ``notes`` to stand behind them."""
        self._fields |= fields
        self._bar.update(self._task, completed=step, text=self._text())

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """After an evaluation."""
        self._fields["measured"] = written(values)
        self._bar.update(self._task, text=self._text())
        if self._lines:
            self._console.print(f"{self._label} {step}/{self._steps}  {self._text()}", highlight=False)

    def _text(self) -> str:
        """What is known: before the first step there is neither a loss nor a speed."""
        formats = {"loss": "loss {:.4f}", "measured": "{}", "tokens_per_second": "{:,.0f} tokens/s", "notes": "{}"}
        known = [(how, self._fields[name]) for name, how in formats.items() if name in self._fields]
        return "  ".join(how.format(value) for how, value in known if value != "")


@contextlib.contextmanager
def loading(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error while something is read, gone when it is done; nothing where that is no terminal.

    Example:
      >>> with loading("weights", 10) as advance:
      ...     advance(4)
    """
    console = Console(stderr=True)
    columns = (
        rich_progress.TextColumn("loading {task.description}"),
        rich_progress.BarColumn(),
        rich_progress.TaskProgressColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    bar = rich_progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)


def written(values: dict[str, float]) -> str:
    """The first two measures, shares as percentages.

    Example:
      >>> written({"exact_match": 0.5}), written({"kl": 1.5, "nll": 3.0, "agreement": 0.4})
      ('exact match 50.0%', 'kl 1.5000  nll 3.0000')
    """
    shares = ("exact_match", "agreement")
    texts = (f"{name.replace('_', ' ')} {value:{'.1%' if name in shares else '.4f'}}" for name, value in values.items())
    return "  ".join(list(texts)[:2])
