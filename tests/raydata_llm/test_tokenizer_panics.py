"""A tokenizer that panics (its pattern backtracks without end): the row's own error, and the others are answered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers

from raydata_llm import LLM
from raydata_llm.engine.bad_words import bad_word_tokens
from raydata_llm.engine.rust_panics import RustPanicError, no_panic
from raydata_llm.prepare import prepare
from raydata_llm.prepare_plan import PreparePlan
from raydata_llm.row_payload import REQUEST_COLUMN, unpack_column
from raydata_llm.tokenizer import encode_texts, encode_whole, load_light_tokenizer, load_tokenizer
from tests.raydata_llm.tiny_tokenizer import save_tokenizer

ENDLESS = "a" * 40 + "!"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYDATA_LLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that splits by a pattern of nested repeats."""
    made = save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    tokenizer = Tokenizer.from_file(str(made / "tokenizer.json"))
    split = pre_tokenizers.Split(Regex(r"(?:(a+)+)+$|b(?!c)"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.save(str(made / "tokenizer.json"))
    (made / "config.json").write_text("{}")
    return made


@pytest.mark.parametrize("load", [load_light_tokenizer, load_tokenizer], ids=["light", "transformers"])
def test_a_text_that_makes_a_tokenizer_panic_is_a_value_error(folder: Path, load: Callable[[str], Any]) -> None:
    tokenizer = load(str(folder))
    with pytest.raises(RustPanicError, match="panicked: Onig"):
        encode_texts(tokenizer, ["fine", ENDLESS])
    assert encode_texts(tokenizer, ["fine"])[0]


def test_all_ways_to_the_tokenizer_turn_a_panic_into_an_error(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    with pytest.raises(RustPanicError):
        encode_whole(tokenizer, [ENDLESS], max_length=4)
    with pytest.raises(RustPanicError):
        bad_word_tokens(tokenizer, [ENDLESS])


def test_interrupts_pass() -> None:
    with pytest.raises(KeyboardInterrupt), no_panic:
        raise KeyboardInterrupt


@pytest.mark.parametrize("column", ["prompt", "messages"])
def test_a_row_whose_text_panics_is_an_error_row_beside_good_ones(folder: Path, column: str) -> None:
    texts = ["fine", ENDLESS, "good"]
    rows = texts if column == "prompt" else [[{"role": "user", "content": text}] for text in texts]
    plan = PreparePlan(model_source=str(folder), keep_going=True)
    requests = unpack_column(prepare(pa.table({column: rows}), plan), REQUEST_COLUMN)
    assert [request.error is None for request in requests] == [True, False, True]
    assert "RustPanicError" in requests[1].error and "(tokenize)" in requests[1].error


class PanickingDecoder:
    """A tokenizer whose decoder panics once a token is there, as a real one does: by an exception of pyo3's module."""

    def __init__(self, inner: Any, token: int) -> None:
        self._inner, self._token = inner, token
        self._panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._inner(*args, **kwargs)

    def __len__(self) -> int:
        return len(self._inner)

    def decode(self, token_ids: Any, **kwargs: Any) -> str:
        if self._token in list(token_ids):
            raise self._panic("no such byte")
        return str(self._inner.decode(token_ids, **kwargs))


@pytest.mark.parametrize("stop", [[], ["never"]], ids=["at the end", "in the loop"])
def test_an_llm_answers_the_others(folder: Path, tiny_model: Callable[..., Path], stop: list[str]) -> None:
    tokenizer = PanickingDecoder(load_tokenizer(str(folder)), 7)
    bias = [{"logit_bias": {token: 100.0}, "max_tokens": 3, "stop": stop, "temperature": 0.0} for token in (7, 40)]
    with LLM(str(tiny_model("llama")), tokenizer=tokenizer, device="cpu", max_num_seqs=4) as llm:
        panicked, good = llm.generate(["fine", "good"], bias, use_tqdm=False)
        assert "no such byte" in str(panicked.error) and not panicked.outputs
        assert good.error is None and len(good.outputs[0].token_ids) == 3
        encoded, fine = llm.generate([ENDLESS, "good"], bias[1], use_tqdm=False)
        assert "RustPanicError" in str(encoded.error) and fine.error is None
