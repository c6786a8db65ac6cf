"""Which token sequences a bad word is."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from raydata_llm.engine.bad_words import bad_word_tokens


class _BytesTokenizer:
    def encode(self, text: str, /, *, add_special_tokens: bool) -> Sequence[int]:
        assert not add_special_tokens
        return list(text.encode())

    def decode(self, token_ids: Sequence[int], /, *, skip_special_tokens: bool) -> str:
        return bytes(token_ids).decode()


@pytest.mark.parametrize(
    ("word", "texts"),
    [("no", ["no", " no"]), (" no", ["no", " no"]), ("no ", ["no ", " no "]), ("\n\n", ["\n\n"]), (" ", [" "])],
)
def test_a_word_is_banned_at_a_texts_start_and_after_a_space(word: str, texts: list[str]) -> None:
    assert bad_word_tokens(_BytesTokenizer(), [word]) == [tuple(text.encode()) for text in texts]


def test_a_word_without_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match="bad_words='' is not valid"):
        bad_word_tokens(_BytesTokenizer(), [""])
