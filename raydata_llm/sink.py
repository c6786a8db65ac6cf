"""`write_parquet` and `write_jsonl`: run a dataset and write its rows to a folder, exactly once each.

Owns what a user says of a sink, and the checks before a row is generated. How files are written is
`raydata_llm.sink_writer`'s matter, which of them count `raydata_llm.ledger`'s.
"""

from __future__ import annotations

import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from raydata_llm.engine.known_names import named_arguments
from raydata_llm.ledger import Ledger, holds_job
from raydata_llm.ledger_index import KEY_BYTES
from raydata_llm.ledger_layout import OLD_ENTRY, DamagedLedgerError, Entry
from raydata_llm.redaction import redact
from raydata_llm.resume import PLAN_SETTING, ResumePlan
from raydata_llm.resume_broker import BROKER_SETTING, start_broker
from raydata_llm.sink_dataset import finished_blocks, refuse_ray_checkpoint, setting, with_setting
from raydata_llm.sink_format import FileFormat, merge_schemas
from raydata_llm.sink_limits import FileLimits
from raydata_llm.sink_storage import Storage
from raydata_llm.sink_task import WritePlan, WrittenFile, read_parquet
from raydata_llm.sink_writer import FileWriter

if TYPE_CHECKING:
    from ray.data import Dataset

_FILE_BYTES = 128 << 20
_FILE_SECONDS = 60.0
# Encoding and uploading at 100-250 MB/s a file: four keep up with any job of one driver.
_FILES_AT_ONCE = 4
_READS_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class WriteSummary:
    """What a sink wrote.

    Args:
        path: The folder.
        files: Files written by this run.
        rows: Rows in them, but for those in files of error rows.
        error_rows: Rows that failed: in files of their own where there is a `dead_letter_path` or a `resume`, else
            among `rows`.
        skipped_rows: Rows that earlier runs had committed.
        size_bytes: Of the files.
    """

    path: str
    files: int
    rows: int
    error_rows: int
    skipped_rows: int
    size_bytes: int


@named_arguments
def write_parquet(
    dataset: Dataset,
    path: str | os.PathLike[str],
    *,
    filesystem: Any = None,
    dead_letter_path: str | os.PathLike[str] | None = None,
    mode: str = "error",
    compression: str | None = "zstd",
    file_bytes: int = _FILE_BYTES,
    file_seconds: float = _FILE_SECONDS,
    files_at_once: int = _FILES_AT_ONCE,
) -> WriteSummary:
    """Run a dataset and write its rows as Parquet files with one schema.

    A file appears whole or not at all, and a task that Ray runs again replaces its own file. When the processor has a
    `ResumeConfig` of this path, rows are committed as their files appear, and a job that is run again skips them.

    Args:
        dataset: Usually what a processor returned.
        path: A folder: local, or an address such as `s3://bucket/folder`.
        filesystem: Of pyarrow or fsspec, if `path` needs one.
        dead_letter_path: A folder for error rows (`__inference_error__` set); None leaves them in `path`.
        mode: "error" refuses a folder that holds files, "append" adds to it. A job that can be resumed has no choice.
        compression: "zstd", "snappy", "gzip", "lz4", "brotli" or None.
        file_bytes: Of a file, about.
        file_seconds: Between a file's first row and its upload at most.
        files_at_once: Files that are encoded and uploaded at once.

    Raises:
        ValueError: before a row is generated, when the folder cannot be written or an argument is wrong.
        OSError: when the store fails for good later; what was written before stays.
    """
    file_format = FileFormat(name="parquet", compression=compression)
    limits = FileLimits(file_bytes=file_bytes, file_seconds=file_seconds, files_at_once=files_at_once)
    return _write(dataset, path, filesystem, dead_letter_path, mode, file_format, limits)


@named_arguments
def write_jsonl(
    dataset: Dataset,
    path: str | os.PathLike[str],
    *,
    filesystem: Any = None,
    dead_letter_path: str | os.PathLike[str] | None = None,
    mode: str = "error",
    compression: str | None = None,
    file_bytes: int = _FILE_BYTES,
    file_seconds: float = _FILE_SECONDS,
    files_at_once: int = _FILES_AT_ONCE,
) -> WriteSummary:
    """Run a dataset and write its rows as files of JSON lines; see `write_parquet`.

    Bytes become base64, times ISO text, and what is no number null.

    Args:
        dataset: As `write_parquet`'s.
        path: As `write_parquet`'s.
        filesystem: As `write_parquet`'s.
        dead_letter_path: As `write_parquet`'s.
        mode: As `write_parquet`'s.
        compression: "gzip" or None.
        file_bytes: As `write_parquet`'s.
        file_seconds: As `write_parquet`'s.
        files_at_once: As `write_parquet`'s.
    """
    file_format = FileFormat(name="jsonl", compression=compression)
    limits = FileLimits(file_bytes=file_bytes, file_seconds=file_seconds, files_at_once=files_at_once)
    return _write(dataset, path, filesystem, dead_letter_path, mode, file_format, limits)


def _write(
    dataset: Dataset,
    path: str | os.PathLike[str],
    filesystem: Any,
    dead_letter_path: str | os.PathLike[str] | None,
    mode: str,
    file_format: FileFormat,
    limits: FileLimits,
) -> WriteSummary:
    if not hasattr(dataset, "iter_internal_ref_bundles"):
        raise ValueError(
            f"dataset={type(dataset).__name__} is not valid: give a ray.data.Dataset, as processor(dataset) is"
        )
    if mode not in ("error", "append"):
        raise ValueError(f"mode={mode!r} is not valid: give 'error' or 'append'")
    resume: ResumePlan | None = setting(dataset, PLAN_SETTING)
    if resume is not None:
        _check_resume(dataset, resume, path, filesystem, mode)
    storage = _writable(path, filesystem)
    letters = None if dead_letter_path is None else _writable(dead_letter_path, filesystem)
    token = uuid.uuid4().hex[:8]
    plan = WritePlan(storage=storage, letters=letters, format=file_format, token=token)
    if resume is None:
        _check_folder(storage, mode)
        return _run(dataset, plan, limits)
    return _run_resumable(dataset, plan, limits, resume)


def _run(dataset: Dataset, plan: WritePlan, limits: FileLimits) -> WriteSummary:
    with FileWriter(plan, limits) as writer:
        _write_blocks(dataset, writer)
    return _summary(plan, writer.files, skipped=0)


def _run_resumable(dataset: Dataset, plan: WritePlan, limits: FileLimits, resume: ResumePlan) -> WriteSummary:
    import ray

    letters = plan.letters
    if letters is None and resume.config.retry_errors:
        letters = plan.storage  # in files of their own, which the next run drops to try their rows again
    ledger, entries = Ledger.begin(
        plan.storage,
        letters or plan.storage,
        resume.space,
        plan.token,
        resume.about,
        retry_errors=resume.config.retry_errors,
    )
    plan = WritePlan(storage=plan.storage, letters=letters, format=plan.format, token=plan.token, ledger=ledger)
    earlier = _earlier_files(plan, entries)
    broker = start_broker(ledger, entries, resume.config.key_column)
    schema = merge_schemas(file.schema for file in earlier) if earlier else None
    try:
        with FileWriter(plan, limits, schema, broker) as writer:
            _write_blocks(with_setting(dataset, BROKER_SETTING, broker[0]), writer)
            writer.mend(earlier)
        skipped = ray.get(broker[1].counts.remote()).found
    finally:
        ray.kill(broker[1])
    ledger.finish(resume.about, {entry.name for entry in entries} | {file.name for file in writer.files})
    return _summary(plan, writer.files, skipped=skipped)


def _write_blocks(dataset: Dataset, writer: FileWriter) -> None:
    from raydata_llm.job_run import jobs_of  # imports Ray

    jobs = jobs_of(dataset)
    for job in jobs:
        job.rows_written = lambda: writer.rows_written
    try:
        for block in finished_blocks(dataset):
            writer.add(block)
    except BaseException:  # Ctrl-C and SIGTERM too: what is finished is not lost
        writer.stop()
        for job in jobs[-1:]:
            job.tell_stopped()
        raise
    writer.finish()


def _writable(path: str | os.PathLike[str], filesystem: Any) -> Storage:
    storage = Storage.open(path, filesystem)
    storage.check_writable()
    return storage


def _check_folder(storage: Storage, mode: str) -> None:
    if holds_job(storage):
        raise ValueError(
            f"path={storage.label!r} holds the files of a job that can be resumed: give another folder, or the "
            "processor a ResumeConfig of this one"
        )
    found = [name for name in storage.sizes() if not name.startswith((".", "_"))]
    if found and mode == "error":
        raise ValueError(
            f"path={storage.label!r} holds {len(found)} files already, such as {sorted(found)[0]!r}: give an empty "
            "folder, mode='append' to add to it, or the processor a ResumeConfig to continue a job"
        )


def _check_resume(
    dataset: Dataset, resume: ResumePlan, path: str | os.PathLike[str], filesystem: Any, mode: str
) -> None:
    refuse_ray_checkpoint(dataset)
    is_local = Storage.open(path, filesystem).is_local
    if _place(path, is_local=is_local) != _place(resume.config.path, is_local=is_local):
        raise ValueError(
            f"path={redact(os.fspath(path))!r} is not the processor's ResumeConfig path "
            f"{redact(resume.config.path)!r}: the sink commits what the processor skips, give both the same folder"
        )
    if mode != "error":
        raise ValueError(f"mode={mode!r} is not valid for a job that can be resumed: leave it out")


def _place(path: str | os.PathLike[str], *, is_local: bool) -> str:
    """A folder without what may be written in several ways: the scheme, credentials, options."""
    scheme, mark, rest = os.fspath(path).partition("://")
    if is_local or scheme in ("local", "file"):
        return os.path.abspath(os.path.expanduser(rest if mark else scheme))
    # With a filesystem argument, `bucket/folder` stands for the same as `s3://bucket/folder`.
    return (rest if mark else scheme).partition("?")[0].rpartition("@")[2].strip("/")


def _earlier_files(plan: WritePlan, entries: list[Entry]) -> list[WrittenFile]:
    """What earlier runs wrote, with the schemas in the files themselves."""
    for entry in entries:
        if not entry.name.endswith(plan.format.suffix):
            raise ValueError(
                f"path={plan.storage.label!r} holds {entry.name!r}, and this sink writes {plan.format.suffix} files: "
                "continue the job with the same function and compression, or give it another folder"
            )
    if not plan.format.has_schema:
        return []
    ledger = plan.ledger
    assert ledger is not None
    old_entries = ledger.sizes_of_old_entries(entries)

    def read(entry: Entry) -> WrittenFile:
        metadata = read_parquet(plan, entry.name, pq.read_metadata)
        # An entry of an earlier release has no other proof.
        if entry.kind == OLD_ENTRY and old_entries[entry] != metadata.num_rows * KEY_BYTES:
            raise DamagedLedgerError(ledger.entry_is_damaged(entry))
        schema = metadata.schema.to_arrow_schema().remove_metadata()
        return WrittenFile(entry.name, 0, 0, entry.size, 0, schema, entry.is_error)

    with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        return list(pool.map(read, entries))


def _summary(plan: WritePlan, files: list[WrittenFile], *, skipped: int) -> WriteSummary:
    return WriteSummary(
        path=plan.storage.label,
        files=len(files),
        rows=sum(file.rows for file in files if not file.is_error),
        error_rows=sum(file.num_failed for file in files),
        skipped_rows=skipped,
        size_bytes=sum(file.size for file in files),
    )
