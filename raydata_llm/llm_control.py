"""The methods of `LLM` that reach its workers: `collective_rpc`, `apply_model`, and torch's profiler around calls.

Owns what may be called when, and vLLM's settings of profiles. What a rank does is `engine/worker.py`'s.
"""

from __future__ import annotations

import pickle
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raydata_llm.engine.engine import Engine
    from raydata_llm.engine.engine_group import EngineGroup

_PREFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_PROFILER_REMEDY = (
    "build the LLM with profiler_config={'profiler': 'torch', 'torch_profiler_dir': '/a/folder'} to have profiles there"
)


class ControlMethods(ABC):
    """What `LLM` has to look at its workers, and to change what they hold."""

    _profiler_config: Mapping[str, Any]

    @abstractmethod
    def _live_engine(self) -> Engine | EngineGroup:
        """The engine, if it generates."""

    @abstractmethod
    def _check_idle(self) -> None:
        """Raise while enqueued prompts are under way."""

    @abstractmethod
    def reset_prefix_cache(self) -> bool:
        """Forget all cached prompt prefixes."""

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        """Call a function on every rank's worker (`raydata_llm.engine.worker.Worker`).

        Cached prefixes are forgotten after, as the function may have changed weights.

        Args:
            method: A method's name, or a function that takes the worker first. Ranks in other processes are sent it.
            timeout: Seconds to wait for ranks in other processes; None: as long as they live.
            args, kwargs: Further arguments.

        Returns:
            What each rank's call returned, by rank.

        Raises:
            ValueError: for a name that a worker does not have, pooling models, and while prompts are under way.
            TimeoutError: when it takes longer.
        """
        answers = self._call(method, args, kwargs, timeout)
        self.reset_prefix_cache()
        return answers

    def apply_model(self, func: Callable[..., Any]) -> list[Any]:
        """Call a function with each rank's parameters, as a torch module; returns what it returned, by rank.

        Args:
            func: May read parameters and write into them in place. The module computes nothing: it has no forward, and
                hooks on it are not called.
        """
        return self.collective_rpc("apply_model", args=(func,))

    def start_profile(
        self,
        profile_prefix: str | None = None,
        *,
        delay_iterations: int | None = None,
        max_iterations: int | None = None,
        profiler_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Profile what runs until `stop_profile`, into the folder that `profiler_config` names.

        Args:
            profile_prefix: How the names of its files begin, a trace and a table for each rank.
            delay_iterations, max_iterations: Profiles span whole calls: None or 0.
            profiler_kwargs: `torch_profiler_...` settings for this profile.

        Raises:
            ValueError: without a folder, and for settings of other profilers.
        """
        settings = {**self._profiler_config, **(profiler_kwargs or {})}
        if not settings.get("torch_profiler_dir"):
            raise ValueError(f"start_profile has no folder: {_PROFILER_REMEDY}")
        if settings.get("profiler") not in (None, "torch"):
            raise ValueError(f"profiler={settings['profiler']!r} is not supported: {_PROFILER_REMEDY}")
        for name, value in (("delay_iterations", delay_iterations), ("max_iterations", max_iterations)):
            if value:
                raise ValueError(f"{name}={value!r} is not supported: profile a call with fewer prompts or tokens")
        prefix = "raydata_llm" if profile_prefix is None else profile_prefix
        if not isinstance(prefix, str) or not _PREFIX.fullmatch(prefix):
            raise ValueError(f"profile_prefix={prefix!r} is not valid: give letters, digits, '.', '_' and '-'")
        self._call("start_profile", (settings, prefix))

    def stop_profile(self) -> None:
        """Write the profile that is under way; nothing if none is."""
        self._call("stop_profile", ())

    def _call(
        self,
        method: str | Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> list[Any]:
        if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or timeout <= 0):
            raise ValueError(f"timeout={timeout!r} is not valid: give seconds, or None")
        self._check_idle()
        engine = self._live_engine()
        return engine.collective_rpc(method, tuple(args), dict(kwargs or {}), timeout=timeout, dumps=_dumps)


def read_profiler_config(given: Any) -> dict[str, Any]:
    """vLLM's `profiler_config`, a dict or an object of vLLM's.

    Raises:
        ValueError: for anything else.
    """
    if given is None:
        return {}
    if is_dataclass(given) and not isinstance(given, type):
        return {field.name: getattr(given, field.name) for field in fields(given)}
    if not isinstance(given, Mapping):
        raise ValueError(f"profiler_config={given!r} is not valid: give a dict; {_PROFILER_REMEDY}")
    return dict(given)


def _dumps(value: Any) -> bytes:
    """Pickle a function for another process, those of a script and lambdas too."""
    try:
        from ray import cloudpickle
    except ImportError:  # without Ray, functions of modules alone
        return pickle.dumps(value)
    pickled: bytes = cloudpickle.dumps(value)  # type: ignore[no-untyped-call]
    return pickled
