"""Thinking: an output's budget of it, and its end, from which on the output follows its form.

Owns how the markers of thinking are found, in prompt and output. Thinking may begin in the prompt (templates open it);
only tokens of the output count. An output that has spent its budget is made to write the end. Knows no device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raydata_llm.engine.bits import keep_only
from raydata_llm.engine.detokenizer import TextEncoder
from raydata_llm.engine.rust_panics import no_panic

_DEFAULT = ("<think>", "</think>")
# By the names of vLLM's parsers: what models think between.
_MARKERS = {
    **dict.fromkeys(("deepseek_r1", "deepseek_v3", "holo2", "nemotron_v3", "qwen3"), _DEFAULT),
    "mistral": ("[THINK]", "[/THINK]"),
    "seed_oss": ("<seed:think>", "</seed:think>"),
}


@dataclass(frozen=True)
class Markers:
    """Tokens that open and close thinking, at least one each."""

    start: list[int]
    end: list[int]

    @classmethod
    def of(cls, tokenizer: TextEncoder, reasoning_config: Mapping[str, str], parser: str = "") -> Markers:
        """From the engine's `reasoning_config`; what it leaves out is the parser's, or `<think>` and `</think>`.

        Raises:
            ValueError: for a parser that is not known, or texts without tokens.
        """
        parser = parser or reasoning_config.get("reasoning_parser", "")
        given = tuple(reasoning_config.get(f"reasoning_{name}_str") for name in ("start", "end"))
        if parser and parser not in _MARKERS and None in given:
            raise ValueError(
                f"reasoning_parser={parser!r} is not known: give one of {', '.join(sorted(_MARKERS))}, or "
                'reasoning_config={"reasoning_start_str": ..., "reasoning_end_str": ...}'
            )
        texts = [one or other for one, other in zip(given, _MARKERS.get(parser, _DEFAULT), strict=True)]
        with no_panic:
            start, end = (list(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
        if not start or not end:
            raise ValueError(f"reasoning_config={dict(reasoning_config)!r} is not valid: its texts have no tokens")
        return cls(start, end)


class ThinkingGuide:
    """Follows the thinking of one output.

    Args:
        budget: Tokens of thinking, from 0 on; the closing marker is not counted.
        prompt: The prompt's tokens.
    """

    def __init__(self, markers: Markers, budget: int, prompt: npt.NDArray[np.int32]) -> None:
        self._markers = markers
        self._budget = budget
        self._num_thought = 0
        # Tokens of the closing marker that are written already, once it is forced.
        self._num_forced = 0
        self._tail: list[int] = prompt[-max(len(markers.start), len(markers.end)) :].tolist()
        # Of the last markers alone: a prompt of 8,000 tokens followed one by one takes 2.7 ms.
        self._thinks = _last(prompt, markers.start) > _last(prompt, markers.end)

    def advance(self, token_id: int) -> None:
        """Take in a drawn token."""
        if self._thinks and self._num_thought >= self._budget:
            self._num_forced += 1
        self._follow(token_id)

    def forbid(self, words: npt.NDArray[np.int32]) -> None:
        """Allow nothing but the closing marker once the budget is spent."""
        if self._thinks and self._num_thought >= self._budget:
            keep_only(words, self._markers.end[self._num_forced])

    def _follow(self, token_id: int) -> None:
        start, end = self._markers.start, self._markers.end
        self._num_thought += self._thinks
        self._tail = [*self._tail, token_id][-max(len(start), len(end)) :]
        if self._thinks and (self._tail[-len(end) :] == end or self._num_forced == len(end)):
            self._thinks, self._num_forced = False, 0
        elif not self._thinks and self._tail[-len(start) :] == start:
            self._thinks, self._num_thought = True, 0


class ThinkingEnd:
    """Waits for the end of one output's thinking.

    Args:
        prompt: The prompt's tokens; thinking that ended there is not waited for.
    """

    def __init__(self, markers: Markers, prompt: npt.NDArray[np.int32]) -> None:
        self._end = markers.end
        self._tail: list[int] = []
        self.is_over = _last(prompt, markers.end) > _last(prompt, markers.start)

    def advance(self, token_id: int) -> None:
        """Take in a drawn token."""
        self._tail = [*self._tail, token_id][-len(self._end) :]
        self.is_over = self.is_over or self._tail == self._end


def _last(tokens: npt.NDArray[np.int32], marker: list[int]) -> int:
    """Where the marker ends the last time; -1 if it does not."""
    for end in np.flatnonzero(tokens == marker[-1])[::-1].tolist():
        if tokens[max(0, end + 1 - len(marker)) : end + 1].tolist() == marker:
            return int(end)
    return -1
