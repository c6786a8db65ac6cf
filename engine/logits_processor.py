"""Where users put code of their own between logits and draws: the engine's setting `logits_processors`.

    class Shout:
        def __init__(self, *, vocab_size: int, device: torch.device) -> None:
            self._bonus = torch.zeros(vocab_size, device=device)
            self._bonus[7] = 5.0

        def new_request_processor(self, params: SamplingParams) -> RequestProcessor | None:
            if "shout" not in params.extra_args:
                return None
            return lambda prompt, output, logits: logits + self._bonus * params.extra_args["shout"]

    LLM(model, logits_processors=[Shout])          # or "my_package.processors:Shout"
    SamplingParams(extra_args={"shout": 2.0})

It is vLLM's processor of one request at a time (there: `new_req_logits_processor` of an `AdapterLogitsProcessor`). The
function is called before each draw with the row's prompt, its output so far and its logits, float32, after penalties
and biases and before temperature and truncation. Rows for which it is None pay nothing.

Invariant: the row's draw waits for its last token on the host, and other rows' for nothing (`guides.py`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from raydata_llm.engine.sampling_params import SamplingParams

# (prompt token ids, output token ids so far, logits [V] float32) -> logits [V]
RequestProcessor = Callable[[list[int], list[int], torch.Tensor], torch.Tensor]


class LogitsProcessor(Protocol):
    """What a user's class offers; one object of it serves an engine. It is made with `vocab_size` and `device`."""

    def new_request_processor(self, params: SamplingParams) -> RequestProcessor | None:
        """What to do with the logits of a request with these parameters; called once an output.

        Raises:
            ValueError: for `extra_args` that make no sense; that is the request's error.
        """
        ...


def load_logits_processors(
    given: Sequence[str | type[Any]], vocab_size: int, device: torch.device
) -> list[LogitsProcessor]:
    """Make an object of each class.

    Raises:
        ValueError: for one that cannot be imported or has no `new_request_processor`.
    """
    return [_load(one)(vocab_size=vocab_size, device=device) for one in given]


def _load(given: str | type[Any]) -> Any:
    found: Any = given
    if isinstance(given, str):
        module, _, name = given.partition(":")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"logits_processors={given!r} is not found ({error}): give 'module:Class'") from error
    if not callable(getattr(found, "new_request_processor", None)):
        raise ValueError(f"logits_processors={given!r} has no method new_request_processor(params)")
    return found
