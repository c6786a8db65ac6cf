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

It is vLLM's processor of one request at a time (there: `new_req_logits_processor` of an `AdapterLogitsProcessor`);
classes that were written for vLLM are taken too (`vllm_logits.py`). The function is called before each draw with the
row's prompt, its output so far and its logits, float32, after penalties and biases and before temperature and
truncation. Rows for which it is None pay nothing.

Invariant: the row's draw waits for its last token on the host, and other rows' for nothing (`guides.py`).
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from raydata_llm.engine.sampling_params import SamplingParams
from raydata_llm.engine.vllm_logits import VllmProcessor, is_vllms

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
    given: Sequence[str | type[Any]], vocab_size: int, device: torch.device, settings: Any = None
) -> list[LogitsProcessor]:
    """Make an object of each class.

    Args:
        settings: What classes of vLLM's interface are made with.

    Raises:
        ValueError: for one that cannot be imported, or has neither interface.
    """
    return [_made(_load(one), vocab_size, device, settings) for one in given]


def _made(kind: Any, vocab_size: int, device: torch.device, settings: Any) -> LogitsProcessor:
    if is_vllms(kind):
        return VllmProcessor(kind, settings, device)
    made: LogitsProcessor = kind(vocab_size=vocab_size, device=device)
    return made


def _load(given: str | type[Any]) -> Any:
    found: Any = given
    if isinstance(given, str):
        module, _, name = given.partition(":")
        try:
            found = operator.attrgetter(name)(importlib.import_module(module))
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"logits_processors={given!r} is not found ({error}): give 'module:Class'") from error
    if not callable(getattr(found, "new_request_processor", None)) and not is_vllms(found):
        remedy = "give it one, or vLLM's update_state, apply and is_argmax_invariant"
        raise ValueError(f"logits_processors={given!r} has no method new_request_processor(params): {remedy}")
    return found
