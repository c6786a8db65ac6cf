"""What the sinks need of a Ray dataset: its finished blocks as references, and settings of one dataset alone.

Owns the names of Ray Data's that this depends on. A setting lies in a copy of the dataset's own context, which datasets
made from it share and which tasks see; the user's DataContext is never changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

if TYPE_CHECKING:
    from ray.data import Dataset


class FinishedBlock(NamedTuple):
    """A block in the object store.

    Args:
        ref: To the block.
        bounds: The rows that are meant, if not all.
        rows: How many.
        size: Bytes of the whole block.
        schema: If it is known and of Arrow.
    """

    ref: Any
    bounds: tuple[int, int] | None
    rows: int
    size: int
    schema: pa.Schema | None


def finished_blocks(dataset: Dataset) -> Iterator[FinishedBlock]:
    """Run the dataset; its blocks that hold rows, as they are finished."""
    for bundle in dataset.iter_internal_ref_bundles():
        slices = getattr(bundle, "slices", None) or [None] * len(bundle.blocks)
        schema = bundle.schema if isinstance(bundle.schema, pa.Schema) else None
        for (ref, metadata), part in zip(_entries(bundle), slices, strict=True):
            bounds = None if part is None else (part.start_offset, part.end_offset)
            rows = metadata.num_rows if bounds is None else bounds[1] - bounds[0]
            if rows is None or rows:
                yield FinishedBlock(ref, bounds, rows or 0, metadata.size_bytes or 0, schema)


def as_table(block: Any, bounds: tuple[int, int] | None) -> pa.Table:
    """A block, or some of its rows, as an Arrow table."""
    from ray.data.block import BlockAccessor

    table = BlockAccessor.for_block(block).to_arrow()
    return table if bounds is None else table.slice(bounds[0], bounds[1] - bounds[0])


def with_setting(dataset: Dataset, name: str, value: Any) -> Dataset:
    """The same dataset with a setting that it, what is made from it, and their tasks have."""
    copy: Dataset = type(dataset).copy(dataset, _deep_copy=True)
    copy.context.set_config(name, value)
    return copy


def setting(dataset: Dataset, name: str) -> Any:
    """A setting of the dataset; None where there is none."""
    return dataset.context.get_config(name)


def refuse_ray_checkpoint(dataset: Dataset) -> None:
    """Refuse to resume by two ledgers at once.

    Raises:
        ValueError: when Ray Data's own checkpoints are on.
    """
    if getattr(dataset.context, "checkpoint_config", None) is not None:
        raise ValueError(
            "resume=ResumeConfig(...) and DataContext.checkpoint_config are both set, and each would skip rows that "
            "the other does not know of: set DataContext.get_current().checkpoint_config = None"
        )


def _entries(bundle: Any) -> list[tuple[Any, Any]]:
    # Ray before 2.59 has plain (reference, metadata) pairs.
    return [entry if isinstance(entry, tuple) else (entry.ref, entry.metadata) for entry in bundle.blocks]
