"""One call of a pooling method of `LLM`: from prompts to results in their order.

Owns the loop that feeds the engine while a thread tokenises ahead of it, and Ctrl-C. Knows no text.
Invariant: it leaves nothing in the engine, however it ends; a prompt that fails is one result with `error` set.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from raydata_llm.engine.pooling_request import PoolingOutput, PoolingRequest, PoolingRequestOutput
from raydata_llm.generation import noted_interrupts, prompt_error
from raydata_llm.pooling_prompts import PooledPrompt
from raydata_llm.progress import Progress
from raydata_llm.redaction import masked_logger

if TYPE_CHECKING:
    from raydata_llm.engine.pooling_engine import PoolingEngine

logger = masked_logger(__name__)

_CHUNK = 256
RawOutput = PoolingRequestOutput[PoolingOutput]
EncodePrompts = Callable[[list[PooledPrompt]], None]


class PoolingCall:
    """The requests and results of one call.

    Args:
        engine: With nothing unfinished in it.
        request_ids: Gives each request its id.
        raises: Raise the first failed prompt's error, instead of giving it as its result.
    """

    def __init__(self, engine: PoolingEngine, request_ids: Iterator[int], *, raises: bool = False) -> None:
        self._engine = engine
        self._raises = raises
        self._request_ids = request_ids
        self._running: dict[str, PooledPrompt] = {}
        self._results: dict[int, RawOutput] = {}

    def run(self, prompts: list[PooledPrompt], encode: EncodePrompts, progress: Progress) -> list[RawOutput]:
        """Pool; returns results in the order of the prompts.

        After Ctrl-C those that were not done have `error` set.

        Args:
            prompts: Their `index` counts from 0.
            encode: Fills in the token ids, or errors, of some prompts; runs in a thread of its own.
            progress: Is told of each result.

        Raises:
            PromptError, KeyboardInterrupt: where failed prompts raise.
        """
        with noted_interrupts() as interrupted, ThreadPoolExecutor(1, "tokenise") as pool:
            chunks = deque((chunk, pool.submit(encode, chunk)) for chunk in _chunks(prompts))
            try:
                while (chunks or self._engine.has_unfinished()) and not interrupted.is_set():
                    for output in [*self._feed(chunks), *self._step()]:
                        progress.advance(output)
            finally:
                for _, encoding in chunks:
                    encoding.cancel()
                self._engine.abort_all()
        return self._ordered_results(prompts)

    def _feed(self, chunks: deque[tuple[list[PooledPrompt], Future[None]]]) -> list[RawOutput]:
        """Hand all tokenised prompts to the engine, which batches by length, waiting only when it has nothing to do."""
        refused = []
        while chunks and (chunks[0][1].done() or not self._engine.has_unfinished()):
            chunk, encoding = chunks.popleft()
            encoding.result()
            refused += [output for prompt in chunk if (output := self._add(prompt)) is not None]
        return refused

    def _add(self, prompt: PooledPrompt) -> RawOutput | None:
        request_id = str(next(self._request_ids))
        prompt.attempt(functools.partial(self._submit, request_id))
        if prompt.error is None:
            return None
        return self._take(prompt, RawOutput(request_id, None, prompt.token_ids or [], error=prompt.error))

    def _submit(self, request_id: str, prompt: PooledPrompt) -> None:
        assert prompt.pooling is not None, "without an error it was read"
        types = prompt.token_types
        request = PoolingRequest(
            request_id=request_id,
            prompt_token_ids=np.asarray(prompt.token_ids, dtype=np.int32),
            pooling_params=prompt.pooling,
            token_type_ids=None if types is None else np.asarray(types, dtype=np.int32),
        )
        self._engine.add_request(request)
        self._running[request_id] = prompt

    def _step(self) -> list[RawOutput]:
        outputs = self._engine.step() if self._engine.has_unfinished() else []
        return [self._take(self._running.pop(output.request_id), output) for output in outputs]

    def _take(self, prompt: PooledPrompt, output: RawOutput) -> RawOutput:
        output.prompt = prompt.text if prompt.pair is None else (prompt.text, prompt.pair)
        if self._raises and output.error is not None:
            raise prompt_error(f"prompts[{prompt.index}]", output.error)
        self._results[prompt.index] = output
        return output

    def _ordered_results(self, prompts: list[PooledPrompt]) -> list[RawOutput]:
        if self._raises and len(self._results) < len(prompts):
            raise KeyboardInterrupt
        for prompt in prompts:
            if prompt.index not in self._results:
                error = "KeyboardInterrupt: interrupted before this prompt was done"
                self._take(prompt, RawOutput(str(prompt.index), None, prompt.token_ids or [], error=error))
        results = [self._results[prompt.index] for prompt in prompts]
        failed = [output for output in results if output.error is not None]
        if failed:
            logger.warning("%d of %d prompts failed; the first: %s", len(failed), len(results), failed[0].error)
        return results


def _chunks(prompts: list[PooledPrompt]) -> Iterator[list[PooledPrompt]]:
    waiting = iter(prompts)
    while chunk := list(itertools.islice(waiting, _CHUNK)):
        yield chunk
