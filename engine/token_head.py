"""A classifier made of a language model's own head: what it would say next, of some tokens (LLMs as rerankers).

    from_2_way_softmax, tokens (no, yes):   logit  = (w[yes] - w[no]) . h      (its sigmoid is their softmax)
    no_post_processing:                     logits = w[tokens] . h

w is the head's weight [vocabulary, hidden], h the last token's state. Settings have vLLM's names:
`hf_overrides={"classifier_from_token": ["no", "yes"], "method": "from_2_way_softmax"}`, and for Qwen3's rerankers
`{"is_original_qwen3_reranker": True}` too. Knows no model; importing it must not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydata_llm.engine.config_fields import bad_field
from raydata_llm.engine.regular_file import read_json_object

if TYPE_CHECKING:
    import torch

_TWO_WAY, _PLAIN = "from_2_way_softmax", "no_post_processing"


@dataclass(frozen=True)
class TokenHead:
    """Which tokens, and what is made of them.

    Args:
        tokens: As the tokenizer's vocabulary writes them, or their ids.
        difference: There is one label: the second token against the first.
    """

    tokens: tuple[str | int, ...]
    difference: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> TokenHead | None:
        """What config.json or `hf_overrides` ask for, if they do.

        Raises:
            ValueError: naming the field, its value and the remedy.
        """
        is_qwen = bool(config.get("is_original_qwen3_reranker"))
        given, method = config.get("classifier_from_token"), config.get("method")
        if given is None and not is_qwen:
            return None
        tokens = ("no", "yes") if given is None else given
        if not isinstance(tokens, list | tuple) or not tokens or not all(map(_is_token, tokens)):
            raise bad_field("classifier_from_token", tokens, 'give a list of tokens, such as ["no", "yes"]')
        if method not in (None, _TWO_WAY, _PLAIN):
            raise bad_field("method", method, f"choose {_TWO_WAY} or {_PLAIN}")
        difference = is_qwen or method == _TWO_WAY or (method is None and len(tokens) == 2)
        if difference and len(tokens) != 2:
            raise bad_field("classifier_from_token", tokens, f"{_TWO_WAY} needs two tokens, such as no and yes")
        return cls(tuple(tokens), difference)

    @property
    def num_labels(self) -> int:
        """Labels of the classifier."""
        return 1 if self.difference else len(self.tokens)

    def token_ids(self, folder: Path) -> list[int]:
        """The tokens' ids.

        Args:
            folder: The model's.

        Raises:
            ValueError: for a token that its tokenizer.json does not have.
        """
        if all(isinstance(token, int) for token in self.tokens):
            return [int(token) for token in self.tokens]
        vocabulary = _vocabulary(folder)
        for token in self.tokens:
            if isinstance(token, str) and token not in vocabulary:
                problem = f"{token!r} is no token of the model's tokenizer.json; give its token's id"
                raise bad_field("classifier_from_token", list(self.tokens), problem)
        return [vocabulary[token] if isinstance(token, str) else token for token in self.tokens]

    def weight(self, head: torch.Tensor, token_ids: list[int]) -> torch.Tensor:
        """The classifier's weight, float32 [labels, hidden], of the language model's [vocabulary, hidden]."""
        if not all(0 <= token_id < len(head) for token_id in token_ids):
            raise bad_field("classifier_from_token", token_ids, f"token ids are from 0 to {len(head) - 1}")
        rows = head[token_ids].float()
        return rows[1:] - rows[:1] if self.difference else rows


def _is_token(token: object) -> bool:
    return isinstance(token, str | int) and not isinstance(token, bool)


def _vocabulary(folder: Path) -> dict[str, int]:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"classifier_from_token names tokens, but {folder} has no tokenizer.json: give token ids")
    content = read_json_object(path)
    try:
        known = content["model"]["vocab"]
        # A Unigram model lists its pieces with their scores.
        ids = known if isinstance(known, dict) else {piece: token_id for token_id, (piece, *_) in enumerate(known)}
        added = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} has no vocabulary that can be read: give token ids") from error
    return {**ids, **added}
