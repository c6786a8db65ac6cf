"""Which row is where: every row is done once, whatever becomes of the replicas."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydata_llm.lease_book import ENGINE_DIED, PROCESS_LOST, LeaseBook
from raydata_llm.pending_rows import Block, Outcome, Quarantined


def cells(count: int, first: int = 0) -> list[bytes]:
    return [str(number).encode() for number in range(first, first + count)]


def answers(rows: list[tuple[int, bytes]]) -> list[Outcome]:
    return [Outcome(row_id, b"answer " + cell, None, 1) for row_id, cell in rows]


def taken(book: LeaseBook, replica: int) -> list[tuple[int, bytes]]:
    lease = book.take(replica)
    assert lease is not None
    return lease.rows


def joined(*replicas: int, num_slots: int = 8, limit: int = 12) -> LeaseBook:
    book = LeaseBook()
    for replica in replicas:
        book.join(replica, num_slots, limit)
    return book


def words(book: LeaseBook, block: Block) -> list[str]:
    outcomes = book.wait(block, timeout=0)
    return ["dead" if isinstance(outcome, Quarantined) else outcome.cell.decode() for outcome in outcomes]


def test_outcomes_come_in_the_order_of_the_rows() -> None:
    book = joined(0)
    block = book.put(cells(3), [1, 5, 3])
    [first] = taken(book, 0)
    assert first[1] == b"1", "costly rows go first"
    rest = taken(book, 0) + taken(book, 0)
    book.give(0, answers(rest[::-1]))
    with pytest.raises(TimeoutError):
        book.wait(block, timeout=0)
    book.give(0, answers([first]))
    assert words(book, block) == ["answer 0", "answer 1", "answer 2"]
    assert book.wait(book.put([], [])) == []


def test_replicas_that_start_together_share_the_costly_rows() -> None:
    book = joined(0, 1, num_slots=64, limit=96)
    book.put(cells(400), [100] * 40 + [1] * 360)
    shares = {0: 0, 1: 0}
    for replica in [0, 1] * 6:
        shares[replica] += sum(int(cell) < 40 for _, cell in taken(book, replica))
    assert sorted(shares.values()) == [16, 24]


def test_a_replica_gets_no_more_than_its_limit() -> None:
    book = joined(0, num_slots=64, limit=96)
    book.put(cells(400), [1] * 400)
    held = [row for _ in range(50) for row in taken(book, 0)]
    assert len(held) == 96
    book.give(0, answers(held[:4]))
    assert taken(book, 0) == [], "small hands are not worth a message"
    book.give(0, answers(held[4:8]))
    assert len(taken(book, 0)) == 8


def test_a_limit_of_few_rows_still_lets_the_replica_have_them() -> None:
    book = joined(0, num_slots=64, limit=4)
    book.put(cells(10), [1] * 10)
    held = [row for _ in range(10) for row in taken(book, 0)]
    assert len(held) == 4
    book.give(0, answers(held[:1]))
    assert len(taken(book, 0)) == 1


def test_slots_are_counted_while_replicas_come_and_go() -> None:
    book = joined(0)

    class Slots(int):
        """A number of slots that takes so long to add up that another replica joins meanwhile."""

        def __radd__(self, other: int) -> int:
            joining = threading.Thread(target=book.join, args=(2, 8, 12))
            joining.start()
            joining.join(0.2)
            return other + int(self)

    book.join(1, Slots(8), 12)
    assert book.num_slots == 16


def test_a_cheap_row_is_not_overtaken_for_ever() -> None:
    book = joined(0, num_slots=1, limit=1)
    book.put([b"cheap"], [10])
    overtakers = 0
    while True:
        book.put([b"costly"], [100])
        [(row_id, cell)] = taken(book, 0)
        book.give(0, [Outcome(row_id, b"", None, num_tokens=10)])
        if cell == b"cheap":
            break
        overtakers += 1
    assert overtakers == 9, "those that came in the 90 steps that they cost more"


def test_rows_of_one_prefix_go_to_one_replica() -> None:
    book = joined(0, 1, num_slots=64, limit=96)
    prefixes = [number // 4 + 1 for number in range(64)]
    order = [(7 * number) % 64 for number in range(64)]
    book.put(
        [cells(64)[number] for number in order], [1 + number % 4 for number in order], [prefixes[n] for n in order]
    )
    where = {int(cell): replica for _ in range(6) for replica in (0, 1) for _, cell in taken(book, replica)}
    assert len(where) == 64 and set(where.values()) == {0, 1}
    for prefix in set(prefixes):
        assert len({where[row] for row in range(64) if prefixes[row] == prefix}) == 1
    assert book.num_waiting == 0


def test_a_prefix_that_most_rows_share_keeps_no_replica_idle() -> None:
    book = joined(0, 1, num_slots=64, limit=96)
    book.put(cells(100), [1] * 100, [9] * 100)
    assert [len(taken(book, replica)) for replica in (0, 1, 0, 1)] == [8] * 4


def test_rows_of_a_lost_process_run_again_among_others() -> None:
    book = joined(0, 1)
    block = book.put(cells(2), [1, 1])
    rows = taken(book, 0) + taken(book, 0)
    assert book.lose(0, PROCESS_LOST, "killed").num_rows == 2
    assert book.take(0) is None, "it is told that it was given up"
    assert book.give(0, answers(rows)) == [], "what it says later is ignored"
    again = taken(book, 1) + taken(book, 1)
    assert sorted(again) == sorted(rows)
    book.give(1, answers(again))
    assert words(book, block) == ["answer 0", "answer 1"]


def search(book: LeaseBook, poison: set[bytes], blame: int, first: int = 0) -> tuple[int, int]:
    """Runs everything with replicas that die of poison; returns deaths and the largest lease with poison after one."""
    replica, deaths = first, 0
    while book.num_waiting or book.num_leased:
        held = []
        while rows := taken(book, replica):
            held += rows
        if {cell for _, cell in held} & poison:
            deaths += 1
            book.lose(replica, blame, "the engine died of poison")
            replica += 1
            book.join(replica, 8, 12)
        else:
            book.give(replica, answers(held))
    return deaths, replica


@pytest.mark.parametrize("blame", [PROCESS_LOST, ENGINE_DIED])
@pytest.mark.parametrize("poison", [set(), {0}, {7}, {3, 4}, set(range(5))], ids=str)
def test_only_rows_that_kill_alone_are_quarantined(poison: set[int], blame: int) -> None:
    book = joined(0, num_slots=64, limit=96)
    block = book.put(cells(12), [1] * 12)
    deaths, _ = search(book, {str(row).encode() for row in poison}, blame)
    assert words(book, block) == ["dead" if row in poison else f"answer {row}" for row in range(12)]
    assert deaths <= 2 + 6 * len(poison)


def test_engines_that_die_of_everything_end_the_job() -> None:
    book = joined(0, num_slots=4000, limit=6000)
    block = book.put(cells(3000), [1] * 3000)
    for replica in range(100):
        if not taken(book, replica):
            break
        book.lose(replica, PROCESS_LOST, "the device is broken")
        book.join(replica + 1, 4000, 6000)
    with pytest.raises(RuntimeError, match="replicas were lost and no row was done, last: the device is broken"):
        book.wait(block, timeout=0)


def test_other_replicas_go_on_while_one_examines() -> None:
    book = joined(0, 1)
    book.put(cells(4), [1] * 4)
    held = [row for _ in range(4) for row in taken(book, 0)]
    book.lose(0, ENGINE_DIED, "poison")
    book.join(2, 8, 12)
    assert len(taken(book, 2)) == 2, "half of the suspects, alone"
    book.put(cells(3, first=10), [1] * 3)
    assert taken(book, 2) == []
    assert [cell for _ in range(3) for _, cell in taken(book, 1)] == cells(3, first=10)
    assert len(held) == 4


def test_a_failure_reaches_every_waiting_caller_and_later_ones() -> None:
    book = joined(0)
    block = book.put(cells(1), [1])
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            book.wait(block)
        except ValueError as error:
            caught.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    book.fail(ValueError("no room"))
    thread.join(timeout=10)
    assert str(caught[0]) == "no room"
    with pytest.raises(ValueError, match="no room"):
        book.put(cells(1), [1])


def test_a_block_that_nobody_waits_for_is_forgotten_wherever_its_rows_are() -> None:
    book = joined(0, num_slots=8, limit=4)
    block, other = book.put(cells(6), [1] * 6, [5] * 6), book.put(cells(2, first=10), [1] * 2)
    held = [row for _ in range(4) for row in taken(book, 0)]
    assert len(held) == 4 and book.num_waiting == 4 and book.holds(0)
    book.withdraw(block)
    assert (book.num_waiting, book.num_leased, book.holds(0)) == (2, 0, False)
    assert book.give(0, answers(held)) == [], "what comes in later does not count"
    assert [row for _ in range(2) for _, row in taken(book, 0)] == cells(2, first=10)
    book.withdraw(other)
    assert book.lose(0, ENGINE_DIED, "gone").num_rows == 0


def draw(choice: Any) -> tuple[list[int], list[int]]:
    return [choice([1, 50]) for _ in range(5)], [choice([0, 1, 2, 3]) for _ in range(5)]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from(["put", "take", "give", "lose", "die", "join", "withdraw"]), max_size=60), st.randoms())
def test_whatever_happens_every_row_is_done_once(events: list[str], random: object) -> None:
    choice = random.choice  # type: ignore[attr-defined]
    book, live, blocks, count = LeaseBook(), [], [], 0
    held: dict[int, list[tuple[int, bytes]]] = {}
    number = 0
    for event in [*events, "join"]:
        if event == "put":
            blocks.append((count, book.put(cells(5, count), *draw(choice))))
            count += 5
        elif event == "join":
            book.join(number, 4, 6)
            live.append(number)
            held[number] = []
            number += 1
        elif event == "withdraw":
            if blocks:
                first, block = blocks.pop(choice(range(len(blocks))))
                book.withdraw(block)
                gone = cells(5, first)
                held = {one: [row for row in rows if row[1] not in gone] for one, rows in held.items()}
        elif live:
            replica = choice(live)
            if event == "take":
                held[replica] += taken(book, replica)
            elif event == "give":
                counted = book.give(replica, answers(held[replica]))
                assert len(counted) == len(held[replica])
                held[replica] = []
            elif len(live) > 1:
                book.lose(replica, PROCESS_LOST if event == "lose" else ENGINE_DIED, "died")
                live.remove(replica)
                assert book.give(replica, answers(held.pop(replica))) == []
    while book.num_waiting or book.num_leased:
        for replica in live:
            book.give(replica, answers(held[replica]))
            held[replica] = taken(book, replica)
    for first, block in blocks:
        for offset, word in enumerate(words(book, block)):
            assert word in (f"answer {first + offset}", "dead")
