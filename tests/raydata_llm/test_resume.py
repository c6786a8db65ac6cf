"""Which rows are the same, and what a row carries to the sink."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raydata_llm import EngineProcessorConfig, ResumeConfig
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.request import LoRARequest
from raydata_llm.ledger_index import KEY_BYTES, NAME_BYTES
from raydata_llm.ledger_layout import Entry
from raydata_llm.resume import ResumePlan, mark_failed, read_carried
from raydata_llm.resume_broker import Claimant, ResumeBroker
from raydata_llm.resume_plan import _SPEED_SETTINGS, resume_plan
from raydata_llm.row_payload import RESUME_COLUMN, RowRequest
from tests.raydata_llm.tiny_tokenizer import save_tokenizer

PLAN = ResumePlan(config=ResumeConfig("out"), about={"model": "m"})


def key(row: dict[str, Any], token_ids: list[int], params: Any = None, plan: ResumePlan = PLAN, **made: Any) -> bytes:
    request = RowRequest(np.array(token_ids, np.int32), params, b"")
    table = plan.admit(pa.table({"x": [0]}), [request], [row], [made])
    return read_carried(table.column(RESUME_COLUMN), "").keys


def test_a_key_follows_the_request_and_the_datasets_own_columns() -> None:
    same = key({"id": 1}, [5, 6], {"top_k": 5, "stop": ["x"]})
    assert key({"id": 1}, [5, 6], {"stop": ["x"], "top_k": 5}, made_by_preprocess="anything") == same
    others = [
        key({"id": 2}, [5, 6], {"top_k": 5, "stop": ["x"]}),
        key({"id": 1}, [5, 7], {"top_k": 5, "stop": ["x"]}),
        key({"id": 1}, [5, 6], {"top_k": 6, "stop": ["x"]}),
    ]
    assert len({same, *others}) == 4


def test_a_key_follows_the_adapter_and_the_pooling_parameters() -> None:
    asked: list[dict[str, Any]] = [
        {},
        {"lora_request": LoRARequest("a", 1, "adapters/a")},
        {"lora_request": LoRARequest("b", 1, "adapters/b")},
        {"pooling_params": {"task": "embed", "dimensions": 8}},
        {"pooling_params": {"task": "embed", "dimensions": 16}},
    ]
    requests = [RowRequest(np.array([5], np.int32), None, b"", **one) for one in asked]
    rows = [{"id": 1}] * len(asked)
    table = PLAN.admit(pa.table({"x": [0] * len(asked)}), requests, rows, [{}] * len(asked))
    keys = read_carried(table.column(RESUME_COLUMN), "").keys
    width = len(keys) // len(asked)
    assert len({keys[start : start + width] for start in range(0, len(keys), width)}) == len(asked)


def test_a_key_follows_the_prompts_embeddings() -> None:
    matrix = np.ones((2, 3), dtype=np.float32)
    asked = [None, matrix, matrix * 2]
    requests = [RowRequest(np.zeros(2, np.int32), None, b"", prompt_embeds=one) for one in asked]
    table = PLAN.admit(pa.table({"x": [0] * 3}), requests, [{"id": 1}] * 3, [{}] * 3)
    keys = read_carried(table.column(RESUME_COLUMN), "").keys
    width = len(keys) // 3
    assert len({keys[start : start + width] for start in range(0, len(keys), width)}) == 3


def test_a_key_column_stands_for_the_row_alone() -> None:
    plan = ResumePlan(config=ResumeConfig("out", key_column="id"), about={})
    same = key({"id": 1, "time": 3}, [5], plan=plan)
    assert same == key({"id": 1, "time": 3}, [6], {"seed": 1}, plan=plan), "the prompt may change"
    other = key({"id": 1, "time": 4}, [5], plan=plan)
    assert same[:NAME_BYTES] == other[:NAME_BYTES] and same != other, "the content is noted beside the name"
    assert key({"id": 2}, [5], plan=plan)[:NAME_BYTES] != same[:NAME_BYTES]
    assert key({}, [5], plan=plan, id=1)[:NAME_BYTES] == same[:NAME_BYTES], "preprocess may make it"
    with pytest.raises(ValueError, match="key_column='id' is not a column: the row has other"):
        key({"other": 1}, [5], plan=plan)


def test_rows_without_a_key_are_told_apart_as_they_came() -> None:
    plan = ResumePlan(config=ResumeConfig("out", key_column="id"), about={})
    first = key({"id": None, "text": "a"}, [5], plan=plan)
    assert first == key({"id": None, "text": "a"}, [6], plan=plan) != key({"id": None, "text": "b"}, [5], plan=plan)


def test_a_row_that_failed_before_its_key_was_made_stops_no_job() -> None:
    plan = ResumePlan(config=ResumeConfig("out", key_column="made"), about={})
    failed = [RowRequest(None, None, b"", "KeyError: 'question' (preprocess)") for _ in range(3)]
    rows = [{"id": 1}, {"id": 2}, {"id": 1}]
    first, second, third = np.frombuffer(
        read_carried(plan.admit(pa.table({"x": [0] * 3}), failed, rows, [{}] * 3).column(RESUME_COLUMN), "").keys,
        f"V{KEY_BYTES}",
    ).tolist()
    assert first == third != second


def test_another_model_version_or_key_column_is_another_space() -> None:
    plans = [
        PLAN,
        ResumePlan(config=ResumeConfig("out"), about={"model": "n"}),
        ResumePlan(config=ResumeConfig("out", key_column="id"), about={"model": "m"}),
    ]
    assert len({plan.space for plan in plans}) == 3
    assert ResumePlan(config=ResumeConfig("elsewhere", retry_errors=False), about={"model": "m"}).space == PLAN.space


def test_settings_that_change_answers_are_another_space_and_others_are_not(tmp_path: Path) -> None:
    def space(**engine_kwargs: Any) -> str:
        model = str(save_tokenizer(tmp_path))
        config = EngineProcessorConfig(model_source=model, engine_kwargs=engine_kwargs, resume=ResumeConfig("out"))
        plan = resume_plan(config)
        assert plan is not None
        return plan.space

    answers: list[dict[str, Any]] = [
        {"seed": 1},
        {"dtype": "float16"},
        {"max_model_len": 64},
        {"hf_overrides": {"rope_theta": [1, 2]}},
        {"generation_config": "vllm"},
        {"pooler_config": {"pooling_type": "MEAN"}},
    ]
    assert len({space(), *(space(**settings) for settings in answers)}) == len(answers) + 1
    assert {space(max_num_seqs=3, num_threads=1, block_size=32), space(enforce_eager=True)} == {space()}
    assert vars(EngineConfig(model="m")).keys() > _SPEED_SETTINGS, "they are settings"


def test_error_rows_are_marked() -> None:
    requests = [RowRequest(np.array([number], np.int32), None, b"") for number in range(3)]
    table = PLAN.admit(pa.table({"x": range(3)}), requests, [{}] * 3, [{}] * 3)
    column = mark_failed(table.column(RESUME_COLUMN), [False, True, False])
    carried = read_carried(pa.chunked_array([column]), "0a1b2c3d")
    assert carried.failed.tolist() == [False, True, False] and not carried.admitted.any()
    assert carried.keep(carried.failed).keys == carried.keys[KEY_BYTES : 2 * KEY_BYTES]


def test_the_reserved_column_is_read_however_steps_in_between_cut_it() -> None:
    requests = [RowRequest(np.array([number], np.int32), None, b"") for number in range(5)]
    column = PLAN.admit(pa.table({"x": range(5)}), requests, [{}] * 5, [{}] * 5).column(RESUME_COLUMN)
    column = pa.chunked_array([mark_failed(column, [False, True, False, False, True])])
    whole = read_carried(column, "--------")
    assert whole.admitted.all() and len(whole.keys) == 5 * KEY_BYTES
    pieces = pa.chunked_array([column.chunk(0)[1:3], column.chunk(0)[:0], column.chunk(0)[4:]]).cast(pa.large_binary())
    carried = read_carried(pieces, "--------")
    assert carried.keys == whole.keep(np.array([False, True, True, False, True])).keys
    assert carried.failed.tolist() == [True, False, True]
    assert read_carried(column.slice(0, 0), "--------").keys == b""


def test_rows_that_the_processor_never_saw_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1 rows have nothing in the column .* write them elsewhere"):
        read_carried(pa.chunked_array([[None]], pa.binary()), "0a1b2c3d")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": ""}, "path='' is not valid: give the folder that the sink writes to"),
        ({"path": "x", "key_column": 3}, "key_column=3 is not valid: give a column's name, or None"),
        ({"path": "x", "version": 2}, "version=2 is not valid: give text"),
        ({"path": "x", "retry_errors": "no"}, "retry_errors='no' is not valid: give True or False"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResumeConfig(**settings)


def test_the_config_takes_it_and_shows_no_credentials() -> None:
    config = EngineProcessorConfig(model_source="m", resume=ResumeConfig("s3://me:canary@bucket/x?secret_key=canary"))
    assert config.resume is not None and config.resume.path.startswith("s3://me:canary@")
    assert "canary" not in repr(config) and "canary" not in str(config)


class KeptKeys:
    """Stands in for a ledger."""

    def __init__(self, *files: bytes) -> None:
        self._files = files
        self.tells_apart = False

    def tell_content_apart(self) -> None:
        self.tells_apart = True

    def tells_content_apart(self) -> bool:
        return self.tells_apart

    def read_keys(self, entries: Iterable[Entry]) -> Iterator[bytes]:
        return (self._files[entry.size] for entry in entries)


def broker(*files: bytes, key_column: str | None = None, ledger: Any = None) -> ResumeBroker:
    kept: Any = ledger or KeptKeys(*files)
    made = ResumeBroker(kept, key_column)
    made.load([Entry("", number) for number in range(len(files))])
    return made


def digits(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(KEY_BYTES, "little") for number in numbers)


def bits(answer: bytes, count: int) -> list[int]:
    return np.unpackbits(np.frombuffer(answer, np.uint8), count=count).tolist()


def test_a_retried_task_gets_the_answer_it_had() -> None:
    asked = broker(digits(1, 2), digits(2))
    first, other = Claimant("prepare", 0, 0), Claimant("prepare", 1, 0)
    assert bits(asked.claim(first, digits(2, 3, 2, 2)), 4) == [1, 0, 1, 0]
    assert bits(asked.claim(other, digits(2, 1)), 2) == [0, 1]
    assert bits(asked.claim(first, digits(2, 3, 2, 2)), 4) == [1, 0, 1, 0]
    assert asked.counts() == (3, 6, 3)


def test_blocks_of_two_datasets_in_one_are_told_apart() -> None:
    asked = broker(digits(1, 2))
    claimant = Claimant("prepare", 0, 0)
    assert bits(asked.claim(claimant, digits(1, 2)), 2) == [1, 1]
    assert bits(asked.claim(claimant, digits(3, 4, 5)), 3) == [0, 0, 0]


def test_ten_thousand_strangers_stop_the_job() -> None:
    asked = broker(digits(1))
    asked.claim(Claimant("prepare", 0, 0), digits(*range(2, 10_001)))
    with pytest.raises(ValueError, match=r"none of the first 10000 rows is among the 1 that are committed.*key_column"):
        asked.claim(Claimant("prepare", 1, 0), digits(10_001))
    asked = broker(digits(1))
    asked.claim(Claimant("prepare", 0, 0), digits(*range(1, 10_001)))
    assert bits(asked.claim(Claimant("prepare", 1, 0), digits(10_001)), 1) == [0]


def named(*rows: tuple[int, int]) -> bytes:
    """Keys of rows, each of a name and a content."""
    return b"".join(digits(name)[:NAME_BYTES] + digits(content)[: KEY_BYTES - NAME_BYTES] for name, content in rows)


def test_a_row_of_a_key_column_is_done_though_its_other_columns_changed() -> None:
    asked = broker(named((1, 1), (2, 1), (3, 1)), key_column="id")
    assert bits(asked.claim(Claimant("prepare", 0, 0), named((1, 2), (4, 1), (2, 1))), 3) == [1, 0, 1]
    assert bits(asked.claim(Claimant("prepare", 1, 0), named((3, 2), (1, 2))), 2) == [1, 0], "each copy once"


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 3, 0, 1], [0, 3, 2, 1]], ids=str)
def test_rows_of_one_key_are_told_apart_by_their_content_after_one_stop_at_most(order: list[int]) -> None:
    rows = [(1, 1), (2, 1), (1, 2), (2, 2)]
    ledger: Any = KeptKeys(named(*rows[:2]))

    def ask() -> dict[int, int]:
        asked = broker(b"", key_column="id", ledger=ledger)
        claims = ((row, asked.claim(Claimant("prepare", row, 0), named(rows[row]))) for row in order)
        return {row: bits(answer, 1)[0] for row, answer in claims}

    if order != sorted(order):
        with pytest.raises(
            ValueError, match=r"key_column='id' has the same value in rows that differ.* Run the job again"
        ):
            ask()
    assert ask() == {0: 1, 1: 1, 2: 0, 3: 0}


def test_names_are_taken_as_often_as_they_were_committed() -> None:
    asked = broker(named((1, 1), (1, 2), (1, 2)), key_column="id")
    assert bits(asked.claim(Claimant("prepare", 0, 0), named((1, 2), (1, 7), (1, 8), (1, 9))), 4) == [1, 1, 1, 0]


def test_rows_that_come_to_the_sink_twice_stop_the_job_and_a_repeated_task_does_not() -> None:
    asked = broker()
    numbers = np.arange(6, dtype=np.uint64) + np.uint64(2**64 - 9)
    for _ in range(2):
        asked.write(0, numbers[:4].tobytes())
    asked.write(1, numbers[4:5].tobytes())
    with pytest.raises(ValueError, match=r"3 rows came to the sink a second time: .*flat_map.* Move that step before"):
        asked.write(2, numbers[3:6].tobytes() + numbers[5:].tobytes())


def test_rows_of_a_block_have_numbers_of_their_own() -> None:
    requests = [RowRequest(np.array([1], np.int32), None, b"") for _ in range(300)]
    column = PLAN.admit(pa.table({"x": range(300)}), requests, [{}] * 300, [{}] * 300).column(RESUME_COLUMN)
    assert len(set(read_carried(column, "").numbers.tolist())) == 300
