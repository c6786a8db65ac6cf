"""Log-probabilities that requests asked for, taken from logits on the device.

Owns which tokens a row's answer is about: its own token, then either the likeliest ones or those that the request
named. A prompt's positions are taken a few hundred at a time, so that a long prompt never has all its logits in memory
at once. Knows no scheduling, and not what becomes of an answer on the host (position_logprobs.py).

Shapes: N rows of logits, M that asked, k the most tokens that a row asked for, E the most that one named.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Collection
from dataclasses import dataclass

import numpy as np
import torch

from raydata_llm.engine.adapter_tiles import AdaptedRows, upload_rows
from raydata_llm.engine.batch import ScheduledBatch
from raydata_llm.engine.decoder import Decoder
from raydata_llm.engine.position_logprobs import HEAD, Wanted
from raydata_llm.engine.prompt_scores import ids_computed_at
from raydata_llm.engine.sampling_params import SamplingParams
from raydata_llm.engine.sequence import Sequence
from raydata_llm.engine.upload import to_host, upload
from raydata_llm.kernels.logprobs import logprob_records

# Logits of a piece of a prompt at most: 64 MiB in bfloat16.
_PIECE_LOGITS = 1 << 25


@dataclass(frozen=True)
class RowLogprobs:
    """Log-probabilities of M rows, on the device or on the host.

    Args:
        records: [M, HEAD + 2 * k] int32; `kernels.logprobs` has the layout.
        named: [M, E] float32; of the tokens that the request named.
    """

    records: torch.Tensor
    named: torch.Tensor

    @property
    def top_ids(self) -> torch.Tensor:
        """The likeliest tokens, [M, k] int32."""
        return self.records[:, HEAD::2]

    @property
    def top_logprobs(self) -> torch.Tensor:
        """Theirs, [M, k] float32."""
        return self.records[:, HEAD + 1 :: 2].contiguous().view(torch.float32)

    def to_host(self) -> RowLogprobs:
        """A copy on the host, whole once what was launched is done."""
        return RowLogprobs(to_host(self.records), to_host(self.named))

    def positions(self, wanted: Iterable[Wanted]) -> Iterator[bytes]:
        """Each row's part, as `PositionLogprobs` holds it; from rows that are on the host."""
        records, named = self.records.numpy().tobytes(), self.named.numpy().tobytes()
        stride, named_stride = 4 * self.records.shape[1], 4 * self.named.shape[1]
        for row, one in enumerate(wanted):
            record = records[row * stride : row * stride + one.top_bytes]
            if one.token_ids:
                record += named[row * named_stride : row * named_stride + one.named_bytes]
            yield record


def wanted_of_outputs(params: SamplingParams, vocab_size: int) -> Wanted | None:
    """What a request asked for at its output positions."""
    if params.logprob_token_ids is not None:
        return Wanted(0, tuple(dict.fromkeys(params.logprob_token_ids)))
    return _top(params.logprobs, vocab_size)


def wanted_of_prompt(params: SamplingParams, vocab_size: int) -> Wanted | None:
    """What a request asked for at its prompt positions."""
    return _top(params.prompt_logprobs, vocab_size)


def row_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, wanted: Collection[Wanted], rows: torch.Tensor | None = None
) -> RowLogprobs:
    """Take what rows want from their logits.

    Args:
        logits: [N, V].
        token_ids: [M] int64; the rows' own tokens.
        wanted: [M], or one for all rows.
        rows: [M] int64; which rows of the logits, or None for all.
    """
    num_named = max(len(one.token_ids) for one in wanted)
    records, log_sums = logprob_records(logits, token_ids, max(one.num_top for one in wanted), rows)
    named = torch.empty((len(token_ids), 0), device=logits.device)
    if num_named:
        padded = np.zeros((len(wanted), num_named), dtype=np.int64)
        for row, one in enumerate(wanted):
            padded[row, : len(one.token_ids)] = one.token_ids
        (ids,) = upload(logits.device, padded.ravel())
        ids = ids.view(-1, num_named).expand(len(token_ids), -1)
        raw = logits.gather(1, ids) if rows is None else logits[rows[:, None], ids]
        named = raw.float() - log_sums[:, None]
    return RowLogprobs(records, named)


@dataclass(frozen=True)
class PromptPiece:
    """Log-probabilities of a stretch of a sequence's prompt, on the host.

    Args:
        start: Position of the first token.
        token_ids: The prompt's tokens there.
    """

    sequence: Sequence
    start: int
    token_ids: list[int]
    rows: RowLogprobs

    def deliver(self) -> None:
        """Put the positions into the sequence; those computed again replace the first ones."""
        positions, scores = self.sequence.prompt_logprobs, self.sequence.prompt_scores
        assert positions is not None or scores is not None, "only chunks of sequences that asked have pieces"
        if positions is not None:
            records = self.rows.positions([positions.wanted] * len(self.token_ids))
            positions.put(self.start, b"".join(records))
        if scores is not None:
            scores.put(self.start - 1, self.rows.named.numpy())


def prompt_pieces(decoder: Decoder, hidden: torch.Tensor, batch: ScheduledBatch) -> list[PromptPiece]:
    """Take the log-probabilities of the step's chunks of prompts that asked for them.

    Args:
        hidden: [T, hidden] of all the step's tokens.
    """
    rows_at_once = max(1, _PIECE_LOGITS // decoder.config.vocab_size)
    firsts = batch.num_decodes + np.cumsum(batch.prefill_counts) - batch.prefill_counts
    pieces = []
    for chunk, sequence in batch.prompt_logprob_chunks:
        params, begin = sequence.request.sampling_params, int(batch.prefill_starts[chunk])
        # What is computed at a position says how likely the next token is.
        end = min(begin + int(batch.prefill_counts[chunk]), sequence.num_prompt - 1)
        for start in range(_first_asked(params, begin), end, rows_at_once):
            stop = min(start + rows_at_once, end)
            first = int(firsts[chunk]) + start - begin
            tokens = sequence.token_ids[start + 1 : stop + 1]
            (tokens_there,) = upload(hidden.device, tokens.astype(np.int64))
            adapted = _rows_of_chunk(decoder, batch, first, stop - start)
            logits = decoder.logits(hidden[first : first + stop - start], adapted)
            rows = row_logprobs(logits, tokens_there, _wanted_at(params, decoder.config.vocab_size, start, stop))
            pieces.append(PromptPiece(sequence, start + 1, tokens.tolist(), rows.to_host()))
    return pieces


def _rows_of_chunk(decoder: Decoder, batch: ScheduledBatch, first: int, count: int) -> AdaptedRows | None:
    """Some of a chunk's tokens, which have all one adapter or none."""
    if not len(batch.adapter_slots):
        return None
    return upload_rows(batch.adapter_slots[first : first + count], decoder.device)


def _first_asked(params: SamplingParams, begin: int) -> int:
    """The first position, from `begin` on, that something is asked of."""
    return begin if params.prompt_logprobs is not None else max(begin, params.prompt_logprob_start or 0)


def _wanted_at(params: SamplingParams, vocab_size: int, begin: int, end: int) -> list[Wanted]:
    """What is asked of the prompt's positions, or one for all."""
    top = wanted_of_prompt(params, vocab_size)
    num_top = 0 if top is None else top.num_top
    return [Wanted(num_top, ids) for ids in ids_computed_at(params, begin, end)]


def _top(count: int | None, vocab_size: int) -> Wanted | None:
    return None if count is None else Wanted(vocab_size if count == -1 else min(count, vocab_size))
