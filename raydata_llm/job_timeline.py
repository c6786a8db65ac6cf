"""What happened when, in as many bins of time as a chart can show.

Owns the bins: their width doubles when there are too many, so an hour costs as much memory as a week. Times are seconds
since the job began. Knows no Ray and no replicas' messages.

    sums    what was added up in a bin: rows, tokens, idle seconds
    levels  what was seen in a bin, averaged over its time: rows in the engine, KV use

Both come with the span since their owner was last heard, so charts are smooth however seldom it speaks.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import pairwise

MAX_BINS = 400


class Track:
    """Bins of one series: a weighted sum, and the weights."""

    def __init__(self) -> None:
        self.sums = array("d")
        self.weights = array("d")

    def add(self, bin_number: int, value: float, weight: float) -> None:
        """Add to a bin."""
        missing = bin_number + 1 - len(self.sums)
        if missing > 0:
            self.sums.extend([0.0] * missing)
            self.weights.extend([0.0] * missing)
        self.sums[bin_number] += value * weight
        self.weights[bin_number] += weight

    def halve(self) -> None:
        """Make one bin of every two."""
        self.sums = array("d", _pairs(self.sums))
        self.weights = array("d", _pairs(self.weights))

    def totals(self, num_bins: int) -> list[float]:
        """The sum of each bin."""
        return [*self.sums, *[0.0] * (num_bins - len(self.sums))]

    def means(self, num_bins: int) -> list[float | None]:
        """The mean of each bin; None where nothing was seen."""
        seen = [value / weight if weight else None for value, weight in zip(self.sums, self.weights, strict=True)]
        return [*seen, *[None] * (num_bins - len(seen))]


class Timeline:
    """Tracks by (owner, series) over the same bins.

    Args:
        bin_seconds: Width of a bin at first.
    """

    def __init__(self, bin_seconds: float = 1.0) -> None:
        self.bin_seconds = bin_seconds
        self.num_bins = 0
        self._tracks: dict[tuple[str, str], Track] = {}

    def add(self, owner: str, series: str, value: float, *, start: float, end: float) -> None:
        """Add what came up between two times to one owner's sums, in equal parts for equal times."""
        spans = self._spans(start, end)
        whole = sum(seconds for _, seconds in spans)
        track = self._tracks.setdefault((owner, series), Track())
        for bin_number, seconds in spans:
            track.add(bin_number, value, seconds / whole)

    def see(self, owner: str, series: str, value: float, *, start: float, end: float) -> None:
        """Note one owner's level between two times."""
        track = self._tracks.setdefault((owner, series), Track())
        for bin_number, seconds in self._spans(start, end):
            track.add(bin_number, value, seconds)

    def totals(self, owner: str, series: str) -> list[float]:
        """One owner's sums."""
        return self._track(owner, series).totals(self.num_bins)

    def means(self, owner: str, series: str) -> list[float | None]:
        """One owner's levels."""
        return self._track(owner, series).means(self.num_bins)

    def _spans(self, start: float, end: float) -> list[tuple[int, float]]:
        """The bins between two times, and how long each was in it."""
        end = max(end, 0.0)
        start = min(max(start, 0.0), end)
        while end >= MAX_BINS * self.bin_seconds:
            self._halve()
        width = self.bin_seconds
        first, last = int(start / width), int(end / width)
        self.num_bins = max(self.num_bins, last + 1)
        edges = [start, *(width * number for number in range(first + 1, last + 1)), end]
        spans = [(first + number, later - sooner) for number, (sooner, later) in enumerate(pairwise(edges))]
        return [span for span in spans if span[1] > 0] or [(last, 1e-9)]

    def _track(self, owner: str, series: str) -> Track:
        return self._tracks.get((owner, series)) or Track()

    def _halve(self) -> None:
        for track in self._tracks.values():
            track.halve()
        self.bin_seconds *= 2
        self.num_bins = (self.num_bins + 1) // 2


def _pairs(values: Sequence[float]) -> list[float]:
    return [sum(values[start : start + 2]) for start in range(0, len(values), 2)]
