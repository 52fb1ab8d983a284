"""What is the user's: errors that say what was given, what was expected and what to do, and the check of a field.

Everything in ``distill`` that refuses an input raises one of these, before any compute is spent. A command ends with
exit code 2 and the message alone for them, and with 1 for every other exception: those are faults of the library or of
the machine (``distill/cli.py``).
"""

import contextlib
import contextvars
import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal


class UserError(ValueError):
    """An input that cannot be used: a file, a configuration, an array's shape.

    Example:
        >>> from distill.errors import UserError
        >>> from distill.training import TrainingConfig
        >>> try:
        ...     TrainingConfig(steps=0)
        ... except UserError as error:
        ...     print(error)
        training: steps=0; expected at least 1.
    """


class MissingFile(UserError, FileNotFoundError):
    """A file or folder that is needed and not there."""


def shown(value: Any, most: int = 80) -> str:
    """A value in a message, cut to ``most`` characters.

    Example:
      >>> shown({"bits": 4}), shown("a" * 100, 12)
      ("{'bits': 4}", "'aaaaaaaa...")
    """
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def some(values: Iterable[str], most: int = 5) -> str:
    """The first few of many names, and how many more there are.

    Example:
      >>> some("abcdefg")
      'a, b, c, d, e and 2 more'
    """
    values = list(values)
    return ", ".join(values[:most]) + (f" and {len(values) - most} more" if len(values) > most else "")


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _fits(value: Any, hint: Any) -> bool:
    """Is a value of the type a field is declared with? Whole numbers are numbers; booleans are neither."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return any(value == choice and isinstance(value, type(choice)) for choice in inner)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, one) for one in inner)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(one, inner[0]) for one in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def _expected(hint: Any) -> str:
    """What a field is declared as, in words: its choices, or its type."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_expected, inner))
    if origin is tuple:
        return f"a tuple, each {_expected(inner[0])}"
    names = {float: "a finite number", int: "a whole number", str: "a text", bool: "True or False", type(None): "None"}
    return names.get(hint) or f"a {hint.__name__}"


Read = Callable[[], Mapping[str, tuple[bool, str]]]
"""Field → (whether anything reads it, what it takes to be read)."""


_OVERRIDDEN = contextvars.ContextVar[tuple[Any, ...]]("overridden", default=())


@contextlib.contextmanager
def overriding(config: Any) -> Iterator[None]:
    """Inside, a field that ``config`` has set and an override has left unread goes back to its default.

    Who turns a loss off on the command line has not asked for its hyperparameters, which the configuration gave it. A
    value that the configuration does not hold is refused as ever.

    Example:
      >>> from distill.features import FeatureConfig
      >>> with overriding(FeatureConfig(hidden_weight=1.0, hidden_loss="cosine")):
      ...     FeatureConfig(hidden_weight=0.0, hidden_loss="cosine").hidden_loss
      'projected_mse'
    """
    token = _OVERRIDDEN.set(tuple(_parts(config)))
    try:
        yield
    finally:
        _OVERRIDDEN.reset(token)


def _parts(config: Any) -> Iterator[Any]:
    if dataclasses.is_dataclass(config):
        yield config
        for field in dataclasses.fields(config):
            yield from _parts(getattr(config, field.name))


def check_fields(config: Any, name: str, read: Read = dict) -> None:
    """Refuses a value of another type than its field is declared with, and one that nothing would read.

    Args:
      config: a dataclass; ``__post_init__`` calls this first.
      name: of the configuration in messages.
      read: called once the types are right; a field that nothing reads must have its default.

    Raises:
      UserError: the field, its value, and what was expected: of a ``Literal``, its choices.

    Example:
      >>> @dataclasses.dataclass(frozen=True)
      ... class Pool:
      ...     kind: Literal["mean", "power"] = "mean"
      ...     exponent: float = 2.0
      ...
      ...     def __post_init__(self):
      ...         check_fields(self, "pool", lambda: {"exponent": (self.kind == "power", "kind='power'")})
      >>> for given in ({"kind": "max"}, {"exponent": 3.0}):
      ...     try:
      ...         Pool(**given)
      ...     except UserError as error:
      ...         print(error)
      pool: kind='max'; expected one of mean, power.
      pool: exponent=3.0 is read only with kind='power'; set that, or leave it out (default: 2.0).
    """
    hints = _hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if not _fits(value, hint):
            near = difflib.get_close_matches(str(value), map(str, typing.get_args(hint)), 1)
            meant = f" Did you mean {near[0]!r}?" if near else ""
            raise UserError(f"{name}: {field.name}={value!r}; expected {_expected(hint)}.{meant}")
    known, defaults = read(), {field.name: field.default for field in dataclasses.fields(config)}
    for field, (used, condition) in known.items():
        value, default = getattr(config, field), defaults[field]
        if not used and value != default:
            if any(type(one) is type(config) and getattr(one, field) == value for one in _OVERRIDDEN.get()):
                object.__setattr__(config, field, default)
                continue
            advice = f"set that, or leave it out (default: {default!r})"
            raise UserError(f"{name}: {field}={value!r} is read only with {condition}; {advice}.")
