"""The first operator: from rows to requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raydata_llm.row_payload import RowError
from raydata_llm.tokenizer import encode_chat, encode_text, load_tokenizer
from tests.raydata_llm.processor_chain import prepared
from tests.raydata_llm.tiny_tokenizer import save_tokenizer

USER = [{"role": "user", "content": "hello world"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tokenizer(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def tokenizer(model: str) -> Any:
    return load_tokenizer(model)


def only(table: pa.Table, model: str, **plan: Any) -> tuple[list[int], str | None]:
    """The token ids and text of a one-row table's prompt."""
    [request], [carried] = prepared(table, model, **plan)
    assert request.error is None and request.prompt_token_ids is not None
    assert request.prompt_token_ids.dtype == np.int32
    return request.prompt_token_ids.tolist(), carried.prompt


def test_messages_go_through_the_chat_template(model: str, tokenizer: Any) -> None:
    text, token_ids = encode_chat(tokenizer, USER)
    assert only(pa.table({"id": [1]}), model, preprocess=lambda row: {"messages": USER}) == (token_ids, text)


def test_a_datasets_own_column_needs_no_preprocess(model: str, tokenizer: Any) -> None:
    assert only(pa.table({"messages": [USER]}), model)[0] == encode_chat(tokenizer, USER)[1]
    text = "plain text"
    assert only(pa.table({"prompt": [text]}), model) == (encode_text(tokenizer, text), text)
    assert only(pa.table({"tokenized_prompt": [[5, 6, 7]]}), model) == ([5, 6, 7], None)


def test_images_of_a_row_are_refused_not_left_out(model: str) -> None:
    rows = pa.table({"id": [0, 1]})
    made = [{"prompt": "hello", "multimodal_data": {"image": "x"}}, {"prompt": "hello", "multimodal_data": None}]
    [failed, good], _ = prepared(rows, model, preprocess=lambda row: made[row["id"]], keep_going=True)
    assert failed.error is not None and "multimodal_data is not supported, as models of text are run" in failed.error
    assert good.error is None


def test_rows_of_token_ids_need_no_tokenizer(tmp_path: Path) -> None:
    table = pa.table({"tokenized_prompt": [[5, 6, 7]], "prompt": ["five six seven"]})
    assert only(table, str(tmp_path), skip_tokenizer=True) == ([5, 6, 7], "five six seven")
    [request], _ = prepared(pa.table({"prompt": ["hello"]}), str(tmp_path), skip_tokenizer=True, keep_going=True)
    assert request.error is not None and "skip_tokenizer_init=True" in request.error


def test_the_template_and_its_variables_can_be_given(model: str, tokenizer: Any) -> None:
    table = pa.table({"messages": [USER]})
    assert (
        only(table, model, chat_template_kwargs={"mood": "glad"})[1]
        == encode_chat(tokenizer, USER, chat_template_kwargs={"mood": "glad"})[0]
    )
    assert only(table, model, chat_template="{{ messages[0].content | upper }}")[1] == "HELLO WORLD"


def test_a_rows_own_tools_reach_the_template(model: str) -> None:
    tools = [{"type": "function", "function": {"name": "look"}}]
    prompt = only(pa.table({"id": [1]}), model, preprocess=lambda row: {"messages": USER, "tools": tools})[1]
    assert prompt is not None and '"look"' in prompt


@pytest.mark.parametrize(
    ("stages", "taken"),
    [
        ({}, "messages"),
        ({"apply_chat_template": False}, "prompt"),
        ({"tokenize": False}, "tokenized_prompt"),
        ({"tokenize": False, "apply_chat_template": False}, "tokenized_prompt"),
    ],
    ids=str,
)
def test_the_stages_decide_which_of_several_prompts_is_taken(
    stages: dict[str, bool], taken: str, model: str, tokenizer: Any
) -> None:
    columns = {"messages": [USER], "prompt": ["a text"], "tokenized_prompt": [[9, 8]]}
    expected = {
        "messages": encode_chat(tokenizer, USER)[1],
        "prompt": encode_text(tokenizer, "a text"),
        "tokenized_prompt": [9, 8],
    }
    assert only(pa.table(columns), model, **stages)[0] == expected[taken]


def test_without_the_tokenize_stage_text_is_tokenised_all_the_same(model: str, tokenizer: Any) -> None:
    assert only(pa.table({"prompt": ["a"]}), model, tokenize=False)[0] == encode_text(tokenizer, "a")


def test_what_preprocess_makes_is_carried_exactly_and_the_row_stays_its_own(model: str) -> None:
    made = {"prompt": "x", "schema": {"a": [1, {"b": None}]}, "keys": {1: "one"}, "prize": 5}

    def preprocess(row: dict[str, Any]) -> dict[str, Any]:
        row["id"] = "changed"
        return made

    [request], [carried] = prepared(pa.table({"id": [1]}), model, preprocess=preprocess)
    assert carried.columns == made and type(carried.columns["prize"]) is int
    assert request.sampling_params is None


def test_sampling_params_are_taken_as_given(model: str) -> None:
    params = [{"top_k": 5, "stop": ["x"]}, {"seed": 3}, None]
    requests, _ = prepared(
        pa.table({"id": [0, 1, 2]}), model, preprocess=lambda row: {"prompt": "x", "sampling_params": params[row["id"]]}
    )
    assert [request.sampling_params for request in requests] == params


def test_a_row_is_told_apart_by_all_that_it_says(model: str) -> None:
    def digests(table: pa.Table) -> list[bytes]:
        return [request.digest for request in prepared(table, model)[0]]

    table = pa.table({"id": [1, 2, 1], "prompt": ["same"] * 3})
    first = digests(table)
    assert first[0] == first[2] != first[1]
    assert digests(table.slice(1, 1)) == [first[1]]


BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "missing column": ({"question": "why"}, "KeyError: 'q' (preprocess)"),
    "no dict": ({"q": "list"}, "TypeError: preprocess returned a list: return a dict of columns (preprocess)"),
    "no prompt": ({"q": "none"}, "the row has none of messages, prompt, tokenized_prompt, only kind, q, other"),
    "wrong type": ({"q": "number"}, "messages=3 is a int"),
    "prompt no text": ({"q": "number prompt"}, "TypeError: prompt=3 is a int: give text (chat template)"),
    "template": ({"q": "clown"}, "no clowns"),
    "token ids": ({"q": "floats"}, "tokenized_prompt=[1.5] is not valid: give a list of token ids"),
    "no token ids": ({"q": "empty"}, "tokenized_prompt=[] is not valid"),
    "large token ids": ({"q": "large"}, "is not valid: give a list of token ids (whole numbers from 0 on)"),
    "no unicode": ({"q": "surrogate"}, "(tokenize)"),
}


def make_bad(row: dict[str, Any]) -> Any:
    if row["kind"] == "good":
        return {"prompt": "good"}
    return {
        "list": [1],
        "none": {"other": 1},
        "number": {"messages": 3},
        "number prompt": {"prompt": 3},
        "clown": {"messages": [{"role": "clown", "content": "ha"}]},
        "floats": {"tokenized_prompt": [1.5]},
        "empty": {"tokenized_prompt": []},
        "large": {"tokenized_prompt": [2**31]},
        "surrogate": {"prompt": "\ud800"},
    }[BAD_ROWS[row["kind"]][0]["q"]]


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_an_error_of_its_own(kind: str, model: str) -> None:
    columns, message = BAD_ROWS[kind]
    table = pa.table({"kind": ["good", kind, "good"], "q": ["", columns.get("q"), ""]})
    requests, _ = prepared(table, model, preprocess=make_bad, keep_going=True)
    assert [request.error is None for request in requests] == [True, False, True]
    assert message in str(requests[1].error)


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_without_leave_to_go_on_it_stops_the_block_by_name(kind: str, model: str) -> None:
    columns, message = BAD_ROWS[kind]
    table = pa.table({"kind": ["good", kind], "q": ["", columns.get("q")]})
    with pytest.raises(RowError) as error:
        prepared(table, model, preprocess=make_bad)
    assert message in str(error.value) and f"'kind': {kind!r}" in str(error.value)


def test_a_tokenizer_that_is_not_there_stops_the_block_even_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokenizer"):
        prepared(pa.table({"prompt": ["x"]}), str(tmp_path), keep_going=True)


def test_a_column_named_like_ours_stops_the_block_even_so(model: str) -> None:
    with pytest.raises(ValueError, match="rename it"):
        prepared(pa.table({"prompt": ["x"], "__raydata_llm_request": [b""]}), model, keep_going=True)


def test_a_mistake_in_sampling_params_is_found_before_a_model_is_loaded(model: str) -> None:
    def ask(row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": "x", "sampling_params": row["given"]}

    given = [{"max_token": 3}, {"temperature": -1.0}, {"min_tokens": 5}, None]
    table = pa.table({"given": pa.array([pa.scalar(None)] * 4), "number": range(4)})
    requests, _ = prepared(table, model, preprocess=lambda row: ask({"given": given[row["number"]]}), keep_going=True)
    assert "max_token: did you mean max_tokens? (sampling_params)" in str(requests[0].error)
    assert "temperature=-1.0 is not valid" in str(requests[1].error)
    # The model's defaults may allow more tokens than a request without a model has.
    assert requests[2].error is None and requests[3].error is None
    with pytest.raises(RowError, match="did you mean max_tokens"):
        prepared(table, model, preprocess=lambda row: ask({"given": given[0]}))
