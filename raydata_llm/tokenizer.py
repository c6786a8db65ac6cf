"""Text to token ids: the tokenizer of a model, its chat template, and how a prompt becomes token ids.

Owns the rule for special tokens: plain text gets those the tokenizer adds, templated text gets none (its template
has written them). Knows no rows and no engine. Importing it imports neither transformers nor torch.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from raydata_llm.chat_template import limited_transformers, syntax_error
from raydata_llm.engine.param_values import check_text
from raydata_llm.engine.rust_panics import no_panic
from raydata_llm.least_tokens import TOO_LONG, check_length
from raydata_llm.light_tokenizer import LightTokenizer
from raydata_llm.tokenizer_cache import load_light, load_prepared, tokenizer_stamp

Messages = Sequence[Mapping[str, Any]]
# How a message's content reaches the template: as text, or, for templates made so, as a list of parts.
CONTENT_FORMATS = ("auto", "string", "openai")
_TEMPLATE_SUFFIXES = (".jinja", ".jinja2", ".j2", ".txt", ".json")
# What an assistant may have said instead of text.
_INSTEAD_OF_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


def load_tokenizer(local_path: str, *, trust_remote_code: bool = False) -> Any:
    """Load a model's tokenizer, once per process.

    Args:
        local_path: A folder in Hugging Face's layout, or a GGUF file (see `resolve_model`).
        trust_remote_code: Run tokenizer code that comes with the folder.

    Returns:
        A transformers tokenizer. Do not change it: the process shares it.

    Raises:
        ValueError: when there is no tokenizer that can be read, with the remedy.
    """
    return _load(local_path, tokenizer_stamp(Path(local_path)), trust_remote_code, False)


def load_light_tokenizer(local_path: str, *, trust_remote_code: bool = False) -> Any:
    """As `load_tokenizer`, for `encode_texts`, `render_chat` and `decode` alone: without transformers if possible."""
    return _load(local_path, tokenizer_stamp(Path(local_path)), trust_remote_code, True)


@functools.lru_cache(maxsize=8)
def _load(local_path: str, stamp: str, trust_remote_code: bool, light: bool) -> Any:
    load = load_light if light else load_prepared
    try:
        with no_panic:
            return load(Path(local_path), stamp, trust_remote_code=trust_remote_code)
    except Exception as error:  # of a damaged file anything may come, `Exception` itself above all
        cause = " ".join(str(error).split())
        raise ValueError(
            f"model_source={local_path!r} has no tokenizer that can be read: {cause}; "
            "add its tokenizer.json (and tokenizer_config.json), or name another one with tokenizer="
        ) from error


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of plain text, with the special tokens that the tokenizer adds (a BOS, if it has the habit).

    Raises:
        ValueError: when `text` is no string.
    """
    return encode_texts(tokenizer, [text])[0]


def encode_texts(tokenizer: Any, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
    """Token ids of several texts at once: tokenizers spreads a list over the machine's cores.

    Raises:
        ValueError: when one of them is no string.
    """
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"prompt={text!r} is a {type(text).__name__}: give text")
        check_text("prompt", text)
    if not texts:
        return []
    with no_panic:
        encoded = tokenizer(
            list(texts),
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
    token_ids: list[list[int]] = encoded["input_ids"]
    return token_ids


def encode_whole(
    tokenizer: Any,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    *,
    max_length: int | None = None,
    add_special_tokens: bool = True,
) -> list[tuple[list[int], list[int] | None]]:
    """Token ids of texts, or of pairs of texts, for a model that reads them whole.

    Args:
        pairs: The second text of each.
        max_length: Cut to so many tokens, special tokens included, the longer text of a pair first.

    Returns:
        Token ids, and for pairs which text each token is of.

    Raises:
        ValueError: when one of the texts is no string.
    """
    for text in (*texts, *(pairs or ())):
        if not isinstance(text, str):
            raise ValueError(f"prompt={text!r} is a {type(text).__name__}: give text")
        check_text("prompt", text)
    with no_panic:
        encoded = tokenizer(
            list(texts),
            None if pairs is None else list(pairs),
            add_special_tokens=add_special_tokens,
            truncation=max_length is not None,
            max_length=max_length,
            return_attention_mask=False,
            return_token_type_ids=pairs is not None,
            verbose=False,
        )
    types = encoded["token_type_ids"] if pairs is not None else [None] * len(texts)
    return list(zip(encoded["input_ids"], types, strict=True))


def cut_text(tokenizer: Any, text: str, max_tokens: int | None) -> str:
    """The start of a text that is so many tokens long, as it was written; None leaves it whole."""
    if max_tokens is None:
        return text
    is_fast = getattr(tokenizer, "is_fast", False)
    encoded = tokenizer(
        text,
        add_special_tokens=False,
        truncation=True,
        max_length=max_tokens,
        return_offsets_mapping=is_fast,
        verbose=False,
    )
    if is_fast:
        offsets = encoded["offset_mapping"]
        return text if len(offsets) < max_tokens else text[: offsets[-1][1]]
    # A tokenizer in Python does not say where its tokens end.
    ids = encoded["input_ids"]
    return text if len(ids) < max_tokens else str(tokenizer.decode(ids))


def encode_chat(
    tokenizer: Any,
    messages: Any,
    *,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    tools: Any = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool | None = None,
    chat_template_content_format: str = "auto",
    most_tokens: int | None = None,
) -> tuple[str, list[int]]:
    """Render a conversation to text and token ids; arguments as `render_chat`'s.

    Args:
        most_tokens: What the model takes; None leaves a text of any length to be tokenised.

    Returns:
        The prompt's text, and its token ids without added special tokens.
    """
    text = render_chat(
        tokenizer,
        messages,
        chat_template=chat_template,
        chat_template_kwargs=chat_template_kwargs,
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        chat_template_content_format=chat_template_content_format,
    )
    if most_tokens is not None:
        check_length(tokenizer, text, most_tokens, TOO_LONG)
    return text, encode_texts(tokenizer, [text], add_special_tokens=False)[0]


def render_chat(
    tokenizer: Any,
    messages: Any,
    *,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    tools: Any = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool | None = None,
    chat_template_content_format: str = "auto",
) -> str:
    """Apply the chat template.

    Args:
        messages: Dicts with `role` and `content`; lists may be NumPy arrays, as Arrow hands them over.
        chat_template: Instead of the tokenizer's own.
        chat_template_kwargs: Further variables of the template, such as `enable_thinking`.
        tools: Function schemas, for templates that know tools.
        add_generation_prompt: Open the assistant's turn; None: unless the last message is the assistant's.
        continue_final_message: Let the model go on in the last message; None: if it is the assistant's.
        chat_template_content_format: "openai" gives the template a message's content as a list of parts; "string", and
            "auto", as text.

    Raises:
        ValueError: naming what came in place of messages, or why the template could not be applied.
    """
    conversation = _plain_messages(messages, in_parts=chat_template_content_format == "openai")
    variables = dict(_plain(chat_template_kwargs or {}))
    tools = _plain(tools) if tools is not None else variables.pop("tools", None)
    if chat_template is None:
        chat_template = variables.pop("chat_template", None)
    check_chat_template(tokenizer, chat_template)
    opens = variables.pop("add_generation_prompt", add_generation_prompt)
    continues = variables.pop("continue_final_message", continue_final_message)
    opens, continues = _choose_ending(conversation, opens, continues)
    # A `LightTokenizer` has them of its own.
    limits = nullcontext() if isinstance(tokenizer, LightTokenizer) else limited_transformers()
    try:
        with limits, no_panic:
            text: str = tokenizer.apply_chat_template(
                conversation,
                tools=tools,
                chat_template=chat_template,
                add_generation_prompt=opens,
                continue_final_message=continues,
                tokenize=False,
                **variables,
            )
    except Exception as error:  # a template is a program: anything may come out of it
        raise ValueError(f"the chat template could not be applied: {type(error).__name__}: {error}") from error
    return text


def check_chat_template(
    tokenizer: Any, chat_template: str | None, chat_template_kwargs: Mapping[str, Any] | None = None
) -> None:
    """Check that there is a chat template, and that it parses.

    Raises:
        ValueError: when neither the caller nor the tokenizer has one, or it does not.
    """
    given = chat_template or (chat_template_kwargs or {}).get("chat_template")
    if isinstance(given, str) and "{" not in given and given.endswith(_TEMPLATE_SUFFIXES):
        raise ValueError(f"chat_template={given!r} is a file's name: give its text, as pathlib.Path(...).read_text()")
    if not given and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "chat_template=None, but the model's tokenizer has none of its own: give chat_template, "
            "or give `prompt` instead of `messages`"
        )
    template = given or tokenizer.chat_template
    if isinstance(template, dict):  # several, by name: the others are for tools, or asked for
        template = template.get("default", "")
    problem = syntax_error(template) if isinstance(template, str) else f"it is a {type(template).__name__}, not text"
    if problem is not None:
        name = "chat_template" if given else "the chat template of the model's tokenizer"
        raise ValueError(f"{name} does not parse ({problem}): mend it, or give another chat_template")


def _choose_ending(conversation: list[Any], opens: bool | None, continues: bool | None) -> tuple[bool, bool]:
    if opens and continues:
        raise ValueError(
            "continue_final_message=True is not valid with add_generation_prompt=True: the last message "
            "can be continued, or a new one begun"
        )
    if continues is None:
        continues = not opens and opens is None and conversation[-1]["role"] == "assistant"
    return (not continues if opens is None else opens), continues


def _plain_messages(messages: Any, *, in_parts: bool) -> list[dict[str, Any]]:
    conversation = _plain(messages)
    remedy = 'give a list such as [{"role": "user", "content": "Hello"}]'
    if not isinstance(conversation, list):
        raise ValueError(f"messages={_short(messages)} is a {type(messages).__name__}: {remedy}")
    if not conversation:
        raise ValueError(f"messages=[] is empty: {remedy}")
    for index, message in enumerate(conversation):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"messages[{index}]={_short(message)} is not a dict with a role: {remedy}")
        _check_content(index, message)
    return [_plain_message(index, message, in_parts=in_parts) for index, message in enumerate(conversation)]


def _check_content(index: int, message: dict[str, Any]) -> None:
    """Check that there is something for a template to write: most write nothing else, some nothing at all without."""
    content, remedy = message.get("content"), 'give text, as {"role": "user", "content": "Hello"}'
    if content is None and all(message.get(key) is None for key in _INSTEAD_OF_CONTENT):
        raise ValueError(f"messages[{index}]={_short(message)} has no content: {remedy}")
    # A tool's result may be an object, which templates write as JSON.
    taken = (str, list) if message["role"] in ("system", "user", "assistant") else (str, list, dict)
    if content is not None and not isinstance(content, taken):
        kind = type(content).__name__
        raise ValueError(f"messages[{index}]['content']={_short(content)} is of type {kind}: {remedy}")


def _plain_message(index: int, message: dict[str, Any], *, in_parts: bool) -> dict[str, Any]:
    # OpenAI's clients write null for what a message does not have; templates ask whether a key is there.
    message = {key: value for key, value in message.items() if value is not None}
    content = message.get("content")
    if isinstance(content, str | list):
        texts = [content] if isinstance(content, str) else _part_texts(index, content)
        message["content"] = [{"type": "text", "text": text} for text in texts] if in_parts else "\n".join(texts)
    if isinstance(message.get("tool_calls"), list):
        calls = [_with_read_arguments(index, _without_none(call)) for call in message.pop("tool_calls")]
        # Templates ask whether there are calls by whether the key is there, and write the content, if it is null too.
        message |= {"tool_calls": calls} if calls else {}
        message.setdefault("content", [] if in_parts else "")
    return message


def _with_read_arguments(index: int, call: Any) -> Any:
    """A call whose arguments are a dict: OpenAI's form has them as JSON's text, and templates write JSON themselves."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments", ""), str):
        return call
    try:
        arguments = json.loads(function.get("arguments") or "{}")
    except json.JSONDecodeError as error:
        given = _short(function["arguments"])
        remedy = "give a dict, or its text as JSON"
        raise ValueError(f"messages[{index}]['tool_calls'] has arguments={given} ({error}): {remedy}") from error
    return {**call, "function": {**function, "arguments": arguments}}


def _part_texts(index: int, parts: list[Any]) -> list[str]:
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            raise ValueError(f"messages[{index}]['content'] has a part that is no text: {_short(part)}; give text only")
        texts.append(text)
    return texts


def _without_none(value: Any) -> Any:
    # Arguments of a call are the user's own data: a null there may be meant.
    if not isinstance(value, dict):
        return value
    kept = {key: inner for key, inner in value.items() if inner is not None}
    return {key: inner if key == "arguments" else _without_none(inner) for key, inner in kept.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    # NumPy arrays and scalars, pyarrow scalars and arrays
    for method in ("tolist", "as_py"):
        if hasattr(value, method):
            return _plain(getattr(value, method)())
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
