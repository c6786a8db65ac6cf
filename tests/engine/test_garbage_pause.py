"""When Python's collector runs while an engine does."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterator
from unittest.mock import patch

import pytest

from raydata_llm.engine.garbage_pause import GarbagePause


class Node:
    """An object in a cycle with itself."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def collector_as_usual() -> Iterator[None]:
    gc.collect()
    assert gc.isenabled() and gc.get_freeze_count() == 0
    yield
    gc.enable()
    gc.unfreeze()


def test_nothing_is_collected_but_when_it_is_due() -> None:
    with GarbagePause() as garbage:
        cycle = weakref.ref(Node())
        made: list[list[int]] = [[] for _ in range(100_000)]  # enough to start the collector, if it were on
        garbage.collect_if_due()
        assert cycle() is not None and len(made) == 100_000
        with patch.object(time, "monotonic", return_value=garbage._last + 31.0):
            garbage.collect_if_due()
        assert cycle() is None
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_what_lived_through_a_collection_is_collected_in_the_end() -> None:
    with GarbagePause() as garbage:
        kept = Node()
        cycle = weakref.ref(kept)
        for number in range(20):
            with patch.object(time, "monotonic", return_value=garbage._last + 31.0):
                garbage.collect_if_due()
            if number == 0:
                del kept
            assert (cycle() is None) == (number == 19)


def test_what_was_made_is_old_afterwards_and_still_collected() -> None:
    with GarbagePause():
        made: list[list[int]] = [[] for _ in range(100_000)]
        cycle = weakref.ref(Node())
    assert gc.get_count()[0] < 100_000 and len(made) == 100_000
    gc.collect()
    assert cycle() is None


def test_an_error_leaves_the_collector_on() -> None:
    with pytest.raises(KeyError), GarbagePause():
        raise KeyError
    assert gc.isenabled()


def test_a_collector_that_is_off_or_has_frozen_objects_is_left_so() -> None:
    gc.disable()
    with GarbagePause() as garbage, patch.object(time, "monotonic", return_value=garbage._last + 31.0):
        cycle = weakref.ref(Node())
        garbage.collect_if_due()
        assert cycle() is not None
    assert not gc.isenabled()
    gc.enable()
    gc.freeze()
    frozen = gc.get_freeze_count()
    with GarbagePause():
        pass
    assert gc.get_freeze_count() == frozen


def test_pauses_nest() -> None:
    with GarbagePause():
        with GarbagePause():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
