"""The method of `LLM` that searches with beams: `beam_search`, as vLLM's.

Owns its arguments, and the texts of its results. What happens in a call is `beam_call.py`'s.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from raydata_llm.beam_call import BeamCall
from raydata_llm.engine.beam_params import BeamSearchOutput, BeamSearchParams, BeamSearchSequence
from raydata_llm.engine.detokenizer import TokenDecoder
from raydata_llm.engine.request import Logprob, LoRARequest
from raydata_llm.engine.sampling_params import SamplingParams
from raydata_llm.generation import Encode
from raydata_llm.llm_texts import Texts
from raydata_llm.progress import Progress
from raydata_llm.prompts import Prompt

if TYPE_CHECKING:
    from raydata_llm.engine.engine import Engine


class BeamMethods(ABC):
    """What `LLM` has for beam search."""

    _tokenizer: Any
    _request_ids: Iterator[int]
    _texts: Texts
    _raises: bool

    @abstractmethod
    def _ask_prompts(
        self,
        prompts: Any,
        sampling_params: Any,
        lora_request: Any,
        tokenization_kwargs: Any = None,
        priority: Any = None,
    ) -> tuple[list[Prompt], Encode]:
        """Prompts as `LLM.generate` takes them."""

    @abstractmethod
    def _engine_that_searches(self) -> Engine:
        """The engine, with nothing under way in it; an error says why it cannot search."""

    def beam_search(
        self,
        prompts: Any,
        params: BeamSearchParams | Mapping[str, Any],
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        use_tqdm: bool | Callable[..., Any] = False,
        concurrency_limit: int | None = None,
        priority: int | Sequence[int] | None = None,
    ) -> list[BeamSearchOutput]:
        """Find the `beam_width` likeliest outputs of each prompt.

        All prompts' beams run in the engine's batches together; no setting is needed for that.

        Args:
            prompts: As in `generate`.
            params: For all: `BeamSearchParams`, or a dict of its fields.
            lora_request: As in `generate`.
            use_tqdm: As in `generate`.
            concurrency_limit: Prompts that are searched at the same time at most; None is as many as fit.
            priority: As in `generate`.

        Returns:
            Results in the order of the prompts, each with its sequences, the best first. Their `tokens` and `text`
            hold the prompt too; `text` shows special tokens, but the end token only with
            `include_stop_str_in_output`. A prompt that cannot be run has `error` set and no sequences; so have those
            that were not done when Ctrl-C interrupted the call.

        Raises:
            ValueError: for arguments that are wrong for all prompts, pooling models, or `data_parallel_size` above 1.
        """
        engine = self._engine_that_searches()
        asked = BeamSearchParams.from_value(params)
        engine.check_beam_params(asked)
        _check_limit(concurrency_limit)
        listed, encode = self._ask_prompts(prompts, None, lora_request, None, priority)

        def finish(output: BeamSearchOutput, prompt: Prompt) -> None:
            for sequence in output.sequences:
                self._fill_sequence(sequence, asked)

        call = BeamCall(engine, asked, concurrency_limit, self._request_ids, finish, raises=self._raises)
        with Progress(len(listed), use_tqdm, "Beam search") as progress:
            return call.run(listed, encode, progress)

    def _fill_sequence(self, sequence: BeamSearchSequence, params: BeamSearchParams) -> None:
        if self._tokenizer is None:
            return
        is_cut = sequence.finish_reason == "stop" and not params.include_stop_str_in_output
        # As vLLM's: special tokens of the prompt are shown.
        decoder = TokenDecoder(self._tokenizer, SamplingParams(skip_special_tokens=False))
        sequence.text = decoder.decode_complete(sequence.tokens[:-1] if is_cut else sequence.tokens)
        sequence.logprobs = [self._name_tokens(position) for position in sequence.logprobs]

    def _name_tokens(self, position: Mapping[int, Logprob]) -> dict[int, Logprob]:
        return {
            token_id: dataclasses.replace(logprob, decoded_token=self._texts.decode_token(token_id))
            for token_id, logprob in position.items()
        }


def _check_limit(limit: int | None) -> None:
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"concurrency_limit={limit!r} is not valid: give a whole number from 1, or None")
