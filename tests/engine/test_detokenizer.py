"""Texts of outputs, their cut and stop strings, on the hard cases of each kind of tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from tokenizers import Tokenizer

from raydata_llm.engine.detokenizer import StopStringWatch, TokenDecoder, output_text
from raydata_llm.engine.sampling_params import SamplingParams
from tests.raydata_llm.tiny_tokenizer import save_tokenizer
from tests.raydata_llm.word_tokenizers import llama_tokenizer, metaspace_tokenizer, wordpiece_tokenizer

EOS = 256


class ByteTokenizer:
    """Token v is byte v; 256 is a special token. Incomplete characters decode to U+FFFD, as in real tokenizers."""

    def decode(self, token_ids: Sequence[int], /, *, skip_special_tokens: bool = False) -> str:
        parts, run = [], bytearray()
        for token in token_ids:
            if token < 256:
                run.append(token)
            else:
                parts += [run.decode(errors="replace"), "" if skip_special_tokens else "</s>"]
                run = bytearray()
        return "".join([*parts, run.decode(errors="replace")])


def write(text: str, params: SamplingParams) -> tuple[str, str | None, int]:
    """Feed a text byte by byte; returns (final text, stop string, tokens written)."""
    tokenizer, tokens = ByteTokenizer(), list(text.encode())
    watch = StopStringWatch(tokenizer, params, ())
    for count in range(1, len(tokens) + 1):
        stop = watch.advance(tokens[:count])
        if stop is not None:
            return output_text(tokenizer, (), tokens[:count], params, stop, "stop"), stop, count
    return output_text(tokenizer, (), tokens, params, None, "length"), None, len(tokens)


@pytest.mark.parametrize(
    ("text", "stop", "expected", "reason"),
    [
        ("hello world", "lo w", "hel", "lo w"),
        ("hello world", ["wor", "o w"], "hell", "o w"),
        ("aaab", "ab", "aa", "ab"),
        ("naïve café!", "é", "naïve caf", "é"),
        ("日本語のテスト", "語の", "日本", "語の"),
        ("tea 🍵 please", "🍵", "tea ", "🍵"),
        ("no end here", "END", "no end here", None),
        ("stop", "stop", "", "stop"),
    ],
)
def test_text_is_cut_where_the_stop_string_begins(
    text: str, stop: str | list[str], expected: str, reason: str | None
) -> None:
    assert write(text, SamplingParams(stop=stop))[:2] == (expected, reason)


def test_stop_string_is_kept_when_asked() -> None:
    params = SamplingParams(stop="\n\n", include_stop_str_in_output=True)
    assert write("a\n\nb", params)[0] == "a\n\n"


def test_a_stop_string_before_min_tokens_does_not_count_later() -> None:
    params = SamplingParams(stop="x", min_tokens=4)
    assert write("x-y-z", params) == ("x-y-z", None, 5)
    assert write("x-y-x-", params) == ("x-y-", "x", 5)


@pytest.mark.parametrize("stop", ["ab", ["ab", "wxyz"]])
def test_a_stop_string_may_begin_before_min_tokens(stop: str | list[str]) -> None:
    params = SamplingParams(stop=stop, min_tokens=4)
    assert write("ab.ab.", params) == ("ab.", "ab", 5)
    assert write(".ab.ab", params) == (".ab.", "ab", 6)
    assert write("..ab..", params) == ("..ab..", None, 6)


def test_tokens_without_text_are_not_decoded_again_and_again() -> None:
    class CountingTokenizer(ByteTokenizer):
        num_decoded = 0

        def decode(self, token_ids: Sequence[int], /, *, skip_special_tokens: bool = False) -> str:
            self.num_decoded += len(token_ids)
            return super().decode(token_ids, skip_special_tokens=skip_special_tokens)

    tokenizer, params = CountingTokenizer(), SamplingParams(stop="ab")
    tokens = [*b"a", *[EOS] * 1000, *b"b"]
    watch = StopStringWatch(tokenizer, params, ())
    stops = [watch.advance(tokens[:count]) for count in range(1, len(tokens) + 1)]
    assert stops == [None] * 1001 + ["ab"]
    assert tokenizer.num_decoded < 4 * len(tokens)
    assert output_text(tokenizer, (), tokens, params, "ab", "stop") == ""


@pytest.mark.parametrize(("keeps", "expected"), [(False, "so "), (True, "so END")])
def test_a_stop_string_in_a_token_with_a_part_of_a_character(keeps: bool, expected: str) -> None:
    class PieceTokenizer:
        def decode(self, token_ids: Sequence[int], /, *, skip_special_tokens: bool = False) -> str:
            pieces = [b"so END\xc3", b"\xa9 on"]
            return b"".join(pieces[token_id] for token_id in token_ids).decode(errors="replace")

    params = SamplingParams(stop="END", include_stop_str_in_output=keeps)
    watch = StopStringWatch(PieceTokenizer(), params, ())
    assert [watch.advance([0]), watch.advance([0, 1])] == [None, "END"]
    assert output_text(PieceTokenizer(), (), [0, 1], params, "END", "stop") == expected


@settings(deadline=None)
@given(text=st.text("ab🍵é ", min_size=1, max_size=20), stop=st.text("ab🍵é ", min_size=1, max_size=4))
def test_the_first_occurrence_ends_the_row(text: str, stop: str) -> None:
    final, reason, count = write(text, SamplingParams(stop=stop))
    start = text.find(stop)
    if start < 0:
        assert (final, reason) == (text, None)
    else:
        assert (final, reason) == (text[:start], stop)
        assert count == len(text[: start + len(stop)].encode()), "it ends with the token that completes the string"


@pytest.mark.parametrize(
    ("include", "skip_special", "expected"),
    [(False, True, "hi"), (True, True, "hi"), (False, False, "hi"), (True, False, "hi</s>")],
)
def test_the_end_token_is_no_text_unless_asked(include: bool, skip_special: bool, expected: str) -> None:
    params = SamplingParams(include_stop_str_in_output=include, skip_special_tokens=skip_special)
    assert output_text(ByteTokenizer(), (), [*b"hi", EOS], params, None, "stop") == expected


def test_an_ordinary_stop_token_is_no_text_either() -> None:
    params = SamplingParams(stop_token_ids=(ord("!"),))
    assert output_text(ByteTokenizer(), (), list(b"hi!"), params, ord("!"), "stop") == "hi"


class Named:
    """A tokenizer of the `tokenizers` library with transformers' names."""

    def __init__(self, backend: Tokenizer) -> None:
        self.backend = backend
        self.num_decoded = 0

    def decode(self, token_ids: Sequence[int], /, *, skip_special_tokens: bool = False) -> str:
        self.num_decoded += len(token_ids)
        return str(self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def convert_ids_to_tokens(self, token_ids: Sequence[int]) -> list[str | None]:
        return [self.backend.id_to_token(token_id) for token_id in token_ids]

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        return dict(self.backend.get_added_tokens_decoder())

    def ids(self, *pieces: str) -> list[int]:
        found = [self.backend.token_to_id(piece) for piece in pieces]
        assert None not in found, pieces
        return [one for one in found if one is not None]

    def byte_ids(self, written: bytes) -> list[int]:
        return self.ids(*(f"<0x{byte:02X}>" for byte in written))


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Named:
    folder: Path = save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return Named(Tokenizer.from_file(str(folder / "tokenizer.json")))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "llama": llama_tokenizer,
    "metaspace first": lambda: metaspace_tokenizer("first"),
    "metaspace always": lambda: metaspace_tokenizer("always"),
    "metaspace never": lambda: metaspace_tokenizer("never"),
    "wordpiece": wordpiece_tokenizer,
}


def generate(
    tokenizer: Named, prompt: Sequence[int], output: Sequence[int], params: SamplingParams
) -> tuple[str, str | None, int]:
    """Feed an output token by token; returns (final text, stop string, tokens written)."""
    if params.stop:
        watch = StopStringWatch(tokenizer, params, prompt)
        for count in range(1, len(output) + 1):
            stop = watch.advance(np.array(output[:count], dtype=np.int32))
            if stop is not None:
                return output_text(tokenizer, prompt, output[:count], params, stop, "stop"), stop, count
    return output_text(tokenizer, prompt, output, params, None, "length"), None, len(output)


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_keeps_the_space_before_its_first_word(kind: str) -> None:
    tokenizer = Named(KINDS[kind]())
    prompt = tokenizer.backend.encode("the").ids
    output = tokenizer.ids("hello", "hello") if kind == "wordpiece" else tokenizer.ids("▁hello", "▁hello")
    assert generate(tokenizer, prompt, output, SamplingParams()) == (" hello hello", None, 2)
    assert generate(tokenizer, prompt, output, SamplingParams(stop=" hello")) == ("", " hello", 1)
    assert generate(tokenizer, prompt, output, SamplingParams(stop="hello h")) == (" ", "hello h", 2)
    kept = SamplingParams(stop=" hello", include_stop_str_in_output=True)
    assert generate(tokenizer, prompt, output, kept) == (" hello", " hello", 1)


def test_a_word_that_goes_on_gets_no_space() -> None:
    llama, bert = Named(llama_tokenizer()), Named(wordpiece_tokenizer())
    assert generate(llama, llama.ids("<s>", "▁the"), llama.ids("hello"), SamplingParams())[0] == "hello"
    assert generate(bert, bert.ids("hello"), bert.ids("##ing", "."), SamplingParams())[0] == "ing."


def test_a_text_without_words_before_it_begins_as_the_tokenizer_begins_texts() -> None:
    tokenizer = Named(llama_tokenizer())
    output = tokenizer.ids("▁hello", "▁world")
    for prompt in ([], tokenizer.ids("<s>"), tokenizer.ids(*["<s>"] * 50)):
        assert generate(tokenizer, prompt, output, SamplingParams())[0] == "hello world"


def test_the_word_before_many_special_tokens_counts() -> None:
    tokenizer = Named(llama_tokenizer())
    prompt = tokenizer.ids("▁the", *["<|user|>"] * 40)
    assert generate(tokenizer, prompt, tokenizer.ids("▁hello"), SamplingParams())[0] == " hello"
    assert generate(tokenizer, prompt, tokenizer.ids("▁hello"), SamplingParams(stop=" hello"))[2] == 1
    shown = SamplingParams(skip_special_tokens=False)
    assert generate(tokenizer, prompt, tokenizer.ids("</s>", "▁hello"), shown)[0] == "</s> hello"


@pytest.mark.parametrize("text", ["日本語", "naïve ☃🍵", "é"])
def test_an_output_cut_within_a_character_ends_before_it(text: str, byte_level: Named) -> None:
    llama, params = Named(llama_tokenizer()), SamplingParams()
    bytes_, written = text.encode(), llama.ids("▁the")
    alphabet = {byte: byte_level.ids(name)[0] for name, byte in _byte_names().items()}
    for cut in range(len(bytes_) + 1):
        complete = bytes_[:cut].decode(errors="ignore")
        assert generate(llama, written, llama.byte_ids(bytes_[:cut]), params)[0] == complete
        assert generate(byte_level, [], [alphabet[byte] for byte in bytes_[:cut]], params)[0] == complete
        ended = output_text(llama, written, [*llama.byte_ids(bytes_[:cut]), 2], params, None, "stop")
        assert ended == complete
        assert TokenDecoder(llama, params).decode_complete(llama.byte_ids(bytes_[:cut])) == complete


def _byte_names() -> dict[str, int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {name: byte for byte, name in bytes_to_unicode().items()}


def test_a_special_token_that_is_left_out_does_not_hide_an_incomplete_character() -> None:
    tokenizer = Named(llama_tokenizer())
    output = [*tokenizer.ids("▁hello"), *tokenizer.byte_ids(b"\xe6\x97\xa5\xe6"), *tokenizer.ids("<|user|>")]
    assert generate(tokenizer, tokenizer.ids("▁the"), output, SamplingParams())[0] == " hello日"


def test_a_replacement_character_that_the_model_wrote_stays(byte_level: Named) -> None:
    llama, params = Named(llama_tokenizer()), SamplingParams()
    alphabet = {byte: byte_level.ids(name)[0] for name, byte in _byte_names().items()}
    before = llama.ids("▁the")
    for written, expected in [(b"\xef\xbf\xbd", "�"), (b"a\xff", "a�"), (b"\xffa", "�a"), (b"\xe6a", "�a")]:
        text = generate(byte_level, [], [alphabet[byte] for byte in written], params)[0]
        assert text == expected
    assert generate(llama, before, llama.byte_ids(b"\xef\xbf\xbd"), params)[0] == "�"
    assert generate(llama, before, llama.ids("�"), params)[0] == "�"
    assert generate(llama, before, llama.ids("▁hello", "�"), SamplingParams(stop="o�"))[:2] == (" hell", "o�")
    assert generate(llama, before, [*llama.byte_ids(b"\xff"), *llama.ids("▁hello")], params)[0] == "� hello"


def test_a_character_that_the_prompt_begins_is_the_outputs_once_it_is_complete(byte_level: Named) -> None:
    alphabet = {byte: byte_level.ids(name)[0] for name, byte in _byte_names().items()}
    llama, (first, *rest) = Named(llama_tokenizer()), "日".encode()
    for params in (SamplingParams(), SamplingParams(stop="日x")):
        assert generate(byte_level, [alphabet[first]], [alphabet[byte] for byte in rest], params)[0] == "日"
        assert generate(llama, llama.byte_ids(bytes([first])), llama.byte_ids(bytes(rest)), params)[0] == "日"
    assert generate(byte_level, [alphabet[first]], [alphabet[rest[0]]], SamplingParams())[0] == ""
    stopped = generate(llama, llama.byte_ids(bytes([first])), llama.byte_ids(bytes(rest)), SamplingParams(stop="日"))
    assert stopped == ("", "日", 2)


def test_a_prompt_of_many_bytes_is_not_read_from_within_a_character() -> None:
    """Llama-2 decodes a run of bytes as a whole or not at all."""
    tokenizer = Named(llama_tokenizer())
    for length in range(1, 12):
        prompt = tokenizer.byte_ids(("語" * length).encode())
        assert generate(tokenizer, prompt, tokenizer.byte_ids("日本".encode()), SamplingParams())[0] == "日本"


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_byte_level_texts_are_what_they_were(data: st.DataObject, byte_level: Named) -> None:
    pieces = st.lists(st.integers(5, byte_level.backend.get_vocab_size() - 1), max_size=20)
    prompt, output = data.draw(pieces), data.draw(pieces)
    alone = byte_level.decode(output, skip_special_tokens=True)
    whole = byte_level.decode(prompt + output, skip_special_tokens=True)
    if byte_level.decode(prompt).endswith("�") or whole.endswith("�"):
        return
    assert generate(byte_level, prompt, output, SamplingParams())[0] == alone


@settings(deadline=None, max_examples=200)
@given(data=st.data(), kind=st.sampled_from(["llama", "metaspace first"]))
def test_prompt_and_output_together_are_the_text_of_all_tokens(data: st.DataObject, kind: str) -> None:
    tokenizer = Named(KINDS[kind]())
    names = ["▁hello", "▁", "▁the", "hello", "<s>", "a", "▁", "é"]
    tokens = st.lists(st.sampled_from([*((name,) for name in names), ("日",), ("🍵",)]), max_size=15)

    def ids(drawn: list[tuple[str]]) -> list[int]:
        return [
            one
            for (name,) in drawn
            for one in (tokenizer.ids(name) if name in names else tokenizer.byte_ids(name.encode()))
        ]

    prompt, output = ids(data.draw(tokens)), ids(data.draw(tokens))
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    text = generate(tokenizer, prompt, output, SamplingParams())[0]
    assert before + text == tokenizer.decode(prompt + output, skip_special_tokens=True)
    stop = data.draw(st.text("helo 日🍵", min_size=1, max_size=3))
    cut, reason, _ = generate(tokenizer, prompt, output, SamplingParams(stop=stop))
    assert (cut, reason) == ((text.split(stop)[0], stop) if stop in text else (text, None))


def test_spaces_between_special_tokens_are_left_out_where_asked() -> None:
    tokenizer = Named(wordpiece_tokenizer())
    prompt, output = tokenizer.ids("the"), tokenizer.ids("[CLS]", "[SEP]", "[SEP]", "hello", "[SEP]")
    shown = SamplingParams(skip_special_tokens=False)
    joined = SamplingParams(skip_special_tokens=False, spaces_between_special_tokens=False)
    hidden = SamplingParams(spaces_between_special_tokens=False)
    assert generate(tokenizer, prompt, output, shown)[0] == " [CLS] [SEP] [SEP] hello [SEP]"
    assert generate(tokenizer, prompt, output, joined)[0] == " [CLS][SEP][SEP] hello [SEP]"
    assert generate(tokenizer, prompt, output, hidden)[0] == " hello"
    joined.stop = ["][S"]
    assert generate(tokenizer, prompt, output, joined) == (" [CLS", "][S", 2)


def test_bytes_that_are_no_text_are_not_decoded_again_and_again() -> None:
    tokenizer = Named(llama_tokenizer())
    output = [*tokenizer.byte_ids(b"\xe6" * 2000), *tokenizer.ids("▁end")]
    params = SamplingParams(stop=" end")
    watch = StopStringWatch(tokenizer, params, tokenizer.ids("▁the"))
    before = tokenizer.num_decoded
    stops = [watch.advance(output[:count]) for count in range(1, len(output) + 1)]
    assert stops[-1] == " end" and set(stops[:-1]) == {None}
    assert tokenizer.num_decoded - before < 100 * len(output)


def test_a_long_prompts_end_alone_is_decoded() -> None:
    tokenizer = Named(llama_tokenizer())
    prompt = tokenizer.ids(*["▁hello"] * 10_000)
    assert generate(tokenizer, prompt, tokenizer.ids("▁world"), SamplingParams())[0] == " world"
    assert tokenizer.num_decoded < 100
