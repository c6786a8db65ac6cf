"""What an engine encodes of a step is what a rank decodes, and the other way round."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from raydata_llm.engine.batch import ScheduledBatch
from raydata_llm.engine.decode_plan import DecodePlan
from raydata_llm.engine.guides import Bitmask
from raydata_llm.engine.logprobs import PromptPiece, RowLogprobs
from raydata_llm.engine.position_logprobs import HEAD, Wanted
from raydata_llm.engine.prompt_embeds import EmbeddedTokens
from raydata_llm.engine.request import LoRARequest, Request
from raydata_llm.engine.sampler import SampledLogprobs
from raydata_llm.engine.sampling_params import SamplingParams
from raydata_llm.engine.sequence import Sequence
from raydata_llm.engine.step_codec import (
    BatchDecoder,
    BatchEncoder,
    decode_bitmask,
    decode_result,
    encode_bitmask,
    encode_result,
    pack_arrays,
    unpack_arrays,
)

VOCAB = 1031
INT32, INT64 = np.dtype(np.int32), np.dtype(np.int64)
DTYPES = st.sampled_from([np.dtype(name) for name in ("uint8", "int32", "int64", "float32")])


def ints(dtype: np.dtype[Any] = INT32, most: int = 6) -> Any:
    return arrays_of.arrays(dtype, st.integers(0, most), elements=st.integers(0, 2**31 - 1))


def sequence(seq_id: int, index: int, key: int, prompt: list[int], params: dict[str, Any]) -> Sequence:
    request = Request(
        request_id=f"row {seq_id}",
        prompt_token_ids=np.array(prompt, dtype=np.int32),
        sampling_params=SamplingParams(**params),
        key=key,
    )
    return Sequence(
        seq_id=seq_id,
        request=request,
        index=index,
        token_ids=np.array([*prompt, 7], dtype=np.int32),
        num_prompt=len(prompt),
        max_tokens=9,
        stop_token_ids=(2, 11),
    )


def empty_step(**fields: Any) -> ScheduledBatch:
    """A step with nothing in it but these fields."""
    none: Any = np.zeros(0, dtype=np.int32)
    arrays = {f.name: none for f in dataclasses.fields(ScheduledBatch) if "IntArray" in str(f.type)}
    plan = DecodePlan(version=3, slots=none, group_starts=none, group_lens=none)
    rest = {"decode_plan": plan, "sample_seq_ids": none.astype(np.int64), "released": [], "admitted": []}
    return ScheduledBatch(**{**arrays, **rest, **fields})


PARAMS = st.sampled_from(
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.7, "top_k": 5, "top_p": 0.25, "min_p": 0.5, "seed": 3},
        {"presence_penalty": 0.5, "repetition_penalty": 1.5, "logit_bias": {5: 3.0}},
        {"logprobs": 3, "prompt_logprobs": 2, "allowed_token_ids": [4, 9], "min_tokens": 2},
    ]
)
SEQUENCES = st.builds(
    sequence,
    seq_id=st.just(0),
    index=st.integers(0, 3),
    key=st.integers(0, 2**64 - 1),
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5),
    params=PARAMS,
)


@st.composite
def batches(draw: Any) -> list[ScheduledBatch]:
    """Steps of one engine: plans that stay for some steps, sequences that come and go."""
    steps: list[ScheduledBatch] = []
    running: dict[int, Sequence] = {}
    plan, next_id = DecodePlan(version=0, slots=draw(ints()), group_starts=draw(ints()), group_lens=draw(ints())), 0
    for number in range(draw(st.integers(1, 5))):
        if draw(st.booleans()):
            plan = DecodePlan(
                version=number + 1, slots=draw(ints()), group_starts=draw(ints()), group_lens=draw(ints())
            )
        released = [slot for slot in running if draw(st.booleans())]
        for slot in released:
            del running[slot]
        admitted = []
        for slot in range(4):
            if slot not in running and draw(st.booleans()):
                running[slot] = dataclasses.replace(draw(SEQUENCES), seq_id=next_id)
                admitted.append((slot, running[slot]))
                next_id += 1
        names = ["prefill_slots", "prefill_starts", "prefill_counts", "prefill_token_ids", "sample_slots"]
        names += ["sample_positions", "block_slots", "block_columns", "blocks", "adapter_slots"]
        steps.append(
            ScheduledBatch(
                decode_plan=plan,
                sample_seq_ids=draw(ints(INT64)),
                released=released,
                admitted=admitted,
                prompt_logprob_chunks=[(index, one) for index, one in enumerate(running.values())],
                adapter_loads=[(slot, LoRARequest(f"an adapter {slot}", slot + 1, "/a/é")) for slot, _ in admitted],
                **{name: draw(ints()) for name in names},
            )
        )
    return steps


@given(st.lists(DTYPES.flatmap(lambda dtype: arrays_of.arrays(dtype, st.integers(0, 5))), max_size=6))
def test_arrays_come_back(arrays: list[Any]) -> None:
    back = unpack_arrays(pack_arrays(arrays))
    assert [array.dtype for array in back] == [array.dtype for array in arrays]
    assert [array.tobytes() for array in back] == [array.tobytes() for array in arrays]


def test_arrays_of_other_dtypes_are_not_sent() -> None:
    with pytest.raises(ValueError, match="float64"):
        pack_arrays([np.zeros(3)])


@settings(deadline=None, max_examples=40)
@given(batches())
def test_batches_come_back(steps: list[ScheduledBatch]) -> None:
    encoder, decoder = BatchEncoder(), BatchDecoder()
    for step in steps:
        back = decoder.decode(encoder.encode(step))
        for field in dataclasses.fields(ScheduledBatch):
            one, other = getattr(back, field.name), getattr(step, field.name)
            if isinstance(other, np.ndarray):
                assert one.dtype == other.dtype and one.tolist() == other.tolist(), field.name
        for name in ("slots", "group_starts", "group_lens"):
            assert getattr(back.decode_plan, name).tolist() == getattr(step.decode_plan, name).tolist()
        assert back.decode_plan.version == step.decode_plan.version
        assert back.released == step.released and back.adapter_loads == step.adapter_loads
        assert [slot for slot, _ in back.admitted] == [slot for slot, _ in step.admitted]
        for (_, one), (_, other) in zip(back.admitted, step.admitted, strict=True):
            assert_same_sequence(one, other)
        chunks = [(chunk, one.seq_id) for chunk, one in back.prompt_logprob_chunks]
        assert chunks == [(chunk, one.seq_id) for chunk, one in step.prompt_logprob_chunks]


def assert_same_sequence(one: Sequence, other: Sequence) -> None:
    assert (one.seq_id, one.index, one.num_prompt) == (other.seq_id, other.index, other.num_prompt)
    assert one.request.key == other.request.key
    params = other.request.sampling_params
    assert one.request.sampling_params.to_mapping() == params.to_mapping()
    assert tuple(one.stop_token_ids) == tuple(other.stop_token_ids)
    if params.repetition_penalty != 1 or params.prompt_logprobs is not None:
        assert one.token_ids.tolist() == other.token_ids.tolist()
    else:
        # Prompts are long, and nobody but a rank that counts tokens needs them.
        assert not len(one.token_ids)


def test_embeddings_come_back() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 5)).astype(np.float32)
    known = dataclasses.replace(sequence(4, 0, 1, [0, 0], {"repetition_penalty": 2.0}), num_embedded=2)
    step = empty_step(embedded=EmbeddedTokens(np.array([0, 1, 4], dtype=np.int32), values), admitted=[(1, known)])
    back = BatchDecoder().decode(BatchEncoder().encode(step))
    assert back.embedded is not None
    assert back.embedded.places.tolist() == [0, 1, 4] and back.embedded.values.tolist() == values.tolist()
    # A rank that counts tokens must not count these.
    assert back.admitted[0][1].num_embedded == 2 and not len(back.admitted[0][1].prompt_token_ids)


def test_a_step_of_running_rows_is_small() -> None:
    plan_slots = 1024
    none, some = np.zeros(0, dtype=np.int32), np.arange(plan_slots, dtype=np.int32)
    grown = np.arange(plan_slots // 16, dtype=np.int32)
    step = empty_step(
        decode_plan=DecodePlan(version=3, slots=some, group_starts=none, group_lens=none),
        sample_slots=some,
        sample_seq_ids=some.astype(np.int64),
        sample_positions=some,
        block_slots=grown,
        block_columns=grown,
        blocks=grown,
    )
    encoder = BatchEncoder()
    first, second = encoder.encode(step), encoder.encode(step)
    # The plan's slots, four bytes each, go once; whose the tokens are goes each time: 16 bytes a row.
    assert len(first) - len(second) == 4 * plan_slots
    assert len(second) < 17 * plan_slots + 1024


def test_a_plan_that_was_never_sent_is_noticed() -> None:
    encoder, step = BatchEncoder(), empty_step()
    encoder.encode(step)
    with pytest.raises(AssertionError, match="never sent"):
        BatchDecoder().decode(encoder.encode(step))


def rows(count: int, width: int, named: int) -> RowLogprobs:
    generator = torch.Generator().manual_seed(count * 100 + width * 10 + named)
    return RowLogprobs(
        records=torch.randint(-(2**31), 2**31, (count, HEAD + 2 * width), generator=generator).int(),
        named=torch.randn((count, named), generator=generator),
    )


def assert_same_rows(one: RowLogprobs, other: RowLogprobs) -> None:
    for field in dataclasses.fields(RowLogprobs):
        assert torch.equal(getattr(one, field.name), getattr(other, field.name)), field.name


@given(
    tokens=ints(most=9),
    wanted=st.none() | st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 1030), max_size=3)), max_size=4),
    pieces=st.lists(st.integers(1, 4), max_size=3),
)
def test_results_come_back(tokens: Any, wanted: list[tuple[int, list[int]]] | None, pieces: list[int]) -> None:
    sequences = [sequence(100 + one, 0, 0, [3, 4, 5, 6, 8], {"prompt_logprobs": 2}) for one in range(len(pieces))]
    sent = [
        PromptPiece(one, start, list(range(count)), rows(count, 2, 0))
        for start, (one, count) in enumerate(zip(sequences, pieces, strict=True))
    ]
    logprobs = None
    if wanted is not None:
        each = [Wanted(num_top, tuple(named)) for num_top, named in wanted]
        width, named = max((one.num_top for one in each), default=0), max((len(w.token_ids) for w in each), default=0)
        logprobs = SampledLogprobs(np.arange(len(each)) * 2, each, rows(len(each), width, named))
    batch = empty_step(prompt_logprob_chunks=list(enumerate(sequences)))
    back, back_logprobs, back_pieces = decode_result(encode_result(tokens, logprobs, sent), batch)
    assert back.tolist() == tokens.tolist()
    assert (back_logprobs is None) == (logprobs is None)
    if logprobs is not None and back_logprobs is not None:
        assert back_logprobs.rows.tolist() == logprobs.rows.tolist() and back_logprobs.wanted == logprobs.wanted
        assert_same_rows(back_logprobs.values, logprobs.values)
    for one, other in zip(back_pieces, sent, strict=True):
        assert one.sequence is other.sequence
        assert (one.start, list(one.token_ids)) == (other.start, other.token_ids)
        assert_same_rows(one.rows, other.rows)


def test_bitmasks_come_back() -> None:
    words = torch.randint(-(2**31), 2**31, (3, 33), dtype=torch.int64).to(torch.int32)
    back = decode_bitmask(encode_bitmask(Bitmask(np.array([0, 4, 9]), words)))
    assert back is not None
    assert back.rows.tolist() == [0, 4, 9] and torch.equal(back.words, words)
    assert decode_bitmask(encode_bitmask(None)) is None


def test_extra_args_of_any_kind_do_not_stop_a_step() -> None:
    given = sequence(0, 0, 1, [3], {"extra_args": {"weights": np.ones(2)}, "temperature": 0.0})
    step = BatchDecoder().decode(BatchEncoder().encode(empty_step(admitted=[(0, given)])))
    assert step.admitted[0][1].request.sampling_params == SamplingParams(temperature=0.0)
