"""The dispatcher's wait for a block, without a Ray session."""

from __future__ import annotations

import pytest

from raydata_llm import dispatcher
from raydata_llm.dispatch_plan import DispatchPlan, ReplicaPlan
from raydata_llm.dispatcher import Dispatcher
from tests.raydata_llm.processor_fakes import start_echo_engine


def without_replicas(monkeypatch: pytest.MonkeyPatch) -> Dispatcher:
    monkeypatch.setattr(Dispatcher, "_watch_pool", lambda self: None)  # it would look for a cluster
    replica = ReplicaPlan(
        model_source="m",
        engine_kwargs={},
        actor_options={},
        max_pending_rows=None,
        hang_timeout_s=60,
        engine_factory=start_echo_engine,
    )
    return Dispatcher(DispatchPlan(min_replicas=0, max_replicas=0, replica=replica))


def test_a_start_that_timed_out_is_an_error_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def never_asked() -> bool:
        raise AssertionError("the error was taken for rows that are not done yet")

    monkeypatch.setattr(dispatcher, "is_cancelled", never_asked)
    waiting = without_replicas(monkeypatch)
    block = waiting._book.put([b"row"], [1])
    waiting._book.fail(TimeoutError("the store gave no answer"))
    with pytest.raises(TimeoutError, match="the store gave no answer"):
        waiting._wait(block)
