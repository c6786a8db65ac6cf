"""Which files count, whatever step a run died in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raydata_llm.ledger import Ledger, RunSupersededError
from raydata_llm.ledger_index import KEY_BYTES
from raydata_llm.ledger_layout import Entry, file_name, read_records
from raydata_llm.sink_storage import Storage

KEYS = b"0123456789abcdef"


def begin(folder: Path, token: str, space: str = "space", letters: Path | None = None, retry: bool = True) -> Ledger:
    return begin_with_entries(folder, token, space, letters, retry)[0]


def begin_with_entries(
    folder: Path, token: str, space: str = "space", letters: Path | None = None, retry: bool = True
) -> tuple[Ledger, list[Entry]]:
    storage = Storage.open(folder)
    return Ledger.begin(storage, Storage.open(letters or folder), space, token, {"model": "m"}, retry_errors=retry)


def part(token: str, number: int = 0, errors: bool = False) -> str:
    return file_name(token, number, ".parquet", errors=errors)


def visible(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir() if file.is_file()}


def test_what_one_run_committed_counts_in_the_next(tmp_path: Path) -> None:
    begin(tmp_path, "aaaaaaaa").commit(part("aaaaaaaa"), b"content", KEYS)
    ledger, entries = begin_with_entries(tmp_path, "bbbbbbbb")
    assert entries == [Entry(part("aaaaaaaa"), 7)]
    assert list(ledger.read_keys(entries)) == [KEYS]
    assert visible(tmp_path) == {part("aaaaaaaa")}


def test_keys_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = begin(tmp_path, "aaaaaaaa")
    lengths = [3, 0, 1, 40]
    keys = [bytes(range(number, number + 1)) * KEY_BYTES * length for number, length in enumerate(lengths)]
    for number, some in enumerate(keys):
        ledger.commit(part("aaaaaaaa", number), b"content", some)
    monkeypatch.setattr("raydata_llm.ledger._PIECE_BYTES", 2 * KEY_BYTES)
    pieces = list(ledger.read_keys(Entry(part("aaaaaaaa", number), 7) for number in range(4)))
    assert b"".join(pieces) == b"".join(keys) and max(map(len, pieces)) <= 2 * KEY_BYTES


def test_cut_writes_are_cleared_away_and_nothing_else_is(tmp_path: Path) -> None:
    begin(tmp_path, "aaaaaaaa").commit(part("aaaaaaaa"), b"content", KEYS)
    begin(tmp_path, "cccccccc")
    space = tmp_path / "_raydata_llm" / "space"
    (space / f"{part('aaaaaaaa', 1)}.9.keys").write_bytes(KEYS)  # no file
    (space / f"{part('aaaaaaaa', 2)}.9.keys").write_bytes(KEYS)  # half a file
    (tmp_path / part("aaaaaaaa", 2)).write_bytes(b"half")
    (tmp_path / part("aaaaaaaa", 3)).write_bytes(b"came late")  # its entry was cleared by a run in between
    (tmp_path / f".{part('aaaaaaaa', 1)}.01234567.part").write_bytes(b"half")
    (tmp_path / ".parquet.01234567.part").write_bytes(b"of somebody else")
    (tmp_path / "notes.txt").write_bytes(b"the user's")
    assert begin_with_entries(tmp_path, "bbbbbbbb")[1] == [Entry(part("aaaaaaaa"), 7)]
    assert visible(tmp_path) == {part("aaaaaaaa"), "notes.txt", ".parquet.01234567.part"}
    assert len(list(space.glob("*.keys"))) == 1


def test_error_rows_are_forgotten_so_that_they_run_again_or_kept(tmp_path: Path) -> None:
    letters = tmp_path / "letters"
    ledger = begin(tmp_path / "out", "aaaaaaaa", letters=letters)
    ledger.commit(part("aaaaaaaa", errors=True), b"bad", KEYS)
    assert visible(letters) == {part("aaaaaaaa", errors=True)}
    assert len(begin_with_entries(tmp_path / "out", "bbbbbbbb", letters=letters, retry=False)[1]) == 1
    assert begin_with_entries(tmp_path / "out", "cccccccc", letters=letters)[1] == []
    assert visible(letters) == set()


def test_a_run_stops_when_a_later_one_has_begun(tmp_path: Path) -> None:
    first = begin(tmp_path, "aaaaaaaa")
    second = begin(tmp_path, "bbbbbbbb")
    with pytest.raises(RunSupersededError, match="another run writes to"):
        first.commit(part("aaaaaaaa"), b"content", KEYS)
    second.commit(part("bbbbbbbb"), b"content", KEYS)
    assert visible(tmp_path) == {part("bbbbbbbb")}


def test_a_later_run_that_began_during_an_upload_gets_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = begin(tmp_path, "aaaaaaaa")
    put = Storage.put

    def slowly(self: Storage, name: str, content: object) -> None:
        if name == part("aaaaaaaa"):
            with monkeypatch.context() as patch:
                patch.setattr(Storage, "put", put)
                assert begin_with_entries(tmp_path, "bbbbbbbb")[1] == []
        put(self, name, content)

    monkeypatch.setattr(Storage, "put", slowly)
    with pytest.raises(RunSupersededError):
        first.commit(part("aaaaaaaa"), b"content", KEYS)
    assert visible(tmp_path) == set(), "the later run does these rows"


def test_a_later_run_that_counted_a_file_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = begin(tmp_path, "aaaaaaaa")
    put = Storage.put

    def begin_after(self: Storage, name: str, content: object) -> None:
        put(self, name, content)
        if name == part("aaaaaaaa"):
            assert begin_with_entries(tmp_path, "bbbbbbbb")[1] == [Entry(name, 7)]

    monkeypatch.setattr(Storage, "put", begin_after)
    with pytest.raises(RunSupersededError):
        first.commit(part("aaaaaaaa"), b"content", KEYS)
    assert visible(tmp_path) == {part("aaaaaaaa")}


def test_of_two_runs_that_begin_at_once_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(tmp_path, "aaaaaaaa")
    put, runs = Storage.put, []

    def after_the_other(self: Storage, name: str, content: object) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Storage, "put", put)
            runs.append(begin(tmp_path, "cccccccc"))
        put(self, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "put", after_the_other)
        with pytest.raises(RunSupersededError):
            begin(tmp_path, "bbbbbbbb")
    numbers = [run.number for run in read_records(Storage.open(tmp_path)).runs]
    assert sorted(numbers) == [1, 2, 2]
    runs[0].commit(part("cccccccc"), b"content", KEYS)
    runs[0].finish({}, [part("cccccccc")])
    assert visible(tmp_path) == {part("cccccccc")}


def test_a_run_of_another_space_ends_one_that_is_under_way(tmp_path: Path) -> None:
    first = begin(tmp_path, "aaaaaaaa")
    first.commit(part("aaaaaaaa"), b"old", KEYS)
    second = begin(tmp_path, "bbbbbbbb", space="other")
    second.commit(part("bbbbbbbb"), b"new", KEYS)
    second.finish({}, [part("bbbbbbbb")])
    with pytest.raises(RunSupersededError):
        first.commit(part("aaaaaaaa", 1), b"old", KEYS)
    assert visible(tmp_path) == {part("bbbbbbbb")}


def test_a_write_that_came_through_after_a_later_run_began_is_dropped_at_its_end(tmp_path: Path) -> None:
    begin(tmp_path, "aaaaaaaa")
    ledger = begin(tmp_path, "bbbbbbbb")
    ledger.commit(part("bbbbbbbb"), b"content", KEYS)
    (tmp_path / part("aaaaaaaa")).write_bytes(b"same rows")
    (tmp_path / part("cccccccc")).write_bytes(b"of a later run, whose entry is not seen yet")
    ledger.finish({}, [part("bbbbbbbb")])
    assert visible(tmp_path) == {part("bbbbbbbb"), part("cccccccc")}


def test_a_file_that_is_gone_at_the_end_is_told_and_its_rows_come_anew(tmp_path: Path) -> None:
    begin(tmp_path, "aaaaaaaa").commit(part("aaaaaaaa"), b"content", KEYS)
    ledger, entries = begin_with_entries(tmp_path, "bbbbbbbb")
    (tmp_path / part("aaaaaaaa")).unlink()
    with pytest.raises(FileNotFoundError, match=r"1 files that the job had written are gone .* run it again"):
        ledger.finish({}, [entry.name for entry in entries])
    assert begin_with_entries(tmp_path, "cccccccc")[1] == []


def test_a_run_that_replaces_a_file_too_late_leaves_the_same_rows_to_the_one_that_counts_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = begin(tmp_path, "aaaaaaaa")
    first.commit(part("aaaaaaaa"), b"content", KEYS)
    put, later = Storage.put, []

    def slowly(self: Storage, name: str, content: object) -> None:
        if name == part("aaaaaaaa"):
            with monkeypatch.context() as patch:
                patch.setattr(Storage, "put", put)
                later.append(begin_with_entries(tmp_path, "bbbbbbbb"))
        put(self, name, content)

    monkeypatch.setattr(Storage, "put", slowly)
    with pytest.raises(RunSupersededError):
        first.replace(part("aaaaaaaa"), b"longer content", KEYS)
    ledger, entries = later[0]
    assert entries == [Entry(part("aaaaaaaa"), 7)]
    ledger.finish({}, [entry.name for entry in entries])
    assert begin_with_entries(tmp_path, "cccccccc")[1] == [Entry(part("aaaaaaaa"), 14)]


def test_error_rows_of_other_jobs_in_the_same_folder_stay(tmp_path: Path) -> None:
    letters = tmp_path / "letters"
    for job, token in (("one", "aaaaaaaa"), ("two", "bbbbbbbb")):
        ledger = begin(tmp_path / job, token, letters=letters)
        ledger.commit(part(token, errors=True), b"bad", KEYS)
        ledger.finish({}, [part(token, errors=True)])
    begin(tmp_path / "two", "cccccccc", letters=letters)
    assert visible(letters) == {part("aaaaaaaa", errors=True)}


def test_error_rows_move_with_their_folder_or_run_again(tmp_path: Path) -> None:
    out, letters = tmp_path / "out", tmp_path / "letters"
    begin(out, "aaaaaaaa").commit(part("aaaaaaaa", errors=True), b"bad", KEYS)
    assert begin_with_entries(out, "bbbbbbbb", letters=letters, retry=False)[1] == []
    assert visible(out) == set(), "the same rows will be in the other folder"


def test_another_spaces_files_take_the_place_at_the_end_at_once(tmp_path: Path) -> None:
    letters = tmp_path / "letters"
    for space, token in (("space", "aaaaaaaa"), ("other", "bbbbbbbb")):
        ledger = begin(tmp_path, token, space=space, letters=letters)
        ledger.commit(part(token), b"content", KEYS)
        ledger.commit(part(token, 1, errors=True), b"bad", KEYS)
        assert visible(tmp_path) == {part("aaaaaaaa")} and visible(letters) == {part("aaaaaaaa", 1, errors=True)}
    ledger.finish({}, [part("bbbbbbbb"), part("bbbbbbbb", 1, errors=True)])
    assert visible(tmp_path) == {part("bbbbbbbb")} and visible(letters) == {part("bbbbbbbb", 1, errors=True)}


def test_what_is_staged_counts_in_a_further_run(tmp_path: Path) -> None:
    begin(tmp_path, "aaaaaaaa").commit(part("aaaaaaaa"), b"old", KEYS)
    begin(tmp_path, "bbbbbbbb", space="other").commit(part("bbbbbbbb"), b"new", KEYS)
    ledger, entries = begin_with_entries(tmp_path, "cccccccc", space="other")
    assert [entry.name for entry in entries] == [part("bbbbbbbb")]
    ledger.finish({"model": "n"}, [part("bbbbbbbb")])
    assert visible(tmp_path) == {part("bbbbbbbb")}
    [said] = (tmp_path / "_raydata_llm" / "runs").glob("*.finished")
    state = json.loads(said.read_text())["state"]
    assert (state["space"], state["about"]) == ("other", {"other": {"model": "n"}})
    assert [entry.name for entry in begin_with_entries(tmp_path, "dddddddd", space="other")[1]] == [part("bbbbbbbb")]
    assert begin_with_entries(tmp_path, "eeeeeeee")[1] == []


@pytest.mark.parametrize("deaths", range(1, 6))
def test_taking_the_place_goes_on_where_it_was_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deaths: int
) -> None:
    ledger = begin(tmp_path, "aaaaaaaa")
    for number in range(2):
        ledger.commit(part("aaaaaaaa", number), b"old", KEYS)
    ledger = begin(tmp_path, "bbbbbbbb", space="other")
    for number in range(2):
        ledger.commit(part("bbbbbbbb", number), b"new!", KEYS)
    steps = 0

    def dying(step: object) -> object:
        def run(self: Storage, *names: str) -> None:
            nonlocal steps
            steps += 1
            if steps == deaths:
                raise KeyboardInterrupt
            step(self, *names)  # type: ignore[operator]

        return run

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "move", dying(Storage.move))
        patch.setattr(Storage, "delete", dying(Storage.delete))
        with pytest.raises(KeyboardInterrupt):
            ledger.finish({}, [part("bbbbbbbb", number) for number in range(2)])
    found = {name.split("-")[1] for name in visible(tmp_path)}
    assert found in ({"aaaaaaaa"}, {"bbbbbbbb"}, set()), "never both"
    entries = begin_with_entries(tmp_path, "cccccccc", space="other")[1]
    assert {entry.name for entry in entries} == visible(tmp_path) == {part("bbbbbbbb"), part("bbbbbbbb", 1)}


def test_a_file_can_be_written_anew(tmp_path: Path) -> None:
    ledger = begin(tmp_path, "aaaaaaaa")
    ledger.commit(part("aaaaaaaa"), b"content", KEYS)
    for _ in range(2):  # as in a retry
        ledger.replace(part("aaaaaaaa"), b"longer content", ledger.keys_of(part("aaaaaaaa")))
    assert begin_with_entries(tmp_path, "bbbbbbbb")[1] == [Entry(part("aaaaaaaa"), 14)]


def test_files_of_no_such_run_are_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs.parquet").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"holds 1 files of no resumable run, such as 'theirs.parquet'"):
        begin(tmp_path, "aaaaaaaa")


def test_a_repeated_task_of_a_run_that_was_superseded_leaves_what_the_later_run_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = begin(tmp_path, "aaaaaaaa")
    first.commit(part("aaaaaaaa", errors=True), b"content", KEYS)
    delete, later = Storage.delete, []

    def slowly(self: Storage, name: str) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Storage, "delete", delete)
            later.append(begin_with_entries(tmp_path, "bbbbbbbb", retry=False))
        delete(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "delete", slowly)
        with pytest.raises(RunSupersededError):
            first.withdraw(part("aaaaaaaa", errors=True))
    [(ledger, entries)] = later
    ledger.finish({}, [entry.name for entry in entries])
    assert visible(tmp_path) == {part("aaaaaaaa", errors=True)}


def test_a_task_of_a_run_that_has_ended_adds_nothing(tmp_path: Path) -> None:
    ledger = begin(tmp_path, "aaaaaaaa")
    ledger.commit(part("aaaaaaaa"), b"content", KEYS)
    ledger.finish({}, [part("aaaaaaaa")])
    with pytest.raises(RunSupersededError, match="has ended"):
        ledger.commit(part("aaaaaaaa", 1), b"content", KEYS)
    assert visible(tmp_path) == {part("aaaaaaaa")}


def test_the_list_of_runs_stays_short(tmp_path: Path) -> None:
    for number in range(5):
        begin(tmp_path, f"aaaaaaa{number}").finish({}, [])
    names = [file.name for file in (tmp_path / "_raydata_llm" / "runs").iterdir()]
    assert len(names) == 5 + 4, "marks, and the last run's two states twice"
