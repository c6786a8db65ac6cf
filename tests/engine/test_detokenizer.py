"""Stop strings and the cut of the text, on a byte-level tokenizer's hard cases."""

from __future__ import annotations

from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from raydata_llm.engine.detokenizer import StopStringWatch, output_text
from raydata_llm.engine.sampling_params import SamplingParams

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
    watch = StopStringWatch(tokenizer, params)
    for count in range(1, len(tokens) + 1):
        stop = watch.advance(tokens[:count])
        if stop is not None:
            return output_text(tokenizer, tokens[:count], params, stop, "stop"), stop, count
    return output_text(tokenizer, tokens, params, None, "length"), None, len(tokens)


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
    watch = StopStringWatch(tokenizer, params)
    stops = [watch.advance(tokens[:count]) for count in range(1, len(tokens) + 1)]
    assert stops == [None] * 1001 + ["ab"]
    assert tokenizer.num_decoded < 4 * len(tokens)
    assert output_text(tokenizer, tokens, params, "ab", "stop") == ""


@pytest.mark.parametrize(("keeps", "expected"), [(False, "so "), (True, "so END")])
def test_a_stop_string_in_a_token_with_a_part_of_a_character(keeps: bool, expected: str) -> None:
    class PieceTokenizer:
        def decode(self, token_ids: Sequence[int], /, *, skip_special_tokens: bool = False) -> str:
            pieces = [b"so END\xc3", b"\xa9 on"]
            return b"".join(pieces[token_id] for token_id in token_ids).decode(errors="replace")

    params = SamplingParams(stop="END", include_stop_str_in_output=keeps)
    watch = StopStringWatch(PieceTokenizer(), params)
    assert [watch.advance([0]), watch.advance([0, 1])] == [None, "END"]
    assert output_text(PieceTokenizer(), [0, 1], params, "END", "stop") == expected


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
    assert output_text(ByteTokenizer(), [*b"hi", EOS], params, None, "stop") == expected


def test_an_ordinary_stop_token_is_no_text_either() -> None:
    params = SamplingParams(stop_token_ids=(ord("!"),))
    assert output_text(ByteTokenizer(), list(b"hi!"), params, ord("!"), "stop") == "hi"
