"""Draws the next token of each row, and its log-probabilities where asked.

Owns the per-slot sampling parameters on the device and the order in which they apply: bans and biases, penalties,
then temperature, truncation and noise. A row that does not use a parameter does not pay for it: which rows do is
known on the host, and only they are gathered.

Shapes: N sampled rows, V vocabulary, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from raydata_llm.engine.batch import ScheduledBatch
from raydata_llm.engine.guides import Bitmask
from raydata_llm.engine.logprobs import RowLogprobs, row_logprobs, wanted_of_outputs
from raydata_llm.engine.position_logprobs import Wanted
from raydata_llm.engine.sequence import IntArray, Sequence
from raydata_llm.engine.upload import UploadBeside, upload
from raydata_llm.kernels.bitmask import apply_bitmask_
from raydata_llm.kernels.logprobs import logprob_records
from raydata_llm.kernels.sampling import greedy, penalise_, sample, truncate

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SampledLogprobs:
    """Log-probabilities of the M rows that asked.

    Args:
        rows: [M] their numbers among the step's sampled rows.
        wanted: [M] what each asked for.
        values: [M] of the drawn tokens.
    """

    rows: Rows
    wanted: list[Wanted]
    values: RowLogprobs


class Sampler:
    """See the module's docstring.

    Args:
        num_slots: S.
        vocab_size: V.
        dtype: Of the logits.
        num_penalty_rows: Size of the pool of token counts; the scheduler runs no more rows with penalties.
        batch_invariant: Take the same kernels for a row whatever the other rows ask for.
        processed_logprobs: Take log-probabilities from what a row is drawn from, not from the model's own logits.
    """

    def __init__(
        self,
        num_slots: int,
        vocab_size: int,
        num_penalty_rows: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        batch_invariant: bool = False,
        processed_logprobs: bool = False,
    ) -> None:
        self._batch_invariant, self._processed_logprobs = batch_invariant, processed_logprobs
        self._dtype = dtype
        self._device = device
        self._vocab_size = vocab_size
        self._temperature = torch.ones(num_slots, device=device)
        self._top_p = torch.ones(num_slots, device=device)
        self._min_p = torch.zeros(num_slots, device=device)
        self._top_k = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._keys = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._penalties = _PenaltyPool(num_slots, vocab_size, num_penalty_rows, device)
        # What the host must know of each slot to leave out what no row uses.
        self._random = np.zeros(num_slots, dtype=bool)
        self._truncated = np.zeros(num_slots, dtype=bool)
        self._adjusted = np.zeros(num_slots, dtype=bool)
        self._has_logprobs = np.zeros(num_slots, dtype=bool)
        self._wanted: list[Wanted | None] = [None] * num_slots
        self._sequences: list[Sequence | None] = [None] * num_slots
        self._adjustments: dict[int, _Adjustment] = {}
        self._upload_beside = UploadBeside(device)

    def release(self, slots: list[int]) -> None:
        """Forget what slots held that are given up."""
        for slot in slots:
            self._sequences[slot] = None
            self._adjustments.pop(slot, None)
            self._penalties.release(slot)

    def admit(self, admitted: list[tuple[int, Sequence]]) -> None:
        """Set the slots of newly admitted sequences."""
        if not admitted:
            return
        params = [sequence.request.sampling_params for _, sequence in admitted]
        slots, temperature, top_p, min_p, top_k, keys = upload(
            self._device,
            np.array([slot for slot, _ in admitted]),
            np.array([p.temperature for p in params], dtype=np.float32),
            np.array([p.top_p for p in params], dtype=np.float32),
            np.array([p.min_p for p in params], dtype=np.float32),
            np.array([p.top_k for p in params]),
            np.array([output_key(sequence.request.key, sequence.index) for _, sequence in admitted]),
        )
        self._temperature[slots] = temperature
        self._top_p[slots] = top_p
        self._min_p[slots] = min_p
        self._top_k[slots] = top_k
        self._keys[slots] = keys
        for (slot, sequence), p in zip(admitted, params, strict=True):
            self._random[slot] = not p.greedy
            self._truncated[slot] = not p.greedy and (p.top_k > 0 or p.top_p < 1 or p.min_p > 0)
            self._adjusted[slot] = bool(p.logit_bias or self._bans_end(sequence)) or p.allowed_token_ids is not None
            if self._adjusted[slot]:
                self._adjustments[slot] = _Adjustment.from_sequence(sequence)
            self._wanted[slot] = wanted_of_outputs(p, self._vocab_size)
            self._has_logprobs[slot] = self._wanted[slot] is not None
            self._sequences[slot] = sequence
            self._penalties.admit(slot, sequence)

    def sample(
        self,
        logits: torch.Tensor,
        batch: ScheduledBatch,
        slots_on_device: torch.Tensor,
        positions: torch.Tensor,
        bitmask: Bitmask | None = None,
    ) -> tuple[torch.Tensor, SampledLogprobs | None]:
        """Draw a token a row.

        Args:
            logits: [N, V] in the model's dtype; may be changed in place.
            slots_on_device, positions: [N]; the rows' slots and the positions of the tokens to be drawn.
            bitmask: What guided rows may draw.

        Returns:
            The tokens, [N] int64, and what rows with `logprobs` asked for, taken from the logits as they came, or,
            with `processed_logprobs`, as they were drawn from.
        """
        # First of all, while the device still runs the forward pass: 16 MB for 1,024 rows of 128,256 tokens.
        words = None if bitmask is None else self._upload_beside(bitmask.words)
        slots = batch.sample_slots
        logprob_rows = np.flatnonzero(self._has_logprobs[slots])
        is_penalised, is_adjusted = self._penalties.any(slots), bool(self._adjusted[slots].any())
        has_processors = bitmask is not None and bool(bitmask.processors)
        raw, raw_rows = logits, self._index(logprob_rows) if 0 < len(logprob_rows) < len(slots) else None
        # What a neighbour needs in float32 no row of a batch-invariant step has in another dtype.
        if self._batch_invariant or is_adjusted or is_penalised or has_processors:
            logits = logits.float()
        is_changed = is_adjusted or is_penalised or bitmask is not None
        if len(logprob_rows) and logits is raw and is_changed and not self._processed_logprobs:
            # The rest changes it in place.
            raw, raw_rows = logits.clone() if raw_rows is None else logits[raw_rows], None
        self._adjust_(logits, slots, batch.sample_positions)
        self._penalties.apply_(logits, slots)
        if bitmask is not None and words is not None:
            for row, process in bitmask.processors:
                logits[row] = process(logits[row])
            apply_bitmask_(logits, words, self._index(bitmask.rows))
        if len(logprob_rows) and self._processed_logprobs:
            raw, raw_rows = self._processed(logits, logprob_rows, slots, slots_on_device), None
        tokens = self._draw(logits, slots, slots_on_device, positions)
        self._penalties.count(slots, tokens)
        if not len(logprob_rows):
            return tokens, None
        wanted = [one for slot in slots[logprob_rows].tolist() if (one := self._wanted[slot]) is not None]
        own = tokens if len(logprob_rows) == len(slots) else tokens[self._index(logprob_rows)]
        return tokens, SampledLogprobs(logprob_rows, wanted, row_logprobs(raw, own, wanted, raw_rows))

    def warm_up(self, num_rows: int) -> None:
        """Run the kernels that a step of so many rows may need."""
        dtype = torch.float32 if self._batch_invariant else self._dtype
        logits = torch.zeros((num_rows, self._vocab_size), dtype=dtype, device=self._device)
        slots = torch.zeros(num_rows, dtype=torch.int32, device=self._device)
        greedy(logits)
        # All rows, and some of them, are two kernels.
        for rows in (None, slots.long()):
            logprob_records(logits.to(self._dtype), slots.long(), 1, rows)
        words = torch.full((num_rows, -(-self._vocab_size // 32)), -1, dtype=torch.int32)
        apply_bitmask_(logits, self._upload_beside(words), torch.arange(num_rows, device=self._device))
        for any_truncated in (False, True):
            self._sample(logits, slots, slots, any_truncated=any_truncated)
        if self._processed_logprobs:
            whole = logits.float()
            logprob_records(whole, slots.long(), 1, None)
            truncate(whole, self._top_k[slots], self._top_p[slots], self._min_p[slots])

    def _processed(self, logits: torch.Tensor, rows: Rows, slots: IntArray, of: torch.Tensor) -> torch.Tensor:
        """What these rows are drawn from, float32: at their temperature, without the tokens that are cut away."""
        index = self._index(rows)
        of = of[index].long()
        is_random = self._temperature[of] > 0
        scaled = logits[index].float() / torch.where(is_random, self._temperature[of], 1.0)[:, None]
        if not self._truncated[slots[rows]].any():
            return scaled
        # A greedy row's cuts are not heeded.
        top_k = torch.where(is_random, self._top_k[of], 0)
        top_p, min_p = torch.where(is_random, self._top_p[of], 1.0), torch.where(is_random, self._min_p[of], 0.0)
        return truncate(scaled, top_k, top_p, min_p)

    def _draw(self, logits: torch.Tensor, slots: IntArray, of: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if not self._random[slots].any():
            return greedy(logits)
        any_truncated = self._batch_invariant or bool(self._truncated[slots].any())
        return self._sample(logits, of, positions, any_truncated=any_truncated)

    def _sample(
        self, logits: torch.Tensor, of: torch.Tensor, positions: torch.Tensor, *, any_truncated: bool
    ) -> torch.Tensor:
        return sample(
            logits,
            self._temperature[of],
            self._top_k[of],
            self._top_p[of],
            self._min_p[of],
            self._keys[of],
            positions.long(),
            any_truncated=any_truncated,
        )

    def _adjust_(self, logits: torch.Tensor, slots: IntArray, positions: IntArray) -> None:
        """Allowed tokens, biases and banned early ends, on the rows that have them."""
        for row in np.flatnonzero(self._adjusted[slots]).tolist():
            sequence = self._sequences[slots[row]]
            assert sequence is not None
            params, adjustment = sequence.request.sampling_params, self._adjustments[int(slots[row])]
            if adjustment.allowed is not None:
                allowed = self._index(adjustment.allowed)
                kept = logits[row, allowed]
                logits[row] = float("-inf")
                logits[row, allowed] = kept
            if len(adjustment.biased):
                biased, by = upload(self._device, adjustment.biased, adjustment.bias)
                logits[row, biased] += by
            if self._bans_end(sequence) and positions[row] < sequence.num_prompt + params.min_tokens:
                logits[row].index_fill_(0, self._index(adjustment.stops), float("-inf"))

    def _bans_end(self, sequence: Sequence) -> bool:
        """Whether the end tokens are banned at first, and not by the bitmask."""
        return bool(sequence.request.sampling_params.min_tokens and sequence.stop_token_ids and not sequence.is_guided)

    def _index(self, numbers: npt.NDArray[np.integer]) -> torch.Tensor:
        return upload(self._device, numbers.astype(np.int64))[0]


@dataclass(frozen=True)
class _Adjustment:
    """What is done to a row's logits at every step, as arrays: a list of 100,000 tokens takes 5 ms to be made one.

    Args:
        allowed: The only tokens that may be drawn.
        biased, bias: Tokens, and what is added to their logits.
        stops: Tokens that end the row.
    """

    allowed: npt.NDArray[np.int64] | None
    biased: npt.NDArray[np.int64]
    bias: npt.NDArray[np.float32]
    stops: npt.NDArray[np.int64]

    @classmethod
    def from_sequence(cls, sequence: Sequence) -> _Adjustment:
        params = sequence.request.sampling_params
        bias, allowed = params.logit_bias or {}, params.allowed_token_ids
        return cls(
            allowed=None if allowed is None else np.array(allowed, dtype=np.int64),
            biased=np.array(list(bias), dtype=np.int64),
            bias=np.array(list(bias.values()), dtype=np.float32),
            stops=np.array(sequence.stop_token_ids, dtype=np.int64),
        )


class _PenaltyPool:
    """Token counts of the running rows that have penalties, in a pool that is only made when a row needs it."""

    def __init__(self, num_slots: int, vocab_size: int, num_rows: int, device: torch.device) -> None:
        self._device, self._vocab_size, self._num_rows = device, vocab_size, num_rows
        self._row_of = np.full(num_slots, -1, dtype=np.int64)
        self._free = list(range(num_rows - 1, -1, -1))
        self._values = torch.zeros((3, num_rows), device=device)
        self._in_prompt: torch.Tensor | None = None
        self._counts: torch.Tensor | None = None

    def release(self, slot: int) -> None:
        """Give back the slot's row, if it has one."""
        if self._row_of[slot] >= 0:
            self._free.append(int(self._row_of[slot]))
            self._row_of[slot] = -1

    def admit(self, slot: int, sequence: Sequence) -> None:
        """If the sequence has penalties, take a row and count its tokens."""
        params = sequence.request.sampling_params
        if not (params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0):
            return
        in_prompt, counts = self._pool()
        row = self._take_row()
        self._row_of[slot] = row
        values = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty)
        values_there, tokens = upload(
            self._device, np.array(values, dtype=np.float32), sequence.token_ids.astype(np.int64)
        )
        self._values[:, row] = values_there
        prompt, written = tokens[sequence.num_embedded : sequence.num_prompt], tokens[sequence.num_prompt :]
        in_prompt[row] = False
        in_prompt[row].index_fill_(0, prompt, True)
        counts[row] = 0
        counts[row].scatter_add_(0, written, torch.ones_like(written, dtype=torch.int32))

    def any(self, slots: IntArray) -> bool:
        """Whether any of the slots has penalties."""
        return bool((self._row_of[slots] >= 0).any())

    def apply_(self, logits: torch.Tensor, slots: IntArray) -> None:
        """Penalise the rows that have penalties, in place."""
        of = self._row_of[slots]
        if (of >= 0).any():
            in_prompt, counts = self._pool()
            presence, frequency, repetition = self._values
            (pool_rows,) = upload(self._device, of)
            penalise_(logits, in_prompt, counts, presence, frequency, repetition, pool_rows)

    def count(self, slots: IntArray, tokens: torch.Tensor) -> None:
        """Take in the drawn tokens."""
        found = self._rows(slots)
        if found is not None:
            rows, pool_rows = found
            self._pool()[1][pool_rows, tokens[rows]] += 1

    def _rows(self, slots: IntArray) -> tuple[torch.Tensor, torch.Tensor] | None:
        rows = np.flatnonzero(self._row_of[slots] >= 0)
        if not len(rows):
            return None
        on_device, pool_rows = upload(self._device, rows, self._row_of[slots[rows]])
        return on_device, pool_rows

    def _take_row(self) -> int:
        assert self._free, "the scheduler admits no more rows with penalties than the pool holds"
        return self._free.pop()

    def _pool(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._in_prompt is None or self._counts is None:
            shape = (self._num_rows, self._vocab_size)
            self._in_prompt = torch.zeros(shape, dtype=torch.bool, device=self._device)
            self._counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
        return self._in_prompt, self._counts


def output_key(key: int, index: int) -> int:
    """The key of one of a request's n outputs, as a signed 64-bit integer."""
    mixed = (key + index * 0xD1342543DE82EF95) & 0xFFFFFFFFFFFFFFFF
    return mixed - (1 << 64) if mixed >> 63 else mixed
