"""Chat templates rendered by jinja2 alone, as transformers renders them, without its import (0.7 CPU seconds).

Owns the sandbox that templates run in: a template is a stranger's program. Knows no tokenizer. What transformers does
beyond plain messages, tools and variables is declined with `Unsupported`, and whoever asked turns to transformers.

Invariant: what is rendered here is what transformers renders, to the letter; tests compare them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.utils

from raydata_llm.template_limits import LimitedEnvironment, is_limited, limits

# Arguments of transformers' `apply_chat_template` that are no variables of the template.
_ARGUMENTS = {
    *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"),
    *("continue_final_message", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors"),
    *("return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "self"),
}
# transformers copies a message's reasoning under several names.
_REASONING = ("reasoning_content", "thinking", "reasoning")


class Unsupported(Exception):
    """Only transformers can render this."""


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Any,
    add_generation_prompt: bool,
    special_tokens: Mapping[str, str],
    variables: Mapping[str, Any],
) -> str:
    """The conversation as the template writes it.

    Raises:
        Unsupported: for what is left to transformers.
        Exception: whatever the template raises, `jinja2.TemplateError` above all.
    """
    if variables.keys() & _ARGUMENTS or any(
        message.get(name) is not None for message in messages for name in _REASONING
    ):
        raise Unsupported
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise Unsupported
    if not _is_plain([messages, tools, variables]):
        raise Unsupported
    with limits():
        return _compiled(template).render(
            messages=[{name: value for name, value in message.items() if value is not None} for message in messages],
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **{**special_tokens, **variables},
        )


@functools.lru_cache(maxsize=64)
def syntax_error(template: str) -> str | None:
    """Why a template does not parse, `{% generation %}` of transformers included; None if it does."""
    try:
        with limits():
            _environment(_Generation).from_string(template)
    except jinja2.TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    except (RecursionError, SyntaxError):  # of Python's own compiler too
        return "it is nested too deeply"
    return None


@contextmanager
def limited_transformers() -> Iterator[None]:
    """Have transformers render the next template of this thread within the same limits.

    Its one function that compiles templates is replaced, for threads within `limits` alone: whoever else uses
    transformers in this process gets its own.
    """
    _limit_compilation()
    with limits():
        yield


@functools.cache
def _limit_compilation() -> None:
    from transformers.utils import chat_template_utils

    compiled = chat_template_utils._compile_jinja_template

    def compile_limited(template: str) -> jinja2.Template:
        if is_limited():
            return _compiled_for_transformers(template)
        theirs: jinja2.Template = compiled(template)
        return theirs

    chat_template_utils._compile_jinja_template = compile_limited  # type: ignore[assignment]


@functools.lru_cache(maxsize=64)
def _compiled_for_transformers(template: str) -> jinja2.Template:
    return _environment(_Generation).from_string(template)


def _is_plain(value: Any) -> bool:
    # transformers rebuilds anything else, so that a template can call none of its methods.
    if isinstance(value, dict):
        return all(type(key) is str and _is_plain(inner) for key, inner in value.items())
    if type(value) is list:
        return all(map(_is_plain, value))
    return value is None or type(value) in (str, int, float, bool)


@functools.lru_cache(maxsize=64)
def _compiled(template: str) -> jinja2.Template:
    try:
        return _environment().from_string(template)
    # `{% generation %}`, a tag that transformers adds, or a mistake.
    except (jinja2.TemplateSyntaxError, SyntaxError) as error:
        raise Unsupported from error


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, by which templates mark what an assistant says; it changes nothing of the text."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 has it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The statements between the tag and its end."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.cache
def _environment(*extensions: type[jinja2.ext.Extension]) -> LimitedEnvironment:
    variables = {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return LimitedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, *extensions],
        filters={"tojson": _to_json},
        variables=variables,
    )


# Names and defaults of these are what templates rely on. jinja2's own `tojson` escapes HTML.
def _to_json(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


class _Dict:
    """`dict` without the attributes by which a template could leave the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` that keeps no name with an underscore before it, Python's own attributes above all."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `namespace(self=...)` works, as in jinja2
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template cannot keep {name!r} in a namespace: rename it")
