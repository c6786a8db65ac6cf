"""Texts of results are what their tokens add to the prompt's text, in `LLM` and in a processor's rows."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from safetensors.torch import load_file

from raydata_llm import LLM, BeamSearchParams, SamplingParams, StructuredOutputsParams
from raydata_llm.tokenizer import load_light_tokenizer
from tests.raydata_llm.processor_chain import answered
from tests.raydata_llm.word_tokenizers import VOCABULARY, save_llama_tokenizer

SETTINGS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_model_len": 64, "max_num_seqs": 8}
HELLO, THE = VOCABULARY.index("▁hello"), VOCABULARY.index("▁the")


@pytest.fixture(scope="module")
def model_folder(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(tiny_model("llama"), folder)
    return save_llama_tokenizer(folder)


@pytest.fixture(scope="module")
def llm(model_folder: Path) -> Iterator[LLM]:
    with LLM(str(model_folder), enable_prompt_embeds=True, **SETTINGS) as made:
        yield made


def hello(**params: Any) -> SamplingParams:
    """An output of ▁hello alone."""
    return SamplingParams(allowed_token_ids=[HELLO], ignore_eos=True, **params)


def test_an_output_keeps_the_space_before_it(llm: LLM) -> None:
    [result] = llm.generate("the", hello(max_tokens=2, n=2), use_tqdm=False)
    assert [output.text for output in result.outputs] == [" hello hello"] * 2
    for stop, text, count in ((" hello", "", 1), ("hello h", " ", 2), ("x", " hello hello", 2)):
        [result] = llm.generate("the", hello(max_tokens=2, stop=[stop]), use_tqdm=False)
        assert (result.outputs[0].text, len(result.outputs[0].token_ids)) == (text, count)


def test_token_ids_text_and_queued_prompts_are_alike(llm: LLM) -> None:
    prompts: list[Any] = ["the", {"prompt_token_ids": [1, THE]}, [THE]]
    results = llm.generate(prompts, hello(max_tokens=1), use_tqdm=False)
    llm.enqueue(prompts, hello(max_tokens=1))
    results += llm.wait_for_completion()
    assert [result.outputs[0].text for result in results] == [" hello"] * 6
    [alone] = llm.generate([[1]], hello(max_tokens=1), use_tqdm=False)
    assert alone.outputs[0].text == "hello"


def test_embeddings_are_no_text_to_go_on_from(llm: LLM, model_folder: Path) -> None:
    table = load_file(model_folder / "model.safetensors")["model.embed_tokens.weight"]
    asked = {"prompt_embeds": table[[1, THE]]}
    shown = hello(max_tokens=2, skip_special_tokens=False)
    [result] = llm.generate([asked], shown, use_tqdm=False)
    assert result.outputs[0].text == "hello hello"
    [result] = llm.generate([asked], hello(max_tokens=2, skip_special_tokens=False, stop=" hello"), use_tqdm=False)
    assert (result.outputs[0].text, result.outputs[0].stop_reason) == ("hello", " hello")


def test_an_output_cut_within_a_character_ends_before_it(llm: LLM) -> None:
    form = StructuredOutputsParams(regex="日")
    for max_tokens, text in ((1, ""), (2, ""), (3, "日"), (9, "日")):
        [result] = llm.generate("the", SamplingParams(max_tokens=max_tokens, structured_outputs=form), use_tqdm=False)
        assert result.outputs[0].text == text
        beams = BeamSearchParams(beam_width=1, max_tokens=max_tokens, structured_outputs=form)
        [found] = llm.beam_search([[1, THE]], beams)
        assert found.sequences[0].text == f"<s> the{text}"


def test_a_form_begins_without_a_space_or_with_the_one_asked_for(llm: LLM) -> None:
    for choice in ("hello", " hello"):
        form = StructuredOutputsParams(choice=[choice])
        [result] = llm.generate("the", SamplingParams(max_tokens=9, structured_outputs=form), use_tqdm=False)
        assert result.outputs[0].text == choice


def test_rows_texts_are_those_of_llm(model_folder: Path) -> None:
    """The engine of this chain answers with the prompt's tokens, backwards."""

    def ask(row: dict[str, Any]) -> dict[str, Any]:
        return {"tokenized_prompt": row["ids"], "sampling_params": {"max_tokens": 2, "n": 2}}

    character = [VOCABULARY.index(f"<0x{byte:02X}>") for byte in "日".encode()]
    rows = [[1, THE, HELLO, HELLO], [THE, *character[1:], character[0]], [character[2], HELLO, THE]]
    table = answered(pa.table({"ids": rows}), str(model_folder), ask)
    assert table.column("generated_text").to_pylist() == [" hello hello", "", " the hello"]
    [first, *_] = table.column("outputs").to_pylist()
    assert [choice["text"] for choice in first] == [" hello hello"] * 2


def test_the_light_tokenizer_names_tokens_as_transformers_does(model_folder: Path, llm: LLM) -> None:
    light, whole = load_light_tokenizer(str(model_folder)), llm.get_tokenizer()
    assert type(light).__name__ == "LightTokenizer"
    token_ids = [0, 1, 2, HELLO, VOCABULARY.index("<0xE6>")]
    assert light.convert_ids_to_tokens(token_ids) == whole.convert_ids_to_tokens(token_ids)
    assert set(light.added_tokens_decoder) == set(whole.added_tokens_decoder)
