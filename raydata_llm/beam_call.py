"""One call of `LLM.beam_search`: from prompts to results in their order.

Owns the loop that feeds the search while a thread tokenises ahead of it, and Ctrl-C. Knows no text.
Invariant: it leaves nothing in the engine, however it ends; a prompt that fails is one result with `error` set.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from raydata_llm.engine.beam_params import BeamRequest, BeamSearchOutput, BeamSearchParams
from raydata_llm.generation import Encode, noted_interrupts, prompt_chunks, prompt_error, tell_failures
from raydata_llm.progress import Progress
from raydata_llm.prompts import Prompt, refuse_embeds

if TYPE_CHECKING:
    from raydata_llm.engine.beam_search import BeamSearch
    from raydata_llm.engine.engine import Engine

# Fills in a result's texts.
Finish = Callable[[BeamSearchOutput, Prompt], None]


class BeamCall:
    """The requests and results of one call.

    Args:
        engine: With nothing unfinished in it.
        params: Of every prompt.
        most_at_once: Prompts that are searched at the same time at most; None is as many as there is room for.
        request_ids: Gives each request its id.
        finish: May raise, which is the prompt's error.
        raises: Raise the first failed prompt's error, instead of giving it as its result.
    """

    def __init__(
        self,
        engine: Engine,
        params: BeamSearchParams,
        most_at_once: int | None,
        request_ids: Iterator[int],
        finish: Finish,
        *,
        raises: bool = False,
    ) -> None:
        self._engine, self._params, self._most_at_once = engine, params, most_at_once
        self._request_ids, self._finish, self._raises = request_ids, finish, raises
        self._chunks: deque[tuple[list[Prompt], Future[None]]] = deque()
        self._ready: deque[Prompt] = deque()
        self._running: dict[str, Prompt] = {}
        self._results: dict[int, BeamSearchOutput] = {}

    def run(self, prompts: list[Prompt], encode: Encode, progress: Progress) -> list[BeamSearchOutput]:
        """Search; returns results in the order of the prompts.

        After Ctrl-C those that were not done have `error` set.

        Args:
            prompts: Their `index` counts from 0.
            encode: Fills in the token ids, or errors, of some prompts; runs in a thread of its own.
            progress: Is told of each result.

        Raises:
            PromptError, KeyboardInterrupt: where failed prompts raise.
        """
        with noted_interrupts() as interrupted, ThreadPoolExecutor(1, "tokenise") as pool:
            self._chunks.extend((chunk, pool.submit(encode, chunk)) for chunk in prompt_chunks(prompts))
            beams = self._engine.beam_search()
            try:
                while len(self._results) < len(prompts) and not interrupted.is_set():
                    for prompt, output in [*self._feed(beams), *self._step(beams)]:
                        self._take(prompt, output, progress)
            finally:
                beams.close()
                for _, encoding in self._chunks:
                    encoding.cancel()
        if self._raises and len(self._results) < len(prompts):
            raise KeyboardInterrupt
        interruption = "KeyboardInterrupt: interrupted before this prompt was done"
        ordered = [self._results.get(prompt.index, BeamSearchOutput(error=interruption)) for prompt in prompts]
        tell_failures(ordered)
        return ordered

    def _feed(self, beams: BeamSearch) -> list[tuple[Prompt, BeamSearchOutput]]:
        """Hand tokenised prompts to the search, waiting only when it has nothing to do; returns those refused."""
        while self._chunks and (self._chunks[0][1].done() or not (self._ready or beams.has_unfinished())):
            chunk, encoding = self._chunks.popleft()
            encoding.result()
            self._ready.extend(chunk)
        refused = []
        while self._ready and (self._most_at_once is None or len(self._running) < self._most_at_once):
            prompt = self._ready.popleft()
            prompt.attempt(functools.partial(self._submit, beams))
            if prompt.error is not None:
                refused.append((prompt, BeamSearchOutput(error=prompt.error)))
        return refused

    def _submit(self, beams: BeamSearch, prompt: Prompt) -> None:
        refuse_embeds(prompt)
        request = BeamRequest(
            request_id=str(next(self._request_ids)),
            prompt_token_ids=np.asarray(prompt.token_ids, dtype=np.int32),
            params=self._params,
            lora_request=prompt.lora_request,
        )
        self._engine.check_beam_request(request)
        beams.add(request)
        self._running[request.request_id] = prompt

    def _step(self, beams: BeamSearch) -> list[tuple[Prompt, BeamSearchOutput]]:
        outputs = beams.step() if beams.has_unfinished() else []
        return [(self._running.pop(request_id), output) for request_id, output in outputs]

    def _take(self, prompt: Prompt, output: BeamSearchOutput, progress: Progress) -> None:
        prompt.attempt(functools.partial(self._finish, output))
        if prompt.error is not None:
            output = BeamSearchOutput(error=prompt.error)
        if self._raises and output.error is not None:
            raise prompt_error(f"prompts[{prompt.index}]", output.error)
        self._results[prompt.index] = output
        # Each position of an output has a map.
        progress.count(len(prompt.token_ids or ()), sum(len(one.logprobs) for one in output.sequences))
