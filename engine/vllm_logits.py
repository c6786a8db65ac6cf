"""vLLM's base classes of logits processors, run as ours.

    class Shout(AdapterLogitsProcessor):                        # one request at a time
        def is_argmax_invariant(self) -> bool: ...
        def new_req_logits_processor(self, params): ...         # None, or a function of (output, logits) or of three

    class Mask(LogitsProcessor):                                # a batch at a time
        def update_state(self, batch_update): ...
        def apply(self, logits): ...

Owns the bridge. vLLM hands a batch's processor all rows of a step at once; here each request that is drawn has an
object of the class to itself, which sees a batch of that one row. So what a processor keeps is its request's alone, and
none sees another's rows.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch

from raydata_llm.engine.sampling_params import SamplingParams

# vLLM's name of it.
_FOR_ONE_REQUEST = "new_req_logits_processor"
RequestProcessor = Callable[[list[int], list[int], torch.Tensor], torch.Tensor]


class MoveDirectionality(Enum):
    """How a row moves in a batch: to a free place, or in exchange. Rows of one request each do not."""

    UNIDIRECTIONAL = auto()
    SWAP = auto()


@dataclass(frozen=True)
class BatchUpdate:
    """What has changed in a batch.

    Args:
        batch_size: Rows in it.
        removed: Their numbers.
        added: (number, parameters, prompt, output): the output is a list that grows while the request runs.
        moved: (from, to, how).
    """

    batch_size: int
    removed: Sequence[int] = ()
    added: Sequence[tuple[int, SamplingParams, list[int] | None, list[int]]] = ()
    moved: Sequence[tuple[int, int, MoveDirectionality]] = ()


class LogitsProcessor(ABC):
    """vLLM's processor of a batch's logits."""

    @classmethod  # noqa: B027 subclasses may leave it
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise a ValueError for a request's parameters that make no sense; that is the request's error."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:  # noqa: B027 as above
        """Take what vLLM hands over: its settings, where logits lie, whether host memory is pinned."""

    @abstractmethod
    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """What is drawn from, of the batch's logits [rows, V]; in place if it likes."""

    @abstractmethod
    def is_argmax_invariant(self) -> bool:
        """Whether the likeliest token stays so: then greedy requests go without."""

    @abstractmethod
    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Take in which rows there are now; None if they are those of before."""


class AdapterLogitsProcessor(LogitsProcessor):
    """vLLM's processor of one request at a time; of a subclass, `new_req_logits_processor(params)` is called alone.

    It gives a function of (output, logits) or of (prompt, output, logits), or None for a request that needs none.
    """

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """As it comes: each request's function is called by itself."""
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Nothing is kept of a batch."""


def is_vllms(kind: Any) -> bool:
    """Whether a class has vLLM's interface, of these base classes or of vLLM's own."""
    return all(callable(getattr(kind, name, None)) for name in ("update_state", "apply", "is_argmax_invariant"))


class VllmProcessor:
    """A class with vLLM's interface as one of ours (`logits_processor.LogitsProcessor`).

    Args:
        kind: The user's class.
        settings: What it is made with, vLLM's `vllm_config` as far as it is known here.
        device: Where logits are.
    """

    def __init__(self, kind: type[Any], settings: Any, device: torch.device) -> None:
        self._of_request = getattr(kind, _FOR_ONE_REQUEST, None)
        if issubclass(kind, AdapterLogitsProcessor) and self._of_request is None:
            raise ValueError(f"logits_processors={kind!r} has no method {_FOR_ONE_REQUEST}(params): give it one")
        self._kind, self._settings, self._device = kind, settings, device
        self.name = kind.__name__
        # It says of itself whether greedy requests need it, and makes those of one request each.
        self._first = self._make()

    def _make(self) -> Any:
        return self._kind(self._settings, self._device, self._device.type == "cuda")

    def new_request_processor(self, params: SamplingParams) -> RequestProcessor | None:
        """The function of one request, if it needs one."""
        params = _with_vllms_extra_args(params)
        validate = getattr(self._kind, "validate_params", None)
        if validate is not None:
            validate(params)
        if params.greedy and self._first.is_argmax_invariant():
            return None
        if self._of_request is not None:
            return _of_three(self._of_request(self._first, params))
        return _BatchOfOne(self._make(), params)


def _with_vllms_extra_args(params: SamplingParams) -> SamplingParams:
    """With None where no `extra_args` were given: vLLM's classes test `params.extra_args and ...`."""
    if not params.extra_args:
        params = params.clone()
        object.__setattr__(params, "extra_args", None)
    return params


def _of_three(function: Callable[..., torch.Tensor] | None) -> RequestProcessor | None:
    if function is None or len(inspect.signature(function).parameters) == 3:
        return function
    of_two: Callable[..., torch.Tensor] = function
    return lambda prompt, output, logits: of_two(output, logits)


class _BatchOfOne:
    """A processor of batches with one request, whose output grows."""

    def __init__(self, processor: Any, params: SamplingParams) -> None:
        self._processor, self._params = processor, params
        self._output: list[int] | None = None

    def __call__(self, prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
        update = None
        if self._output is None:
            self._output = []
            update = BatchUpdate(batch_size=1, added=[(0, self._params, prompt, self._output)])
        self._output[:] = output
        self._processor.update_state(update)
        made: torch.Tensor = self._processor.apply(logits[None])
        return made[0]
