"""The second operator: takes blocks of requests, has replicas answer their rows, and gives the blocks back.

Owns the pool: how many replicas there are, what they are placed on, and when to give up. It is one actor without a
CPU or GPU of its own; Ray ends the replicas, which it started, with it, however the job ends. Runs in several threads
at once, one a block, so that replicas draw on all blocks in flight. Knows no text and no model. Invariants: a task
gives back exactly one block (Ray Data replays retried tasks by block number), its rows in the order they came.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from raydata_llm.dispatch_plan import DispatchPlan
from raydata_llm.engine.request import sampling_key
from raydata_llm.lease_book import LeaseBook
from raydata_llm.occurrences import Occurrences
from raydata_llm.pending_rows import Block, Outcome, Quarantined
from raydata_llm.plain_errors import told_plainly
from raydata_llm.ray_blocks import block_rows, block_size_limit, is_cancelled, task_call
from raydata_llm.redaction import masked_errors, masked_logger
from raydata_llm.replica_link import ReplicaLink
from raydata_llm.row_payload import (
    OUTPUT_COLUMN,
    REQUEST_COLUMN,
    TICKET_COLUMN,
    RowOutput,
    append_cells,
    describe_failure,
    pack,
    row_error,
    seal_block,
)
from raydata_llm.row_ticket import read_tickets

logger = masked_logger(__name__)

# Packed requests held outside the object store at once.
_MAX_BYTES = 512 << 20
# For a worker process to start, on a busy machine.
_PROCESS_SECONDS = 60.0
_WATCH_SECONDS = 1.0


class Dispatcher:
    """The callable that Ray Data puts into the operator's actor."""

    def __init__(self, plan: DispatchPlan) -> None:
        self._plan = plan
        self._book = LeaseBook()
        self._occurrences = Occurrences()
        self._room = _ByteRoom(_MAX_BYTES)
        self._links: list[ReplicaLink] = []
        self._grow(plan.min_replicas)
        threading.Thread(target=self._watch_pool, name="pool watch", daemon=True).start()

    @masked_errors()
    def __call__(self, table: pa.Table) -> pa.Table:
        """Have a block's requests answered and append the outputs.

        Raises:
            RowError: for a row that fails, unless rows may.
            ValueError: when the engine could not start, or no replica found a place.
        """
        tickets = read_tickets(table.column(TICKET_COLUMN))
        runnable = np.flatnonzero(tickets["cost"] >= 0).tolist()
        cells: list[bytes] = table.column(REQUEST_COLUMN).to_pylist()
        keys = self._keys(tickets["digest"])
        chosen = tickets[runnable]
        with told_plainly(), self._room.taken(sum(map(len, cells))):
            rows = [(keys[index], cells[index]) for index in runnable]
            block = self._book.put(rows, chosen["cost"].tolist(), chosen["prefix"].tolist())
            outcomes = self._wait(block)
        outputs: list[bytes | None] = [None] * len(cells)
        for index, outcome in zip(runnable, outcomes, strict=True):
            outputs[index] = self._output(table, index, outcome)
        table = append_cells(table.drop_columns([TICKET_COLUMN]), OUTPUT_COLUMN, outputs)
        return seal_block(table, block_size_limit())

    def _wait(self, block: Block) -> list[Outcome | Quarantined]:
        while not block.done.wait(_WATCH_SECONDS):
            if is_cancelled():
                # Ray would wait for its rows, and keep the replicas and their GPUs for that.
                self._book.withdraw(block)
                raise TimeoutError(f"{block.num_missing} rows of a block are not done, and nobody wants them any more")
        return self._book.wait(block)

    def _keys(self, digests: np.ndarray[Any, np.dtype[np.uint64]]) -> list[int]:
        """The noise keys of a block's rows."""
        numbers = self._occurrences.number(task_call(), digests[:, 0])
        return [
            sampling_key(self._plan.job_seed, digest.tobytes(), number)
            for digest, number in zip(digests, numbers, strict=True)
        ]

    def _output(self, table: pa.Table, index: int, outcome: Outcome | Quarantined) -> bytes:
        if isinstance(outcome, Quarantined):
            error: str | None = describe_failure(outcome.cause, "engine")
            cell = pack(RowOutput(None, "", outcome.row_id, 0.0, error))
        else:
            cell, error = outcome.cell, outcome.error
        if error is not None and not self._plan.keep_going:
            self._stop(table, index, error)
        return cell

    def _stop(self, table: pa.Table, index: int, error: str) -> None:
        raise row_error(block_rows(table.slice(index, 1))[0], error)

    def _grow(self, count: int) -> None:
        self._links += [ReplicaLink(self._plan.replica, self._book, _log_quarantined) for _ in range(count)]

    def _watch_pool(self) -> None:
        patience = self._plan.placement_timeout_s
        if not self._asked():
            # Its ranks' places are asked for apart: there is room for it anywhere, and it waits for a process alone.
            patience = max(patience, _PROCESS_SECONDS)
        deadline = time.monotonic() + patience
        while not any(link.is_placed for link in self._links):
            if time.monotonic() > deadline:
                self._book.fail(ValueError(self._describe_unplaced()))
                return
            time.sleep(_WATCH_SECONDS)
        while len(self._links) < self._plan.max_replicas:
            self._grow_if_busy()
            time.sleep(_WATCH_SECONDS)

    def _grow_if_busy(self) -> None:
        """More rows wait than all replicas run, and none is on its way: add as many as there are, up to the most."""
        size = len(self._links)
        if all(link.is_ready for link in self._links) and self._book.num_waiting > self._book.num_slots:
            self._grow(min(size, self._plan.max_replicas - size))
            logger.info("The pool grows from %d replicas to %d", size, len(self._links))

    def _asked(self) -> dict[str, float]:
        return {name: value for name, value in _resources(self._plan.replica.actor_options).items() if value}

    def _describe_unplaced(self) -> str:
        asked = self._asked()
        total = {name: value for name, value in ray.cluster_resources().items() if "node:" not in name}  # type: ignore[no-untyped-call]
        free = ray.available_resources()  # type: ignore[no-untyped-call]
        available = {name: f"{free.get(name, 0):g} of {value:g}" for name, value in sorted(total.items())}
        return (
            f"no replica found a place in {self._plan.placement_timeout_s:g} s: each of {self._plan.min_replicas} asks "
            f"for {asked}, and the cluster has free {available}: start fewer replicas or smaller ones "
            "(concurrency, accelerator_type), or raise placement_timeout_s where nodes are added on demand"
        )


class _ByteRoom:
    """Holds back callers while others have more than so many bytes; one alone always gets in."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
        self._changed = threading.Condition()

    def taken(self, count: int) -> _ByteLoan:
        return _ByteLoan(self, count)

    def acquire(self, count: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + count <= self._limit)
            self._held += count

    def release(self, count: int) -> None:
        with self._changed:
            self._held -= count
            self._changed.notify_all()


@dataclass(frozen=True)
class _ByteLoan:
    room: _ByteRoom
    count: int

    def __enter__(self) -> None:
        self.room.acquire(self.count)

    def __exit__(self, *raised: object) -> None:
        self.room.release(self.count)


def _log_quarantined(quarantined: Sequence[Quarantined]) -> None:
    for row in quarantined:
        logger.error("A row kills engines and is given up: %s", row.cause)


def _resources(options: Mapping[str, Any]) -> dict[str, Any]:
    named = {"CPU": options.get("num_cpus"), "GPU": options.get("num_gpus"), "memory": options.get("memory")}
    accelerator = options.get("accelerator_type")
    return {**named, **(options.get("resources") or {}), "accelerator_type": accelerator}
