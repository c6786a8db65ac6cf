"""A Ray task's view of its block: rows as Ray Data hands them to a user's function, and the block's number.

Owns the few things that only Ray Data can tell from inside a task.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

_CALLS = "raydata_llm_calls"


def block_rows(table: pa.Table) -> list[dict[str, Any]]:
    """The rows, their values converted as `Dataset.map` converts them."""
    from ray.data.block import BlockAccessor

    return list(BlockAccessor.for_block(table).iter_rows(public_row_format=True))


def block_number() -> int:
    """The number of this block among those of its operator, the same in a retry; 0 outside a Ray Data task."""
    from ray.data._internal.execution.interfaces.task_context import TaskContext

    context = TaskContext.get_current()
    return 0 if context is None else int(context.task_idx)


def block_part() -> int:
    """How many blocks this task had before this one (0 unless Ray Data hands it several); asking counts."""
    from ray.data._internal.execution.interfaces.task_context import TaskContext

    context = TaskContext.get_current()
    if context is None:
        return 0
    part = int(context.kwargs.get("raydata_llm_block_part", 0))
    context.kwargs["raydata_llm_block_part"] = part + 1
    return part


def execution_id() -> str:
    """A name of this execution of the dataset, the same in all of its tasks; empty outside Ray Data."""
    from ray.data import DataContext

    return str(getattr(DataContext.get_current(), "dataset_logger_id", None) or "")


def block_size_limit() -> int | None:
    """Bytes from which Ray Data may cut a task's output into several blocks; None when it does not."""
    from ray.data import DataContext

    return DataContext.get_current().target_max_block_size


def columns_to_arrow(columns: dict[str, list[Any]]) -> pa.Table:
    """A table of Python values, with Ray Data's rules for tensors and for what Arrow has no type for."""
    from ray.data.block import BlockAccessor

    table = BlockAccessor.batch_to_arrow_block(columns)
    assert isinstance(table, pa.Table)
    return table


def task_call() -> tuple[int, int]:
    """The block's number, and how many calls for other blocks came before in this task; the same in a retry."""
    from ray.data._internal.execution.interfaces.task_context import TaskContext

    context = TaskContext.get_current()
    if context is None:
        return 0, 0
    call = context.kwargs.get(_CALLS, 0)
    context.kwargs[_CALLS] = call + 1
    return int(context.task_idx), call


def task_name() -> str:
    """A name of the Ray task that this is, the same in a retry and no other task's; empty outside Ray."""
    import ray

    return str(ray.get_runtime_context().get_task_id() or "") if ray.is_initialized() else ""


def is_cancelled() -> bool:
    """Whether nobody wants what this task makes any more: the job failed, was interrupted, or has rows enough."""
    import ray

    if not ray.is_initialized():
        return False
    ask = getattr(ray.get_runtime_context(), "is_canceled", None)
    return ask is not None and bool(ask())
