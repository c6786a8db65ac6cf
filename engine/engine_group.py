"""Several engines as one: each in a thread of its own, with its ranks in processes, fed from one queue.

Owns the queue that the engines draw on: a request is no engine's until that engine has room for it, so one that is
quick takes more than one that is slow. Knows no text. Used by one thread; the engines' threads are its own.
"""

from __future__ import annotations

import dataclasses
import functools
import queue
import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from raydata_llm.engine.engine import Engine
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.engine_stats import EngineStats
from raydata_llm.engine.local_ranks import LocalRanks, check_gpus
from raydata_llm.engine.request import Request, RequestOutput, TokenArray

# Requests with an engine at most, as a multiple of what it runs at once: its admission needs some to choose from.
_HELD_PER_SLOT = 1.5
# Requests that are queued between two looks for results.
_WANTED = 256


class EngineGroup:
    """Has the methods of an `Engine`.

    Args:
        config: Each engine's.
        count: How many engines.

    Raises:
        ValueError: as `Engine`'s; for more ranks than GPUs; for logits processors, which no other process has.
    """

    def __init__(self, config: EngineConfig, count: int, tokenizer: Any = None) -> None:
        if config.logits_processors:
            raise ValueError(
                f"logits_processors are run by an engine in the caller's process, and data_parallel_size={count} has "
                "its engines' work done in others: leave it at 1"
            )
        check_gpus(config, count)

        def make(number: int) -> Engine:
            launcher = functools.partial(LocalRanks, first_gpu=number * config.num_ranks, num_engines=count)
            return Engine(config, tokenizer, launcher, own_process=False)

        with ThreadPoolExecutor(count) as pool:
            self._members = [_Member(self, engine) for engine in pool.map(make, range(count))]
        first = self._members[0].engine
        self.default_sampling_params = first.default_sampling_params
        self.max_model_len, self.model_config = first.max_model_len, first.model_config
        self.changed = threading.Condition()
        self.waiting: deque[Request] = deque()
        self.outputs: queue.SimpleQueue[list[RequestOutput] | BaseException] = queue.SimpleQueue()
        self._unfinished: set[str] = set()
        for member in self._members:
            member.thread.start()

    def add_request(self, request: Request) -> None:
        """As `Engine.add_request`."""
        if request.request_id in self._unfinished:
            raise ValueError(f"request_id={request.request_id!r} is in use by an unfinished request")
        self.check_request(request)
        self._unfinished.add(request.request_id)
        with self.changed:
            self.waiting.append(request)
            self.changed.notify()

    def check_request(self, request: Request) -> TokenArray:
        """As `Engine.check_request`."""
        return self._members[0].engine.check_request(request)

    def has_unfinished(self) -> bool:
        """Whether `step` has anything to wait for."""
        return bool(self._unfinished)

    def num_wanted(self) -> int:
        """As `Engine.num_wanted`; the engines draw on the queue from threads of their own."""
        return _WANTED

    def step(self) -> list[RequestOutput]:
        """Wait a moment for requests that finish.

        Raises:
            BaseException: what an engine died of.
            RuntimeError: when all have died before.
        """
        # Looked at first: what an engine died of is there before that is known.
        is_dead = all(member.is_ending for member in self._members)
        try:
            found = self.outputs.get(timeout=0.05)
        except queue.Empty:
            if is_dead:
                raise RuntimeError("all engines have died, each of an error that was raised: make a new LLM") from None
            return []
        if isinstance(found, BaseException):
            raise found
        self._unfinished -= {output.request_id for output in found}
        return found

    def abort_all(self) -> None:
        """Forget every request; the engines' threads abort those that run."""
        with self.changed:
            self.waiting.clear()
            for member in self._members:
                # One that has died does not answer.
                member.is_aborting = not member.is_ending
            self.changed.notify_all()
            self.changed.wait_for(lambda: not any(member.is_aborting for member in self._members), timeout=60)
        while not self.outputs.empty():
            self.outputs.get()
        self._unfinished.clear()

    def reset_prefix_cache(self) -> None:
        """As `Engine.reset_prefix_cache`."""
        for member in self._members:
            member.engine.reset_prefix_cache()

    def collective_rpc(self, *args: Any, **kwargs: Any) -> list[Any]:
        """As `Engine.collective_rpc`, on the ranks of one engine after the other's; no request may be under way."""
        return [answer for member in self._members for answer in member.engine.collective_rpc(*args, **kwargs)]

    def stats(self) -> EngineStats:
        """The engines' sums; of the shares and seconds, their means."""
        each = [dataclasses.asdict(member.engine.stats()) for member in self._members]
        totals = {name: sum(one[name] for one in each) for name in each[0]}
        totals |= {name: total / len(each) for name, total in totals.items() if isinstance(total, float)}
        totals["num_waiting"] += len(self.waiting)
        return EngineStats(**totals)

    def shutdown(self) -> None:
        """End all engines."""
        with self.changed:
            for member in self._members:
                member.is_ending = True
            self.changed.notify_all()
        for member in self._members:
            member.thread.join()


class _Member:
    """One engine and its thread."""

    def __init__(self, group: EngineGroup, engine: Engine) -> None:
        self._group, self.engine = group, engine
        self.is_aborting = self.is_ending = False
        self._num_held = 0
        self._most_held = max(1, int(engine.max_num_seqs * _HELD_PER_SLOT))
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def _run(self) -> None:
        try:
            while not self.is_ending:
                for request in self._take():
                    self._add(request)
                if self.engine.has_unfinished():
                    self._give(self.engine.step())
        except BaseException as error:
            self._group.outputs.put(error)
        finally:
            with self._group.changed:
                self.is_ending, self.is_aborting = True, False
                self._group.changed.notify_all()
            self.engine.shutdown()

    def _add(self, request: Request) -> None:
        try:
            self.engine.add_request(request)
        except Exception as error:
            # What needs more than a look at the request: its guides, and users' logits processors.
            self._give([request.refused(f"{type(error).__name__}: {error}")])

    def _take(self) -> Iterable[Request]:
        """Requests that it has room for; with nothing to do it waits for one."""
        group = self._group
        with group.changed:
            if self.is_aborting:
                self.engine.abort_all()
                self._num_held, self.is_aborting = 0, False
                group.changed.notify_all()
            while not (group.waiting or self._num_held or self.is_ending or self.is_aborting):
                group.changed.wait()
            count = min(len(group.waiting), self._most_held - self._num_held)
            taken = [group.waiting.popleft() for _ in range(count)]
        self._num_held += len(taken)
        return taken

    def _give(self, outputs: list[RequestOutput]) -> None:
        self._num_held -= len(outputs)
        if outputs:
            self._group.outputs.put(outputs)
