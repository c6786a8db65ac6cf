"""The scheduler alone: any mix of requests, ends, aborts and launch-ahead, with made-up tokens."""

from __future__ import annotations

from collections import deque
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from raydata_llm.engine.batch import ScheduledBatch
from raydata_llm.engine.block_manager import BlockManager
from raydata_llm.engine.request import LoRARequest, Request
from raydata_llm.engine.sampling_params import SamplingParams
from raydata_llm.engine.scheduler import Scheduler
from raydata_llm.engine.scheduler_limits import SchedulerLimits
from raydata_llm.engine.sequence import FinishedSequence, Sequence
from tests.engine.optimism import optimistic_admission

EOS = 1
MAX_MODEL_LEN = 48


def make_scheduler(num_blocks: int = 40, block_size: int = 4, **limits: int | bool) -> Scheduler:
    defaults: dict[str, int | bool] = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
        "max_penalty_seqs": 2,
        "max_model_len": MAX_MODEL_LEN,
    }
    chosen = SchedulerLimits(block_size=block_size, **(defaults | limits))  # type: ignore[arg-type]
    return Scheduler(chosen, BlockManager(num_blocks + 1))


def make_sequence(
    seq_id: int,
    prompt: list[int],
    max_tokens: int,
    max_model_len: int = MAX_MODEL_LEN,
    adapter: int = 0,
    **params: object,
) -> Sequence:
    sampling = SamplingParams(max_tokens=max_tokens, **params)  # type: ignore[arg-type]
    token_ids = np.array(prompt, dtype=np.int32)
    return Sequence(
        seq_id=seq_id,
        request=Request(
            request_id=str(seq_id),
            prompt_token_ids=token_ids,
            sampling_params=sampling,
            lora_request=LoRARequest(f"adapter {adapter}", adapter, f"/{adapter}") if adapter else None,
        ),
        index=0,
        token_ids=token_ids,
        num_prompt=len(prompt),
        max_tokens=min(len(prompt) + max_tokens, max_model_len),
        stop_token_ids=() if sampling.ignore_eos else (EOS,),
    )


class FakeModel:
    """Draws token p of sequence s as a function of (s, p), so that a preempted sequence writes the same again.

    It also plays the KV cache: which token each block position holds, checked as attention would read it.
    """

    def __init__(self, scheduler: Scheduler, eos_every: int) -> None:
        self._scheduler, self._eos_every = scheduler, eos_every
        self._last: dict[int, int] = {}
        # What is at a place of a block: tokens, computed with an adapter.
        self._cache: dict[tuple[int, int], tuple[LoRARequest | None, tuple[int, ...]]] = {}

    def token(self, seq_id: int, position: int) -> int:
        draw = (seq_id * 7919 + position * 104729) % 1009
        return EOS if self._eos_every and draw % self._eos_every == 0 else 2 + draw

    def launch(self, batch: ScheduledBatch, history: dict[int, list[int]]) -> np.ndarray:
        table, size = self._scheduler.table, self._scheduler.limits.block_size
        spans = [(slot, int(table.num_computed[slot]) - 1, 1) for slot in batch.decode_plan.slots.tolist()]
        spans += list(
            zip(
                batch.prefill_slots.tolist(),
                batch.prefill_starts.tolist(),
                batch.prefill_counts.tolist(),
                strict=True,
            )
        )

        def content(slot: int, position: int) -> tuple[LoRARequest | None, tuple[int, ...]]:
            sequence = table.sequences[slot]
            assert sequence is not None
            return sequence.request.lora_request, tuple(history[sequence.seq_id][: position + 1])

        for slot, start, count in spans:
            for position in range(start, start + count):
                place = (int(table.block_table[slot, position // size]), position % size)
                self._cache[place] = content(slot, position)
        for slot, start, count in spans:
            for position in range(start + count):
                place = (int(table.block_table[slot, position // size]), position % size)
                assert self._cache[place] == content(slot, position), "attention would read another's KV"
        drawn = []
        for seq_id, position in zip(batch.sample_seq_ids.tolist(), batch.sample_positions.tolist(), strict=True):
            token = self.token(seq_id, position)
            del history[seq_id][position:]
            history[seq_id].append(token)
            drawn.append(token)
        return np.array(drawn, dtype=np.int32)


def run(
    scheduler: Scheduler, sequences: list[Sequence], *, steps_ahead: int, eos_every: int, abort_at: dict[int, str]
) -> dict[int, FinishedSequence]:
    """Drive the scheduler as the engine does; asserts its invariants after each step."""
    model = FakeModel(scheduler, eos_every)
    history = {sequence.seq_id: sequence.token_ids.tolist() for sequence in sequences}
    in_flight: deque[tuple[ScheduledBatch, np.ndarray]] = deque()
    finished: dict[int, FinishedSequence] = {}
    for sequence in sequences:
        scheduler.add(sequence)
    for step in range(10_000):
        if not scheduler.has_unfinished():
            return finished
        ended = scheduler.abort({abort_at[step]}) if step in abort_at else []
        batch = scheduler.schedule(len(in_flight))
        if batch is not None:
            check_budgets(scheduler, batch)
            in_flight.append((batch, model.launch(batch, history)))
        if in_flight and (batch is None or len(in_flight) > steps_ahead):
            ended += scheduler.update(*in_flight.popleft())
        scheduler.check_integrity()
        for one in ended:
            assert one.sequence.seq_id not in finished, "finished twice"
            finished[one.sequence.seq_id] = one
    raise AssertionError("the scheduler does not come to an end")


def check_budgets(scheduler: Scheduler, batch: ScheduledBatch) -> None:
    assert 0 < batch.num_tokens <= scheduler.limits.max_num_batched_tokens
    assert scheduler.table.num_running <= scheduler.limits.max_num_seqs
    assert len(set(batch.sample_slots.tolist())) == len(batch.sample_slots)
    assert set(batch.decode_plan.slots.tolist()).isdisjoint(batch.prefill_slots.tolist())


def expected_output(sequence: Sequence, eos_every: int, scheduler: Scheduler) -> tuple[list[int], str]:
    model = FakeModel(scheduler, eos_every)
    output: list[int] = []
    while True:
        output.append(model.token(sequence.seq_id, sequence.num_prompt + len(output)))
        if output[-1] == EOS and sequence.stop_token_ids and len(output) > sequence.request.sampling_params.min_tokens:
            return output, "stop"
        if sequence.num_prompt + len(output) == sequence.max_tokens:
            return output, "length"


requests = st.lists(
    st.tuples(
        st.integers(1, 30),  # prompt length
        st.integers(1, 40),  # max_tokens
        st.integers(0, 2),  # which shared prefix
        st.booleans(),  # ignore_eos
        st.booleans(),  # penalties
        st.integers(0, 3),  # adapter, 0 for none
    ),
    min_size=1,
    max_size=20,
)


@settings(max_examples=80, deadline=None)
@given(
    requests=requests,
    steps_ahead=st.integers(0, 3),
    num_blocks=st.integers(12, 40),
    block_size=st.sampled_from([4, 5, 16]),
    max_num_seqs=st.integers(1, 8),
    budget=st.integers(8, 64),
    chunked=st.booleans(),
    prefix_caching=st.booleans(),
    optimistic=st.booleans(),
    eos_every=st.sampled_from([0, 5, 30]),
    max_loras=st.integers(1, 3),
    aborted=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 19)), max_size=3),
)
def test_every_request_finishes_once_with_its_own_tokens(
    requests: list[tuple[int, int, int, bool, bool, int]],
    steps_ahead: int,
    num_blocks: int,
    block_size: int,
    max_num_seqs: int,
    budget: int,
    chunked: bool,
    prefix_caching: bool,
    optimistic: bool,
    eos_every: int,
    max_loras: int,
    aborted: list[tuple[int, int]],
) -> None:
    scheduler = make_scheduler(
        num_blocks,
        block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget if chunked else max(budget, MAX_MODEL_LEN),
        enable_chunked_prefill=chunked,
        enable_prefix_caching=prefix_caching,
        max_loras=max_loras,
    )
    sequences = [
        make_sequence(
            seq_id,
            [100 + prefix] * (length // 2) + [(seq_id * 31 + i) % 97 + 2 for i in range(length - length // 2)],
            max_tokens,
            ignore_eos=ignore_eos,
            presence_penalty=0.5 if penalties else 0.0,
            adapter=adapter,
        )
        for seq_id, (length, max_tokens, prefix, ignore_eos, penalties, adapter) in enumerate(requests)
    ]
    prompts = {sequence.seq_id: sequence.token_ids for sequence in sequences}
    abort_at = {step: str(seq_id) for step, seq_id in aborted}
    with optimistic_admission(optimistic):
        finished = run(scheduler, sequences, steps_ahead=steps_ahead, eos_every=eos_every, abort_at=abort_at)
    assert finished.keys() == prompts.keys()
    for sequence in sequences:
        ended = finished[sequence.seq_id]
        output, reason = expected_output(sequence, eos_every, scheduler)
        if ended.finish_reason == "abort":
            assert ended.output_token_ids == output[: len(ended.output_token_ids)]
        else:
            assert (ended.output_token_ids, ended.finish_reason) == (output, reason)
    assert scheduler.blocks.num_held == 0
    assert scheduler.table.num_free_slots == max_num_seqs


def test_rows_of_unknown_lengths_fill_the_blocks_and_are_hardly_ever_preempted() -> None:
    rng = np.random.default_rng(5)
    lengths = np.clip(np.exp(rng.normal(np.log(50), 0.8, size=800)), 4, 400).astype(int)
    scheduler = make_scheduler(1000, 16, max_model_len=512, max_num_seqs=256, max_num_batched_tokens=2048)
    for seq_id in range(len(lengths)):
        scheduler.add(make_sequence(seq_id, [seq_id + 2] * 64, 400, max_model_len=512))
    peaks, held = [], []
    while scheduler.has_unfinished():
        batch = scheduler.schedule(0)
        assert batch is not None
        if scheduler.intake.num_waiting and scheduler.lengths.num_finished > 100:
            peaks.append(scheduler.simulated_peak() / 1000)
            held.append(scheduler.blocks.num_held / 1000)
        written = batch.sample_positions + 1 - 64
        scheduler.update(batch, np.where(written >= lengths[batch.sample_seq_ids], EOS, 2).astype(np.int32))
    assert scheduler.num_preemptions <= len(lengths) / 200
    assert np.mean(peaks) > 0.95
    assert np.mean(held) > 0.85


def test_admission_by_simulation_avoids_preemption_where_optimism_does_not() -> None:
    preemptions = {}
    for optimistic in (False, True):
        scheduler = make_scheduler(24, max_num_batched_tokens=64)
        sequences = [make_sequence(i, [i + 2] * 8, 40, ignore_eos=True) for i in range(12)]
        with optimistic_admission(optimistic):
            run(scheduler, sequences, steps_ahead=1, eos_every=0, abort_at={})
        preemptions[optimistic] = scheduler.num_preemptions
    assert preemptions[False] == 0 < preemptions[True]


def test_rows_of_one_prompt_share_its_blocks_from_the_first_step() -> None:
    scheduler = make_scheduler(40, max_num_batched_tokens=48)
    for seq_id in range(6):
        scheduler.add(make_sequence(seq_id, [7] * 17, 4))
    batch = scheduler.schedule(0)
    assert batch is not None
    assert len(batch.prefill_slots) == 6
    assert batch.num_tokens == 17 + 5, "followers compute only the last, partial block"
    assert scheduler.blocks.num_held == 4 + 6


def test_rows_that_may_write_most_start_first() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for seq_id, max_tokens in enumerate((3, 20, 5, 30)):
        scheduler.add(make_sequence(seq_id, [9, 9], max_tokens))
    batch = scheduler.schedule(0)
    assert batch is not None
    assert [sequence.seq_id for _, sequence in batch.admitted] == [3, 1]


def test_penalty_rows_never_outnumber_their_pool() -> None:
    scheduler = make_scheduler(max_penalty_seqs=2)
    sequences = [make_sequence(i, [3, 4], 10, frequency_penalty=1.0) for i in range(7)]
    peak = 0
    original = scheduler.schedule

    def watched(num_in_flight: int) -> ScheduledBatch | None:
        nonlocal peak
        batch = original(num_in_flight)
        peak = max(peak, scheduler.table.num_running)
        return batch

    scheduler.schedule = watched  # type: ignore[method-assign]
    finished = run(scheduler, sequences, steps_ahead=0, eos_every=0, abort_at={})
    assert len(finished) == 7
    assert peak == 2


@pytest.mark.parametrize("lack", [{"adapter": 2}, {"frequency_penalty": 1.0}])
def test_rows_that_lack_something_hold_back_none_that_do_not(lack: dict[str, Any]) -> None:
    scheduler = make_scheduler(max_num_seqs=4, max_penalty_seqs=1, max_loras=1)
    blocking = make_sequence(0, [5, 6], 40, **({"adapter": 1} if "adapter" in lack else lack))
    lacking = [make_sequence(i, [5, 6], 30, **lack) for i in range(1, 4)]
    others = [make_sequence(i, [5, 6], 20) for i in range(4, 10)]
    steps: dict[int, int] = {}
    original = scheduler.schedule

    def watched(num_in_flight: int) -> ScheduledBatch | None:
        batch = original(num_in_flight)
        assert batch is not None
        for _, sequence in batch.admitted:
            steps[sequence.seq_id] = len(steps)
        return batch

    scheduler.schedule = watched  # type: ignore[method-assign]
    run(scheduler, [blocking, *lacking, *others], steps_ahead=0, eos_every=0, abort_at={})
    assert [seq_id for seq_id in steps if seq_id not in (1, 2, 3)] == [0, 4, 5, 6, 7, 8, 9]
    assert min(steps[1], steps[2], steps[3]) > steps[6], "the first three go beside the one that blocks"


def test_an_end_is_kept_back_until_min_tokens() -> None:
    scheduler = make_scheduler()
    sequences = [make_sequence(0, [5, 5, 5], 20, min_tokens=12)]
    finished = run(scheduler, sequences, steps_ahead=2, eos_every=2, abort_at={})
    assert len(finished[0].output_token_ids) > 12
    assert finished[0].finish_reason == "stop"


@pytest.mark.parametrize("steps_ahead", [0, 1, 3])
def test_tokens_past_an_end_seen_late_reach_no_output(steps_ahead: int) -> None:
    scheduler = make_scheduler()
    sequences = [make_sequence(i, [5] * (i + 1), 30) for i in range(6)]
    finished = run(scheduler, sequences, steps_ahead=steps_ahead, eos_every=6, abort_at={})
    for ended in finished.values():
        assert EOS not in ended.output_token_ids[:-1]


def test_a_watch_reads_the_output_where_it_lies() -> None:
    scheduler = make_scheduler()
    seen: list[tuple[bool, list[int]]] = []

    class Watch:
        def advance(self, token_ids: Any) -> str | None:
            seen.append((np.shares_memory(token_ids, scheduler.table.token_ids), list(token_ids)))
            return "end" if len(token_ids) == 3 else None

    sequence = make_sequence(0, [5, 6], 8, ignore_eos=True)
    sequence.stop_watch = Watch()
    scheduler.add(sequence)
    finished: list[FinishedSequence] = []
    for token in (7, 8, 9):
        batch = scheduler.schedule(0)
        assert batch is not None
        finished += scheduler.update(batch, np.array([token], dtype=np.int32))
    assert seen == [(True, [7]), (True, [7, 8]), (True, [7, 8, 9])], "a copy for each token is quadratic"
    assert [(one.output_token_ids, one.finish_reason, one.stop_reason) for one in finished] == [
        ([7, 8, 9], "stop", "end")
    ]
