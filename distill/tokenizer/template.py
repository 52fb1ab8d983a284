"""Chat templates: Jinja in a sandbox, as transformers renders them, with limits of time, steps and size.

A template comes with a model's weights and is code of somebody else. The sandbox keeps it from the machine; the limits
keep it from running for ever or filling the memory. Every loop iteration, call and filter is one step.
"""

import contextvars
import datetime
import functools
import json
import re
import string
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from distill.errors import UserError

if TYPE_CHECKING:
    from jinja2 import Template

TODAY = datetime.datetime(2024, 7, 26)
"""The date of a template that asks for today's: rows prepared on two days are equal. It is Llama 3.1's own default."""

SECONDS, STEPS, CHARACTERS, NUMBER = 10.0, 2_000_000, 16_000_000, 100_000
"""Limits of one rendering: time, steps, length of any text or list, size of any number a filter is given."""

_START, _END = "\ufdd0", "\ufdd1"  # noncharacters: in no text that is exchanged
_REASONING = ("reasoning_content", "thinking", "reasoning")
_NO_SIZES = ("d", "default", "map", "reject", "rejectattr", "select", "selectattr", "sum")
"""Filters of whose arguments none is a length: numbers as large as a date in seconds are usual there."""


class Rendered(NamedTuple):
    """What a template writes."""

    text: str
    generated: list[tuple[int, int]]
    """Characters ``[from, to)`` inside ``{% generation %} … {% endgeneration %}``."""


class _Budget:
    """What one rendering may still use."""

    def __init__(self):
        self.steps, self.until = 0, time.monotonic() + SECONDS

    def step(self) -> None:
        """Counts a step."""
        self.steps += 1
        if self.steps > STEPS or (self.steps % 64 == 0 and time.monotonic() > self.until):
            raise UserError(f"it does not end within {STEPS} steps or {SECONDS:.0f} seconds")

    def size(self, value: Any) -> Any:
        """The value, refused if it is enormous."""
        if isinstance(value, str | bytes | list | tuple | dict):
            self.length(len(value))
        if isinstance(value, int) and value.bit_length() > 4096:
            raise UserError("it makes a number of more than 4096 bits")
        return value

    def pattern(self, text: str) -> None:
        """Refuses a format whose width alone is enormous, such as ``%999999999d``, or that takes it from a value."""
        if re.search(r"\d{6}|%[-+ #0\d.]*\*", text):
            raise UserError(f"it writes with a width above {NUMBER} characters")

    def arguments(self, name: str, values: list[Any]) -> None:
        """Refuses a filter or method whose result would be enormous, before it is made."""
        numbers = [abs(value) for value in values if isinstance(value, int)]
        texts = [value for value in values if isinstance(value, str)]
        if max(numbers, default=0) > NUMBER:
            raise UserError(f"it gives {name} a number above {NUMBER}")
        length = 0
        if numbers and texts:  # indent, center, expandtabs: so much for each line or tabulator
            length = max(numbers) * (1 + texts[0].count("\n") + texts[0].count("\t"))
        if name == "replace" and len(texts) >= 3:
            length = texts[0].count(texts[1]) * len(texts[2])
        if name == "join" and values and isinstance(values[0], list | tuple):
            between = len(texts[0]) if texts else 0
            length = sum(between + len(part) for part in values[0] if isinstance(part, str))
        if name == "format" and texts:
            self.pattern(texts[0])
        self.length(length)

    def operation(self, operator: str, left: Any, right: Any) -> None:
        """Refuses an operation whose result would be enormous, before it is made."""
        if operator == "%" and isinstance(left, str):
            self.pattern(left)
        if operator == "**" and (not isinstance(right, int) or abs(right) > 64):
            raise UserError("it raises a number to a power above 64")
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, str | bytes | list | tuple) and isinstance(other, int):
                    self.length(len(one) * other)

    def length(self, length: int) -> None:
        """Refuses a text or list of such a length."""
        if length > CHARACTERS:
            raise UserError(f"it makes a text or list longer than {CHARACTERS} characters")


_budget: contextvars.ContextVar[_Budget] = contextvars.ContextVar("budget")


def writes_date(template: str | None) -> bool:
    """Whether a template asks for today's date, and gets ``TODAY``."""
    return "strftime_now" in (template or "")


def is_marked(template: str | None) -> bool:
    """Whether a template marks generated text, ``{% generation %} … {% endgeneration %}``."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", template or "") is not None


def render(
    template: str, messages: Iterable[Mapping[str, Any]], tools: Iterable[Any], *, answer: bool, **names: Any
) -> Rendered:
    """Renders a conversation.

    Args:
      template: Jinja, as models publish it.
      messages: each an object of text, numbers, lists and objects.
      tools: JSON schemas; none: the template sees None.
      answer: the template's ``add_generation_prompt``.
      names: further variables, such as ``bos_token``.

    Raises:
      UserError: the template is no Jinja, refuses the conversation, fails, or goes beyond a limit of this module.

    Example:
      >>> chat = [{"role": "user", "content": "hi"}]
      >>> render("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", chat, (), answer=False).text
      '<user>hi'
    """
    token = _budget.set(_Budget())
    try:
        values = {
            "messages": [_one_name_of_reasoning(_plain(message)) for message in messages],
            "tools": [_plain(tool) for tool in tools] or None,
            "documents": None,
            "add_generation_prompt": answer,
        }
        return _split("".join(_pieces(_compiled(template), values | names)))
    except Exception as error:  # what a template raises can be anything
        line = _line(error)
        raise UserError(f"the chat template fails: {error}{f' (its line {line})' if line else ''}") from error
    finally:
        _budget.reset(token)


def _pieces(template: "Template", values: Mapping[str, Any]) -> Iterator[str]:
    budget, length = _budget.get(), 0
    for piece in template.generate(**values):
        length += len(piece)
        if length > CHARACTERS:
            raise UserError(f"it writes more than {CHARACTERS} characters")
        budget.step()
        yield piece


def _split(text: str) -> Rendered:
    """A text without its marks, and where they were."""
    plain, spans, begins, length = [], [], [], 0
    for piece in re.split(f"([{_START}{_END}])", text):
        if piece == _START:
            begins.append(length)
        elif piece == _END:
            spans.append((begins.pop(), length))
        else:
            plain.append(piece)
            length += len(piece)
    return Rendered("".join(plain), spans)


def _plain(value: Any) -> Any:
    """A value of JSON's kinds alone: other objects have methods that the sandbox does not know."""
    if value is None or type(value) in (str, int, float, bool):
        return value.replace(_START, "").replace(_END, "") if isinstance(value, str) else value
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    raise UserError(f"a conversation holds a {type(value).__name__}; expected text, numbers, lists and objects.")


def _one_name_of_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Reasoning under each name that templates read, as transformers gives it."""
    found = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


def _line(error: BaseException) -> int | None:
    """Line of the template where it failed."""
    from jinja2 import TemplateSyntaxError

    if isinstance(error, TemplateSyntaxError):
        return error.lineno
    trace, line = error.__traceback__, None
    while trace is not None:
        line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == "<template>" else line
        trace = trace.tb_next
    return line


@functools.lru_cache(maxsize=64)
def _compiled(template: str) -> "Template":
    environment = _environment()
    if len(template) > CHARACTERS:
        raise UserError(f"it has more than {CHARACTERS} characters")
    return environment.from_string(_counted()().visit(environment.parse(template)))


def _tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """JSON without Jinja's escapes of HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _strftime(form: str) -> str:
    return TODAY.strftime(form)


def _counting(values: Iterable[Any]) -> Iterator[Any]:
    budget = _budget.get()
    for value in values:
        budget.step()
        yield value


def _limited(name: str, function: Callable) -> Callable:
    """A filter that counts as a step and refuses enormous arguments and results."""

    @functools.wraps(function)
    def inner(*values, **options):
        budget = _budget.get()
        budget.step()
        written = values[1:] if values and isinstance(values[0], int) else values  # not the number that it writes
        given = [value for value in written if isinstance(value, str | bytes | int | list | tuple)]
        budget.arguments(name, [*given, *options.values()] if name not in _NO_SIZES else [])
        return budget.size(function(*values, **options))

    return inner


@functools.cache
def _counted() -> type:
    """The transformer that counts the iterations of every loop of a template."""
    from jinja2 import nodes
    from jinja2.visitor import NodeTransformer

    class Counted(NodeTransformer):
        def visit_For(self, node):
            node = self.generic_visit(node)
            node.iter = nodes.Filter(node.iter, "counting", [], [], None, None, lineno=node.lineno)
            return node

        def visit_Concat(self, node):
            node = self.generic_visit(node)
            return nodes.Filter(node, "limited", [], [], None, None, lineno=node.lineno)

    return Counted


@functools.cache
def _environment() -> Any:
    """The sandbox, with the filters and functions that transformers gives chat templates."""
    import jinja2.ext
    import jinja2.runtime
    import jinja2.sandbox
    import jinja2.utils
    from jinja2 import nodes

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012 jinja's own form

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            start, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in (_START, _END))
            return nodes.Scope([start, *body, end]).set_lineno(line)

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**", "+", "%"})

        def call_binop(self, context, operator, left, right, /):
            budget = _budget.get()
            budget.operation(operator, left, right)
            return budget.size(super().call_binop(context, operator, left, right))

        def wrap_str_format(self, function, /):
            method = isinstance(function, type("".join)) and isinstance(function.__self__, str)
            if method and function.__name__ in ("format", "format_map"):
                _budget.get().pattern(function.__self__)
                if any("{" in (spec or "") for _, _, spec, _ in string.Formatter().parse(function.__self__)):
                    raise UserError("it takes the width of a format from a value")
            return super().wrap_str_format(function)

        def call(self, context, function, /, *values, **options):
            budget = _budget.get()
            budget.step()
            owner = (function.__self__,) if isinstance(function, type("".join)) else ()  # a method of a text or list
            name = function.__name__ if owner else "a function"
            written = values if owner and isinstance(owner[0], int) else (*owner, *values)
            given = [value for value in written if isinstance(value, str | bytes | int | list | tuple)]
            makes_nothing = isinstance(function, jinja2.runtime.Macro) or any(isinstance(o, dict | list) for o in owner)
            if not makes_nothing:  # ", ".join(texts): texts first, as a filter
                budget.arguments(name, given[::-1] if name == "join" else given)
            return budget.size(super().call(context, function, *values, **options))

    class Dict:
        def __call__(self, *values, **named):
            return dict(*values, **named)

    class Namespace(jinja2.utils.Namespace):
        def __setitem__(self, name, value):
            if name.startswith("_"):
                raise jinja2.TemplateError(f"a name with an underscore first, {name!r}")
            super().__setitem__(name, value)

    extensions = [Generation, jinja2.ext.loopcontrols]
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False)
    environment.filters["tojson"] = _tojson
    environment.filters = {name: _limited(name, function) for name, function in environment.filters.items()}
    environment.filters |= {"counting": _counting, "limited": _limited("~", lambda value: value)}
    environment.globals |= {"raise_exception": _raise, "strftime_now": _strftime, "dict": Dict()}
    environment.globals["namespace"] = Namespace
    return environment
