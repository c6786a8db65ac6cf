"""Scheduled batches and their results as bytes: arrays one after the other, no pickled objects.

Owns the layout, which both ends take from this file. A step of running rows is a few hundred bytes: slots that grew a
block, and the version of a decode plan that the other end has already. Sampling parameters come as JSON, once for each
admission.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raydata_llm.engine.batch import ScheduledBatch
from raydata_llm.engine.decode_plan import DecodePlan
from raydata_llm.engine.guides import Bitmask
from raydata_llm.engine.logprobs import PromptPiece, RowLogprobs
from raydata_llm.engine.position_logprobs import Wanted
from raydata_llm.engine.prompt_embeds import EmbeddedTokens
from raydata_llm.engine.request import LoRARequest, Request
from raydata_llm.engine.sampler import SampledLogprobs
from raydata_llm.engine.sampling_params import SamplingParams
from raydata_llm.engine.sequence import IntArray, Sequence

Array = npt.NDArray[Any]
_DTYPES = [np.dtype(name) for name in ("uint8", "int32", "int64", "float32")]
_BATCH_ARRAYS = (
    "prefill_slots",
    "prefill_starts",
    "prefill_counts",
    "prefill_token_ids",
    "sample_slots",
    "sample_seq_ids",
    "sample_positions",
    "block_slots",
    "block_columns",
    "blocks",
    "adapter_slots",
    "copy_sources",
    "copy_targets",
    "beam_slots",
    "beam_tokens",
    "beam_counts",
)
_PLAN_ARRAYS = ("slots", "group_starts", "group_lens")


def pack_arrays(arrays: Iterable[Array]) -> bytes:
    """Arrays of one dimension as bytes: their count, dtypes and lengths, then their contents."""
    arrays = [np.ascontiguousarray(array) for array in arrays]
    header = [len(arrays), *(value for array in arrays for value in (_DTYPES.index(array.dtype), len(array)))]
    return b"".join([np.array(header, dtype=np.int64).tobytes(), *(array.tobytes() for array in arrays)])


def unpack_arrays(data: bytes) -> list[Array]:
    """The arrays again; they may not be written to."""
    count = int(np.frombuffer(data, np.int64, 1)[0])
    header = np.frombuffer(data, np.int64, 2 * count, 8).reshape(-1, 2).tolist()
    arrays, offset = [], 8 + 16 * count
    for dtype, length in header:
        arrays.append(np.frombuffer(data, _DTYPES[dtype], length, offset))
        offset += length * _DTYPES[dtype].itemsize
    return arrays


class BatchEncoder:
    """Makes bytes of batches; knows which decode plan was sent last."""

    def __init__(self) -> None:
        self._version: int | None = None

    def encode(self, batch: ScheduledBatch) -> bytes:
        """The batch as bytes."""
        plan = batch.decode_plan
        is_new = plan.version != self._version
        self._version = plan.version
        plan_arrays = [getattr(plan, name) if is_new else np.zeros(0, np.int32) for name in _PLAN_ARRAYS]
        chunks = [(chunk, sequence.seq_id) for chunk, sequence in batch.prompt_logprob_chunks]
        return pack_arrays(
            [
                np.array([plan.version, is_new], dtype=np.int64),
                *plan_arrays,
                *(getattr(batch, name) for name in _BATCH_ARRAYS),
                np.array(batch.released, dtype=np.int32),
                np.array(chunks, dtype=np.int64).ravel(),
                _encode_loads(batch.adapter_loads),
                *_encode_embedded(batch.embedded),
                *_encode_admitted(batch.admitted),
            ]
        )


class BatchDecoder:
    """Makes batches of bytes; keeps the last decode plan and the sequences that run."""

    def __init__(self) -> None:
        self._plan: DecodePlan | None = None
        self._running: dict[int, Sequence] = {}
        self._slots: dict[int, Sequence] = {}

    def decode(self, data: bytes) -> ScheduledBatch:
        """The batch."""
        head, *arrays = unpack_arrays(data)
        plan_arrays, arrays = arrays[: len(_PLAN_ARRAYS)], arrays[len(_PLAN_ARRAYS) :]
        if head[1]:
            self._plan = DecodePlan(version=int(head[0]), **dict(zip(_PLAN_ARRAYS, plan_arrays, strict=True)))
        assert self._plan is not None and self._plan.version == head[0], "the plan was never sent"
        fields, arrays = arrays[: len(_BATCH_ARRAYS)], arrays[len(_BATCH_ARRAYS) :]
        released, chunks, loads, places, values, *admissions = arrays
        for slot in released.tolist():
            sequence = self._slots.pop(slot, None)
            if sequence is not None:
                del self._running[sequence.seq_id]
        admitted = _decode_admitted(*admissions)
        for slot, sequence in admitted:
            self._slots[slot] = self._running[sequence.seq_id] = sequence
        return ScheduledBatch(
            decode_plan=self._plan,
            **dict(zip(_BATCH_ARRAYS, fields, strict=True)),
            released=released.tolist(),
            admitted=admitted,
            prompt_logprob_chunks=[(chunk, self._running[seq]) for chunk, seq in chunks.reshape(-1, 2).tolist()],
            adapter_loads=_decode_loads(loads),
            embedded=EmbeddedTokens(places, values.reshape(len(places), -1)) if len(places) else None,
        )


def _encode_embedded(embedded: EmbeddedTokens | None) -> tuple[Array, Array]:
    if embedded is None:
        return np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.float32)
    return embedded.places, embedded.values.ravel()


def _encode_loads(loads: list[tuple[int, LoRARequest]]) -> Array:
    if not loads:
        return np.zeros(0, dtype=np.uint8)
    entries = [(slot, adapter.lora_name, adapter.lora_int_id, adapter.lora_path) for slot, adapter in loads]
    return np.frombuffer(json.dumps(entries).encode(), dtype=np.uint8)


def _decode_loads(loads: Array) -> list[tuple[int, LoRARequest]]:
    entries = json.loads(loads.tobytes()) if len(loads) else []
    return [(slot, LoRARequest(name, number, path)) for slot, name, number, path in entries]


def _encode_admitted(admitted: list[tuple[int, Sequence]]) -> list[Array]:
    numbers: dict[str, int] = {}
    entries: list[tuple[int, ...]] = []
    tokens: list[IntArray] = []
    stops: list[int] = []
    for slot, sequence in admitted:
        params = sequence.request.sampling_params
        # Not what is for logits processors, which no rank runs: it may be anything.
        text = json.dumps({name: value for name, value in params.to_mapping().items() if name != "extra_args"})
        # Tokens are counted for penalties, and looked at for the log-probabilities of prompts.
        known = sequence.token_ids if _needs_tokens(params) else sequence.token_ids[:0]
        key = np.uint64(sequence.request.key & 0xFFFFFFFFFFFFFFFF).astype(np.int64)
        number = numbers.setdefault(text, len(numbers))
        # Of guided sequences the bitmask bans early ends.
        banned = () if sequence.is_guided else sequence.stop_token_ids
        lens = (sequence.num_prompt, sequence.num_embedded, len(known), len(banned))
        entries.append((slot, sequence.seq_id, sequence.index, int(key), number, *lens))
        tokens.append(known)
        stops.extend(banned)
    return [
        np.array(entries, dtype=np.int64).ravel(),
        np.concatenate([np.zeros(0, np.int32), *tokens]).astype(np.int32),
        np.array(stops, dtype=np.int32),
        np.frombuffer(json.dumps(list(numbers)).encode(), dtype=np.uint8),
    ]


def _decode_admitted(entries: Array, tokens: Array, stops: Array, texts: Array) -> list[tuple[int, Sequence]]:
    params = [SamplingParams.from_mapping(json.loads(text)) for text in json.loads(texts.tobytes())]
    admitted, token, stop = [], 0, 0
    for slot, seq_id, index, key, number, *lens in entries.reshape(-1, 9).tolist():
        num_prompt, num_embedded, num_tokens, num_stops = lens
        token_ids: IntArray = tokens[token : token + num_tokens]
        token += num_tokens
        request = Request(
            request_id=str(seq_id),
            prompt_token_ids=token_ids[:num_prompt],
            sampling_params=params[number],
            key=key & 0xFFFFFFFFFFFFFFFF,
        )
        sequence = Sequence(
            seq_id=seq_id,
            request=request,
            index=index,
            token_ids=token_ids,
            num_prompt=num_prompt,
            num_embedded=num_embedded,
            # Ends are the scheduler's matter.
            max_tokens=0,
            stop_token_ids=tuple(stops[stop : stop + num_stops].tolist()),
        )
        stop += num_stops
        admitted.append((slot, sequence))
    return admitted


def _needs_tokens(params: SamplingParams) -> bool:
    penalised = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0
    return bool(penalised) or params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None


def encode_bitmask(bitmask: Bitmask | None) -> bytes:
    """What guided rows may draw, as bytes; of no row, nothing."""
    if bitmask is None:
        return b""
    return pack_arrays([bitmask.rows, bitmask.words.numpy().ravel()])


def decode_bitmask(data: bytes) -> Bitmask | None:
    """The bitmask again."""
    if not data:
        return None
    rows, words = unpack_arrays(data)
    return Bitmask(rows, torch.from_numpy(words.copy()).view(len(rows), -1))


def encode_result(tokens: IntArray, logprobs: SampledLogprobs | None, pieces: list[PromptPiece]) -> bytes:
    """A step's result as bytes."""
    arrays: list[Array] = [tokens, np.array([logprobs is not None, len(pieces)], dtype=np.int64)]
    if logprobs is not None:
        wanted = logprobs.wanted
        arrays += [
            logprobs.rows,
            np.array([(one.num_top, len(one.token_ids)) for one in wanted], dtype=np.int64).ravel(),
            np.array([token_id for one in wanted for token_id in one.token_ids], dtype=np.int64),
            *_encode_rows(logprobs.values),
        ]
    for piece in pieces:
        where = np.array([piece.sequence.seq_id, piece.start], dtype=np.int64)
        arrays += [where, np.array(piece.token_ids, dtype=np.int64), *_encode_rows(piece.rows)]
    return pack_arrays(arrays)


def decode_result(data: bytes, batch: ScheduledBatch) -> tuple[IntArray, SampledLogprobs | None, list[PromptPiece]]:
    """The result of `batch`."""
    tokens, (has_logprobs, num_pieces), *arrays = unpack_arrays(data)
    rest = iter(arrays)
    logprobs = None
    if has_logprobs:
        rows, wants, named = next(rest), next(rest).reshape(-1, 2).tolist(), next(rest).tolist()
        wanted, start = [], 0
        for num_top, num_named in wants:
            wanted.append(Wanted(num_top, tuple(named[start : start + num_named])))
            start += num_named
        logprobs = SampledLogprobs(rows, wanted, _decode_rows(rest))
    sequences = {sequence.seq_id: sequence for _, sequence in batch.prompt_logprob_chunks}
    pieces = []
    for _ in range(int(num_pieces)):
        (seq_id, first), token_ids = next(rest).tolist(), next(rest).tolist()
        pieces.append(PromptPiece(sequences[seq_id], first, token_ids, _decode_rows(rest)))
    return tokens, logprobs, pieces


def _encode_rows(rows: RowLogprobs) -> list[Array]:
    shape = np.array([*rows.records.shape, rows.named.shape[1]], dtype=np.int64)
    return [shape, rows.records.numpy().ravel(), rows.named.numpy().ravel()]


def _decode_rows(arrays: Iterable[Array]) -> RowLogprobs:
    rest = iter(arrays)
    (count, width, num_named), records, named = (next(rest) for _ in range(3))
    return RowLogprobs(
        records=torch.from_numpy(records.copy()).view(int(count), int(width)),
        named=torch.from_numpy(named.copy()).view(int(count), int(num_named)),
    )
