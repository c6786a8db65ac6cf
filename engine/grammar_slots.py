"""The grammars of the sequences that run: all slots' take in their tokens at once, and are asked for masks at once.

Owns which slot has which matcher. Works on arrays, so that a row costs Python nothing unless its output ends. Rows of
one table are served one after the other, see `grammar`: lists are in the order of tables, of which a thread takes
neighbours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from raydata_llm.engine.grammar import GrammarGuide, Words

_NO_TABLE = -1


class GrammarSlots:
    """See the module's docstring.

    Args:
        num_slots: Sequences that can run at once.
    """

    def __init__(self, num_slots: int) -> None:
        self._guides: list[GrammarGuide | None] = [None] * num_slots
        self._matchers = np.full(num_slots, None, dtype=object)
        self._tables = np.full(num_slots, _NO_TABLE, dtype=np.int64)

    def occupy(self, slot: int, guide: GrammarGuide | None) -> None:
        """Have a slot follow a grammar, or none."""
        self._guides[slot] = guide
        self._matchers[slot] = None if guide is None else guide.matcher
        self._tables[slot] = _NO_TABLE if guide is None else guide.table

    def advance(self, slots: npt.NDArray[np.int32], token_ids: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
        """Take in the token drawn for each of some slots, on many threads; returns whose output ended, or failed."""
        noted = np.zeros(len(slots), dtype=bool)
        order = self._order(slots)
        if not len(order):
            return noted
        from llguidance.numpy import consume_token_par

        guide, drawn = self._guide(slots[order[0]]), token_ids[order]
        pairs = list(zip(self._matchers[slots[order]].tolist(), drawn.tolist(), strict=True))
        allowed = np.array(consume_token_par(guide.threads, pairs))
        for place in np.flatnonzero(~allowed | np.isin(drawn, guide.eos_token_ids)).tolist():
            self._guide(slots[order[place]]).note(int(drawn[place]), is_allowed=bool(allowed[place]))
            noted[order[place]] = True
        return noted

    def fill(self, slots: npt.NDArray[np.int32], words: Words) -> None:
        """Write what each of some slots may draw into its row of `words`, [M, W], on many threads."""
        words[self._tables[slots] == _NO_TABLE] = -1
        order = self._order(slots)
        if not len(order):
            return
        from llguidance.numpy import fill_next_token_bitmask_par

        pairs = list(zip(self._matchers[slots[order]].tolist(), order.tolist(), strict=True))
        fill_next_token_bitmask_par(self._guide(slots[order[0]]).threads, pairs, words)

    def _order(self, slots: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        """Places of the slots that have a grammar, by table."""
        tables = self._tables[slots]
        order = np.argsort(tables, kind="stable")
        return order[np.count_nonzero(tables == _NO_TABLE) :]

    def _guide(self, slot: int | np.int32) -> GrammarGuide:
        guide = self._guides[slot]
        assert guide is not None, f"slot {slot} has no grammar"
        return guide
