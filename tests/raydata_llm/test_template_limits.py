"""Chat templates that loop, grow or do not parse: each is its row's error, soon and in little memory."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from raydata_llm import LLM, EngineProcessorConfig, build_llm_processor, template_limits
from raydata_llm.chat_template import render
from raydata_llm.engine.pooling_params import PoolingParams
from raydata_llm.pooling_prompts import PairForm, PooledPrompt
from raydata_llm.prepare import prepare
from raydata_llm.prepare_plan import PreparePlan
from raydata_llm.row_payload import REQUEST_COLUMN, unpack_column
from raydata_llm.template_limits import TemplateLimitError
from raydata_llm.tokenizer import load_light_tokenizer, load_tokenizer, render_chat
from tests.raydata_llm.tiny_tokenizer import CHAT_TEMPLATE, save_tokenizer

CHAT = [{"role": "user", "content": "hello"}]
GROW = "{% set ns = namespace(x=START, y=START) %}{% for i in range(60) %}STEP{% endfor %}END"


def grown(start: str, step: str, end: str = "{{ ns.x|length }}") -> str:
    return GROW.replace("START", start).replace("STEP", step).replace("END", end)


TWICE = "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}"
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}"
ENDLESS = {
    "loops": LOOP + "{% endfor %}{% endfor %}",
    "loops that write": "{% for i in range(99999) %}{% for j in range(99999) %}"
    + "a" * 99
    + "{% endfor %}{% endfor %}",
    "loops into a variable": "{% set x %}" + LOOP + "abc{% endfor %}{% endfor %}{% endset %}{{ x }}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "a macro without end": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "a block without end": "{% block a %}{{ self.a() }}{% endblock %}",
    "a recursive loop": "{% for i in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "times": "{{ 'a' * 10**10 }}",
    "a list, times": "{{ [1] * 10**10 }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "products": grown("2", "{% set ns.x = ns.x * ns.x %}", "{{ ns.x > 1 }}"),
    "joined": grown("'ab'", "{% set ns.x = ns.x ~ ns.x %}"),
    "added": grown("'ab'", "{% set ns.x = ns.x + ns.x %}"),
    "added lists": grown("[1]", "{% set ns.x = ns.x + ns.x %}"),
    "nested lists": grown("[1]", TWICE, "{{ ns.x }}"),
    "nested lists, joined": grown("[1]", TWICE, "{{ 'a' ~ ns.x }}"),
    "nested lists as json": grown("[1]", TWICE, "{{ ns.x|tojson }}"),
    "nested lists as text": grown("[1]", TWICE, "{{ ns.x|string|length }}"),
    "nested lists, compared": grown("[1]", TWICE, "{{ ns.x == ns.y }}"),
    "nested lists, tested": grown("[1]", TWICE, "{{ ns.x is eq(ns.y) }}"),
    "nested lists, formatted": grown("[1]", TWICE, "{{ '%s' % (ns.x,) }}"),
    "nested tuples, hashed": grown("(1,)", "{% set ns.x = (ns.x, ns.x) %}", "{{ {ns.x: 1} }}{{ {}[ns.x] }}"),
    "json's indent": "{{ messages|tojson(indent=10**9) }}",
    "json's indent as text": "{{ messages|tojson(indent=' ' * 10**7) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format's own width": "{{ '{:{w}}'.format(1, w=10**9) }}",
    "format by percent": "{{ '%1000000000d' % 1 }}",
    "format by percent, its own width": "{{ '%*d' % (10**9, 1) }}",
    "many fields": "{{ ('{0}' * 10**6).format('a' * 10**6) }}",
    "the format filter": "{{ '%1000000000d'|format(1) }}",
    **{name: f"{{{{ 'a'.{name}(10**9) }}}}" for name in ("center", "ljust", "rjust", "zfill")},
    "tabs": "{{ ('\\t' * 10**5).expandtabs(10**5) }}",
    "the center filter": "{{ 'a'|center(10**9) }}",
    "a mapped filter": "{{ ['a']|map('center', 10**9)|list }}",
    "replace": "{{ ('a' * 10**6).replace('a', 'b' * 10**6) }}",
    "the replace filter": "{{ ('a' * 10**6)|replace('a', 'b' * 10**6) }}",
    "join": "{{ ('b' * 10**6).join('a' * 10**6) }}",
    "the join filter": "{{ ('a' * 10**6)|join('b' * 10**6) }}",
    "indent": "{{ ('\\n' * 10**6)|indent(10**6) }}",
    "batches": "{{ [1]|batch(10**9, 'a')|list }}",
    "lorem ipsum": "{{ lipsum(n=10**9) }}",
    "long ranges": "{{ range(10**9)|list }}",
    "an error's text": "{{ raise_exception('a' * 10**9) }}",
    "a text split often": "{% for i in range(99999) %}{{ ('a ' * 10**6).split()|length }}{% endfor %}",
    "bytes": "{{ (10).to_bytes(10**10, 'big') }}",
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYDATA_LLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def short_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "MOST_SECONDS", 0.3)


@pytest.mark.usefixtures("short_time")
@pytest.mark.parametrize("load", [load_light_tokenizer, load_tokenizer], ids=["light", "transformers"])
@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS)
def test_what_would_not_end_is_an_error_soon(folder: Path, template: str, load: Callable[[str], Any]) -> None:
    tokenizer = load(str(folder))
    began = time.thread_time()
    with pytest.raises(ValueError, match=r"the chat template could not be applied: [A-Z]") as told:
        render_chat(tokenizer, CHAT, chat_template=template)
    assert time.thread_time() - began < 5 and len(str(told.value)) < 300
    assert render_chat(tokenizer, CHAT) == "<|user|>hello</s><|assistant|>".join(["<s>", ""])


@pytest.mark.usefixtures("short_time")
@pytest.mark.parametrize("load", [load_light_tokenizer, load_tokenizer], ids=["light", "transformers"])
def test_a_thread_that_loops_is_stopped_and_others_render_meanwhile(folder: Path, load: Callable[[str], Any]) -> None:
    tokenizer, errors = load(str(folder)), []

    def run() -> None:
        with pytest.raises(ValueError) as told:
            render_chat(tokenizer, CHAT, chat_template=ENDLESS["loops"])
        errors.append(str(told.value))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert "hello" in render_chat(tokenizer, CHAT)
    for thread in threads:
        thread.join()
    assert len(errors) == 2 and all("ran for more than" in error for error in errors)


@pytest.mark.usefixtures("short_time")
def test_a_template_that_a_continued_message_or_a_pair_needs_is_bounded_too(folder: Path) -> None:
    tokenizer = load_light_tokenizer(str(folder))
    with pytest.raises(ValueError, match="ran for more than"):
        render_chat(
            tokenizer, [*CHAT, {"role": "assistant", "content": "so"}], chat_template="{# content #}" + ENDLESS["loops"]
        )
    pair = PooledPrompt(0, ("a", "b"), None, text="a", pair="b", pooling=PoolingParams(task="score"))
    with pytest.raises(ValueError, match="ran for more than"):
        PairForm(chat_template=ENDLESS["loops"]).apply(pair, load_tokenizer(str(folder)))


@pytest.mark.usefixtures("short_time")
def test_a_row_whose_template_does_not_end_is_an_error_row_beside_good_ones(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    template = "{% if messages[0].content == 'loop' %}" + ENDLESS["loops"] + "{% endif %}" + CHAT_TEMPLATE
    plan = PreparePlan(model_source=str(folder), chat_template=template, keep_going=True)
    rows = [[{"role": "user", "content": text}] for text in ("hello", "loop", "world")]
    requests = unpack_column(prepare(pa.table({"messages": rows}), plan), REQUEST_COLUMN)
    assert [request.error is None for request in requests] == [True, False, True]
    assert "ran for more than 0.3 seconds" in requests[1].error and "(chat template)" in requests[1].error


def test_transformers_own_rendering_is_left_as_it_is_for_others(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    render_chat(tokenizer, CHAT)
    text = tokenizer.apply_chat_template(CHAT, chat_template="{{ 'a'.center(2 * 10**6) }}", tokenize=False)
    assert len(text) == 2 * 10**6


HONEST = (
    CHAT_TEMPLATE,
    "{% for m in messages[::-1] %}{{ loop.length }}{{ loop.last }}{{ loop.revindex }}{{ m.role ~ ':' ~ m.content }}"
    "{% endfor %}",
    "{% set ns = namespace(s='', l=[]) %}{% for m in messages %}{% set ns.s = ns.s + m.content %}"
    "{% set ns.l = ns.l + [m] %}{% if loop.index0 % 2 == 0 %}{% continue %}{% endif %}{% endfor %}"
    "{{ ns.s }}{{ ns.l|length }}{{ ns.l }}",
    "{% macro say(m, deep=1) %}{{ '%s|%d' % (m.role, deep) }}{{ caller() }}{% endmacro %}"
    "{% for m in messages %}{% call say(m) %}x{{ m.content|trim|upper }}{% endcall %}{% endfor %}",
    "{{ messages|tojson(indent=4) }}{{ messages|selectattr('role', 'equalto', 'user')|list|length }}"
    "{{ messages|map(attribute='content')|join(', ') }}{{ messages[0].content.replace('e', 'EE').split('E') }}",
    "{{ '{:>8}|{}'.format('a', 1234567890) }}{{ 1234567890|tojson }}{{ 'x' * 3 }}{{ 2 ** 10 }}{{ 7 // 2 }}"
    "{{ nothing }}{{ nothing is defined }}"
    "{{ {'a': [1, (2, 3)]} }}{{ dict(a=1)|items|list }}{{ none }}{{ true ~ 1.5 ~ none ~ nothing }}",
    "{% block a %}{{ messages[0]['content'][1:3] }}{% endblock %}{% set x %}so {{ 1 + 1 }}{% endset %}{{ x }}"
    "{{ x|length }}"
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }}{% else %}none{% endfor %}{{ 'a' in 'abc' and 1 in [1, 2] }}",
)


@pytest.mark.parametrize("template", HONEST, ids=range(len(HONEST)))
@pytest.mark.parametrize(
    "chat", [CHAT, [{"role": "user", "content": "héllo\n"}, {"role": "assistant", "content": "é"}] * 9]
)
def test_what_ends_is_rendered_as_without_bounds(template: str, chat: list[dict[str, str]]) -> None:
    from transformers.utils.chat_template_utils import _cached_compile_jinja_template

    variables: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
    theirs = _cached_compile_jinja_template(template).render(
        messages=chat, tools=None, documents=None, add_generation_prompt=True, **variables
    )
    assert theirs == render(
        template, chat, tools=None, add_generation_prompt=True, special_tokens=variables, variables={}
    )


def test_long_conversations_and_texts_are_within_the_bounds() -> None:
    template = HONEST[2].replace("{{ ns.l }}", "")
    chat = [{"role": "user", "content": "word " * 20}] * 500
    assert len(render(template, chat, tools=None, add_generation_prompt=True, special_tokens={}, variables={})) > 25_000
    chat = [{"role": "user", "content": "word " * 800_000}]
    plain = "{% for m in messages %}{{ m.role + ': ' + m.content|trim + '\n' }}{% endfor %}"
    assert len(render(plain, chat, tools=None, add_generation_prompt=True, special_tokens={}, variables={})) > 3_999_990


BROKEN = "{% for m in messages %}\n{{ m.content }"


def test_a_template_that_does_not_parse_is_refused_when_the_processor_is_built(tiny_model: Callable[..., Path]) -> None:
    model = str(tiny_model("llama"))
    for fields in ({"chat_template": BROKEN}, {"chat_template_stage": {"chat_template": BROKEN}}):
        with pytest.raises(ValueError, match=r"chat_template does not parse \(line 2: .*mend it"):
            build_llm_processor(EngineProcessorConfig(model_source=model, **fields))
    kwargs = {"chat_template_kwargs": {"chat_template": BROKEN}}
    with pytest.raises(ValueError, match="does not parse"):
        build_llm_processor(EngineProcessorConfig(model_source=model), builder_kwargs=kwargs)
    good = EngineProcessorConfig(model_source=model, chat_template="{% generation %}{{ 1 }}{% endgeneration %}")
    build_llm_processor(good)


def test_a_template_of_the_models_own_that_does_not_parse_is_named_so(tmp_path: Path) -> None:
    tokenizer = load_light_tokenizer(str(save_tokenizer(tmp_path / "broken", chat_template=BROKEN)))
    with pytest.raises(ValueError, match=r"template of the model's tokenizer does not parse .line 2"):
        render_chat(tokenizer, CHAT)


@pytest.mark.parametrize(
    ("own", "words"),
    [([{"name": "default", "template": BROKEN}], "line 2"), (3, "it is a int, not text")],
    ids=["named", "number"],
)
def test_a_template_of_the_models_own_is_looked_at_in_each_of_its_forms(tmp_path: Path, own: Any, words: str) -> None:
    tokenizer = load_tokenizer(str(save_tokenizer(tmp_path / "broken", chat_template=own)))
    with pytest.raises(ValueError, match=f"template of the model's tokenizer does not parse .{words}"):
        render_chat(tokenizer, CHAT)


def test_a_broken_template_for_tools_does_not_disturb_the_one_for_chats(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "{{ 1 }}"}, {"name": "tool_use", "template": BROKEN}]
    assert render_chat(load_tokenizer(str(save_tokenizer(tmp_path / "two", chat_template=named))), CHAT) == "1"


@pytest.mark.usefixtures("short_time")
def test_an_llm_answers_the_others_and_refuses_a_template_that_does_not_parse(
    folder: Path, tiny_model: Callable[..., Path]
) -> None:
    with LLM(str(tiny_model("llama")), tokenizer=str(folder), device="cpu", max_num_seqs=4) as llm:
        template = "{% if messages[0].content == 'loop' %}" + ENDLESS["loops"] + "{% endif %}" + CHAT_TEMPLATE
        chats = [[{"role": "user", "content": text}] for text in ("hello", "loop")]
        good, bad = llm.chat(chats, {"max_tokens": 2}, use_tqdm=False, chat_template=template)
        assert good.error is None and bad.error is not None and "ran for more than" in bad.error
        with pytest.raises(ValueError, match="does not parse"):
            llm.chat(chats, {"max_tokens": 2}, use_tqdm=False, chat_template=BROKEN)


def test_the_clock_is_begun_anew_for_each_template(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "MOST_TEXT", 100)
    once = "{{ 'a' * 40 }}"
    for _ in range(5):
        assert render(once, CHAT, tools=None, add_generation_prompt=True, special_tokens={}, variables={}) == "a" * 40
    with pytest.raises(TemplateLimitError):
        render(once * 2, CHAT, tools=None, add_generation_prompt=True, special_tokens={}, variables={})
    assert json.dumps(CHAT)


def test_a_long_sum_counts_its_text_once() -> None:
    text = "a" * (template_limits.MOST_TEXT // 4)
    template = "{{ '<' + messages[0]['role'] + ':' + messages[0]['content'] + eos_token + '>' }}"
    written = render(
        template,
        [{"role": "user", "content": text}],
        tools=None,
        add_generation_prompt=True,
        special_tokens={"eos_token": "</s>"},
        variables={},
    )
    assert written == f"<user:{text}</s>>"
