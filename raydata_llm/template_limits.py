"""Bounds for chat templates, which are strangers' programs: of their time, of their text, of what they build.

Owns an environment that counts what a template makes and looks at the clock in each turn of a loop. All of it happens
inside the rendering thread, so it works in any thread of a Ray worker and stops nothing else. As no single call can be
interrupted, one that makes much of little (`*`, `center`, `join`, ...) or walks through what it is given (`tojson`,
`==`, ...) is checked before it is done.

Invariant: rendering within `limits` ends soon after `MOST_SECONDS` of the thread's own time, with memory for a few
times `MOST_TEXT`, or raises `TemplateLimitError`. Templates within the bounds render as without them, to the letter.
"""

from __future__ import annotations

import functools
import itertools
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jinja2
import jinja2.runtime
import jinja2.sandbox
from jinja2 import nodes

# Of the thread's own time. Real templates take a tenth of a millisecond, and 20 ms for a conversation of 1 MB. That of
# Gemma 4 looks at all messages for each of them, and takes 5 seconds for 1,200.
MOST_SECONDS = 20.0
# Characters that one rendering makes, the text and all that is made on its way: prompts of a million tokens have 4
# million.
MOST_TEXT = 64 << 20
# Values of the lists and dicts that one rendering makes.
_MOST_VALUES = 1 << 24
# Values that are seen in one of them, each as often as it is seen: lists of lists that hold one list twice are few
# objects, and take for ever to be written or compared.
_MOST_SEEN = 1 << 19
_MOST_FIGURE, _MOST_BITS, _MOST_INDENT, _MOST_LOREM = 1 << 20, 1 << 16, 64, 100
# For filters that are written in Python.
_MOST_SLOW_TEXT = 1 << 20
_LOOK_EVERY, _LOOK_FROM = 64, 1 << 16
# A width of seven digits, one that is an argument of its own, or a field within a field.
_WIDTH = re.compile(r"\d{7}|%[^%a-zA-Z]*\*|\{[^{}]*\{")
# Filters that look at their values one by one or not at all, and one whose check looks at all of them.
_IDLE = frozenset(("length", "count", "first", "last", "list", "map", "select", "selectattr", "reject", "rejectattr"))
_IDLE |= {"default", "d", "items", "attr", "batch", "slice", "reverse", "random", "trim", "safe", "upper", "lower"}
_IDLE |= {"tojson"}
_SLOW = frozenset(("wordwrap", "urlize", "striptags", "title", "xmlattr", "pprint", "wordcount", "truncate"))
_OF_NO_TEXT, _FORMATTING = ("to_bytes", "generate_lorem_ipsum"), ("format", "format_map")
_COMPARING = frozenset(("eq", "equalto", "==", "ne", "!=", "lt", "lessthan", "<", "gt", "greaterthan", ">", "le", "<="))
_COMPARING |= {"ge", ">=", "in"}
_TURN, _MADE, _SEEN = "__raydata_llm_turn__", "__raydata_llm_made__", "__raydata_llm_seen__"
_ADDED, _JOINED_AT_ONCE = "__raydata_llm_added__", 1024
# Most values are of these, and hold no others.
_SCALARS = frozenset((str, int, float, bool, type(None)))
_HOLDERS = (list, tuple, dict)


class TemplateLimitError(RuntimeError):
    """A template that runs too long or makes too much."""


class _Meter(threading.local):
    """What this thread's rendering has used."""

    active = False
    text = values = turns = 0
    ends_at = 0.0

    def begin(self) -> None:
        self.active, self.text, self.values, self.turns = True, 0, 0, 0
        self.ends_at = time.thread_time() + MOST_SECONDS

    def turn(self) -> None:
        """One more turn of a loop, or call of a macro."""
        self.turns += 1
        if self.turns % _LOOK_EVERY == 0:
            self.look()

    def look(self) -> None:
        """Look at the clock."""
        if time.thread_time() > self.ends_at:
            raise TemplateLimitError(f"the chat template ran for more than {MOST_SECONDS:g} seconds: mend its loops")

    def make_text(self, size: int) -> None:
        """So many characters are about to be made, or were."""
        self.text += size
        if self.text > MOST_TEXT:
            raise TemplateLimitError(
                f"the chat template made more than {MOST_TEXT >> 20} million characters: mend what repeats its text"
            )
        if size > _LOOK_FROM:
            self.look()

    def make_values(self, count: int) -> None:
        """A list or dict of so many values is about to be made, or was."""
        self.values += count
        if self.values > _MOST_VALUES:
            raise TemplateLimitError("the chat template made lists of millions of values: mend what repeats them")


_meter = _Meter()


@contextmanager
def limits() -> Iterator[None]:
    """Count afresh what this thread's next rendering makes."""
    _meter.begin()
    try:
        yield
    finally:
        _meter.active = False


def is_limited() -> bool:
    """Whether this thread is within `limits`."""
    return _meter.active


class LimitedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox of templates, bounded; its templates are compiled and rendered within `limits`.

    Args:
        filters, variables: Beside jinja2's own.
        options: jinja2's.
    """

    intercepted_binops = frozenset(("*", "%", "**"))

    def __init__(
        self, *, filters: Mapping[str, Callable[..., Any]], variables: Mapping[str, Any], **options: Any
    ) -> None:
        super().__init__(finalize=_seen, **options)
        limited = {**self.filters, **filters}
        self.filters = {name: _limited(name, function) for name, function in limited.items()}
        self.filters |= {_MADE: _made, _SEEN: _seen, _ADDED: _added, _TURN: _turn}
        tests: Any = self.tests
        tests |= {name: _comparing(tests[name]) for name in _COMPARING}
        self.globals |= variables

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """Join a template's pieces as it writes them."""
        written: list[str] = []
        size, left = 0, iter(pieces)
        while size <= MOST_TEXT and (some := list(itertools.islice(left, _JOINED_AT_ONCE))):
            written += some
            size += sum(map(len, some))
        _meter.make_text(size)
        return "".join(written)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        for node in template.find_all((nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block)):
            turn = nodes.Filter(nodes.Const(None), _TURN, [], [], None, None, lineno=node.lineno)
            body: list[nodes.Node] = node.body  # type: ignore[attr-defined]  # of each of these
            body.insert(0, nodes.ExprStmt(turn, lineno=node.lineno))
        _rewrite(template)
        return template

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """Do an operation that may make much."""
        _check_operands(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: jinja2.runtime.Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call what a template calls."""
        if not isinstance(__obj, jinja2.runtime.Macro):
            # The sandbox has methods of its own in the place of `str.format` and `format_map`.
            owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
            given = (owner, *args) if isinstance(owner, str | list) else args
            _check_arguments(getattr(__obj, "__name__", ""), given, kwargs)
        return _made(super().call(__context, __obj, *args, **kwargs))


def _rewrite(node: nodes.Node) -> None:
    """Have a template's nodes count what they make, and look at what they compare."""
    for name, value in node.iter_fields():
        if isinstance(value, list):
            setattr(node, name, [_rewritten(one) if isinstance(one, nodes.Node) else one for one in value])
        elif isinstance(value, nodes.Node):
            setattr(node, name, _rewritten(value))


def _rewritten(node: nodes.Node) -> nodes.Node:
    _rewrite(node)
    if isinstance(node, nodes.Add):
        # a + b + c is added at once.
        first = node.left
        if isinstance(first, nodes.Filter) and first.name == _ADDED:
            first.args.append(node.right)
            return first
        return nodes.Filter(first, _ADDED, [node.right], [], None, None, lineno=node.lineno)
    if isinstance(node, nodes.Getitem) and not isinstance(node.arg, nodes.Slice | nodes.Neg):
        # The hash of a tuple looks at all that it holds.
        node.arg = _filtered(node.arg, _SEEN)
    elif isinstance(node, nodes.Concat):
        node.nodes = [_filtered(one, _MADE, _SEEN) for one in node.nodes]
    elif isinstance(node, nodes.Compare):
        if not any(map(_is_fixed, (node.expr, *(operand.expr for operand in node.ops)))):
            node.expr = _filtered(node.expr, _SEEN)
            for operand in node.ops:
                operand.expr = _filtered(operand.expr, _SEEN)
    elif isinstance(node, nodes.Dict):
        for pair in node.items:
            pair.key = _filtered(pair.key, _SEEN)
        return _filtered(node, _MADE)
    elif isinstance(node, nodes.List) or (isinstance(node, nodes.Tuple) and node.ctx == "load"):
        return _filtered(node, _MADE)
    return node


def _is_fixed(node: nodes.Node) -> bool:
    is_list = isinstance(node, nodes.List | nodes.Tuple)
    return isinstance(node, nodes.Const) or (is_list and all(map(_is_fixed, node.items)))  # type: ignore[attr-defined]


def _filtered(node: nodes.Expr, *names: str) -> nodes.Expr:
    if _is_fixed(node):
        return node
    for name in names:
        node = nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
    return node


@jinja2.pass_context  # so that jinja2 does not do it once, when it compiles the template
def _turn(context: jinja2.runtime.Context, value: None) -> None:
    """One more turn of a loop, or call of a macro."""
    _meter.turn()


def _added(first: Any, *others: Any) -> Any:
    """The sum of values, from the left."""
    if type(first) is str and all(type(one) is str for one in others):
        _meter.make_text(len(first) + sum(map(len, others)))
        return "".join((first, *others))
    for one in others:
        _check_operands("+", first, one)
        first = first + one
    return first


def _made(value: Any) -> Any:
    """Count a value."""
    kind = type(value)
    if kind is str:
        _meter.make_text(len(value))
    elif kind in (list, tuple, dict):
        _meter.make_values(len(value))
    elif kind is int:
        _check_bits(value.bit_length())
    return value


def _seen(value: Any) -> Any:
    """Refuse a value that shows too many."""
    if type(value) not in _SCALARS and isinstance(value, _HOLDERS):
        _size(value)
    return value


def _size(value: Any) -> int:
    """Characters of a value's text, about."""
    if type(value) is str:
        return len(value)
    size = seen = 0
    left = [value]
    while left:
        one = left.pop()
        seen += 1
        if seen > _MOST_SEEN or size > MOST_TEXT:
            raise TemplateLimitError("the chat template made a list or dict that is too large: mend what repeats it")
        kind = type(one)
        if kind is str or isinstance(one, str):
            size += len(one)
        elif kind in _SCALARS:
            continue
        elif kind is dict or isinstance(one, Mapping):
            left.extend(one.keys())
            left.extend(one.values())
        elif isinstance(one, list | tuple):
            left.extend(one)
    return size + 8 * seen


def _check_bits(bits: int) -> None:
    if bits > _MOST_BITS:
        raise TemplateLimitError("the chat template made a number that is too large: mend its arithmetic")


def _check_product(size: int, times: float) -> None:
    """Refuse so much, made so many times; what is within the bounds is counted when it is there."""
    if size * max(times, 0) > MOST_TEXT:
        _meter.make_text(MOST_TEXT + 1)


def _check_operands(operator: str, left: Any, right: Any) -> None:
    if operator == "%":
        if isinstance(left, str):
            _check_format(left, right)
    elif operator == "+" and isinstance(left, str) and isinstance(right, str):
        _meter.make_text(len(left) + len(right))
    elif isinstance(left, int) and isinstance(right, int):
        times = max(right, 0) if operator == "**" else 1
        _check_bits(left.bit_length() * times + (right.bit_length() if operator == "*" else 0))
    elif operator == "+" and isinstance(left, list | tuple) and isinstance(right, list | tuple):
        _meter.make_values(len(left) + len(right))
    elif operator == "*":
        number, other = (left, right) if isinstance(left, int) else (right, left)
        if isinstance(number, int) and isinstance(other, str):
            _check_product(len(other), number)
            _meter.make_text(len(other) * max(number, 0))
        elif isinstance(number, int) and isinstance(other, list | tuple):
            _meter.make_values(len(other) * max(number, 0))


def _check_format(text: str, values: Any) -> None:
    if _WIDTH.search(text):
        raise TemplateLimitError(f"the chat template formats by {text[:80]!r}: give widths of 6 digits at most")
    _check_product(_size(values), text.count("%") + text.count("{"))


def _check_arguments(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments of which a function or a filter would make too much, before it is called.

    Args:
        name: The filter's, function's or method's.
        args: A method's begin with the text or list that it is of.
    """
    rest = (*args[1:], *kwargs.values())
    check = _CHECKS.get(name)
    if check is not None:
        given = (*args, *kwargs.values()) if name in _OF_NO_TEXT else rest
        figures = [abs(one) for one in given if isinstance(one, int | float)]
        if name not in _FORMATTING and any(not one <= _MOST_FIGURE for one in figures):
            raise TemplateLimitError(f"the chat template gives {name} {max(figures)}: give {_MOST_FIGURE} at most")
        texts = [len(one) for one in rest if isinstance(one, str)]
        check(args[0] if args else None, rest, int(max(figures, default=0)), max(texts, default=0))
    for one in rest if name in _IDLE else (*args, *rest):
        _seen(one)
    if name in _SLOW and args and isinstance(args[0], str) and len(args[0]) > _MOST_SLOW_TEXT:
        raise TemplateLimitError(f"the chat template gives {name} {len(args[0])} characters: give a million at most")


# Each of these is given the text (or list), the other arguments, the largest figure and the longest text among them.
def _check_replace(text: Any, rest: tuple[Any, ...], figure: int, longest: int) -> None:
    if isinstance(text, str) and rest and isinstance(rest[0], str):
        _check_product(longest, text.count(rest[0]) if rest[0] else len(text) + 1)


def _check_join(values: Any, rest: tuple[Any, ...], figure: int, longest: int) -> None:
    if isinstance(values, str) and rest and not isinstance(rest[0], str):
        values, longest = rest[0], len(values)  # the method: the separator's own
    if isinstance(values, list | tuple | dict | str):
        _check_product(len(values), longest)
        _check_product(_size(values), 1)


def _check_formatted(text: Any, rest: tuple[Any, ...], figure: int, longest: int) -> None:
    if isinstance(text, str):
        _check_format(text, rest)


def _check_indent(text: Any, rest: tuple[Any, ...], figure: int, longest: int) -> None:
    _check_product(str(text).count("\n") + 1, max(figure, longest, 4))


def _check_each(text: Any, rest: tuple[Any, ...], figure: int, longest: int) -> None:
    _check_product(len(text) if isinstance(text, str) else 1, max(figure, longest, 8))


def _check_json(value: Any, rest: tuple[Any, ...], figure: int, longest: int) -> None:
    if max(figure, longest) > _MOST_INDENT:
        raise TemplateLimitError(f"the chat template writes JSON with an indent above {_MOST_INDENT}: lower it")
    _check_product(_size(value), 8)


def _check_translate(text: Any, rest: tuple[Any, ...], figure: int, longest: int) -> None:
    if isinstance(text, str) and rest and isinstance(rest[0], dict):
        _check_product(len(text), max((_size(one) for one in rest[0].values()), default=1))


def _check_sum(values: Any, rest: tuple[Any, ...], figure: int, longest: int) -> None:
    if any(isinstance(one, list | tuple) for one in rest):
        raise TemplateLimitError("the chat template sums lists: add them in a loop")


def _check_lorem(first: Any, rest: tuple[Any, ...], figure: int, longest: int) -> None:
    if figure > _MOST_LOREM:
        raise TemplateLimitError(f"the chat template writes {figure} paragraphs or words: give {_MOST_LOREM} at most")


def _check_width(text: Any, rest: tuple[Any, ...], figure: int, longest: int) -> None:
    """A figure is checked before; this is for what takes no more than one."""


_Check = Callable[[Any, tuple[Any, ...], int, int], None]
_CHECKS: dict[str, _Check] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "to_bytes", "batch", "slice", "round"), _check_width),
    **dict.fromkeys(("format", "format_map"), _check_formatted),
    **dict.fromkeys(("expandtabs", "wordwrap"), _check_each),
    "replace": _check_replace,
    "join": _check_join,
    "indent": _check_indent,
    "tojson": _check_json,
    "translate": _check_translate,
    "sum": _check_sum,
    "generate_lorem_ipsum": _check_lorem,
}


def _limited(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose arguments are checked, and whose result is counted."""
    # jinja2 hands some of them its context first.
    passed = int(hasattr(function, "jinja_pass_arg"))

    @functools.wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        _check_arguments(name, args[passed:], kwargs)
        return _made(function(*args, **kwargs))

    return limited


def _comparing(test: Callable[..., Any]) -> Callable[..., Any]:
    """A test whose two values are looked at first."""

    def compared(left: Any, right: Any) -> Any:
        return test(_seen(left), _seen(right))

    return compared
