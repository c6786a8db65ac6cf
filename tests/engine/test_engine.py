"""What the engine promises of single requests: parameters, ends, errors, draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM

from raydata_llm.engine.device_errors import DeviceError, DeviceMemoryError, explained
from raydata_llm.engine.engine import Engine
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.request import Request, RequestOutput, request_digest, sampling_key, seeded_key
from raydata_llm.engine.sampling_params import SamplingParams

PROMPT = [5, 9, 300, 41, 8]


class LetterTokenizer:
    """Token v is the letter a..z of v % 26; enough to have stop strings across token borders."""

    def decode(self, token_ids: Any, /, *, skip_special_tokens: bool = False) -> str:
        return "".join(chr(ord("a") + token % 26) for token in token_ids)


@pytest.fixture(scope="module")
def model_path(tiny_model: Callable[..., Path]) -> str:
    return str(tiny_model("llama"))


@pytest.fixture(scope="module")
def engine(model_path: str) -> Engine:
    return Engine(EngineConfig(model=model_path, device="cpu"), LetterTokenizer())


def request(index: int, prompt: list[int] | None = None, key: int = 0, **params: Any) -> Request:
    sampling = SamplingParams(**({"temperature": 0.0, "max_tokens": 24} | params))
    token_ids = np.array(prompt or PROMPT, dtype=np.int32)
    return Request(request_id=str(index), prompt_token_ids=token_ids, sampling_params=sampling, key=key)


def run(engine: Engine, requests: list[Request]) -> list[RequestOutput]:
    for one in requests:
        engine.add_request(one)
    outputs: dict[str, RequestOutput] = {}
    while engine.has_unfinished():
        outputs |= {output.request_id: output for output in engine.step()}
    engine.check_integrity()
    return [outputs[one.request_id] for one in requests]


def one_output(engine: Engine, **params: Any) -> Any:
    return run(engine, [request(0, **params)])[0].outputs[0]


def test_greedy_ends_by_length(engine: Engine) -> None:
    output = one_output(engine, max_tokens=7)
    assert (len(output.token_ids), output.finish_reason, output.stop_reason) == (7, "length", None)


def test_stop_token_ends_the_row_and_is_its_reason(engine: Engine) -> None:
    free = one_output(engine).token_ids
    stop = free[6]
    output = one_output(engine, stop_token_ids=[stop])
    assert output.token_ids == free[: free.index(stop) + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)


def test_model_eos_ends_the_row_unless_ignored(engine: Engine) -> None:
    biased = {"logit_bias": {2: 1000.0}}
    output = one_output(engine, **biased)
    assert (output.token_ids, output.finish_reason, output.stop_reason) == ([2], "stop", None)
    assert one_output(engine, ignore_eos=True, **biased).token_ids == [2] * 24


def test_min_tokens_bans_every_end_until_then(engine: Engine) -> None:
    output = one_output(engine, logit_bias={2: 1000.0}, min_tokens=5)
    # As transformers' min_new_tokens: the end itself comes after so many.
    assert 2 not in output.token_ids[:5]
    assert len(output.token_ids) == 6
    assert output.token_ids[-1] == 2


def test_stop_string_across_token_borders(engine: Engine) -> None:
    free = one_output(engine).token_ids
    text = LetterTokenizer().decode(free)
    stop = text[5:8]
    output = one_output(engine, stop=[stop, "not there"])
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert output.token_ids == free[: text.index(stop) + 3]


def test_allowed_tokens_are_the_only_ones_drawn(engine: Engine) -> None:
    allowed = [17, 400, 1030]
    outputs = run(engine, [request(i, key=i, temperature=1.5, allowed_token_ids=allowed) for i in range(8)])
    assert {token for output in outputs for token in output.outputs[0].token_ids} <= set(allowed)


def test_penalties_apply_to_what_was_written(engine: Engine) -> None:
    free = one_output(engine, max_tokens=60).token_ids
    assert len(set(free)) < len(free), "the unpenalised row must repeat itself for this test to say something"
    penalised = one_output(engine, max_tokens=60, presence_penalty=2.0, frequency_penalty=2.0, repetition_penalty=50.0)
    assert len(set(penalised.token_ids)) > len(set(free))
    assert not set(penalised.token_ids) & set(PROMPT)


def test_repetition_penalty_writes_what_transformers_writes(engine: Engine, model_path: str) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(model_path).eval()
    ids = torch.tensor([PROMPT])
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, repetition_penalty=1.3
    )
    assert one_output(engine, repetition_penalty=1.3).token_ids == expected[0, len(PROMPT) :].tolist()


def test_logprobs_equal_transformers(engine: Engine, model_path: str) -> None:
    output = one_output(engine, logprobs=3)
    model: Any = AutoModelForCausalLM.from_pretrained(model_path).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPT + output.token_ids])).logits[0, len(PROMPT) - 1 : -1]
    expected = logits.log_softmax(dim=-1)
    assert len(output.logprobs) == len(output.token_ids)
    for position, (token, entries) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
        top = expected[position].topk(3)
        assert set(entries) == {token, *top.indices.tolist()}
        for token_id, entry in entries.items():
            assert entry.logprob == pytest.approx(float(expected[position, token_id]), abs=1e-4)
            assert entry.rank == int((expected[position] > expected[position, token_id]).sum()) + 1
    chosen = sum(float(expected[i, token]) for i, token in enumerate(output.token_ids))
    assert output.cumulative_logprob == pytest.approx(chosen, abs=1e-3)


def test_logprobs_do_not_change_the_draw(engine: Engine) -> None:
    with_, without = (one_output(engine, temperature=1.0, key=3, logprobs=k).token_ids for k in (5, None))
    assert with_ == without


def test_first_token_follows_the_model_distribution(engine: Engine, model_path: str) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(model_path).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPT])).logits[0, -1]
    top_k, temperature, draws = 12, 1.7, 4000
    probabilities, tokens = (logits / temperature).softmax(dim=-1).topk(top_k)
    requests = [request(i, key=i, temperature=temperature, top_k=top_k, max_tokens=1) for i in range(draws)]
    drawn = [output.outputs[0].token_ids[0] for output in run(engine, requests)]
    observed = [drawn.count(token) for token in tokens.tolist()]
    assert sum(observed) == draws
    expected = (probabilities.double() / probabilities.double().sum() * draws).numpy()
    assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_a_draw_depends_on_its_key_alone(model_path: str) -> None:
    params = {"temperature": 1.0, "top_p": 0.9, "max_tokens": 16}
    prompts = [[3 + i, 7, 9 + 2 * i] * (1 + i % 5) for i in range(24)]
    requests = [request(i, prompt, key=sampling_key(0, bytes([i])), **params) for i, prompt in enumerate(prompts)]
    settings: list[dict[str, Any]] = [
        {},
        {"max_num_seqs": 3, "steps_ahead": 2},
        {"max_num_batched_tokens": 9, "max_num_seqs": 9, "enable_prefix_caching": False},
    ]
    results = []
    for number, setting in enumerate(settings):
        order = np.random.default_rng(number).permutation(len(requests)).tolist()
        engine = Engine(EngineConfig(model=model_path, device="cpu", **setting))
        outputs = {output.request_id: output for output in run(engine, [requests[i] for i in order])}
        results.append([outputs[str(i)].outputs[0].token_ids for i in range(len(requests))])
    assert results[0] == results[1] == results[2]
    assert len({tuple(tokens) for tokens in results[0]}) == len(requests)


def test_n_outputs_are_different_draws_of_one_prompt(engine: Engine) -> None:
    output = run(engine, [request(0, prompt=[4] * 40, n=4, temperature=1.0, key=seeded_key(11, [4] * 40))])[0]
    assert [one.index for one in output.outputs] == [0, 1, 2, 3]
    assert len({tuple(one.token_ids) for one in output.outputs}) == 4
    single = run(engine, [request(0, prompt=[4] * 40, temperature=1.0, key=seeded_key(11, [4] * 40))])[0]
    assert single.outputs[0].token_ids == output.outputs[0].token_ids
    with pytest.raises(ValueError, match="n must be 1 when using greedy sampling"):
        request(0, n=3)


def test_keys_differ_by_seed_row_and_occurrence() -> None:
    params = SamplingParams(temperature=1.0)
    digests = [request_digest([1, 2], params), request_digest([1, 3], params), request_digest([1, 2], SamplingParams())]
    assert digests[0] == digests[2] != digests[1]
    keys = {sampling_key(seed, digest, n) for seed in (0, 1) for digest in digests[:2] for n in (0, 1)}
    assert len(keys) == 8
    assert len({seeded_key(seed, prompt) for seed in (1, 2) for prompt in ([1, 2], [1, 3], [1])}) == 6


def test_rows_of_every_kind_in_one_batch_do_not_disturb_each_other(engine: Engine) -> None:
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 0.7, "top_p": 0.5, "min_p": 0.01},
        {"repetition_penalty": 1.5},
        {"temperature": 1.0, "frequency_penalty": 1.0, "presence_penalty": 0.5},
        {"logit_bias": {7: 5.0}},
        {"allowed_token_ids": [3, 4, 5]},
        {"min_tokens": 10, "logit_bias": {2: 50.0}},
        {"logprobs": 2},
        {"stop": "q"},
        {"n": 2, "temperature": 1.0},
    ]
    requests = [request(i, key=i, **kind) for i, kind in enumerate(kinds)]
    together = run(engine, requests)
    for i, one in enumerate(requests):
        alone = run(engine, [one])[0]
        assert [o.token_ids for o in alone.outputs] == [o.token_ids for o in together[i].outputs], kinds[i]


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "prompt_token_ids is empty"),
        ([1031], {}, "prompt_token_ids holds 1031, outside the vocabulary of 1031 tokens"),
        ([-1], {}, "prompt_token_ids holds -1, outside"),
        ([5] * 64, {}, "the prompt has 64 tokens and max_model_len=64 leaves no room"),
        ([5], {"stop_token_ids": [1031]}, "stop_token_ids names token 1031"),
        ([5], {"allowed_token_ids": [2000]}, "allowed_token_ids names token 2000"),
        ([5], {"logit_bias": {5000: 1.0}}, "logit_bias names token 5000"),
        ([5], {"stop": ["x"]}, "needs a tokenizer"),
    ],
)
def test_a_request_that_cannot_run_is_refused_and_harms_no_other(
    model_path: str, prompt: list[int], params: dict[str, Any], message: str
) -> None:
    engine = Engine(EngineConfig(model=model_path, device="cpu", max_model_len=64))
    engine.add_request(request(1, max_tokens=3))
    sampling = SamplingParams(**params)
    bad = Request(request_id="bad", prompt_token_ids=np.array(prompt, dtype=np.int32), sampling_params=sampling)
    with pytest.raises(ValueError, match=message):
        engine.add_request(bad)
    finished = []
    while engine.has_unfinished():
        finished += engine.step()
    assert [output.request_id for output in finished] == ["1"]


def test_prompts_are_truncated_from_the_left_when_asked(model_path: str) -> None:
    engine = Engine(EngineConfig(model=model_path, device="cpu", max_model_len=32))
    prompt = list(range(3, 103))
    kept = run(engine, [request(0, prompt, truncate_prompt_tokens=6), request(1, prompt, truncate_prompt_tokens=-1)])
    assert kept[0].prompt_token_ids == prompt[-6:]
    assert kept[1].prompt_token_ids == prompt[-31:]
    assert [len(output.outputs[0].token_ids) for output in kept] == [24, 1]


def test_a_row_ends_at_max_model_len(model_path: str) -> None:
    engine = Engine(EngineConfig(model=model_path, device="cpu", max_model_len=32, steps_ahead=3))
    output = run(engine, [request(0, [5] * 20, max_tokens=None, ignore_eos=True)])[0].outputs[0]
    assert (len(output.token_ids), output.finish_reason) == (12, "length")


def test_abort_returns_what_was_written(engine: Engine) -> None:
    for index in range(3):
        engine.add_request(request(index, max_tokens=100, ignore_eos=True))
    for _ in range(10):
        engine.step()
    aborted = engine.abort_all()
    assert {output.request_id for output in aborted} == {"0", "1", "2"}
    assert all(output.outputs[0].finish_reason == "abort" for output in aborted)
    assert all(0 < len(output.outputs[0].token_ids) <= 10 for output in aborted)
    assert not engine.has_unfinished()
    engine.check_integrity()
    assert one_output(engine, max_tokens=3).finish_reason == "length", "the engine goes on"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_model_len": 2048}, "max_model_len=2048 is more than the model was made for: give 1024 or less"),
        ({"max_model_len": 512, "kv_cache_memory_bytes": 100_000}, r"max_model_len=512 needs .* set max_model_len=\d+"),
        ({"num_gpu_blocks_override": 3}, "num_gpu_blocks_override=3 leaves"),
        ({"max_num_seqs": 32, "max_num_batched_tokens": 16}, "max_num_batched_tokens=16 is less than max_num_seqs=32"),
        (
            {"enable_chunked_prefill": False, "max_num_batched_tokens": 100},
            "max_num_batched_tokens=100 is less than max_model_len=1024",
        ),
        ({"device": "cuda"}, "device='cuda' is not there"),
    ],
)
def test_settings_that_cannot_be_met_say_what_would_do(model_path: str, settings: dict[str, Any], message: str) -> None:
    if settings.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=message):
        Engine(EngineConfig(model=model_path, **({"device": "cpu"} | settings)))


def test_the_length_that_the_error_names_does_fit(model_path: str) -> None:
    with pytest.raises(ValueError, match="set max_model_len=") as raised:
        Engine(EngineConfig(model=model_path, device="cpu", kv_cache_memory_bytes=100_000))
    fits = int(str(raised.value).split("set max_model_len=")[1].split()[0])
    engine = Engine(EngineConfig(model=model_path, device="cpu", kv_cache_memory_bytes=100_000, max_model_len=fits))
    output = run(engine, [request(0, [5] * (fits - 3), max_tokens=None, ignore_eos=True)])[0]
    assert len(output.outputs[0].token_ids) == 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes_run(model_path: str, dtype: str) -> None:
    engine = Engine(EngineConfig(model=model_path, device="cpu", dtype=dtype))
    exact = Engine(EngineConfig(model=model_path, device="cpu"))
    outputs = [run(one, [request(0, logprobs=0, max_tokens=1)])[0].outputs[0] for one in (engine, exact)]
    assert outputs[0].cumulative_logprob == pytest.approx(outputs[1].cumulative_logprob, abs=0.3)


def test_kv_memory_that_is_not_there_is_refused_before_it_is_taken(model_path: str) -> None:
    asked: dict[str, Any] = {
        "kv_cache_memory_bytes": 1 << 50,
        "max_num_seqs": 1 << 20,
        "max_num_batched_tokens": 1 << 20,
    }
    with pytest.raises(ValueError, match=r"kv_cache_memory_bytes=\d+ makes .* GiB free: ask for less"):
        Engine(EngineConfig(model=model_path, device="cpu", **asked))


def test_device_errors_say_what_to_change() -> None:
    told = r"out of GPU memory while loading: buy more\. torch says: no room"
    with pytest.raises(DeviceMemoryError, match=told), explained("loading", "buy more"):
        raise torch.OutOfMemoryError("no room\ndetails")
    told = r"the GPU failed while stepping: illegal access.*CUDA_LAUNCH_BLOCKING=1"
    with pytest.raises(DeviceError, match=told), explained("stepping", "buy more"):
        raise torch.AcceleratorError("illegal access")


def test_a_result_has_the_very_list_of_its_prompt(engine: Engine) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=2)
    cut = SamplingParams(temperature=0.0, max_tokens=2, truncate_prompt_tokens=3)
    asked = [list(PROMPT), list(PROMPT)]
    requests = [
        Request(request_id=str(index), prompt_token_ids=prompt, sampling_params=one)
        for index, (prompt, one) in enumerate(zip(asked, (params, cut), strict=True))
    ]
    whole, truncated = run(engine, requests)
    assert whole.prompt_token_ids is asked[0] and truncated.prompt_token_ids == PROMPT[-3:]
    assert run(engine, [request(2)])[0].prompt_token_ids == PROMPT


def test_ended_requests_are_handed_out_while_the_next_step_runs(model_path: str) -> None:
    engine = Engine(EngineConfig(model=model_path, device="cpu", steps_ahead=1))
    ended: list[set[str]] = []
    for index, length in enumerate((3, 3, 6, 6, 9)):
        engine.add_request(request(index, max_tokens=length))
    while engine.has_unfinished():
        ended.append({output.request_id for output in engine.step()})
        engine.check_integrity()
    assert [one for one in ended if one] == [{"0", "1"}, {"2", "3"}, {"4"}]


@pytest.mark.parametrize("step", range(1, 8))
def test_aborting_loses_no_request_that_has_ended(model_path: str, step: int) -> None:
    engine = Engine(EngineConfig(model=model_path, device="cpu", steps_ahead=1))
    for index, length in enumerate((2, 3, 40)):
        engine.add_request(request(index, max_tokens=length))
    outputs = [output for _ in range(step) for output in engine.step()]
    outputs += engine.abort({"0", "2"})
    while engine.has_unfinished():
        outputs += engine.step()
    reasons = {output.request_id: output.outputs[0].finish_reason for output in outputs}
    assert sorted(output.request_id for output in outputs) == ["0", "1", "2"]
    assert reasons["1"] == "length" and reasons["2"] == "abort" and reasons["0"] in ("length", "abort")
    assert step < 4 or reasons["0"] == "length"


def test_few_requests_are_wanted_while_enough_wait(model_path: str) -> None:
    engine = Engine(EngineConfig(model=model_path, device="cpu", max_num_seqs=4))
    assert engine.num_wanted() == 32
    for index in range(256):
        engine.add_request(request(index, max_tokens=2))
        assert index == 255 or engine.num_wanted() == 256
    assert engine.num_wanted() == 32
    while engine.has_unfinished():
        engine.step()


@pytest.mark.parametrize("bad", [1.5, "7", None, [3], 2**31])
def test_a_prompt_of_anything_but_token_ids_is_refused(engine: Engine, bad: Any) -> None:
    asked = Request(request_id="0", prompt_token_ids=[5, bad], sampling_params=SamplingParams(max_tokens=1), key=0)
    with pytest.raises(ValueError, match="give token ids, integers from 0 on"):
        engine.add_request(asked)
    assert not engine.has_unfinished()


def test_what_a_failed_step_was_to_write_is_not_taken_for_written(
    model_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> Any:
        raise RuntimeError("the device has failed")

    engine = Engine(EngineConfig(model=model_path, device="cpu", block_size=4, max_num_seqs=1))
    prompt = list(range(3, 40))
    expected = run(engine, [request(0, prompt)])
    engine.reset_prefix_cache()
    # It gives up a slot with penalties, which the step that fails was to tell the device.
    engine.add_request(request(1, repetition_penalty=9.0))
    engine.step()
    engine.abort_all()
    engine.add_request(request(2, prompt))
    with monkeypatch.context() as patch:
        patch.setattr(engine._worker, "launch", failing)
        with pytest.raises(RuntimeError, match="has failed"):
            engine.step()
    engine.abort_all()
    outputs = run(engine, [request(3, prompt)])
    assert outputs[0].num_cached_tokens == 0
    assert outputs[0].outputs == expected[0].outputs
