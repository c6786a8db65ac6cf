"""Keys that prove themselves, alone and inside Parquet files."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydata_llm.ledger_entry import TRAILER_BYTES, add_to_parquet, keys_in_parquet, seal, unsealed
from raydata_llm.ledger_index import KEY_BYTES
from raydata_llm.sink_format import FileFormat

KEYS = st.lists(st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES), max_size=9).map(b"".join)
TABLE = pa.table({"id": range(3000), "text": [f"row {number} " * 5 for number in range(3000)]})
TABLE_KEYS = bytes(range(KEY_BYTES)) * 3000


def cut(content: bytes, length: int) -> list[bytes]:
    return [content[start : start + length] for start in range(0, len(content), length)]


@settings(max_examples=60, deadline=None)
@given(KEYS, st.integers(1, 70))
def test_an_entry_gives_its_keys_however_it_is_cut_into_pieces(keys: bytes, length: int) -> None:
    pieces = list(unsealed(cut(seal(keys), length)))
    assert b"".join(pieces) == keys and not any(len(piece) % KEY_BYTES for piece in pieces)


@settings(max_examples=150, deadline=None)
@given(KEYS, st.data())
def test_an_entry_that_was_cut_garbled_or_lengthened_is_refused(keys: bytes, data: st.DataObject) -> None:
    entry = seal(keys)
    place = data.draw(st.integers(0, len(entry) - 1))
    garbled = entry[:place] + bytes([entry[place] ^ data.draw(st.integers(1, 255))]) + entry[place + 1 :]
    for damaged in (entry[:place], garbled, entry + b"x", entry + entry, b""):
        with pytest.raises(ValueError, match="does not prove itself"):
            list(unsealed(cut(damaged, 20)))


@pytest.mark.parametrize("compression", ["zstd", None])
def test_a_parquet_file_carries_its_keys_and_readers_do_not_notice(tmp_path: Path, compression: str | None) -> None:
    file_format = FileFormat(name="parquet", compression=compression)
    plain, content = file_format.encode(TABLE), file_format.encode(TABLE, TABLE_KEYS)
    assert content.size == plain.size + len(TABLE_KEYS) + TRAILER_BYTES
    (tmp_path / "file.parquet").write_bytes(content)
    assert pq.read_table(tmp_path / "file.parquet") == TABLE
    assert pq.read_schema(tmp_path / "file.parquet") == pq.read_schema(pa.BufferReader(plain))
    assert pq.read_table(tmp_path / "file.parquet", filters=[("id", "=", 2999)])["id"].to_pylist() == [2999]
    body = bytes(content)
    assert keys_in_parquet(lambda start, length: body[start : start + length], len(body)) == TABLE_KEYS


def test_a_file_without_keys_or_with_damaged_ones_gives_none() -> None:
    content = bytes(FileFormat(name="parquet", compression=None).encode(TABLE.slice(0, 3)))
    whole = bytes(add_to_parquet(content, TABLE_KEYS[: 3 * KEY_BYTES]))
    keys_at = whole.index(TABLE_KEYS[: 3 * KEY_BYTES])
    garbled = whole[:keys_at] + b"\xff" + whole[keys_at + 1 :]
    for body in (content, garbled, b"", b"PAR1", bytes(4) + b"PAR1", b"\xff" * 40, whole[:-1]):

        def read(start: int, length: int, body: bytes = body) -> bytes:
            return body[start : start + length]

        assert keys_in_parquet(read, len(body)) is None
