"""One call of `LLM.generate` or `LLM.chat`: from prompts to results in their order.

Owns the loop that feeds the engine while a thread tokenises ahead of it, the noise keys, and Ctrl-C. Knows no text.
Invariant: it leaves nothing in the engine, however it ends; a prompt that fails is one result with `error` set.
"""

from __future__ import annotations

import functools
import itertools
import logging
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import numpy as np

from raydata_llm.engine.request import Request, RequestOutput, request_digest, sampling_key, seeded_key
from raydata_llm.progress import Progress
from raydata_llm.prompts import Prompt

if TYPE_CHECKING:
    from raydata_llm.engine.engine import Engine
    from raydata_llm.engine.engine_group import EngineGroup

logger = logging.getLogger(__name__)

# Prompts are tokenised this many at a time, so that the engine starts on the first while the rest is tokenised.
_CHUNK = 256

Encode = Callable[[list[Prompt]], None]
Finish = Callable[[Prompt, RequestOutput], None]


class Generation:
    """The requests and results of one call.

    Args:
        engine: With nothing unfinished in it.
        seed: Of the noise of prompts without a seed.
        request_ids: Gives each request its id.
        occurrences: How often each drawn request was asked before, by digest; kept over calls, so that asking again
            draws anew, as one call with the prompt twice does.
    """

    def __init__(
        self, engine: Engine | EngineGroup, seed: int, request_ids: Iterator[int], occurrences: Counter[bytes]
    ) -> None:
        self._engine = engine
        self._seed = seed
        self._request_ids = request_ids
        self._occurrences = occurrences
        self._running: dict[str, Prompt] = {}
        self._results: dict[int, RequestOutput] = {}

    def run(self, prompts: list[Prompt], encode: Encode, finish: Finish, progress: Progress) -> list[RequestOutput]:
        """Generate; returns results in the order of the prompts.

        Args:
            prompts: Their `index` counts from 0.
            encode: Fills in the token ids, or errors, of some prompts; runs in a thread of its own.
            finish: Fills in a result's text.
            progress: Is told of each result.

        Raises:
            KeyboardInterrupt: after Ctrl-C, when what ran has been aborted.
        """
        with noted_interrupts() as interrupted, ThreadPoolExecutor(1, "tokenise") as pool:
            chunks = deque((chunk, pool.submit(encode, chunk)) for chunk in _chunks(prompts))
            try:
                while chunks or self._engine.has_unfinished():
                    if interrupted.is_set():
                        raise KeyboardInterrupt
                    for output in [*self._feed(chunks), *self._step(finish)]:
                        progress.advance(output)
            except BaseException:
                for _, encoding in chunks:
                    encoding.cancel()
                self._engine.abort_all()
                raise
        return self._ordered_results()

    def _feed(self, chunks: deque[tuple[list[Prompt], Future[None]]]) -> list[RequestOutput]:
        """Hand the next tokenised prompts to the engine, waiting only when it has nothing to do."""
        if not chunks or (self._engine.has_unfinished() and not chunks[0][1].done()):
            return []
        chunk, encoding = chunks.popleft()
        encoding.result()
        return [output for prompt in chunk if (output := self._add(prompt)) is not None]

    def _add(self, prompt: Prompt) -> RequestOutput | None:
        request_id = str(next(self._request_ids))
        prompt.attempt(functools.partial(self._submit, request_id))
        if prompt.error is None:
            return None
        output = RequestOutput(request_id, prompt.token_ids or [], error=prompt.error, prompt=prompt.text)
        self._results[prompt.index] = output
        return output

    def _submit(self, request_id: str, prompt: Prompt) -> None:
        params = prompt.params
        assert params is not None
        token_ids = np.asarray(prompt.token_ids, dtype=np.int32)
        if params.greedy:
            key = 0  # nothing is drawn
        elif params.seed is not None:
            key = seeded_key(params.seed)
        else:
            adapter = "" if prompt.lora_request is None else prompt.lora_request.lora_name
            digest = request_digest(token_ids, params, adapter)
            key = sampling_key(self._seed, digest, self._occurrences[digest])
            self._occurrences[digest] += 1
        self._engine.add_request(
            Request(
                request_id=request_id,
                prompt_token_ids=token_ids,
                sampling_params=params,
                key=key,
                lora_request=prompt.lora_request,
            )
        )
        self._running[request_id] = prompt

    def _step(self, finish: Finish) -> list[RequestOutput]:
        outputs = self._engine.step() if self._engine.has_unfinished() else []
        for output in outputs:
            prompt = self._running.pop(output.request_id)
            finish(prompt, output)
            self._results[prompt.index] = output
        return outputs

    def _ordered_results(self) -> list[RequestOutput]:
        results = [self._results[index] for index in range(len(self._results))]
        failed = [output for output in results if output.error is not None]
        if failed:
            logger.warning("%d of %d prompts failed; the first: %s", len(failed), len(results), failed[0].error)
        return results


def _chunks(prompts: list[Prompt]) -> Iterator[list[Prompt]]:
    waiting = iter(prompts)
    while chunk := list(itertools.islice(waiting, _CHUNK)):
        yield chunk


@contextmanager
def noted_interrupts() -> Iterator[threading.Event]:
    """Let Ctrl-C set an event instead of breaking into a step, whose state would be left half done.

    A second Ctrl-C breaks in. Outside the main thread, or where the program has its own handler, nothing changes.
    """
    noted = threading.Event()
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield noted
        return

    def note(signum: int, frame: FrameType | None) -> None:
        if noted.is_set():
            raise KeyboardInterrupt
        noted.set()

    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
