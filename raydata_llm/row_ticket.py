"""What the dispatcher knows of a row without opening its request: fixed bytes in a column of their own.

Owns the ticket's layout, what a row is expected to cost, and which rows of a block start with the same tokens. Knows no
engine and no replica. Invariant: equal rows have equal digests in every process.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from raydata_llm.row_payload import RowRequest

# `cost` is negative for a row that failed before; `prefix` is 0 for a row that shares none.
_TICKET = np.dtype([("cost", "<i8"), ("prefix", "<u8"), ("digest", "<u8", 2)])
# A row without max_tokens may write up to the model's limit: more than those that say.
_UNLIMITED = 1 << 20
# Shorter prefixes cost less to compute again than a row's place in the queue is worth.
_PREFIX_LENGTHS = (2048, 512, 128)

Tickets = np.ndarray[Any, Any]


def append_tickets(table: pa.Table, name: str, requests: Sequence[RowRequest]) -> pa.Table:
    """The table with a ticket for each of its rows."""
    tickets = np.zeros(len(requests), _TICKET)
    tickets["cost"] = [_cost(request) for request in requests]
    # Embeddings are not compared: two rows with the same are rare, and what they share is found by their engine.
    prompts = [None if request.prompt_embeds is not None else request.prompt_token_ids for request in requests]
    tickets["prefix"] = shared_prefixes(prompts)
    digests = b"".join(request.digest for request in requests)
    tickets["digest"] = np.frombuffer(digests, "<u8").reshape(-1, 2)
    width = _TICKET.itemsize
    column = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(width), len(requests), [None, pa.py_buffer(tickets.tobytes())]
    )
    return table.append_column(name, column)


def read_tickets(column: pa.ChunkedArray) -> Tickets:
    """The tickets of a block: fields cost, prefix, and digest as two numbers."""
    return np.frombuffer(b"".join(column.to_pylist()), _TICKET)


def shared_prefixes(prompts: Sequence[Any]) -> list[int]:
    """For each prompt, a number that it shares with those of the block that start with the same tokens; 0 if none does.

    Args:
        prompts: Arrays of token ids, None where there is none.
    """
    marks = [0] * len(prompts)
    for length in _PREFIX_LENGTHS:
        heads = {
            index: _hash(prompt[:length].tobytes())
            for index, prompt in enumerate(prompts)
            if not marks[index] and prompt is not None and len(prompt) >= length
        }
        copies = Counter(heads.values())
        for index, head in heads.items():
            if copies[head] > 1:
                marks[index] = head
    return marks


def _cost(request: RowRequest) -> int:
    """Tokens that the row may write, or of a pooled row reads; wrong values are the replica's to refuse."""
    if request.error is not None:
        return -1
    if request.pooling_params is not None and request.prompt_token_ids is not None:
        return len(request.prompt_token_ids)
    params = request.sampling_params
    asked = params.get("max_tokens") if isinstance(params, Mapping) else None
    is_number = isinstance(asked, (int, float)) and asked >= 0
    return min(int(min(asked, _UNLIMITED)), _UNLIMITED) if is_number and asked is not None else _UNLIMITED


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") or 1
