"""What a process remembers of the blocks of a job."""

from __future__ import annotations

import pytest

from raydata_llm.block_memory import BlockMemory, TooManyErrorsError, memory_of

BAD = "KeyError: 'q' (preprocess)"


def test_a_job_in_which_too_many_rows_fail_is_stopped_with_the_commonest_cause() -> None:
    memory = BlockMemory()
    memory.count([BAD] * 9 + [None] * 90, 0.1)
    with pytest.raises(
        TooManyErrorsError, match=r"max_error_fraction=0.1: 13 of the 103 rows .* 10 of them with KeyEr"
    ):
        memory.count([BAD, "a", "b", "c"], 0.1)


def test_a_few_rows_prove_nothing_and_no_limit_allows_all() -> None:
    memory = BlockMemory()
    memory.count([BAD] * 99, 0.0)
    unlimited = BlockMemory()
    unlimited.count([BAD] * 1000, None)
    with pytest.raises(TooManyErrorsError):
        memory.count([None], 0.5)


def test_executions_are_kept_apart() -> None:
    assert memory_of("one") is memory_of("one") and memory_of("one") is not memory_of("two")
    assert memory_of("") is not memory_of("")
