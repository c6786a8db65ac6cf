"""What may end an output beside its tokens: stop strings, and repetition.

Owns which watches a request has. Knows no scheduling.
"""

from __future__ import annotations

from typing import Protocol

from raydata_llm.engine.detokenizer import OutputTokens, PromptTokens, StopStringWatch, Tokenizer
from raydata_llm.engine.repetition import RepetitionWatch
from raydata_llm.engine.sampling_params import SamplingParams


class OutputWatch(Protocol):
    """Follows one output."""

    def advance(self, token_ids: OutputTokens) -> str | None:
        """Look at the output so far (it only grows) and return the stop reason, if there is one."""
        ...


class _Watches:
    def __init__(self, watches: list[OutputWatch]) -> None:
        self._watches = watches

    def advance(self, token_ids: OutputTokens) -> str | None:
        reasons = [watch.advance(token_ids) for watch in self._watches]
        return next((reason for reason in reasons if reason is not None), None)


def watch_of(
    params: SamplingParams, tokenizer: Tokenizer | None, prompt_token_ids: PromptTokens, most_tokens: int
) -> OutputWatch | None:
    """The watch over an output of the request; None if its tokens alone end it.

    Args:
        prompt_token_ids: Empty for a prompt of embeddings.
        most_tokens: That the output may have.
    """
    watches: list[OutputWatch] = []
    if params.stop and tokenizer is not None:
        watches.append(StopStringWatch(tokenizer, params, prompt_token_ids))
    if params.repetition_detection is not None:
        watches.append(RepetitionWatch(params.repetition_detection, params.min_tokens, most_tokens))
    return _Watches(watches) if len(watches) > 1 else watches[0] if watches else None
