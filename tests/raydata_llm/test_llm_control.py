"""What reaches an LLM's workers: functions on each rank, its parameters, profiles; and what scripts read of it."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from raydata_llm import LLM, SamplingParams
from tests.raydata_llm.tiny_tokenizer import save_tokenizer

GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
SETTINGS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_model_len": 96, "max_num_seqs": 4}


@pytest.fixture(scope="module")
def model_folder(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(tiny_model("llama"), folder)
    return str(save_tokenizer(folder))


@pytest.fixture
def llm(model_folder: str) -> Iterator[LLM]:
    with LLM(model_folder, **SETTINGS) as made:
        yield made


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def test_a_function_is_applied_to_the_parameters(llm: LLM) -> None:
    [shapes] = llm.apply_model(shapes_of)
    assert shapes["model.embed_tokens.weight"] == (1031, 96)
    assert shapes["model.layers.2.self_attn.qkv_proj.weight"] == ((6 + 2 + 2) * 24, 96)
    [layers] = llm.apply_model(lambda model: len(model.model.layers))
    assert layers == 3


def test_what_is_written_into_a_parameter_is_what_the_next_call_computes_with(llm: LLM) -> None:
    before = llm.generate("hello world", GREEDY)[0].outputs[0].token_ids

    def favour(model: Any) -> None:
        model.lm_head.weight.zero_()

    with torch.no_grad():
        llm.apply_model(favour)
    # The cached prompt is forgotten too: all logits are alike, and the first token is taken.
    assert llm.generate("hello world", GREEDY)[0].outputs[0].token_ids == [0, 0, 0, 0] != before


def test_a_worker_is_called_by_name_or_with_a_function(llm: LLM) -> None:
    assert llm.collective_rpc(lambda worker, first, *, second: (worker.rank, first + second), args=(1,), kwargs={"second": 2}) == [(0, 3)]  # fmt: skip # noqa: E501
    [model] = llm.collective_rpc("get_model")
    assert isinstance(model, torch.nn.Module)
    assert llm.llm_engine.collective_rpc("get_model", timeout=5)
    for name in ("no_such_method", "_read_weights", "sizes"):
        with pytest.raises(ValueError, match=f"method='{name}' is not a method of a rank's worker"):
            llm.collective_rpc(name)
    with pytest.raises(ZeroDivisionError):
        llm.collective_rpc(lambda worker: 1 / 0)
    with pytest.raises(ValueError, match="timeout=0 is not valid"):
        llm.collective_rpc("get_model", timeout=0)


def test_a_worker_is_not_called_while_prompts_are_under_way(llm: LLM) -> None:
    llm.enqueue(["hello", "world"], [GREEDY, SamplingParams(max_tokens=40, ignore_eos=True)])
    results = llm.as_completed()
    next(results)
    with pytest.raises(ValueError, match=r"are under way: call wait_for_completion\(\), or reset\(\)"):
        llm.collective_rpc("get_model")
    assert len(llm.wait_for_completion()) == 1


def rank_and_sum(worker: Any, factor: int) -> tuple[int, float]:
    return worker.rank, factor * float(worker.get_model().model.norm.weight.sum())


@pytest.mark.slow
def test_every_rank_of_an_engine_is_called(model_folder: str, tmp_path: Path) -> None:
    profiler = {"torch_profiler_dir": str(tmp_path), "torch_profiler_with_stack": False}
    with LLM(model_folder, tensor_parallel_size=2, profiler_config=profiler, **SETTINGS) as llm:
        first, second = llm.collective_rpc(rank_and_sum, args=(2,))
        assert (first[0], second[0]) == (0, 1) and first[1] == second[1]
        assert llm.collective_rpc(lambda worker: worker.rank) == [0, 1]
        assert [shapes["model.layers.0.mlp.down_proj.weight"] for shapes in llm.apply_model(shapes_of)] == [
            (96, 88)
        ] * 2
        with pytest.raises(ValueError, match="method='nothing' is not a method"):
            llm.collective_rpc("nothing")
        with pytest.raises(ZeroDivisionError):
            llm.collective_rpc(lambda worker: 1 / 0)
        llm.start_profile("two")
        assert len(llm.generate("hello", GREEDY)[0].outputs[0].token_ids) == 4
        llm.stop_profile()
        assert {path.name for path in tmp_path.glob("*.txt")} == {"two_pp0_tp0.txt", "two_pp0_tp1.txt"}
        assert llm.get_world_size() == 2


def test_a_profile_lands_in_the_folder_that_the_settings_name(model_folder: str, tmp_path: Path) -> None:
    settings = {"profiler": "torch", "torch_profiler_dir": str(tmp_path / "traces"), "torch_profiler_with_stack": False}
    with LLM(model_folder, profiler_config=settings, **SETTINGS) as llm:
        llm.start_profile()
        llm.generate("hello", GREEDY)
        llm.stop_profile()
        llm.stop_profile()  # nothing is under way any more
        [trace] = (tmp_path / "traces").glob("raydata_llm_pp0_tp0.*.pt.trace.json.gz")
        assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        assert "aten::" in (tmp_path / "traces" / "raydata_llm_pp0_tp0.txt").read_text()
        wrong: Any
        for wrong in ({"profile_prefix": "../x"}, {"delay_iterations": 3}, {"profiler_kwargs": {"profiler": "cuda"}}):
            with pytest.raises(ValueError, match="is not"):
                llm.start_profile(**wrong)


def test_a_profile_needs_a_folder(llm: LLM) -> None:
    with pytest.raises(ValueError, match=r"start_profile has no folder: build the LLM with profiler_config="):
        llm.start_profile()


def test_scripts_read_the_models_config(llm: LLM, model_folder: str) -> None:
    config = llm.llm_engine.model_config
    assert config is llm.model_config and config.model == model_folder and config.max_model_len == 96
    assert config.dtype == torch.float32 and config.get_vocab_size() == 1031 and config.get_head_size() == 24
    assert config.hf_config.num_hidden_layers == config.get_total_num_hidden_layers() == 3
    assert config.hf_text_config.model_type == "llama" and config.architecture == "LlamaForCausalLM"
    assert config.get_hidden_size() == 96 and config.get_total_num_kv_heads() == 2 and config.runner_type == "generate"
    engine = llm.llm_engine
    assert engine.tokenizer is engine.get_tokenizer() is llm.get_tokenizer()
    assert engine.vllm_config.parallel_config.world_size == llm.get_world_size() == 1
    assert engine.vllm_config.model_config is config and engine.vllm_config.scheduler_config.max_num_seqs == 4
    assert config.embedding_size == 96 and engine.vllm_config.scheduler_config.enable_chunked_prefill
    llm.enqueue("hello", GREEDY)
    assert engine.has_unfinished_requests() and engine.get_num_unfinished_requests() == 1
    assert llm.wait_for_completion() and not engine.has_unfinished_requests()
    with pytest.raises(AttributeError, match=r"llm_engine\.model_executor is not there: known are apply_model"):
        print(engine.model_executor)
