"""Results of timed runs as a Markdown table."""

from __future__ import annotations

from typing import Any

COLUMNS = {
    "model": "model",
    "workload": "workload",
    "wall_s": "wall s",
    "first_s": "first s",
    "out_tok_s": "out tok/s",
    "bound_share": "of bound",
    "steps": "steps",
    "mean_decode_rows": "decode rows",
    "gpu_busy": "GPU busy",
    "preemptions": "preempted",
    "compiles": "compiles",
}


def table(results: list[dict[str, Any]]) -> str:
    """A line each."""
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|---" * len(COLUMNS) + "|"]
    for result in results:
        cells = [_cell(name, result.get(name)) for name in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name in ("bound_share", "gpu_busy"):
        return f"{value:.0%}"
    return f"{value:,}" if isinstance(value, int) else str(value)
