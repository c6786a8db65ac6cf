"""The progress bar of `LLM`: prompts done, and tokens in and out per second.

Owns when a bar is drawn: on a terminal or in a notebook, not in a log file. Knows no engine.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from raydata_llm.engine.pooling_request import PoolingRequestOutput
from raydata_llm.engine.request import RequestOutput


class Progress:
    """A bar over `total` prompts.

    Args:
        total: Prompts.
        use_tqdm: False draws nothing; True draws where someone looks; or a class to use as tqdm.
        description: Before the bar.
    """

    def __init__(self, total: int, use_tqdm: bool | Callable[..., Any], description: str) -> None:
        self._bar = _make_bar(total, use_tqdm, description)
        self._started = time.perf_counter()
        self._num_prompt_tokens = self._num_output_tokens = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, output: RequestOutput | PoolingRequestOutput[Any]) -> None:
        """Count a result's prompt as done."""
        outputs = output.outputs if isinstance(output, RequestOutput) else ()
        self.count(len(output.prompt_token_ids), sum(len(one.token_ids) for one in outputs))

    def count(self, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """Count one prompt as done."""
        if self._bar is None:
            return
        self._num_prompt_tokens += num_prompt_tokens
        self._num_output_tokens += num_output_tokens
        elapsed = max(time.perf_counter() - self._started, 1e-9)
        speed = f"input: {self._num_prompt_tokens / elapsed:.0f} tok/s"
        speed += f", output: {self._num_output_tokens / elapsed:.0f} tok/s"
        self._bar.set_postfix_str(speed, refresh=False)
        self._bar.update(1)


def _make_bar(total: int, use_tqdm: bool | Callable[..., Any], description: str) -> Any:
    if not use_tqdm:
        return None
    if callable(use_tqdm):
        return use_tqdm(total=total, desc=description)
    if not (sys.stderr.isatty() or "ipykernel" in sys.modules):
        return None
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=description, unit="prompt", dynamic_ncols=True)
