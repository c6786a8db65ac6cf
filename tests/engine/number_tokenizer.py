"""A tokenizer for models that have none: a text is its token ids, with spaces between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class NumberTokenizer:
    """See the module's docstring."""

    def decode(self, token_ids: Any, /, *, skip_special_tokens: bool = False) -> str:
        """Text of the token ids."""
        return " ".join(map(str, token_ids))

    def encode(self, text: str, /, *, add_special_tokens: bool) -> Sequence[int]:
        """Token ids of the text."""
        return [int(word) for word in text.split()]
