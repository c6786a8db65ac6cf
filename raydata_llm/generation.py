"""Prompts on their way through an engine: fed in, stepped, and handed out as results as they finish.

Owns the loop that feeds the engine while a thread tokenises ahead of it, the noise keys, and Ctrl-C. Knows no text.
Invariants: a prompt that fails is one result with `error` set; whatever raises in a step leaves nothing in the engine;
results that were made are kept until they are taken.
"""

from __future__ import annotations

import functools
import itertools
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

from raydata_llm.engine.beam_params import BeamSearchOutput
from raydata_llm.engine.failed_outputs import PromptError
from raydata_llm.engine.garbage_pause import GarbagePause
from raydata_llm.engine.request import Request, RequestOutput, request_digest, sampling_key, seeded_key
from raydata_llm.progress import Progress
from raydata_llm.prompts import Prompt
from raydata_llm.redaction import masked_logger

if TYPE_CHECKING:
    from raydata_llm.engine.engine import Engine
    from raydata_llm.engine.engine_group import EngineGroup

logger = masked_logger(__name__)

# Prompts are tokenised this many at a time, so that the engine starts on the first while the rest is tokenised.
_CHUNK = 256

Encode = Callable[[list[Prompt]], None]
Finish = Callable[[Prompt, RequestOutput], None]
_Item = TypeVar("_Item")


class Generation:
    """The prompts that are under way in an engine.

    Args:
        engine: With nothing unfinished in it.
        seed: Of the noise of prompts without a seed.
        request_ids: Gives each request its id.
        occurrences: How often each drawn request was asked before, by digest; kept over calls, so that asking again
            draws anew, as one call with the prompt twice does.
        finish: Fills in a result's text.
        raises: Raise the first failed prompt's error, instead of giving it as its result.
    """

    def __init__(
        self,
        engine: Engine | EngineGroup,
        seed: int,
        request_ids: Iterator[int],
        occurrences: Counter[bytes],
        finish: Finish,
        *,
        raises: bool = False,
    ) -> None:
        self._engine = engine
        self._seed = seed
        self._request_ids = request_ids
        self._occurrences = occurrences
        self._finish = finish
        self._raises = raises
        self._tokenising = ThreadPoolExecutor(1, "tokenise")
        self._chunks: deque[tuple[dict[str, Prompt], Future[None]]] = deque()
        self._tokenised: deque[tuple[str, Prompt]] = deque()
        self._unfinished: dict[str, Prompt] = {}
        self._done: deque[RequestOutput] = deque()

    def add(self, prompts: list[Prompt], encode: Encode) -> list[str]:
        """Queue prompts; returns the ids that their results will have.

        Args:
            encode: Fills in the token ids, or errors, of some prompts; runs in a thread of its own.

        Raises:
            PromptError: where failed prompts raise, for the first that cannot be run; none is queued then.
        """
        if self._raises:
            # All prompts are looked at before any is run, so that a bad one costs no other's work.
            encode(prompts)
            encode = _leave
            self._check(prompts)
        named = {str(next(self._request_ids)): prompt for prompt in prompts}
        for chunk in prompt_chunks(list(named.items())):
            self._chunks.append((dict(chunk), self._tokenising.submit(encode, [prompt for _, prompt in chunk])))
        self._unfinished |= named
        return list(named)

    def _check(self, prompts: list[Prompt]) -> None:
        def check(prompt: Prompt) -> None:
            self._engine.check_request(_request("", prompt, key=0))

        for prompt in prompts:
            prompt.attempt(check)
            if prompt.error is not None:
                raise prompt_error(f"prompts[{prompt.index}]", prompt.error)

    @property
    def num_untaken(self) -> int:
        """Prompts whose results have not been taken."""
        return len(self._unfinished) + len(self._done)

    @property
    def is_under_way(self) -> bool:
        """Whether the engine has begun on a prompt that is not done."""
        return self._engine.has_unfinished()

    def results(self) -> Iterator[RequestOutput]:
        """Run, and yield results as they finish.

        Raises:
            KeyboardInterrupt: after Ctrl-C; everything is kept, and another call goes on.
            PromptError: where failed prompts raise; the others are kept, and another call goes on.
        """
        while self.num_untaken:
            for output in self._take_done():
                if self._raises and output.error is not None:
                    raise prompt_error(f"the prompt with request_id={output.request_id!r}", output.error)
                yield output
            if not self._unfinished:
                continue
            with noted_interrupts() as interrupted:
                self._advance()
            if interrupted.is_set():
                raise KeyboardInterrupt

    def run_keeping(self, progress: Progress) -> list[RequestOutput]:
        """As `run`, but what is interrupted is kept, done or not, and another call goes on.

        Raises:
            KeyboardInterrupt: after Ctrl-C.
        """
        results = []
        try:
            with GarbagePause() as garbage:
                for output in self.results():
                    results.append(output)
                    progress.advance(output)
                    garbage.collect_if_due()
        except BaseException:
            self._done.extendleft(reversed(results))
            raise
        return sorted(results, key=lambda output: int(output.request_id))

    def run_untaken(self) -> None:
        """Run to the end, and keep all results for whoever takes them."""
        while self._unfinished:
            self._advance()

    def run(self, progress: Progress) -> list[RequestOutput]:
        """Run to the end; returns results in the order in which they were asked for.

        After Ctrl-C those that were not done have `error` set, and nothing is left.

        Args:
            progress: Is told of each result.

        Raises:
            PromptError, KeyboardInterrupt: where failed prompts raise.
        """
        asked, results = list(self._unfinished), dict[str, RequestOutput]()
        try:
            with noted_interrupts() as interrupted, GarbagePause() as garbage:
                while self.num_untaken and not interrupted.is_set():
                    self._advance()
                    garbage.collect_if_due()
                    for output in self._take_done():
                        if self._raises and output.error is not None:
                            raise prompt_error(f"prompts[{asked.index(output.request_id)}]", output.error)
                        results[output.request_id] = output
                        progress.advance(output)
            if self._raises and self._unfinished:
                raise KeyboardInterrupt
            results |= self._given_up()
        finally:
            self.abort()
        ordered = [results[request_id] for request_id in asked]
        tell_failures(ordered)
        return ordered

    def abort(self) -> None:
        """Forget all prompts, and the results that were not taken."""
        self._forget_unfinished()
        self._done.clear()
        self._tokenising.shutdown()

    def _forget_unfinished(self) -> None:
        for _, encoding in self._chunks:
            encoding.cancel()
        self._chunks.clear()
        self._tokenised.clear()
        self._unfinished.clear()
        self._engine.abort_all()

    def _take_done(self) -> Iterator[RequestOutput]:
        while self._done:
            yield self._done.popleft()

    def _given_up(self) -> dict[str, RequestOutput]:
        """Results of prompts that are not done."""
        error = "KeyboardInterrupt: interrupted before this prompt was done"
        return {
            request_id: RequestOutput(request_id, prompt.token_ids or [], error=error, prompt=prompt.text)
            for request_id, prompt in self._unfinished.items()
        }

    def _advance(self) -> None:
        """Feed the engine and run a step."""
        try:
            self._feed()
            if self._engine.has_unfinished():
                for output in self._engine.step():
                    self._finish(self._unfinished.pop(output.request_id), output)
                    self._done.append(output)
        except BaseException:
            # A second Ctrl-C is one of them: the step is half done.
            self._forget_unfinished()
            raise

    def _feed(self) -> None:
        """Hand tokenised prompts to the engine, as many as it wants, waiting only when it has nothing to do."""
        wanted = self._engine.num_wanted()
        while wanted > 0 and (self._tokenised or self._take_chunk()):
            request_id, prompt = self._tokenised.popleft()
            wanted -= 1
            prompt.attempt(functools.partial(self._submit, request_id))
            if prompt.error is not None:
                refused = RequestOutput(request_id, prompt.token_ids or [], error=prompt.error, prompt=prompt.text)
                self._done.append(refused)
                del self._unfinished[request_id]

    def _take_chunk(self) -> bool:
        """Move on to the next chunk, if there is one that is tokenised or the engine has nothing to do."""
        if not self._chunks or (self._engine.has_unfinished() and not self._chunks[0][1].done()):
            return False
        self._chunks[0][1].result()
        self._tokenised.extend(self._chunks.popleft()[0].items())
        return True

    def _submit(self, request_id: str, prompt: Prompt) -> None:
        params = prompt.params
        assert params is not None
        assert prompt.token_ids is not None
        if params.greedy:
            key = 0  # nothing is drawn
        elif params.seed is not None:
            key = seeded_key(params.seed, prompt.token_ids, prompt.embeds)
        else:
            adapter = "" if prompt.lora_request is None else prompt.lora_request.lora_name
            digest = request_digest(prompt.token_ids, params, adapter, prompt.embeds)
            key = sampling_key(self._seed, digest, self._occurrences[digest])
            self._occurrences[digest] += 1
        self._engine.add_request(_request(request_id, prompt, key))


def _request(request_id: str, prompt: Prompt, key: int) -> Request:
    assert prompt.params is not None and prompt.token_ids is not None, "without an error it was read"
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt.token_ids,
        sampling_params=prompt.params,
        key=key,
        lora_request=prompt.lora_request,
        prompt_embeds=prompt.embeds,
    )


def _leave(prompts: list[Prompt]) -> None:
    """Prompts that are encoded need nothing more."""


def prompt_error(which: str, error: str) -> PromptError:
    """What is raised of a failed prompt, where failed prompts raise."""
    return PromptError(f"{which} failed: {error}")


def tell_failures(results: Sequence[RequestOutput | BeamSearchOutput]) -> None:
    """Warn of prompts that failed."""
    failed = [output for output in results if output.error is not None]
    if failed:
        logger.warning("%d of %d prompts failed; the first: %s", len(failed), len(results), failed[0].error)


def prompt_chunks(prompts: Sequence[_Item]) -> Iterator[list[_Item]]:
    """As many prompts as are tokenised at a time."""
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
