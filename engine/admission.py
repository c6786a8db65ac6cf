"""Whether waiting sequences fit into the KV blocks, now and at the peak of all that runs.

Owns the judgement of one burst of admissions, in which those it let in count already. Changes no slot and no block: the
intake admits.
"""

from __future__ import annotations

import numpy as np

from raydata_llm.engine.block_forecast import BlockForecast
from raydata_llm.engine.block_manager import BlockManager
from raydata_llm.engine.length_model import LengthModel
from raydata_llm.engine.sequence import Sequence, SequenceTable

# Share of the blocks kept free where lengths are drawn, not known: the draws of some hundred rows err by 1 to 2 %.
_HEADROOM = 0.04
# Ends that lie apart by less than this share of what is still to be written are as good as one.
_APART, _NEARLY_ALL = 1 / 8, 0.9


class Admission:
    """A burst's judge; make a new one for each burst.

    Args:
        table: What runs.
        blocks: The pool.
        lengths: What is known of lengths.
    """

    def __init__(self, table: SequenceTable, blocks: BlockManager, lengths: LengthModel) -> None:
        self._table = table
        self._blocks = blocks
        self._lengths = lengths
        self._forecast: BlockForecast | None = None
        self._is_exact = False
        self._spare = 0

    def fits(self, sequence: Sequence, num_cached: int, num_evictable: int) -> bool:
        """Whether a sequence may be admitted; if so it is taken to be.

        Args:
            num_cached: Blocks of its prefix that are cached.
            num_evictable: Of these, blocks that nobody holds.
        """
        size, known = self._table.block_size, len(sequence.token_ids)
        if -(-known // size) - num_cached + num_evictable > self._blocks.num_available:
            return False
        if self._table.num_running == 0:
            return True  # alone it fits, whatever is predicted: the engine was sized so
        return self._keeps_peak(sequence, num_cached, num_evictable)

    def num_fitting(self, sequence: Sequence, num_cached: int) -> int:
        """About how many sequences such as this one, of a known end, would fit beside those that run."""
        assert self._table.num_running > 0, "the first is admitted without a forecast"
        own = -(-sequence.max_tokens // self._table.block_size) - num_cached
        peak = self._forecast_of_all().peak
        spare = self._limit(False) - peak if self._is_exact else self._spare
        return max(0, spare) // max(1, own)

    def ends_with_others(self, sequence: Sequence) -> bool:
        """Whether the sequence, of a known end, would end about when nearly all that run do: as one round."""
        remaining = sequence.max_tokens - len(sequence.token_ids)
        apart = np.abs(self._forecast_of_all().remaining - remaining)
        return bool(np.mean(apart <= _APART * remaining) >= _NEARLY_ALL)

    def _keeps_peak(self, sequence: Sequence, num_cached: int, num_evictable: int) -> bool:
        # Peaks add up to no less than the peak of the sum: while there is room for a sequence's own, all that it may
        # write, nothing need be simulated.
        most = -(-sequence.max_tokens // self._table.block_size) - num_cached + num_evictable
        self._forecast_of_all()
        if not self._is_exact:
            if most <= self._spare:
                self._spare -= most
                return True
            self._forecast = forecast(self._table, self._blocks, self._lengths)
            self._is_exact = True
        may_stop = sequence.may_stop
        return self._forecast_of_all().add_within(
            self._limit(may_stop),
            len(sequence.token_ids),
            self._remaining(sequence, may_stop),
            num_cached,
            num_evictable,
        )

    def _forecast_of_all(self) -> BlockForecast:
        if self._forecast is None:
            self._forecast = forecast(self._table, self._blocks, self._lengths)
            self._spare = self._limit(False) - self._forecast.peak
        return self._forecast

    def _limit(self, drawn: bool) -> int:
        usable = self._blocks.num_usable
        return usable - int(_HEADROOM * usable) if drawn else usable

    def _remaining(self, sequence: Sequence, may_stop: bool) -> int:
        written, most = len(sequence.token_ids) - sequence.num_prompt, sequence.max_tokens - sequence.num_prompt
        if not may_stop:
            return most - written
        row = (np.array([value]) for value in (written, most, True, sequence.seq_id))
        return int(self._lengths.predict(*row)[0]) - written


def forecast(table: SequenceTable, blocks: BlockManager, lengths: LengthModel) -> BlockForecast:
    """The blocks that all that runs will hold, by what is known of lengths now."""
    slots = table.running()
    num_tokens, shared = table.num_tokens[slots], table.num_shared_blocks[slots]
    outputs, may_stop = num_tokens - table.num_prompt[slots], table.may_stop[slots]
    max_outputs = table.max_tokens[slots] - table.num_prompt[slots]
    lengths.take_running(outputs[may_stop], max_outputs[may_stop])
    drawn = lengths.predict(outputs, max_outputs, may_stop, table.seq_id[slots])
    return BlockForecast(
        num_tokens,
        drawn - outputs,
        shared,
        block_size=table.block_size,
        # Blocks that sequences share count once, beside what each holds alone.
        base=blocks.num_held - int((table.num_blocks[slots] - shared).sum()),
        room=table.num_free_slots,
    )
