"""Log-probabilities that requests asked for: taken from logits on the device, put into maps on the host.

Owns what a position's map holds: the position's own token, then either the likeliest tokens or the ones that the
request named. A prompt's positions are taken a few hundred at a time, so that a long prompt never has all its logits
in memory at once. Knows no scheduling.

Shapes: M rows, k the most tokens that a row asked for, E the most that one named.
"""

from __future__ import annotations

from collections.abc import Sequence as Collection
from dataclasses import dataclass

import numpy as np
import torch

from raydata_llm.engine.batch import ScheduledBatch
from raydata_llm.engine.decoder import Decoder
from raydata_llm.engine.request import Logprob
from raydata_llm.engine.sampling_params import SamplingParams
from raydata_llm.engine.sequence import Sequence
from raydata_llm.engine.upload import to_host, upload
from raydata_llm.kernels.invariant_topk import invariant_topk
from raydata_llm.kernels.logprobs import token_logprobs

# Logits of a piece of a prompt at most: 64 MiB in bfloat16.
_PIECE_LOGITS = 1 << 25


@dataclass(frozen=True)
class RowLogprobs:
    """Log-probabilities of M rows, on the device or on the host.

    Args:
        chosen, ranks: [M] of each row's own token; the likeliest has rank 1.
        top_ids, top_logprobs: [M, k] of the likeliest tokens.
        named: [M, E] of the tokens that the request named.
    """

    chosen: torch.Tensor
    ranks: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor
    named: torch.Tensor

    def to_host(self) -> RowLogprobs:
        """A copy on the host, whole once what was launched is done."""
        return RowLogprobs(
            to_host(self.chosen),
            to_host(self.ranks),
            to_host(self.top_ids),
            to_host(self.top_logprobs),
            to_host(self.named),
        )


@dataclass(frozen=True)
class Wanted:
    """What a row's map holds beside the row's own token.

    Args:
        num_top: How many of the likeliest tokens; the vocabulary's size for all.
        token_ids: Tokens that the request named.
    """

    num_top: int
    token_ids: tuple[int, ...] = ()


def wanted_of_outputs(params: SamplingParams, vocab_size: int) -> Wanted | None:
    """What a request asked for at its output positions."""
    if params.logprob_token_ids is not None:
        return Wanted(0, tuple(params.logprob_token_ids))
    return _top(params.logprobs, vocab_size)


def wanted_of_prompt(params: SamplingParams, vocab_size: int) -> Wanted | None:
    """What a request asked for at its prompt positions."""
    return _top(params.prompt_logprobs, vocab_size)


def row_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, wanted: Collection[Wanted], *, batch_invariant: bool = False
) -> RowLogprobs:
    """Take what rows want from their logits.

    Args:
        logits: [M, V].
        token_ids: [M] int64; the rows' own tokens.
        wanted: [M], or one for all rows.
        batch_invariant: Of equally likely tokens name the first ones; else whichever torch does.
    """
    width = max(one.num_top for one in wanted)
    num_named = max(len(one.token_ids) for one in wanted)
    chosen, ranks, log_sums = token_logprobs(logits, token_ids)
    topk = invariant_topk if batch_invariant else torch.topk
    top_values, top_ids = topk(logits, min(width, logits.shape[1]))
    named = logits[:, :0]
    if num_named:
        padded = np.zeros((len(wanted), num_named), dtype=np.int64)
        for row, one in enumerate(wanted):
            padded[row, : len(one.token_ids)] = one.token_ids
        (ids,) = upload(logits.device, padded.ravel())
        named = logits.gather(1, ids.view(-1, num_named).expand(len(logits), -1))
    return RowLogprobs(
        chosen, ranks, top_ids, top_values.float() - log_sums[:, None], named.float() - log_sums[:, None]
    )


def position_maps(rows: RowLogprobs, token_ids: list[int], wanted: list[Wanted]) -> list[dict[int, Logprob]]:
    """A map for each of M positions, from rows that are on the host; arguments as `row_logprobs`."""
    entries = zip(
        token_ids,
        rows.chosen.tolist(),
        rows.ranks.tolist(),
        rows.top_ids.tolist(),
        rows.top_logprobs.tolist(),
        rows.named.tolist(),
        wanted if len(wanted) == len(token_ids) else wanted * len(token_ids),
        strict=True,
    )
    maps = []
    for token_id, chosen, rank, top_ids, top_logprobs, named, one in entries:
        likeliest = zip(top_ids[: one.num_top], top_logprobs, range(1, one.num_top + 1), strict=False)
        found = {token_id: Logprob(chosen, rank)}
        # No rank is known of a token that was only named.
        found |= {named_id: Logprob(value, None) for named_id, value in zip(one.token_ids, named, strict=False)}
        found |= {top_id: Logprob(value, place) for top_id, value, place in likeliest}
        found[token_id] = Logprob(chosen, rank)
        maps.append(found)
    return maps


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
    wanted: Wanted
    rows: RowLogprobs

    def deliver(self) -> None:
        """Put the positions' maps into the sequence; those of positions computed again replace the first ones."""
        maps = position_maps(self.rows, self.token_ids, [self.wanted])
        known = self.sequence.prompt_logprobs
        assert known is not None and len(known) >= self.start, "prompts are computed from their start"
        known[self.start : self.start + len(maps)] = maps


def prompt_pieces(decoder: Decoder, hidden: torch.Tensor, batch: ScheduledBatch) -> list[PromptPiece]:
    """Take the log-probabilities of the step's chunks of prompts that asked for them.

    Args:
        hidden: [T, hidden] of all the step's tokens.
    """
    rows_at_once = max(1, _PIECE_LOGITS // decoder.config.vocab_size)
    firsts = batch.num_decodes + np.cumsum(batch.prefill_counts) - batch.prefill_counts
    pieces = []
    for chunk, sequence in batch.prompt_logprob_chunks:
        wanted = wanted_of_prompt(sequence.request.sampling_params, decoder.config.vocab_size)
        assert wanted is not None, "the scheduler names only chunks that asked"
        begin = int(batch.prefill_starts[chunk])
        # What is computed at a position says how likely the next token is.
        end = min(begin + int(batch.prefill_counts[chunk]), sequence.num_prompt - 1)
        for start in range(begin, end, rows_at_once):
            stop = min(start + rows_at_once, end)
            first = int(firsts[chunk]) + start - begin
            tokens = sequence.token_ids[start + 1 : stop + 1]
            (tokens_there,) = upload(hidden.device, tokens.astype(np.int64))
            logits = decoder.logits(hidden[first : first + stop - start])
            rows = row_logprobs(logits, tokens_there, [wanted], batch_invariant=decoder.batch_invariant)
            pieces.append(PromptPiece(sequence, start + 1, tokens.tolist(), wanted, rows.to_host()))
    return pieces


def _top(count: int | None, vocab_size: int) -> Wanted | None:
    return None if count is None else Wanted(vocab_size if count == -1 else min(count, vocab_size))
