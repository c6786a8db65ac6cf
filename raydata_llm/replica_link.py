"""The dispatcher's line to one replica: starts it, feeds it, collects from it, and replaces it when it is gone.

Owns the replica's actor and the two threads that talk to it. Knows rows as opaque cells. Invariant: whatever ends a
replica (its engine's death, its process's, its node's, silence), its rows go back to the book and a new one is started.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from raydata_llm.dispatch_plan import ReplicaPlan
from raydata_llm.engine.rank_line import RankError
from raydata_llm.lease_book import ENGINE_DIED, PROCESS_LOST, LeaseBook
from raydata_llm.pending_rows import Quarantined
from raydata_llm.redaction import mask_error, masked_logger, redact
from raydata_llm.replica import Collected, Replica

logger = masked_logger(__name__)

# Rows with a replica at once, as a multiple of what its engine runs: the rest bridges the way there and back.
_LIMIT = 1.5
_POLL_SECONDS = 1.0
# Replicas that are lost one after the other with nothing done in between.
_LOSSES_IN_VAIN = 3
# feed, collect, and one to spare for a question while both run.
_THREADS = 3

_numbers = itertools.count()


class ReplicaLink:
    """Keeps one replica running.

    Args:
        plan: How it is started.
        book: Where its rows come from.
        on_quarantined: Told of rows found to kill engines.
    """

    def __init__(
        self,
        plan: ReplicaPlan,
        book: LeaseBook,
        on_quarantined: Callable[[list[Quarantined]], None],
    ) -> None:
        self._plan, self._book, self._on_quarantined = plan, book, on_quarantined
        self._losses_in_vain = 0
        self._actor: Any = None
        self._fed = threading.Event()
        self.is_placed = False
        self.is_ready = False
        threading.Thread(target=self._run, name="replica link", daemon=True).start()

    def _run(self) -> None:
        try:
            while True:
                self._serve()
        except Exception as error:
            logger.exception("A replica cannot be kept running")
            self._book.fail(mask_error(error))

    def _serve(self) -> None:
        """One replica's life."""
        number = next(_numbers)
        self.is_ready = False
        self._actor = (
            ray.remote(Replica)
            .options(max_concurrency=_THREADS, **self._plan.actor_options)
            .remote(
                self._plan.model_source, self._plan.engine_kwargs, self._plan.engine_factory, self._plan.stats_sender
            )
        )
        try:
            address, pid = _answer(self._actor.where.remote())
            self.is_placed = True
            num_slots = _answer(self._actor.start.remote())
        except RayTaskError as error:
            if isinstance(error.cause, RankError):
                self._note_loss(number, f"while it started: {error.cause}", blame=0)
                return
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except RayActorError as error:
            self._note_loss(number, f"while it started: {error}", blame=0)
            return
        logger.info("Replica %d is ready: %d rows at once, process %d on %s", number, num_slots, pid, address)
        self._book.join(number, num_slots, limit=self._plan.max_pending_rows or math.ceil(num_slots * _LIMIT))
        self.is_ready = True
        threading.Thread(target=self._feed, args=(number, self._actor), name="replica feed", daemon=True).start()
        self._collect(number)

    def _feed(self, number: int, actor: Any) -> None:
        while (lease := self._book.take(number, _POLL_SECONDS)) is not None:
            if lease.rows:
                # Not waited for: if it is lost with the actor, `_collect` hears of that.
                actor.feed.remote(lease.rows)
                self._fed.set()

    def _collect(self, number: int) -> None:
        patience = self._plan.hang_timeout_s
        while True:
            try:
                collected: Collected = ray.get(
                    self._actor.collect.remote(self._wait_for_rows(number)), timeout=patience + _POLL_SECONDS
                )
            except GetTimeoutError:
                self._note_loss(number, f"its process gave no sign of life for {patience:g} s", blame=ENGINE_DIED)
                return
            except RayError as error:
                self._note_loss(number, f"its process or node is gone: {error}", blame=PROCESS_LOST)
                return
            if self._book.give(number, collected.outcomes):
                self._losses_in_vain = 0
            if collected.death is not None:
                self._note_loss(number, f"the engine died of {collected.death}", blame=ENGINE_DIED)
                return
            if collected.seconds_silent > patience:
                silence = f"the engine hangs: no step ended for {collected.seconds_silent:.0f} s"
                self._note_loss(number, silence, blame=ENGINE_DIED)
                return

    def _wait_for_rows(self, number: int) -> float:
        """Hold back while the replica has no rows; returns how long it may wait for some to finish."""
        self._fed.clear()
        # Ray ends the dispatcher when its calls have returned, or five seconds later: if one to a replica with nothing
        # to do were always under way, the next job would wait so long for this one's GPUs.
        if self._book.holds(number) or self._fed.wait(_POLL_SECONDS):
            return _POLL_SECONDS
        return 0.0

    def _note_loss(self, number: int, cause: str, blame: int) -> None:
        self.is_placed = self.is_ready = False
        cause = redact(cause)
        loss = self._book.lose(number, blame, f"EngineDeadError: {cause}")
        self._on_quarantined(loss.quarantined)
        ray.kill(self._actor)
        self._losses_in_vain = 0 if loss.num_rows else self._losses_in_vain + 1
        if self._losses_in_vain >= _LOSSES_IN_VAIN:
            raise RuntimeError(f"{self._losses_in_vain} replicas were lost before they did anything, the last: {cause}")
        logger.warning("Replica %d is replaced: %s", number, cause)
        time.sleep(min(0.1 * 2**self._losses_in_vain, 5.0))


def _answer(reference: ray.ObjectRef[Any]) -> Any:
    """As `ray.get`, but waiting in Python: a job whose rows all failed ends while its replicas start.

    Ray 2.60 takes its core apart under a thread that is in `ray.get` when the process ends: in 4 of 14 such jobs the
    dispatcher died of a segmentation fault, and its stack stood among the job's lines.
    """
    return reference.future().result()
