"""How much memory a container still gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from raydata_llm.engine.kv_budget import container_room


@pytest.mark.parametrize(
    ("files", "room"),
    [
        ({"max": "max\n", "current": "900\n"}, None),
        ({"current": "900\n"}, None),
        ({"max": "1000\n", "current": "900\n"}, 100),
        (
            {"max": "1000\n", "current": "900\n", "stat": "anon 200\nfile 700\ninactive_file 600\nactive_file 100\n"},
            700,
        ),
    ],
)
def test_files_that_a_container_has_read_leave_room(files: dict[str, str], room: int | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert container_room(tmp_path) == room
