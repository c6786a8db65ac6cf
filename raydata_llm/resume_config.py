"""What a user says of a job that can be resumed. Plain data; reads nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from raydata_llm.engine.known_names import named_fields
from raydata_llm.redaction import redact


@named_fields({})
@dataclass(frozen=True)
class ResumeConfig:
    """Let a job that is run again skip the rows that it has written.

    Args:
        path: The folder that the sink writes to.
        key_column: The column, of the dataset or made by `preprocess`, that tells rows apart, for prompts that are
            not the same in each run. Rows in which it is null, and rows that differ and share a value, are told
            apart by the dataset's columns. None: the prompt's token ids, the sampling parameters and the dataset's
            columns.
        version: Any text; another one starts afresh, and its results replace the others when the job is done. Give one
            for what is not noticed by itself: another `postprocess`, a LoRA adapter replaced in its place.
        retry_errors: Run rows again that failed.
    """

    path: str
    key_column: str | None = field(default=None, kw_only=True)
    version: str = field(default="", kw_only=True)
    retry_errors: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.path, (str, os.PathLike)) or not os.fspath(self.path):
            raise ValueError(f"resume: path={self.path!r} is not valid: give the folder that the sink writes to")
        object.__setattr__(self, "path", os.fspath(self.path))
        if self.key_column is not None and (not isinstance(self.key_column, str) or not self.key_column):
            raise ValueError(f"resume: key_column={self.key_column!r} is not valid: give a column's name, or None")
        if not isinstance(self.version, str):
            raise ValueError(f"resume: version={self.version!r} is not valid: give text")
        if not isinstance(self.retry_errors, bool):
            raise ValueError(f"resume: retry_errors={self.retry_errors!r} is not valid: give True or False")

    def __repr__(self) -> str:
        return f"ResumeConfig({redact(self.path)!r}, key_column={self.key_column!r}, version={self.version!r})"
