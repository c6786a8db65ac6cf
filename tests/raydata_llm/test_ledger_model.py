"""Thousands of schedules of runs that share a folder: every row once, whatever sleeps, dies or is damaged.

`RAYDATA_LLM_SCHEDULES=10000` plays so many of each kind, as `-m slow` does.
"""

from __future__ import annotations

import os

import pytest

from tests.raydata_llm.ledger_model import Schedule, one_thread_a_run

COUNT = int(os.environ.get("RAYDATA_LLM_SCHEDULES", "150"))
KINDS = pytest.mark.parametrize(
    ("kills", "damage"),
    [(False, False), (True, False), (True, True)],
    ids=["runs that sleep", "and die", "and damage"],
)


def play(seeds: range, *, kills: bool, damage: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with one_thread_a_run(monkeypatch):
        ends = [Schedule(seed, kills=kills, damage=damage).check() for seed in seeds]
    assert ends.count("whole") >= 0.98 * len(seeds), "few damaged folders cannot be used any more"


@KINDS
def test_every_schedule_ends_with_each_row_once(kills: bool, damage: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    play(range(COUNT), kills=kills, damage=damage, monkeypatch=monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@KINDS
def test_ten_thousand_schedules_end_with_each_row_once(
    kills: bool, damage: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(range(10_000), kills=kills, damage=damage, monkeypatch=monkeypatch)
