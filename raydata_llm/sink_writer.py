"""Finished blocks become files: the driver's side of a sink.

Collects references to blocks until a file's worth or its time is there, hands them to write tasks, a few at once, and
gathers what was written. Rows never pass through the driver. Owns file numbers, the schema of all files, and what
happens on the way out. Invariant: a block is in exactly one file's task.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import pyarrow as pa

from raydata_llm.redaction import masked_logger
from raydata_llm.resume_broker import BrokerHandle, nothing_matches
from raydata_llm.row_payload import RESERVED_COLUMNS
from raydata_llm.sink_dataset import FinishedBlock, as_table
from raydata_llm.sink_format import merge_schemas
from raydata_llm.sink_limits import FileLimits
from raydata_llm.sink_task import WritePlan, WrittenFile, rewrite_file, write_file

logger = masked_logger(__name__)

_TASK_RETRIES = 4
_CLOCK_SECONDS = 0.5
# Arguments of a write task at most; each costs some 10 us.
_MOST_BLOCKS = 10_000
# By which the next files' sizes are foretold.
_RECENT_FILES = 32


class FileWriter:
    """Writes blocks as files; use it as a context manager.

    Args:
        plan: Of the write tasks.
        limits: When a file is full, and how many are written at once.
        schema: Of the files that are there already.
        broker: The name and actor of a run that can be resumed.
    """

    def __init__(
        self, plan: WritePlan, limits: FileLimits, schema: pa.Schema | None = None, broker: Any = None
    ) -> None:
        import ray

        self.files: list[WrittenFile] = []
        self.schema = schema
        self._plan = plan
        self._plan_ref = ray.put(plan)
        self._limits = limits
        # A task beyond the CPUs starts a process of its own: on two cores four at once took 4.2 s where two took 0.8.
        self._at_once = min(limits.files_at_once, max(1, int(ray.cluster_resources().get("CPU", 1))))  # type: ignore[no-untyped-call]
        self._broker = broker
        self._proven = broker is None
        self._pending: list[FinishedBlock] = []
        self._pending_bytes = 0
        self._full_at = limits.block_bytes([])
        self._since = 0.0
        self._count = 0
        self._under_way: list[Any] = []
        self._error: Exception | None = None
        self._lock = threading.RLock()
        self._stopped = threading.Event()
        self._clock = threading.Thread(target=self._watch_clock, name="raydata_llm-sink-clock", daemon=True)

    def __enter__(self) -> FileWriter:
        self._clock.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._clock.join()

    @property
    def rows_written(self) -> int:
        """Rows in the files that are known to be there."""
        return sum(file.rows for file in self.files)

    def add(self, block: FinishedBlock) -> None:
        """Take a finished block.

        Raises:
            ValueError, OSError: when an earlier file could not be written.
        """
        with self._lock:
            self._raise_error()
            self._since = self._since if self._pending else time.monotonic()
            self._pending.append(block)
            self._pending_bytes += block.size
            if self._pending_bytes >= self._full_at or len(self._pending) >= _MOST_BLOCKS:
                self._begin_file()

    def finish(self) -> None:
        """Write what is left, wait for all files and give them one schema.

        Raises:
            ValueError, OSError: when a file could not be written.
        """
        with self._lock:
            self._raise_error()
            if not self._proven and not self._prove() and self._pending:
                raise ValueError(nothing_matches(self._counts()))
            self._proven = True
            self._begin_file()
            self._gather(0)
            self._raise_error()
            self._mend([file for file in self.files if file.schema is not None and file.schema != self.schema])

    def stop(self) -> None:
        """Write what has come so far: the job ends early, by an error or by a signal."""
        with self._lock:
            if self._error is None:
                self._begin_file()
            self._gather(0)
            if self._error is not None:
                logger.error("Not all finished rows could be written: %s", self._error)

    def mend(self, files: Iterable[WrittenFile]) -> None:
        """Bring files of earlier runs to the schema of all."""
        with self._lock:
            self._mend([file for file in files if file.schema != self.schema])

    def _begin_file(self) -> None:
        if not self._pending or not (self._proven or self._prove()):
            return
        # Where uploads are slow a signal mostly finds the driver here: the blocks still pend, for `stop` to write.
        self._gather(self._at_once - 1)
        blocks, self._pending, self._pending_bytes = self._pending, [], 0
        self._learn(block.schema for block in blocks if block.schema is not None)
        bounds = [block.bounds for block in blocks]
        task = _remote(_write, self._plan)
        refs = [block.ref for block in blocks]
        self._under_way.append(task.remote(self._plan_ref, self._count, self.schema, self._broker, bounds, *refs))
        self._count += 1

    def _prove(self) -> bool:
        """Whether some row was found committed: until then all rows may be strangers, and none is written."""
        counts = self._counts()
        # Where nobody asked, the blocks were made before this run: their write tasks ask.
        self._proven = not counts.committed or not counts.asked or counts.found > 0
        return self._proven

    def _counts(self) -> Any:
        import ray

        return ray.get(self._broker[1].counts.remote())

    def _learn(self, schemas: Iterable[pa.Schema]) -> None:
        if not self._plan.format.has_schema:
            return
        plain = [pa.schema([field for field in schema if field.name not in RESERVED_COLUMNS]) for schema in schemas]
        self.schema = merge_schemas([*([] if self.schema is None else [self.schema]), *plain])

    def _gather(self, remaining: int) -> None:
        """Wait until no more than so many files are under way."""
        import ray

        while len(self._under_way) > remaining:
            [done], self._under_way = ray.wait(self._under_way, num_returns=1)
            try:
                files = ray.get(done)
                self.files += files
                self._full_at = self._limits.block_bytes(self.files[-_RECENT_FILES:])
                self._learn(file.schema for file in files if file.schema is not None)
            except Exception as error:
                self._error = self._error or _cause(error)

    def _has_room(self) -> bool:
        import ray

        return len(self._under_way) < self._at_once or bool(ray.wait(self._under_way, timeout=0)[0])

    def _mend(self, files: list[WrittenFile]) -> None:
        import ray

        task = _remote(rewrite_file, self._plan)
        for start in range(0, len(files), self._at_once):
            some = files[start : start + self._at_once]
            try:
                ray.get([task.remote(self._plan_ref, file, self.schema) for file in some])
            except ray.exceptions.RayTaskError as error:
                raise _cause(error) from None

    def _watch_clock(self) -> None:
        while not self._stopped.wait(_CLOCK_SECONDS):
            with self._lock:
                is_due = self._pending and time.monotonic() - self._since >= self._limits.file_seconds
                # Not to wait with the lock in hand: a signal would find the driver with a block that is not pending.
                if is_due and self._has_room():
                    try:
                        self._begin_file()
                    except Exception as error:
                        self._error = self._error or _cause(error)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error


def _cause(error: Exception) -> Exception:
    """The error of a task without Ray's pages around it."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, Exception) else error


@functools.lru_cache(maxsize=8)
def _remote(function: Any, plan: WritePlan) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    options: dict[str, Any] = {"num_cpus": 0, "max_retries": _TASK_RETRIES}
    if plan.storage.is_local:  # other nodes have another disk under that name
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
    return ray.remote(function).options(**options)


def _write(
    plan: WritePlan, number: int, schema: pa.Schema | None, broker: Any, bounds: list[Any], *blocks: Any
) -> list[WrittenFile]:
    tables = [as_table(block, part) for block, part in zip(blocks, bounds, strict=True)]
    return write_file(plan, number, schema, None if broker is None else BrokerHandle(*broker), tables)
