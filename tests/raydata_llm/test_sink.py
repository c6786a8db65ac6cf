"""The sinks on a Ray of two CPUs, behind a processor whose engine needs no model."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from raydata_llm import EngineProcessorConfig, ResumeConfig, write_jsonl, write_parquet
from raydata_llm.processor import Processor
from raydata_llm.sink import _place
from raydata_llm.sink_dataset import finished_blocks
from raydata_llm.sink_format import FileFormat
from raydata_llm.sink_limits import FileLimits
from raydata_llm.sink_storage import Storage
from raydata_llm.sink_task import WritePlan
from raydata_llm.sink_writer import FileWriter
from tests.raydata_llm.faulty_disks import DeadlyDisk
from tests.raydata_llm.patience import wait_until
from tests.raydata_llm.processor_fakes import ray_session, start_echo_engine, start_nothing
from tests.raydata_llm.tiny_tokenizer import save_tokenizer


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    with ray_session(PYTHONPATH=str(Path(__file__).parents[2])):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tokenizer(tmp_path_factory.mktemp("model")))


def ask(row: dict[str, Any]) -> dict[str, Any]:
    if row.get("bad"):
        1 / 0  # noqa: B018
    return {"prompt": f"row {row['id']}", "sampling_params": {"max_tokens": 3}}


def keep(row: dict[str, Any]) -> dict[str, Any]:
    return {"id": row["id"], "seldom": None if row["id"] < 30 else "text", "text": row["generated_text"]}


def processor(model: str, resume: ResumeConfig | None, engine: Any = start_echo_engine, **functions: Any) -> Processor:
    config = EngineProcessorConfig(model_source=model, batch_size=8, should_continue_on_error=True, resume=resume)
    return Processor(config, functions.get("ask", ask), functions.get("keep", keep), engine_factory=engine)


def ids_in(folder: Path) -> list[int]:
    return sorted(pq.read_table(folder)["id"].to_pylist())


def test_small_and_large_files_have_one_schema_and_every_row(tmp_path: Path) -> None:
    rows = [{"id": number, "seldom": None if number < 90 else "text", "pad": "x" * 100} for number in range(100)]
    ds = ray.data.from_items(rows, override_num_blocks=10)
    summary = write_parquet(ds, tmp_path / "small", file_bytes=1500, files_at_once=2)
    assert summary.files > 3 and (summary.rows, summary.error_rows, summary.skipped_rows) == (100, 0, 0)
    assert ids_in(tmp_path / "small") == list(range(100))
    files = list((tmp_path / "small").glob("*.parquet"))
    assert len(files) == summary.files and sum(file.stat().st_size for file in files) > 0
    assert {str(pq.read_schema(file).field("seldom").type) for file in files} == {"string"}
    assert write_parquet(ds, tmp_path / "large").files == 1


def test_a_folder_that_holds_files_is_added_to_only_on_request(tmp_path: Path) -> None:
    ds = ray.data.range(3)
    write_parquet(ds, tmp_path)
    with pytest.raises(ValueError, match=r"holds 1 files already, such as 'part-.*mode='append' to add to it"):
        write_parquet(ds, tmp_path)
    write_parquet(ds, tmp_path, mode="append")
    assert ids_in(tmp_path) == [0, 0, 1, 1, 2, 2]


def test_error_rows_among_the_answers_are_counted_too(model: str, tmp_path: Path) -> None:
    ds = ray.data.from_items([{"id": number, "bad": number % 5 == 0} for number in range(40)])
    summary = write_parquet(processor(model, None)(ds), tmp_path / "out")
    assert (summary.rows, summary.error_rows) == (40, 8)
    errors = pq.read_table(tmp_path / "out")["__inference_error__"].to_pylist()
    assert sum(map(bool, errors)) == 8


def test_error_rows_go_to_their_own_folder(model: str, tmp_path: Path) -> None:
    ds = ray.data.from_items([{"id": number, "bad": number % 5 == 0} for number in range(40)])
    summary = write_jsonl(processor(model, None)(ds), tmp_path / "out", dead_letter_path=tmp_path / "letters")
    assert (summary.rows, summary.error_rows) == (32, 8)
    letters = [json.loads(line) for file in (tmp_path / "letters").iterdir() for line in file.open()]
    assert {row["id"] for row in letters} == set(range(0, 40, 5))
    assert all("ZeroDivisionError" in row["__inference_error__"] for row in letters)
    rows = [json.loads(line) for file in (tmp_path / "out").iterdir() for line in file.open()]
    assert {row["id"] for row in rows} == set(range(40)) - set(range(0, 40, 5))


def test_types_that_do_not_go_together_are_named(tmp_path: Path) -> None:
    ds = ray.data.range(40, override_num_blocks=4).map(lambda row: {"x": row["id"] if row["id"] < 10 else "text"})
    with pytest.raises(ValueError, match=r"column 'x' is .* in some rows and .* in others: let postprocess return one"):
        write_parquet(ds, tmp_path, file_bytes=1)


def test_a_write_task_that_dies_is_run_again_and_doubles_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "died"
    write_parquet(ray.data.range(20), tmp_path / "out", filesystem=DeadlyDisk(str(marker)))
    assert marker.exists() and len(list((tmp_path / "out").iterdir())) == 1
    assert ids_in(tmp_path / "out") == list(range(20))


def test_a_job_run_again_does_what_is_left(model: str, tmp_path: Path) -> None:
    out, letters = tmp_path / "out", tmp_path / "letters"
    resume = ResumeConfig(str(out))
    # Two rows that are alike in everything, in blocks far apart.
    rows = [{"id": number, "bad": number == 3} for number in [*range(40), 7]]
    first = write_parquet(processor(model, resume)(ray.data.from_items(rows[:30])), out, dead_letter_path=letters)
    assert (first.rows, first.error_rows, first.skipped_rows) == (29, 1, 0)

    mended = [{**row, "bad": False} if row["id"] != 3 else row for row in rows]
    calm = processor(model, resume, ask=lambda row: ask({**row, "bad": False}))
    second = write_parquet(calm(ray.data.from_items(mended)), out, dead_letter_path=letters)
    assert (second.rows, second.error_rows, second.skipped_rows) == (12, 0, 29)
    assert Counter(ids_in(out)) == Counter([*range(40), 7])
    assert [file.name for file in letters.iterdir()] == [], "the row that failed ran again"
    assert {str(pq.read_schema(file).field("seldom").type) for file in out.glob("*.parquet")} == {"string"}
    assert not [name for name in pq.read_table(out).column_names if name.startswith("__raydata_llm")]

    third = write_parquet(calm(ray.data.from_items(mended)), out, dead_letter_path=letters)
    assert (third.files, third.skipped_rows) == (0, 41)
    assert ray.data.read_parquet(str(out)).count() == 41, "the ledger is no reader's concern"


def test_a_signal_writes_what_is_finished_and_the_rest_comes_later(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "raydata_llm")
    out, progress = tmp_path / "out", tmp_path / "progress"
    progress.mkdir()

    def slowly(row: dict[str, Any]) -> dict[str, Any]:
        (progress / str(row["id"])).touch()
        time.sleep(0.1)
        return keep(row)

    def interrupt() -> None:
        wait_until(lambda: len(list(progress.iterdir())) >= 40)
        signal.raise_signal(signal.SIGINT)

    ds = processor(model, ResumeConfig(str(out)), keep=slowly)(ray.data.range(160))
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        write_parquet(ds, out)
    finished = ids_in(out)
    assert 0 < len(finished) < 160
    (said,) = (line for line in caplog.messages if line.startswith("raydata_llm  stopped: "))
    assert said.startswith(f"raydata_llm  stopped: {len(finished)} rows are written"), said
    summary = write_parquet(processor(model, ResumeConfig(str(out)))(ray.data.range(160)), out)
    assert (summary.rows, summary.skipped_rows) == (160 - len(finished), len(finished))
    assert ids_in(out) == list(range(160))


def test_a_signal_while_an_upload_is_waited_for_loses_no_finished_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = WritePlan(
        storage=Storage.open(tmp_path), letters=None, format=FileFormat(name="parquet", compression=None), token="0" * 8
    )
    wait = FileWriter._gather

    def interrupted(writer: FileWriter, remaining: int) -> None:
        monkeypatch.setattr(FileWriter, "_gather", wait)
        raise KeyboardInterrupt

    with FileWriter(plan, FileLimits(file_bytes=1, file_seconds=600.0, files_at_once=1)) as writer:
        for number, block in enumerate(finished_blocks(ray.data.range(30, override_num_blocks=3))):
            if number == 1:
                monkeypatch.setattr(FileWriter, "_gather", interrupted)
            with contextlib.suppress(KeyboardInterrupt):
                writer.add(block)
        writer.stop()
    assert ids_in(tmp_path) == list(range(30))


def test_another_version_replaces_the_results_at_the_end(model: str, tmp_path: Path) -> None:
    for version, count in (("1", 20), ("2", 10)):
        resume = ResumeConfig(str(tmp_path), version=version)
        write_parquet(processor(model, resume)(ray.data.range(count)), tmp_path)
        assert ids_in(tmp_path) == list(range(count))


def test_a_job_of_strangers_writes_nothing(model: str, tmp_path: Path) -> None:
    resume = ResumeConfig(str(tmp_path))
    write_parquet(processor(model, resume)(ray.data.range(10)), tmp_path)
    changed = processor(model, resume, ask=lambda row: {"prompt": f"other {row['id']}"})
    with pytest.raises(ValueError, match="none of the first 10 rows is among the 10 that are committed"):
        write_parquet(changed(ray.data.range(10)), tmp_path)
    assert ids_in(tmp_path) == list(range(10))


def test_rows_made_before_the_sink_ran_are_not_written_twice(model: str, tmp_path: Path) -> None:
    resume = ResumeConfig(str(tmp_path))
    write_parquet(processor(model, resume)(ray.data.range(10)), tmp_path)
    made = processor(model, resume)(ray.data.range(15)).materialize()
    summary = write_parquet(made, tmp_path)
    assert (summary.rows, summary.skipped_rows) == (5, 10)
    assert ids_in(tmp_path) == list(range(15))


def test_steps_after_the_processor_keep_their_rows_or_are_told_to(model: str, tmp_path: Path) -> None:
    ds = processor(model, ResumeConfig(str(tmp_path)))(ray.data.range(10))
    with pytest.raises(ValueError, match="the rows lack the column '__raydata_llm_resume', by which a job is resumed"):
        write_parquet(ds.select_columns(["id"]), tmp_path)
    write_parquet(ds.map(lambda row: {**row, "more": 1}).filter(lambda row: row["id"] < 7), tmp_path)
    assert ids_in(tmp_path) == list(range(7))


def test_what_cannot_go_together_is_refused_before_a_row(model: str, tmp_path: Path) -> None:
    ds = processor(model, ResumeConfig(str(tmp_path / "a")), engine=start_nothing)(ray.data.range(10))
    with pytest.raises(ValueError, match=r"is not the processor's ResumeConfig path .*give both the same folder"):
        write_parquet(ds, tmp_path / "b")
    with pytest.raises(ValueError, match="mode='append' is not valid for a job that can be resumed"):
        write_parquet(ds, tmp_path / "a", mode="append")
    with pytest.raises(ValueError, match="'/proc/x' cannot be used"):
        write_parquet(ray.data.range(1), "/proc/x")
    with pytest.raises(ValueError, match="file_seconds=0 is not valid: give more than 0 seconds"):
        write_parquet(ds, tmp_path / "a", file_seconds=0)
    with pytest.raises(ValueError, match=r"dataset=list is not valid: give a ray.data.Dataset"):
        write_jsonl([1], tmp_path)  # type: ignore[arg-type]
    from ray.data.checkpoint import CheckpointConfig

    context = ray.data.DataContext.get_current()
    context.checkpoint_config = CheckpointConfig(id_column="id", checkpoint_path=str(tmp_path / "checkpoint"))
    try:
        both = ray.data.range(10)
        with pytest.raises(ValueError, match=r"DataContext\.checkpoint_config are both set"):
            processor(model, ResumeConfig(str(tmp_path / "a")))(both)
    finally:
        context.checkpoint_config = None


@pytest.mark.parametrize(
    ("path", "same", "is_local"),
    [
        ("s3://me:secret@bucket/folder/?region=eu", "s3://bucket/folder", False),
        ("bucket/folder", "s3://bucket/folder/", False),
        ("folder", str(Path.cwd() / "folder"), True),
        ("local:///a/b/", "/a/b", True),
        ("file:///a/b", "/a/./b", True),
    ],
    ids=str,
)
def test_a_folder_is_the_same_however_it_is_written(path: str, same: str, is_local: bool) -> None:
    assert _place(path, is_local=is_local) == _place(same, is_local=is_local)
    assert _place(path, is_local=is_local) != _place(f"{same}/more", is_local=is_local)


def test_an_empty_dataset_leaves_an_empty_folder(model: str, tmp_path: Path) -> None:
    ds = ray.data.from_arrow(pa.table({"id": pa.array([], pa.int64())}))
    summary = write_parquet(processor(model, ResumeConfig(str(tmp_path)), engine=start_nothing)(ds), tmp_path)
    assert (summary.files, summary.rows) == (0, 0)


def test_steps_after_the_processor_that_multiply_rows_stop_the_job(model: str, tmp_path: Path) -> None:
    rows = [{"id": number % 140} for number in range(160)]  # 20 are copies of others
    ds = processor(model, ResumeConfig(str(tmp_path)))(ray.data.from_items(rows))
    with pytest.raises(ValueError, match=r"rows came to the sink a second time: .*flat_map.* Move that step before"):
        write_parquet(ds.flat_map(lambda row: [row, row]), tmp_path)
    shuffled = ds.repartition(3).random_shuffle().filter(lambda row: row["id"] != 139)
    write_parquet(shuffled, tmp_path)
    assert ids_in(tmp_path) == sorted(row["id"] for row in rows if row["id"] != 139)


def test_made_rows_that_were_multiplied_stop_the_job_too(model: str, tmp_path: Path) -> None:
    made = processor(model, ResumeConfig(str(tmp_path)))(ray.data.range(20)).materialize()
    for doubled in (made.flat_map(lambda row: [row, row]), made.union(made)):
        with pytest.raises(ValueError, match="20 rows came to the sink a second time"):
            write_parquet(doubled, tmp_path)
    write_parquet(made, tmp_path)
    assert ids_in(tmp_path) == list(range(20))


def test_a_job_whose_key_column_is_not_unique_ends_with_every_row(model: str, tmp_path: Path) -> None:
    resume = ResumeConfig(str(tmp_path), key_column="key")
    rows = [{"id": number, "key": number % 4} for number in range(8)]
    write_parquet(processor(model, resume)(ray.data.from_items(rows[:4])), tmp_path)
    again = processor(model, resume)(ray.data.from_items(rows[4:] + rows[:4], override_num_blocks=2))
    with contextlib.suppress(ValueError):  # once, where the others come first
        write_parquet(again, tmp_path)
    summary = write_parquet(again, tmp_path)
    assert summary.rows + summary.skipped_rows == 8
    assert ids_in(tmp_path) == list(range(8))


def test_a_file_that_is_no_parquet_any_more_is_named(model: str, tmp_path: Path) -> None:
    resume = ResumeConfig(str(tmp_path))
    write_parquet(processor(model, resume)(ray.data.range(10)), tmp_path)
    [file] = tmp_path.glob("*.parquet")
    file.write_bytes(b"\xaa" * file.stat().st_size)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"'{file.name}' in .* is damaged, .* delete '{file.name}' and run again"):
            write_parquet(processor(model, resume)(ray.data.range(10)), tmp_path)
    file.unlink()
    assert write_parquet(processor(model, resume)(ray.data.range(10)), tmp_path).rows == 10
