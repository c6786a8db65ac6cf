"""LLM's sleep and wake_up: memory is given up and taken back, and what is written after is what was written before."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from raydata_llm import LLM, LoRARequest, SamplingParams
from raydata_llm.engine.engine import Engine
from raydata_llm.engine.worker import Worker
from tests.engine.lora_adapters import adapter_pairs, save_adapter
from tests.raydata_llm.tiny_tokenizer import save_tokenizer

SETTINGS: dict[str, Any] = {"dtype": "float32", "max_model_len": 96, "max_num_seqs": 4, "num_gpu_blocks_override": 60}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PROMPTS = ["hello world", "the quick brown fox jumps over the lazy dog", "a"]
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=5, max_tokens=12, ignore_eos=True, frequency_penalty=1.0),
    SamplingParams(temperature=1.0, seed=6, max_tokens=12, ignore_eos=True),
]


@pytest.fixture(scope="module")
def model_folder(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(tiny_model("llama"), folder)
    return save_tokenizer(folder)


@pytest.fixture
def llm(model_folder: Path) -> Iterator[LLM]:
    with LLM(str(model_folder), device="cpu", **SETTINGS) as made:
        yield made


def written(llm: LLM) -> list[list[int]]:
    return [result.outputs[0].token_ids for result in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


def worker_of(llm: LLM) -> Worker:
    engine = llm._open_engine()
    assert isinstance(engine, Engine) and isinstance(engine._worker, Worker)
    return engine._worker


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("level", [1, 2])
def test_what_is_written_after_sleep_is_what_was_written_before(level: int, device: str, model_folder: Path) -> None:
    with LLM(str(model_folder), device=device, **SETTINGS) as llm:
        expected = written(llm)
        for _ in range(2):
            llm.sleep(level)
            assert llm.is_sleeping
            llm.wake_up()
            assert not llm.is_sleeping and written(llm) == expected


@pytest.mark.parametrize("level", [1, 2])
def test_kv_and_at_level_2_weights_are_freed(level: int, llm: LLM) -> None:
    written(llm)
    decoder, runner = worker_of(llm)._decoder, worker_of(llm)._runner
    assert runner is not None
    cache = weakref.ref(runner._kv_cache.layers[0][0])
    weights = [weakref.ref(tensor) for tensor in decoder._parameters.values()]
    del runner
    llm.sleep(level)
    gc.collect()
    assert cache() is None
    assert {tensor() is None for tensor in weights} == {level == 2}


@pytest.mark.gpu
@pytest.mark.parametrize("level", [1, 2])
def test_a_sleeping_llm_leaves_the_gpu_to_others(level: int, model_folder: Path) -> None:
    with LLM(str(model_folder), device="cuda", **SETTINGS) as llm:
        expected = written(llm)
        runner = worker_of(llm)._runner
        assert runner is not None
        kv_bytes = sum(tensor.nbytes for layer in runner._kv_cache.layers for tensor in layer)
        del runner
        before = torch.cuda.memory_reserved()
        llm.sleep(level)
        asleep = torch.cuda.memory_reserved()
        # Another takes what was freed, so that nothing comes back to where it was.
        other = torch.full((1 << 24,), 7.0, device="cuda")
        llm.wake_up()
        assert before - asleep >= kv_bytes > 0 and written(llm) == expected
        assert bool((other == 7).all())


def test_parts_wake_one_after_the_other(llm: LLM) -> None:
    expected = written(llm)
    llm.sleep()
    with pytest.raises(ValueError, match="wake the weights first"):
        llm.wake_up(tags=["kv_cache"])
    llm.wake_up(tags=["weights"])
    with pytest.raises(RuntimeError, match=r"sleeps \(kv_cache, scheduling\): call wake_up"):
        llm.generate("a")
    llm.wake_up(tags=["kv_cache"])
    llm.wake_up()
    assert written(llm) == expected


def test_prompts_are_enqueued_in_sleep_and_run_after(llm: LLM) -> None:
    expected = written(llm)
    llm.sleep(level=0)
    llm.enqueue(PROMPTS, PARAMS)
    with pytest.raises(RuntimeError, match=r"sleeps \(scheduling\)"):
        llm.wait_for_completion()
    llm.wake_up(tags=["scheduling"])
    assert [result.outputs[0].token_ids for result in llm.wait_for_completion()] == expected


def test_what_is_under_way_keeps_it_awake(llm: LLM) -> None:
    llm.enqueue(["a", "b"], [{"max_tokens": 1}, {"max_tokens": 40, "ignore_eos": True}])
    next(llm.as_completed())
    with pytest.raises(ValueError, match=r"enqueued prompts are under way: call wait_for_completion\(\)"):
        llm.sleep()
    llm.reset()
    llm.sleep()
    assert llm.is_sleeping


def test_cached_prefixes_are_forgotten(llm: LLM) -> None:
    long = "the quick brown fox jumps over the lazy dog " * 3
    assert [llm.generate(long, PARAMS[0])[0].num_cached_tokens > 0 for _ in range(2)] == [False, True]
    llm.sleep()
    llm.wake_up()
    assert llm.generate(long, PARAMS[0])[0].num_cached_tokens == 0


@pytest.mark.parametrize("device", DEVICES)
def test_adapters_come_back(device: str, model_folder: Path, tmp_path: Path) -> None:
    auto: Any = transformers.AutoModelForCausalLM
    save_adapter(tmp_path / "lora", *adapter_pairs(auto.from_pretrained(model_folder), 3))
    adapter = LoRARequest("lora", 1, str(tmp_path / "lora"))
    with LLM(str(model_folder), device=device, enable_lora=True, **SETTINGS) as llm:
        plain, adapted = (llm.generate("hello", PARAMS[0], lora_request=one) for one in (None, adapter))
        assert plain[0].outputs[0].token_ids != adapted[0].outputs[0].token_ids
        llm.sleep(2)
        llm.wake_up()
        for lora_request, expected in ((None, plain), (adapter, adapted)):
            after = llm.generate("hello", PARAMS[0], lora_request=lora_request)
            assert after[0].outputs[0].token_ids == expected[0].outputs[0].token_ids


def test_wrong_levels_and_tags_are_named(llm: LLM) -> None:
    for level in (3, -1, True, "1"):
        with pytest.raises(ValueError, match=f"level={level!r} is not valid: give 0, 1 or 2"):
            llm.sleep(level)  # type: ignore[arg-type]
    for tags in (["kv"], "weights"):
        with pytest.raises(ValueError, match=r"tags=.* is not valid: give a list of some of weights, kv_cache"):
            llm.wake_up(tags)
    llm.sleep()
    with pytest.raises(ValueError, match=r"sleep\(level=2\) while weights, kv_cache, scheduling sleep"):
        llm.sleep(2)
