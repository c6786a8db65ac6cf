"""Packed positions read as maps and as flat lists, and go to other processes without their tokenizer."""

from __future__ import annotations

import copy
import pickle
import struct
import subprocess
import sys
from collections.abc import Sequence

import pytest

from raydata_llm.engine import position_logprobs
from raydata_llm.engine.flat_logprobs import FlatLogprobs
from raydata_llm.engine.position_logprobs import PositionLogprobs, Wanted
from raydata_llm.engine.request import Logprob
from raydata_llm.kernels import logprobs


def record(chosen: float, rank: int, tops: Sequence[tuple[int, float]] = (), named: Sequence[float] = ()) -> bytes:
    pairs = b"".join(struct.pack("<if", *pair) for pair in tops)
    return struct.pack("<fi", chosen, rank) + pairs + struct.pack(f"<{len(named)}f", *named)


def outputs() -> PositionLogprobs[dict[int, Logprob]]:
    found: PositionLogprobs[dict[int, Logprob]] = PositionLogprobs(Wanted(2), of_prompt=False)
    found.add(record(-0.5, 1, [(7, -0.5), (8, -1.5)]))
    found.add(record(-4.0, 9, [(1, -0.25), (0, -2.0)]))
    found.close([7, 5])
    return found


MAPS = [
    {7: Logprob(-0.5, 1), 8: Logprob(-1.5, 2)},
    {5: Logprob(-4.0, 9), 1: Logprob(-0.25, 1), 0: Logprob(-2.0, 2)},
]


def test_positions_read_as_a_list_of_maps() -> None:
    found = outputs()
    assert len(found) == 2 and found == MAPS and list(found) == MAPS and found[-1] == MAPS[1] and found[:1] == MAPS[:1]
    assert [list(one) for one in found] == [[7, 8], [5, 1, 0]]
    assert found != MAPS[:1] and found != 3
    assert found.total() == -4.5
    assert repr(found) == repr(MAPS)


def test_of_a_prompt_nothing_is_known_at_its_first_token() -> None:
    found: PositionLogprobs[dict[int, Logprob] | None] = PositionLogprobs(Wanted(0), of_prompt=True)
    assert len(found) == 1
    found.put(1, record(-1.0, 3) + record(-2.0, 4))
    # Computed again after a preemption, and further.
    found.put(2, record(-2.5, 5) + record(-3.0, 6))
    found.close([9, 8, 7, 6, 5])
    expected = [None, {8: Logprob(-1.0, 3)}, {7: Logprob(-2.5, 5)}, {6: Logprob(-3.0, 6)}]
    assert found == expected
    assert list(found.flat()) == [{}, *expected[1:]]


def test_positions_beyond_what_is_known_are_refused() -> None:
    found: PositionLogprobs[dict[int, Logprob] | None] = PositionLogprobs(Wanted(0), of_prompt=True)
    with pytest.raises(AssertionError, match="from their start"):
        found.put(2, record(-1.0, 3))


def test_named_tokens_have_no_rank_and_the_own_one_is_told_once() -> None:
    found: PositionLogprobs[dict[int, Logprob]] = PositionLogprobs(Wanted(0, (4, 6)), of_prompt=False)
    found.add(record(-1.0, 2, named=(-3.0, -1.0)))
    found.close([6])
    assert found == [{6: Logprob(-1.0, 2), 4: Logprob(-3.0, None)}]
    flat = found.flat()
    assert (flat.token_ids, flat.ranks, flat.decoded_tokens) == ([6, 4], [2, None], [None, None])


def test_flat_lists_are_those_of_the_maps() -> None:
    flat, appended = outputs().flat(), FlatLogprobs(MAPS)
    assert vars(flat) == vars(appended)
    assert list(FlatLogprobs.of_entries([], [], [], [], None)) == []
    appended.extend(appended[:1])
    appended.extend(MAPS)
    assert list(appended) == [*MAPS, MAPS[0], *MAPS]


def test_what_a_reader_changes_stays() -> None:
    found = outputs()
    found[0][3] = Logprob(-9.0, 10)
    assert found[0][3] == Logprob(-9.0, 10) and 3 in next(iter(found))


def test_copies_carry_what_tokens_say_but_no_tokenizer() -> None:
    found = outputs()
    found.name_tokens(lambda token_id: f"<{token_id}>")
    for other in (pickle.loads(pickle.dumps(found)), copy.deepcopy(found)):
        assert [one.decoded_token for one in other[1].values()] == ["<5>", "<1>", "<0>"]
    plain = pickle.loads(pickle.dumps(outputs()))
    assert plain == MAPS and len(pickle.dumps(outputs())) < 700


def test_readers_need_no_torch_and_the_layout_is_the_kernels() -> None:
    assert position_logprobs.HEAD == logprobs.HEAD
    code = "import sys, raydata_llm.engine.position_logprobs; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
