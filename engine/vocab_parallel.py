"""Sampling where each rank has the logits of a share of the vocabulary.

Owns which rows can do without whole logits: of greedy rows and of plain draws each rank's best token is enough, of rows
with a small top_k each rank's likeliest. Those few numbers are gathered. Other rows (penalties, biases, log-probs, a
top_p without a top_k, whatever is new) have their logits gathered and are the sampler's, alone. Noise depends on key,
position and token only, so all ranks come to the same tokens.

Shapes: N sampled rows, M some of them, C candidates of a rank, P ranks.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from raydata_llm.engine.batch import ScheduledBatch
from raydata_llm.engine.decoder import Decoder
from raydata_llm.engine.guides import Bitmask
from raydata_llm.engine.sampler import SampledLogprobs, Sampler, output_key
from raydata_llm.engine.sampling_params import SamplingParams
from raydata_llm.engine.sequence import IntArray, Sequence
from raydata_llm.engine.upload import upload
from raydata_llm.kernels.sampling import greedy, row_seeds, sample, token_noise, truncate_ref

# Likeliest tokens of each rank that are gathered for rows with a top_k of this or less.
_CANDIDATES = 64
# What does not bear on a step's logits.
_HARMLESS = {
    *("n", "temperature", "seed", "stop", "stop_token_ids", "ignore_eos", "max_tokens", "detokenize"),
    *("skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output"),
    *("truncate_prompt_tokens", "prompt_logprobs", "prompt_logprob_token_ids", "prompt_logprob_start"),
    "repetition_detection",
}
_CUTS = {"top_k", "top_p", "min_p"}
_PLAIN, _CUT, _WHOLE = 0, 1, 2


class VocabParallelSampler:
    """Takes the sampler's place on ranks that are not alone.

    Args:
        sampler: For rows that need whole logits.
        decoder: Its shard says which tokens are here.
    """

    def __init__(self, sampler: Sampler, decoder: Decoder, num_slots: int) -> None:
        self._sampler, self._decoder = sampler, decoder
        self._device = decoder.device
        self._kind = np.zeros(num_slots, dtype=np.int8)
        self._random = np.zeros(num_slots, dtype=bool)
        self._temperature = torch.ones(num_slots, device=self._device)
        self._top_p = torch.ones(num_slots, device=self._device)
        self._min_p = torch.zeros(num_slots, device=self._device)
        self._top_k = torch.zeros(num_slots, dtype=torch.int64, device=self._device)
        self._keys = torch.zeros(num_slots, dtype=torch.int64, device=self._device)

    def release(self, slots: list[int]) -> None:
        """Forget what slots held that are given up."""
        self._sampler.release(slots)

    def admit(self, admitted: list[tuple[int, Sequence]]) -> None:
        """Set the slots of newly admitted sequences."""
        self._sampler.admit(admitted)
        if not admitted:
            return
        params = [sequence.request.sampling_params for _, sequence in admitted]
        slots = np.array([slot for slot, _ in admitted])
        self._kind[slots] = [_kind(one) for one in params]
        self._random[slots] = [not one.greedy for one in params]
        there, temperature, top_p, min_p, top_k, keys = upload(
            self._device,
            slots,
            np.array([one.temperature for one in params], dtype=np.float32),
            np.array([one.top_p for one in params], dtype=np.float32),
            np.array([one.min_p for one in params], dtype=np.float32),
            np.array([one.top_k for one in params]),
            np.array([output_key(sequence.request.key, sequence.index) for _, sequence in admitted]),
        )
        self._temperature[there], self._top_p[there], self._min_p[there] = temperature, top_p, min_p
        self._top_k[there], self._keys[there] = top_k, keys

    def sample(
        self,
        part: torch.Tensor,
        batch: ScheduledBatch,
        slots_on_device: torch.Tensor,
        positions: torch.Tensor,
        bitmask: Bitmask | None = None,
    ) -> tuple[torch.Tensor, SampledLogprobs | None]:
        """As `Sampler.sample`, of this rank's part of the logits."""
        kinds = self._kind[batch.sample_slots]
        slots = slots_on_device.long()
        present = np.unique(kinds).tolist()
        if len(present) == 1:
            # Mostly so, and a part of the logits is not to be copied for it.
            return self._sample_kind(present[0], part, batch, np.arange(len(kinds)), slots, positions, bitmask)
        tokens = torch.zeros(len(part), dtype=torch.int64, device=self._device)
        logprobs = None
        for kind in present:
            chosen = np.flatnonzero(kinds == kind)
            (rows,) = upload(self._device, chosen)
            found = self._sample_kind(kind, part[rows], batch, chosen, slots[rows], positions[rows], bitmask)
            tokens[rows], logprobs = found[0], found[1] or logprobs
        return tokens, logprobs

    def _sample_kind(
        self,
        kind: int,
        part: torch.Tensor,
        batch: ScheduledBatch,
        rows: np.ndarray[tuple[int], np.dtype[np.int64]],
        slots: torch.Tensor,
        positions: torch.Tensor,
        bitmask: Bitmask | None,
    ) -> tuple[torch.Tensor, SampledLogprobs | None]:
        """Sample for some rows of the batch, all of one kind."""
        if kind == _WHOLE:
            whole = self._decoder.whole_logits(part)
            return self._sample_whole(whole, batch, rows, slots, positions, bitmask)
        if kind == _CUT:
            return self._draw_cut(part, slots, positions), None
        is_random = bool(self._random[batch.sample_slots[rows]].any())
        return self._draw_plain(part, slots, positions, is_random=is_random), None

    def warm_up(self, num_rows: int) -> None:
        """Run the kernels that a step of so many rows may need, and the gathers, in the same order on each rank."""
        slots = torch.zeros(num_rows, dtype=torch.int64, device=self._device)
        num_tokens = len(self._decoder.shard.tokens)
        part = torch.zeros((num_rows, num_tokens), dtype=self._decoder.dtype, device=self._device)
        for is_random in (False, True):
            self._draw_plain(part, slots, slots, is_random=is_random)
        self._draw_cut(part, slots, slots)
        self._decoder.whole_logits(part)
        self._sampler.warm_up(num_rows)

    def _sample_whole(
        self,
        logits: torch.Tensor,
        batch: ScheduledBatch,
        rows: np.ndarray[tuple[int], np.dtype[np.int64]],
        slots: torch.Tensor,
        positions: torch.Tensor,
        bitmask: Bitmask | None,
    ) -> tuple[torch.Tensor, SampledLogprobs | None]:
        own: IntArray = batch.sample_slots[rows]
        some = dataclasses.replace(
            batch,
            sample_slots=own,
            sample_seq_ids=batch.sample_seq_ids[rows],
            sample_positions=batch.sample_positions[rows],
        )
        if bitmask is not None:
            # Guided rows are all among these.
            bitmask = Bitmask(np.searchsorted(rows, bitmask.rows), bitmask.words)
        tokens, logprobs = self._sampler.sample(logits, some, slots, positions, bitmask)
        return tokens, logprobs and dataclasses.replace(logprobs, rows=rows[logprobs.rows])

    def _draw_plain(
        self, part: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, *, is_random: bool
    ) -> torch.Tensor:
        first = self._decoder.shard.tokens.start
        if not is_random:
            best = greedy(part)[:, None]
            return _likeliest(*self._gathered(part.gather(1, best).float(), best, width=1))
        temperature, keys, positions = self._temperature[slots], self._keys[slots], positions.long()
        uncut = (self._top_k[slots], self._top_p[slots], self._min_p[slots])
        best = sample(part, temperature, *uncut, keys, positions, any_truncated=False, first_token=first)[:, None]
        scores = part.gather(1, best).float()
        noise = token_noise(row_seeds(keys, positions), (best + first).int())
        scores = torch.where(temperature[:, None] > 0, scores / temperature.clamp(min=1e-30)[:, None] + noise, scores)
        return _likeliest(*self._gathered(scores, best, width=1))

    def _draw_cut(self, part: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        top = part.float().topk(min(_CANDIDATES, part.shape[1]), dim=-1)
        width = min(_CANDIDATES, self._decoder.shard.tokens_per_rank)
        values, tokens = self._gathered(top.values, top.indices, width=width)
        scaled = values / self._temperature[slots][:, None]
        kept = truncate_ref(scaled, self._top_k[slots], self._top_p[slots], self._min_p[slots])
        seeds = row_seeds(self._keys[slots], positions.long())
        return _likeliest(kept + token_noise(seeds, tokens.int()), tokens)

    def _gathered(self, values: torch.Tensor, places: torch.Tensor, *, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All ranks' candidates, [M, P * width], and their tokens; one gather of float64, which is exact for both."""
        both = torch.stack([values.double(), (places + self._decoder.shard.tokens.start).double()])
        if width > values.shape[1]:
            # The last rank may have fewer tokens than that.
            both = torch.nn.functional.pad(both, (0, width - values.shape[1]), value=float("-inf"))
            both[1, :, values.shape[1] :] = 0
        gathered = self._decoder.parallel.all_gather(both).permute(1, 2, 0, 3).flatten(2)
        return gathered[0].float(), gathered[1].long()


def _likeliest(scores: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The token of the best score; the lowest of equals."""
    best = scores.amax(dim=-1, keepdim=True)
    return tokens.masked_fill(scores < best, torch.iinfo(torch.int64).max).amin(dim=-1)


def _kind(params: SamplingParams) -> int:
    changed = set(params.to_mapping()) - _HARMLESS
    if changed - _CUTS:
        return _WHOLE
    if params.greedy or not changed:
        return _PLAIN
    return _CUT if 0 < params.top_k <= _CANDIDATES else _WHOLE
