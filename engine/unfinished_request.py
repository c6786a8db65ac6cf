"""A request under way: the outputs that have ended, until they are its result.

Owns the assembly of a request's n outputs. Knows no steps and no device.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from raydata_llm.engine.position_logprobs import PositionLogprobs
from raydata_llm.engine.prompt_scores import PromptScores
from raydata_llm.engine.request import CompletionOutput, Logprob, Request, RequestOutput, TokenArray
from raydata_llm.engine.request_stats import RequestStateStats
from raydata_llm.engine.sequence import FinishedSequence


@dataclass
class UnfinishedRequest:
    """See the module's docstring.

    Args:
        prompt: Its tokens, truncated.
        outputs: By index; None of those that have not ended.
        num_missing: Outputs that have not ended; counted down, as n = 10,000 took 20 s to be counted anew at each end.
    """

    request: Request
    prompt: TokenArray
    outputs: list[CompletionOutput | None]
    stats: RequestStateStats
    num_cached_tokens: int = 0
    prompt_logprobs: PositionLogprobs[dict[int, Logprob] | None] | None = None
    prompt_scores: PromptScores | None = None
    error: str | None = None
    num_missing: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_missing = len(self.outputs)

    @property
    def is_flat(self) -> bool:
        """Whether log-probabilities are asked for in flat lists."""
        return self.request.sampling_params.flat_logprobs

    @property
    def prompt_token_ids(self) -> list[int]:
        """The list that was given, if it was one and nothing was cut off."""
        given = self.request.prompt_token_ids
        if isinstance(given, list) and len(given) == len(self.prompt):
            return given
        token_ids: list[int] = self.prompt.tolist()
        return token_ids

    def take(self, ended: FinishedSequence) -> None:
        """Take in an output that ended."""
        sequence = ended.sequence
        logprobs = sequence.logprobs
        if logprobs is not None:
            logprobs.close(ended.output_token_ids)
        self.prompt_logprobs = self.prompt_logprobs or sequence.prompt_logprobs
        self.prompt_scores = self.prompt_scores or sequence.prompt_scores
        self.error = self.error or sequence.error
        self.num_cached_tokens = max(self.num_cached_tokens, sequence.num_cached_tokens)
        self.num_missing -= 1
        self.outputs[sequence.index] = CompletionOutput(
            index=sequence.index,
            token_ids=ended.output_token_ids,
            finish_reason=ended.finish_reason,
            stop_reason=ended.stop_reason,
            cumulative_logprob=None if logprobs is None else logprobs.total(),
            logprobs=logprobs.flat() if logprobs is not None and self.is_flat else logprobs,
            lora_request=self.request.lora_request,
        )

    def output(self) -> RequestOutput:
        """The result, all outputs having ended."""
        positions = self.prompt_logprobs
        if positions is not None:
            positions.close(self.prompt.tolist())
        return RequestOutput(
            request_id=self.request.request_id,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[output for output in self.outputs if output is not None and self.error is None],
            error=self.error,
            num_cached_tokens=self.num_cached_tokens,
            prompt_logprobs=positions.flat() if positions is not None and self.is_flat else positions,
            prompt_token_id_logprobs=None if self.prompt_scores is None else self.prompt_scores.values,
            lora_request=self.request.lora_request,
            metrics=self.stats,
        )
