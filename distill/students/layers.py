"""Which layers of a teacher its student keeps: evenly spread, every n-th, both ends, or the first ones."""

from distill.errors import UserError


def spread(layers: int, of: int) -> tuple[int, ...]:
    """``layers`` of ``of`` layers, counted from 0, evenly spread, the first and the last among them.

    Example:
      >>> spread(4, 10), spread(1, 10)
      ((0, 3, 6, 9), (0,))
    """
    _check_count(layers, of)
    return tuple(round(i * (of - 1) / max(layers - 1, 1)) for i in range(layers))


def every(layers: int, of: int) -> tuple[int, ...]:
    """Every n-th of ``of`` layers from the first on, n as large as ``layers`` of them allow (arXiv 1910.01108).

    Example:
      >>> every(3, 6), every(3, 8)
      ((0, 2, 4), (0, 2, 4))
    """
    _check_count(layers, of)
    return tuple(range(0, of, of // layers))[:layers]


def ends(layers: int, of: int) -> tuple[int, ...]:
    """The first and the last of ``of`` layers, one more of the first if ``layers`` is odd.

    Example:
      >>> ends(2, 6), ends(3, 6)
      ((0, 5), (0, 1, 5))
    """
    _check_count(layers, of)
    first = -(-layers // 2)
    return (*range(first), *range(of - layers + first, of))


def first(layers: int, of: int) -> tuple[int, ...]:
    """The first of ``of`` layers.

    Example:
      >>> first(2, 6)
      (0, 1)
    """
    _check_count(layers, of)
    return tuple(range(layers))


def _check_count(layers: int, of: int) -> None:
    if not 1 <= layers <= of:
        raise UserError(f"{layers} layers of {of}; expected 1 … {of}.")


CHOICES = {"spread": spread, "every": every, "ends": ends, "first": first}
"""Ways to choose a number of layers."""
