"""How few tokens a text can have: never more than it has, and found without a tokenizer's work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pyarrow as pa
import pytest
from hypothesis import given, settings
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from raydata_llm import LLM, least_tokens
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.tokenizer import load_light_tokenizer, load_tokenizer
from tests.raydata_llm.processor_chain import prepared
from tests.raydata_llm.tiny_tokenizer import save_tokenizer

LONG = "hello world, " * 800_000
BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}
LETTERS = {letter: 300 + number for number, letter in enumerate("▁ abcdeé")}
SPACES = {"▁" * count: 400 + count for count in (2, 4, 8)}


def sentencepiece(normalizer: Any, **settings: Any) -> Any:
    vocab = {**BYTES, **LETTERS, **SPACES}
    merges = [("▁" * (count // 2), "▁" * (count // 2)) for count in (2, 4, 8)]
    model = models.BPE(vocab=vocab, merges=merges, **{"byte_fallback": True, "fuse_unk": True, **settings})
    return Tokenizer(model), normalizer, None


def byte_level(normalizer: Any, splitter: Any = None) -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: number for number, letter in enumerate(alphabet)} | {"Ġ" * 2: 300, "ab": 301}
    model = models.BPE(vocab=vocab, merges=[("Ġ", "Ġ"), ("a", "b")])
    return Tokenizer(model), normalizer, splitter or pre_tokenizers.ByteLevel(add_prefix_space=False)


def word_piece() -> Any:
    vocab = {word: number for number, word in enumerate(("[UNK]", "a", "##b", "hello", "1"))}
    model = models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=5)
    return Tokenizer(model), normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()


def unigram() -> Any:
    vocab = [("<unk>", 0.0), ("▁a", -1.0), ("b", -2.0), *((name, -9.0) for name in BYTES)]
    return Tokenizer(models.Unigram(vocab, 0, byte_fallback=False)), None, pre_tokenizers.Metaspace()


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "sentencepiece": lambda: sentencepiece(
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    ),
    "without bytes": lambda: sentencepiece(normalizers.Replace(" ", "▁"), byte_fallback=False),
    "spaces joined": lambda: sentencepiece(normalizers.Replace(Regex(" +"), "▁")),
    "letters removed": lambda: sentencepiece(normalizers.Replace("abc", "")),
    "stripped": lambda: sentencepiece(normalizers.Strip()),
    "accents removed": lambda: sentencepiece(normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])),
    "byte level": lambda: byte_level(None),
    "composed": lambda: byte_level(normalizers.NFC()),
    "decomposed": lambda: byte_level(normalizers.NFKD()),
    "spaces split away": lambda: byte_level(
        None, pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel()])
    ),
    "split removed": lambda: byte_level(
        None, pre_tokenizers.Sequence([pre_tokenizers.Split("a", "removed"), pre_tokenizers.ByteLevel()])
    ),
    "word pieces": word_piece,
    "unigram": unigram,
}  # fmt: skip
BOUNDED = {"sentencepiece", "stripped", "byte level", "composed", "decomposed", "spaces split away", "word pieces"}


def build(name: str, *added: AddedToken) -> PreTrainedTokenizerFast:
    tokenizer, normalizer, splitter = TOKENIZERS[name]()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if splitter is not None:
        tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteFallback()
    tokenizer.add_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(autouse=True)
def _no_text_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(least_tokens, "LONG_TEXT", 1)


pieces = st.sampled_from(
    ["a", "ab", " ", "   ", "e\u0301", "\u1112\u1161\u11ab", "1", "<m>", "\n", "\x00", "hello", "🦊", "é", "abc"]
)


@pytest.mark.parametrize("swallows", [False, True], ids=["", "a token that swallows spaces"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_text_has_fewer_tokens(name: str, swallows: bool) -> None:
    tokenizer = build(name, AddedToken("<m>", lstrip=swallows, rstrip=swallows))

    @settings(max_examples=60, deadline=None, database=None)
    @given(st.lists(pieces | st.text(max_size=3), max_size=40).map("".join))
    def check(text: str) -> None:
        text = text.encode("utf-8", "ignore").decode()
        found = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert least_tokens.least_tokens(tokenizer, text) <= found

    check()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_is_known_of_tokenizers(name: str) -> None:
    assert bool(least_tokens.least_tokens(build(name), "ab a1 " * 1000)) == (name in BOUNDED)


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> str:
    folder = tiny_model("llama")
    save_tokenizer(folder)
    return str(folder)


@pytest.fixture
def no_long_text_is_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where one is; the shortest of the tests' long ones would take seconds."""
    from raydata_llm.light_tokenizer import LightTokenizer

    for kind in (LightTokenizer, PreTrainedTokenizerFast):
        original = kind.__call__

        def call(self: Any, texts: Any, *args: Any, _original: Any = original, **kwargs: Any) -> Any:
            assert all(len(text) < 1_000_000 for text in texts)
            return _original(self, texts, *args, **kwargs)

        monkeypatch.setattr(kind, "__call__", call)


@pytest.mark.usefixtures("no_long_text_is_tokenised")
def test_a_prompt_that_is_far_too_long_is_refused_before_it_is_tokenised(model: str) -> None:
    llm = LLM(model, device="cpu", max_model_len=64)
    params = {"temperature": 0.0, "max_tokens": 2}
    chats = [[{"role": "user", "content": text}] for text in (LONG, "hello")]
    for results in (
        llm.generate([LONG, "hello"], params, use_tqdm=False),
        llm.chat(chats, params, use_tqdm=False),
        llm.beam_search([LONG, "hello"], {"beam_width": 2, "max_tokens": 2}),
    ):
        assert results[1].error is None
        error = results[0].error
        assert error is not None and "the model takes 63: shorten it, set truncate_prompt_tokens" in error


@pytest.mark.usefixtures("no_long_text_is_tokenised")
@pytest.mark.parametrize("max_model_len", [64, None], ids=["set", "the model's"])
def test_a_row_that_is_far_too_long_is_refused_before_it_is_tokenised(model: str, max_model_len: int | None) -> None:
    made = [{"prompt": LONG}, {"messages": [{"role": "user", "content": LONG}]}, {"prompt": "hello"}]
    rows = pa.table({"id": [0, 1, 2]})
    engine = EngineConfig(model=model, max_model_len=max_model_len)
    requests, _ = prepared(rows, model, preprocess=lambda row: made[row["id"]], keep_going=True, engine=engine)
    for one in requests[:2]:
        assert one.error is not None and f"the model takes {(max_model_len or 1024) - 1:,}" in one.error
    assert requests[2].error is None


def test_a_long_text_that_is_to_be_cut_is_tokenised(model: str) -> None:
    llm = LLM(model, device="cpu", max_model_len=64)
    result = llm.generate("hello world " * 100, {"truncate_prompt_tokens": 5, "max_tokens": 2}, use_tqdm=False)[0]
    assert result.error is None and len(result.prompt_token_ids) == 5


def test_both_tokenizers_of_a_model_are_bounded_alike(model: str) -> None:
    bounds = [least_tokens.least_tokens(load(model), "hello " * 900) for load in (load_tokenizer, load_light_tokenizer)]
    assert bounds[0] == bounds[1] > 400
