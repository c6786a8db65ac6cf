"""The tokenizer: loading it quickly and exactly, encoding text, and chat templates."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raydata_llm import tokenizer_cache
from raydata_llm.light_tokenizer import LightTokenizer
from raydata_llm.tokenizer import (
    encode_chat,
    encode_text,
    encode_texts,
    load_light_tokenizer,
    load_tokenizer,
    render_chat,
)
from tests.raydata_llm.tiny_tokenizer import CHAT_TEMPLATE, save_tokenizer

TEXTS = ["", "hello world", " the  quick\n\tfox", "naïve café 你好 🦊", "<|user|>a</s>b<s>", "\x00\x7f", "x" * 300]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("RAYDATA_LLM_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(str(save_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


def assert_equal_tokenizers(ours: Any, theirs: Any) -> None:
    for text in TEXTS:
        for special in (True, False):
            expected = theirs(text, add_special_tokens=special)["input_ids"]
            assert encode_texts(ours, [text], add_special_tokens=special) == [expected]
            assert ours.decode(expected, skip_special_tokens=special) == theirs.decode(
                expected, skip_special_tokens=special
            )
    assert ours.chat_template == theirs.chat_template
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.all_special_ids == theirs.all_special_ids
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()


@pytest.mark.parametrize(
    ("tokenizer_class", "model_type"),
    [
        ("PreTrainedTokenizerFast", "llama"),
        ("LlamaTokenizerFast", "llama"),
        ("Qwen2Tokenizer", "qwen2"),
        (None, "qwen3"),
        ("LlamaTokenizer", "mistral"),
        ("GPT2Tokenizer", "gpt2"),
    ],
)
def test_prepared_form_equals_auto_tokenizer(
    tokenizer_class: str | None, model_type: str, tmp_path: Path, cache: Path
) -> None:
    from transformers import AutoTokenizer

    folder = save_tokenizer(tmp_path / "m", tokenizer_class=tokenizer_class, add_bos_token=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    first = load_tokenizer(str(folder))
    prepared = [path for path in (cache / "tokenizers").glob("m-*") if path.is_dir()]
    again = tokenizer_cache.load_prepared(folder, tokenizer_cache.tokenizer_stamp(folder), trust_remote_code=False)
    assert again.name_or_path in map(str, prepared)
    reference = AutoTokenizer.from_pretrained(str(folder))
    assert_equal_tokenizers(first, reference)
    assert_equal_tokenizers(again, reference)
    assert_light_equals(folder, reference)


def assert_light_equals(source: Path, theirs: Any) -> None:
    """What a task does with a tokenizer comes out the same without transformers."""
    light = load_light_tokenizer(str(source))
    assert isinstance(light, LightTokenizer)
    for special in (True, False):
        expected = encode_texts(theirs, TEXTS, add_special_tokens=special)
        assert encode_texts(light, TEXTS, add_special_tokens=special) == expected
        for token_ids in expected:
            assert light.decode(token_ids, skip_special_tokens=special) == theirs.decode(token_ids, special)
    if theirs.chat_template is not None:
        for messages in CHATS:
            assert render_chat(light, messages) == render_chat(theirs, messages)


CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "What is 2 < 3 & 'so on'?\n"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "naïve 🦊"}],
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "z "}],
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "begun"}],
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning": "r"}],
    [{"role": "user", "content": "q", "name": None, "at": np.float32(0.5)}],
]


@pytest.mark.parametrize(
    "template",
    [
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ m }}{% endfor %}",
        "{% set ns = namespace(_n=0) %}{{ ns._n }}",
        "{{ dict(a=1) }}{{ dict.fromkeys(['b']) }}{{ dict.__class__ }}{{ messages.__class__.__mro__ }}",
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}",
        "{{ messages | tojson(indent=2, sort_keys=true) }}\n  {% if tools %}\n{{ tools[0] | tojson }}{% endif %}",
        "{{ strftime_now('%Y') }}{{ bos_token }}{{ pad_token }}{{ unk_token }}{{ documents }}{{ mood }}",
        "{% generation %}{{ messages[0].content }}{% endgeneration %}",
        "{{ messages[0].reasoning_content }}{{ messages[-1].thinking }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no') }}",
        "{{ messages[0].content.upper() | trim }}{{ messages[0].nothing.more }}",
        "{% broken",
    ],
)
def test_a_template_renders_without_transformers_as_with_it(template: str, tmp_path: Path) -> None:
    folder = str(save_tokenizer(tmp_path / "m", chat_template=template))
    theirs, light = load_tokenizer(folder), load_light_tokenizer(folder)
    assert isinstance(light, LightTokenizer)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"x": "<é>"}}}]
    for messages in CHATS:
        for more in ({}, {"tools": tools, "chat_template_kwargs": {"mood": "glad"}}, {"tools": ["f"]}):
            assert rendered(light, messages, more) == rendered(theirs, messages, more)


def rendered(tokenizer: Any, messages: Any, more: Any) -> str:
    try:
        return render_chat(tokenizer, messages, **more)
    except ValueError as error:
        told, kind, _ = str(error).partition("SecurityError")  # its words are our own
        return told + kind


@pytest.mark.parametrize("special", [True, False])
def test_a_tokenizer_that_splits_special_tokens_does_so_without_transformers(tmp_path: Path, special: bool) -> None:
    from transformers import AutoTokenizer

    folder = save_tokenizer(tmp_path / "m", split_special_tokens=special, clean_up_tokenization_spaces=True)
    load_tokenizer(str(folder))
    assert_light_equals(folder, AutoTokenizer.from_pretrained(str(folder)))


def test_a_tokenizer_that_cleans_its_text_is_left_to_transformers(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = save_tokenizer(tmp_path / "m", clean_up_tokenization_spaces=True)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, ".": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    load_tokenizer(str(folder))
    light = load_light_tokenizer(str(folder))
    assert not isinstance(light, LightTokenizer) and light.decode([1, 2]) == "a."


def test_a_prepared_tokenizer_loads_without_torch(tmp_path: Path, tokenizer: Any) -> None:
    folder = str(save_tokenizer(tmp_path / "m"))
    load_tokenizer(folder)
    script = (
        "import sys; from raydata_llm.tokenizer import load_light_tokenizer, load_tokenizer, encode_chat; "
        f"encode_chat(load_light_tokenizer({folder!r}), [{{'role': 'user', 'content': 'hi'}}]); "
        "assert 'transformers' not in sys.modules; "
        f"encode_chat(load_tokenizer({folder!r}), [{{'role': 'user', 'content': 'hi'}}]); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=dict(os.environ))


def test_changed_files_are_read_anew(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "m")
    assert load_tokenizer(str(folder)).chat_template == CHAT_TEMPLATE
    assert load_tokenizer(str(folder)) is load_tokenizer(str(folder))
    save_tokenizer(folder, chat_template="other {{ messages }}")
    assert load_tokenizer(str(folder)).chat_template == "other {{ messages }}"


def test_a_class_with_behaviour_of_its_own_is_not_prepared(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    class Shouting(TokenizersBackend):
        def decode(self, *args: Any, **kwargs: Any) -> str:
            return str(super().decode(*args, **kwargs)).upper()

    folder = save_tokenizer(tmp_path / "shouting")
    monkeypatch.setattr(tokenizer_cache, "_load_from_source", lambda source, **_: Shouting.from_pretrained(str(source)))
    for _ in range(2):
        loaded = tokenizer_cache.load_prepared(folder, tokenizer_cache.tokenizer_stamp(folder), trust_remote_code=False)
        assert loaded.decode(loaded("hello")["input_ids"], skip_special_tokens=True) == "HELLO"
    assert not [path for path in (cache / "tokenizers").glob("shouting-*") if path.is_dir()]


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tokenizer(tmp_path / "m")
    monkeypatch.setattr(tokenizer_cache, "_can_write", lambda folder: False)
    assert encode_text(load_tokenizer(str(folder)), "hello")[0] == 1


def test_a_folder_without_tokenizer_is_a_value_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"has no tokenizer that can be read: .*tokenizer="):
        load_tokenizer(str(tmp_path))


@pytest.mark.model
def test_gguf_tokenizer_equals_auto_tokenizer(demo_model: Path) -> None:
    from transformers import AutoTokenizer

    ours = load_tokenizer(str(demo_model))
    again = tokenizer_cache.load_prepared(
        demo_model, tokenizer_cache.tokenizer_stamp(demo_model), trust_remote_code=False
    )
    theirs: Any = AutoTokenizer.from_pretrained(str(demo_model.parent), gguf_file=demo_model.name)
    assert_equal_tokenizers(ours, theirs)
    assert_equal_tokenizers(again, theirs)
    assert_light_equals(demo_model, theirs)
    messages = [{"role": "user", "content": "hi"}]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert encode_chat(again, messages)[1] == expected["input_ids"]


def test_text_gets_the_special_tokens_and_templated_text_does_not(tokenizer: Any) -> None:
    assert encode_text(tokenizer, "hello").count(1) == 1
    text, token_ids = encode_chat(tokenizer, [{"role": "user", "content": "hello"}])
    assert text == "<s><|user|>hello</s><|assistant|>"
    assert token_ids.count(1) == 1
    assert tokenizer.decode(token_ids) == text


def test_text_that_is_no_text_is_named(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="prompt=7 is a int: give text"):
        encode_text(tokenizer, 7)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("last_role", "ending"),
    [
        ("user", "<|user|>x</s><|assistant|>"),
        ("tool", "<|tool|>x</s><|assistant|>"),
        ("system", "<|system|>x</s><|assistant|>"),
        ("assistant", "<|assistant|>x"),
    ],
)
def test_the_last_role_decides_whether_a_turn_is_opened_or_continued(
    tokenizer: Any, last_role: str, ending: str
) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": last_role, "content": "x"}]
    assert render_chat(tokenizer, messages) == f"<s><|user|>q</s>{ending}"


def test_the_ending_can_be_chosen(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}]
    opened = render_chat(tokenizer, messages, add_generation_prompt=True)
    assert opened == "<s><|user|>q</s><|assistant|>x</s><|assistant|>"
    closed = render_chat(tokenizer, messages, add_generation_prompt=False, continue_final_message=False)
    assert closed == "<s><|user|>q</s><|assistant|>x</s>"
    assert render_chat(tokenizer, messages[:1], chat_template_kwargs={"add_generation_prompt": False}).endswith("</s>")
    with pytest.raises(ValueError, match="continue_final_message=True is not valid with add_generation_prompt=True"):
        render_chat(tokenizer, messages, add_generation_prompt=True, continue_final_message=True)


def test_template_tools_and_variables_reach_the_template(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "q"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    text = render_chat(tokenizer, messages, tools=tools, chat_template_kwargs={"mood": "glad"})
    assert '"name": "f"' in text and "mood:glad" in text
    assert render_chat(tokenizer, messages, chat_template_kwargs={"tools": tools}).count('"name": "f"') == 1
    assert render_chat(tokenizer, messages, chat_template="{{ messages[0].content }}!") == "q!"
    assert render_chat(tokenizer, messages, chat_template_kwargs={"chat_template": "fixed"}) == "fixed"


def test_messages_from_arrow_and_numpy_are_taken(tokenizer: Any) -> None:
    plain = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "z"}]
    expected = render_chat(tokenizer, plain)
    assert render_chat(tokenizer, np.array(plain, dtype=object)) == expected
    assert render_chat(tokenizer, tuple(plain)) == expected
    rows = pa.array([plain, [{"role": "user", "content": "w", "tool_calls": [{"id": "1"}]}]])
    # Arrow gives the first row's messages the second's key, as None.
    first: Any = rows.to_pylist()[0]
    assert first[0]["tool_calls"] is None
    assert render_chat(tokenizer, first) == expected
    assert render_chat(tokenizer, rows[0]) == expected
    assert "calls:1" in render_chat(tokenizer, rows.to_pandas()[1])


def test_text_parts_are_joined_and_other_parts_refused(tokenizer: Any) -> None:
    parts = np.array([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}], dtype=object)
    assert "<|user|>one\ntwo</s>" in render_chat(tokenizer, [{"role": "user", "content": parts}])
    image = {"type": "image_url", "image_url": {"url": "http://x"}, "text": None}
    with pytest.raises(ValueError, match=r"messages\[0\]\['content'\] has a part that is no text.*image_url"):
        render_chat(tokenizer, [{"role": "user", "content": [image]}])


def test_null_arguments_of_a_tool_call_stay(tokenizer: Any) -> None:
    call = {"id": None, "function": {"name": "f", "arguments": {"x": None}}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    template = "{{ messages[0].tool_calls | tojson }}"
    text = render_chat(tokenizer, [message], chat_template=template, continue_final_message=False)
    assert json.loads(text) == [{"function": {"name": "f", "arguments": {"x": None}}}]


def test_arguments_of_a_tool_call_are_read_from_their_text(tokenizer: Any) -> None:
    template = "{% for m in messages %}{{ (m.tool_calls | tojson) if 'tool_calls' in m else 'none' }};{% endfor %}"
    calls = [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"city": "K\u00f6ln"}'}},
        {"id": "2", "type": "function", "function": {"name": "f", "arguments": {"city": "Köln"}}},
        {"id": "3", "type": "function", "function": {"name": "f", "arguments": ""}},
    ]
    messages = [{"role": "assistant", "tool_calls": calls}, {"role": "assistant", "content": "a", "tool_calls": []}]
    text = render_chat(tokenizer, messages, chat_template=template, continue_final_message=False)
    read, empty, _ = text.split(";")
    assert [call["function"]["arguments"] for call in json.loads(read)] == [{"city": "Köln"}, {"city": "Köln"}, {}]
    assert empty == "none"
    null = [{"role": "assistant", "content": None, "tool_calls": calls}]
    written = render_chat(
        tokenizer, null, chat_template="[{{ messages[0].content + 'x' }}]", continue_final_message=False
    )
    assert written == "[x]"
    assert calls[0]["function"] == {"name": "f", "arguments": '{"city": "K\u00f6ln"}'}, "the caller's own is left alone"
    bad = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{city"}}]}]
    with pytest.raises(ValueError, match=r"messages\[0\]\['tool_calls'\] has arguments='{city'.*give a dict"):
        render_chat(tokenizer, bad, chat_template=template)


def test_content_comes_in_parts_where_that_is_asked_for(tokenizer: Any) -> None:
    template = "{% for m in messages %}{{ m.content | tojson if m.content else '' }};{% endfor %}"
    parts = [{"type": "text", "text": "one"}, "two"]
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": parts}]
    text = render_chat(tokenizer, messages, chat_template=template, chat_template_content_format="openai")
    assert text == (
        '[{"type": "text", "text": "s"}];[{"type": "text", "text": "one"}, {"type": "text", "text": "two"}];'
    )
    assert render_chat(tokenizer, messages, chat_template=template) == '"s";"one\\ntwo";'


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ("hello", r"messages='hello' is a str"),
        (None, r"messages=None is a NoneType"),
        ({"role": "user", "content": "q"}, r"messages=.* is a dict"),
        ([], r"messages=\[\] is empty"),
        (["hello"], r"messages\[0\]='hello' is not a dict with a role"),
        ([{"role": "user", "content": "q"}, {"content": "q"}], r"messages\[1\]=.* is not a dict with a role"),
        ([{"role": 3, "content": "q"}], r"messages\[0\]=.* is not a dict with a role"),
        ([{"role": "clown", "content": "q"}], "the chat template could not be applied: TemplateError: no clowns"),
        ([{"role": "user", "content": 5}], r"messages\[0\]\['content'\]=5 is of type int: give text"),
    ],
)
def test_bad_messages_are_one_value_error(tokenizer: Any, messages: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        render_chat(tokenizer, messages)


def test_a_tokenizer_without_template_says_what_to_do(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(save_tokenizer(tmp_path / "m", chat_template=None)))
    messages = [{"role": "user", "content": "q"}]
    with pytest.raises(ValueError, match=r"chat_template=None.*give chat_template"):
        encode_chat(tokenizer, messages)
    assert encode_chat(tokenizer, messages, chat_template="{{ messages[0].content }}")[0] == "q"


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({"role": "user"}, "messages[1]={'role': 'user'} has no content: give text"),
        ({"role": "user", "text": "hi"}, "messages[1]={'role': 'user', 'text': 'hi'} has no content"),
        ({"role": "assistant", "content": None}, "has no content"),
        ({"role": "user", "content": {"type": "text", "text": "hi"}}, "is of type dict: give text"),
    ],
)
def test_a_message_that_says_nothing_is_named(tokenizer: Any, message: Any, complaint: str) -> None:
    first = {"role": "system", "content": "s"}
    with pytest.raises(ValueError, match=re.escape(complaint)):
        render_chat(tokenizer, [first, message])


def test_a_message_may_say_something_else_than_text(tokenizer: Any) -> None:
    template = "{% for m in messages %}{{ m.content | tojson if m.content else '' }};{% endfor %}"
    calls = [{"id": "1", "function": {"name": "f", "arguments": {}}}]
    messages = [
        {"role": "assistant", "reasoning_content": "hm"},
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "content": {"degrees": 5}},
    ]
    assert render_chat(tokenizer, messages, chat_template=template) == ';;{"degrees": 5};'


def test_a_file_in_place_of_a_template_is_named_and_not_rendered(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"chat_template='/x/chat.jinja' is a file's name: give its text"):
        render_chat(tokenizer, [{"role": "user", "content": "q"}], chat_template="/x/chat.jinja")
