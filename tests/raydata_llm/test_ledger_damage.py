"""A ledger that is not what was written: made again, or named with what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from raydata_llm.ledger import Ledger
from raydata_llm.ledger_index import KEY_BYTES
from raydata_llm.ledger_layout import DamagedLedgerError, Entry, file_name
from raydata_llm.sink_format import FileFormat
from raydata_llm.sink_storage import Storage

KEYS = [bytes([65 + number]) * KEY_BYTES for number in range(4)]
TOKENS = ("aaaaaaaa", "bbbbbbbb")
PARQUET = FileFormat(name="parquet", compression=None)
DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "lost": lambda body: None,
    "emptied": lambda body: b"",
    "cut to whole keys": lambda body: body[:KEY_BYTES],
    "cut": lambda body: body[:21],
    "garbled": lambda body: body[:-1] + bytes([body[-1] ^ 1]),
}
DAMAGED = pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())


def begin(folder: Path, token: str, space: str = "space") -> tuple[Ledger, list[Entry]]:
    storage = Storage.open(folder)
    return Ledger.begin(storage, storage, space, token, {}, retry_errors=True)


def name_of(token: str, suffix: str) -> str:
    return file_name(token, 0, suffix, errors=False)


def fill(folder: Path, suffix: str) -> None:
    """Two runs, of two rows each; the second was killed before its end."""
    for number, token in enumerate(TOKENS):
        ledger, entries = begin(folder, token)
        keys = b"".join(KEYS[2 * number : 2 * number + 2])
        content = PARQUET.encode(pa.table({"id": [0, 1]}), keys) if suffix == ".parquet" else b'{"id": 0}\n{"id": 1}\n'
        ledger.commit(name_of(token, suffix), content, keys)
        if not number:
            ledger.finish({}, [*(entry.name for entry in entries), name_of(token, suffix)])


def keys_counted(folder: Path, token: str = "cccccccc") -> list[bytes]:
    ledger, entries = begin(folder, token)
    keys = b"".join(ledger.read_keys(entries))
    ledger.finish({}, [entry.name for entry in entries])
    return sorted(keys[start : start + KEY_BYTES] for start in range(0, len(keys), KEY_BYTES))


def spoil(path: Path, damage: Callable[[bytes], bytes | None]) -> None:
    body = damage(path.read_bytes())
    if body is None:
        path.unlink()
    else:
        path.write_bytes(body)


@DAMAGED
@pytest.mark.parametrize("token", TOKENS)
def test_a_parquet_files_entry_is_made_again_from_the_file(
    tmp_path: Path, token: str, damage: Callable[[bytes], bytes | None]
) -> None:
    fill(tmp_path, ".parquet")
    [entry] = (tmp_path / "_raydata_llm" / "space").glob(f"part-{token}*.keys")
    whole = entry.read_bytes()
    spoil(entry, damage)
    assert keys_counted(tmp_path) == KEYS
    assert entry.read_bytes() == whole


@DAMAGED
@pytest.mark.parametrize("token", TOKENS)
def test_a_damaged_entry_of_json_lines_stops_the_run_until_its_file_is_deleted(
    tmp_path: Path, token: str, damage: Callable[[bytes], bytes | None]
) -> None:
    fill(tmp_path, ".jsonl")
    name = name_of(token, ".jsonl")
    [entry] = (tmp_path / "_raydata_llm" / "space").glob(f"{name}.*.keys")
    spoil(entry, damage)
    for later in ("cccccccc", "dddddddd"):
        with pytest.raises(DamagedLedgerError, match=rf"{name}.* is lost or damaged.* delete '{name}' and run again"):
            keys_counted(tmp_path, later)
    (tmp_path / name).unlink()
    assert keys_counted(tmp_path, "eeeeeeee") == (KEYS[2:] if token == TOKENS[0] else KEYS[:2])


def test_a_file_that_was_cut_is_written_anew(tmp_path: Path) -> None:
    fill(tmp_path, ".parquet")
    spoil(tmp_path / name_of(TOKENS[0], ".parquet"), lambda body: body[:50])
    assert keys_counted(tmp_path) == KEYS[2:]
    assert not (tmp_path / name_of(TOKENS[0], ".parquet")).exists()


@DAMAGED
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_runs_damaged_mark_or_state_changes_nothing(
    tmp_path: Path, suffix: str, damage: Callable[[bytes], bytes | None]
) -> None:
    fill(tmp_path / "first", suffix)
    for name in [path.name for path in (tmp_path / "first" / "_raydata_llm" / "runs").iterdir()]:
        shutil.copytree(tmp_path / "first", tmp_path / name)
        spoil(tmp_path / name / "_raydata_llm" / "runs" / name, damage if "." in name else DAMAGES["lost"])
        assert keys_counted(tmp_path / name) == KEYS, name
        # Its files are still known when others take their place.
        ledger, _ = begin(tmp_path / name, "dddddddd", space="other")
        ledger.finish({}, [])
        assert not list((tmp_path / name).glob("part-*"))


def test_a_state_of_which_both_copies_are_damaged_stops_every_run(tmp_path: Path) -> None:
    fill(tmp_path, ".jsonl")
    for state in (tmp_path / "_raydata_llm" / "runs").glob("00000002-*.begun*"):
        spoil(state, DAMAGES["garbled"])
    with pytest.raises(DamagedLedgerError, match=r"begun' in .* is damaged, and so is its copy.* give the job another"):
        keys_counted(tmp_path)


def test_files_of_a_run_of_which_nothing_else_is_left_are_named(tmp_path: Path) -> None:
    fill(tmp_path, ".jsonl")
    strange = tmp_path / name_of("cccccccc", ".jsonl")
    strange.write_bytes(b"{}\n")
    for token in ("dddddddd", "eeeeeeee"):
        with pytest.raises(DamagedLedgerError, match=r"part-cccccccc.* is of a run of which nothing else .* delete"):
            keys_counted(tmp_path, token)
    strange.unlink()
    assert keys_counted(tmp_path, "ffffffff") == KEYS
    shutil.rmtree(tmp_path / "_raydata_llm" / "runs")
    with pytest.raises(ValueError, match=r"holds 2 files of no resumable run, such as 'part-aaaaaaaa"):
        keys_counted(tmp_path)


def test_a_folder_removed_while_a_run_goes_on_is_named(tmp_path: Path) -> None:
    ledger, _ = begin(tmp_path / "out", TOKENS[0])
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"was removed or emptied while the job ran.* run the job again"):
        ledger.commit(name_of(TOKENS[0], ".jsonl"), b"{}\n", KEYS[0])
    with pytest.raises(FileNotFoundError, match="was removed or emptied"):
        ledger.finish({}, [])
    assert keys_counted(tmp_path / "out") == []


def old_folder(folder: Path, suffix: str, *, staged: str | None = None) -> None:
    """A folder as the release before wrote it: one run in space `old`, and one in `new` that was not done."""
    place = folder / "_raydata_llm"
    content = bytes(PARQUET.encode(pa.table({"id": [0, 1]})))
    for space in ("runs", "old", "new"):
        (place / space).mkdir(parents=True)
    (place / "current.json").write_text(json.dumps({"space": "old", "model": "m"}))
    for number, (token, space) in enumerate(zip(TOKENS, ("old", "new"), strict=True)):
        (place / "runs" / f"{number + 1:08d}-{token}-{space}").touch()
        name = name_of(token, suffix)
        keys = b"".join(KEYS[2 * number : 2 * number + 2])
        (place / space / f"{name}.{len(content)}.ledger").write_bytes(keys)
        (place / space / f"part-{token}-000001{suffix}.9.ledger").write_bytes(KEYS[0])  # a write that was cut
        (folder / name if space == "old" else place / space / f"{name}.staged").write_bytes(content)


@pytest.mark.parametrize(("space", "keys"), [("old", KEYS[:2]), ("new", KEYS[2:])])
def test_a_folder_of_the_release_before_is_read_on(tmp_path: Path, space: str, keys: list[bytes]) -> None:
    old_folder(tmp_path, ".jsonl")
    for token in ("cccccccc", "dddddddd"):
        ledger, entries = begin(tmp_path, token, space)
        assert b"".join(ledger.read_keys(entries)) == b"".join(keys)
    ledger.finish({}, [entry.name for entry in entries])
    token = TOKENS[0] if space == "old" else TOKENS[1]
    assert [path.name for path in tmp_path.glob("part-*")] == [name_of(token, ".jsonl")]
    assert not (tmp_path / "_raydata_llm" / "current.json").exists(), "that release refuses the folder now"


@pytest.mark.parametrize("done", range(3))
def test_a_change_of_space_that_the_release_before_had_begun_is_finished(tmp_path: Path, done: int) -> None:
    old_folder(tmp_path, ".jsonl")
    intent = {"from": "old", "to": "new", "about": {}}
    (tmp_path / "_raydata_llm" / "promotion.json").write_text(json.dumps(intent))
    if done > 0:
        (tmp_path / name_of(TOKENS[0], ".jsonl")).unlink()
    if done > 1:
        name = name_of(TOKENS[1], ".jsonl")
        (tmp_path / "_raydata_llm" / "new" / f"{name}.staged").rename(tmp_path / name)
    _, entries = begin(tmp_path, "cccccccc", "new")
    assert [entry.name for entry in entries] == [name_of(TOKENS[1], ".jsonl")]
    assert [path.name for path in tmp_path.glob("part-*")] == [name_of(TOKENS[1], ".jsonl")]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"spac": 1}', b'{"space": [1], "to": 3}', b"\xff\xfe"]
)
@pytest.mark.parametrize("name", ["current.json", "promotion.json"])
def test_a_damaged_file_of_the_release_before_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    old_folder(tmp_path, ".jsonl")
    (tmp_path / "_raydata_llm" / name).write_bytes(content)
    remedy = "write .* into it" if name == "current.json" else "delete '_raydata_llm/promotion.json' and run again"
    with pytest.raises(DamagedLedgerError, match=rf"{name}' in .* is damaged: {remedy}"):
        begin(tmp_path, "cccccccc")


@pytest.mark.parametrize("body", [b"", KEYS[0][:5]], ids=["emptied", "odd"])
def test_a_damaged_entry_of_the_release_before_is_named(tmp_path: Path, body: bytes) -> None:
    old_folder(tmp_path, ".jsonl")
    [entry] = (tmp_path / "_raydata_llm" / "old").glob("*-000000.jsonl.*")
    entry.write_bytes(body)
    ledger, entries = begin(tmp_path, "cccccccc", "old")
    with pytest.raises(DamagedLedgerError, match=r"is lost or damaged.* delete 'part-aaaaaaaa-000000.jsonl' and run"):
        list(ledger.read_keys(entries))
