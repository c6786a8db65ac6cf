"""Rows with different LoRA adapters in one batch equal models with these adapters merged, run by transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from raydata_llm.engine import adapter_cache
from raydata_llm.engine.adapter import read_adapter
from raydata_llm.engine.adapter_slots import AdapterSlots
from raydata_llm.engine.engine import Engine
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.model_config import ModelConfig
from raydata_llm.engine.parallel import alone
from raydata_llm.engine.request import LoRARequest, Request
from raydata_llm.engine.sampling_params import SamplingParams
from raydata_llm.engine.shard import ModelShard, RankPlace
from tests.engine.lora_adapters import RANK_LIMIT, adapter_pairs, save_adapter
from tests.engine.optimism import optimistic_admission

NUM_ADAPTERS = 16
MAX_TOKENS = 12
LORA: dict[str, Any] = {"enable_lora": True, "max_lora_rank": RANK_LIMIT}
WAYS: dict[str, dict[str, Any]] = {
    "all at once": {"max_loras": NUM_ADAPTERS},
    "three slots for sixteen adapters": {"max_loras": 3},
    "one slot": {"max_loras": 1},
    "chunked prefill": {"max_loras": 5, "max_num_batched_tokens": 16, "max_num_seqs": 4},
    "launched ahead": {"max_loras": 2, "steps_ahead": 2},
    "no prefix cache": {"max_loras": 4, "enable_prefix_caching": False},
    "shared prefixes": {"max_loras": 4, "block_size": 4},
    "two ranks": {"max_loras": 3, "tensor_parallel_size": 2},
    "two stages": {"max_loras": 3, "pipeline_parallel_size": 2},
    "preempted": {
        "max_loras": 4,
        "max_model_len": 60,
        "block_size": 5,
        "num_gpu_blocks_override": 13,
        "max_num_seqs": 7,
        "optimistic": True,
    },
}


class Reference:
    """What the plain model and each merged one write."""

    def __init__(self, model_folder: Path, folder: Path) -> None:
        rng = np.random.default_rng(0)
        self.model = model_folder
        shared = rng.integers(3, 90, size=11).tolist()
        self.prompts = [rng.integers(3, 90, size=9).tolist(), [*shared, 5], [*shared, 6, 7]]
        self.adapters: list[LoRARequest | None] = [None]
        self.written = [self.write(self.load())]
        for number in range(NUM_ADAPTERS):
            model = self.load()
            rank, pairs = adapter_pairs(model, number)
            save_adapter(folder / str(number), rank, pairs)
            for name, (a, b) in pairs.items():
                model.get_parameter(f"{name}.weight").data += b @ a
            self.adapters.append(LoRARequest(f"adapter {number}", number + 1, str(folder / str(number))))
            self.written.append(self.write(model))

    def load(self) -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        return model.eval()

    def write(self, model: Any) -> list[list[int]]:
        outputs = []
        for prompt in self.prompts:
            ids = torch.tensor([prompt])
            whole = model.generate(ids, max_new_tokens=MAX_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
            outputs.append(whole[0, len(prompt) :].tolist())
        return outputs


@pytest.fixture(scope="module")
def reference(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(tiny_model("llama"), tmp_path_factory.mktemp("adapters"))


def generate(engine: Engine, reference: Reference) -> dict[tuple[int, int], list[int]]:
    """What each adapter (0 is none) writes to each prompt, all rows in one batch, in mixed order."""
    rows = [(number, index) for number in range(NUM_ADAPTERS + 1) for index in range(len(reference.prompts))]
    np.random.default_rng(1).shuffle(rows)
    for number, index in rows:
        engine.add_request(
            Request(
                request_id=f"{number} {index}",
                prompt_token_ids=np.array(reference.prompts[index], dtype=np.int32),
                sampling_params=SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True),
                lora_request=reference.adapters[number],
            )
        )
    written = {}
    while engine.has_unfinished():
        for output in engine.step():
            number, index = map(int, output.request_id.split())
            written[number, index] = output.outputs[0].token_ids
        engine.check_integrity()
    return written


@pytest.mark.parametrize("way", WAYS)
def test_sixteen_adapters_in_one_batch_equal_sixteen_merged_models(way: str, reference: Reference) -> None:
    settings = {"max_model_len": 64, **WAYS[way]}
    optimistic = settings.pop("optimistic", False)
    engine = Engine(EngineConfig(model=str(reference.model), dtype="float32", device="cpu", **LORA, **settings))
    try:
        with optimistic_admission(optimistic):
            written = generate(engine, reference)
    finally:
        engine.shutdown()
    assert len({str(one) for one in reference.written}) == NUM_ADAPTERS + 1, "the adapters change nothing"
    for number, wanted in enumerate(reference.written):
        assert [written[number, index] for index in range(len(wanted))] == wanted, (way, number)
    if way == "preempted":
        assert engine.stats().num_preemptions > 0


def test_an_adapter_whose_folder_vanishes_once_it_is_accepted_is_used_and_refused_after(
    reference: Reference, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    there = reference.adapters[3]
    assert there is not None
    shutil.copytree(there.lora_path, folder)
    request = Request(
        request_id="a",
        prompt_token_ids=np.array(reference.prompts[0], dtype=np.int32),
        sampling_params=SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True),
        lora_request=LoRARequest("a", 1, str(folder)),
    )
    engine = Engine(EngineConfig(model=str(reference.model), dtype="float32", device="cpu", max_model_len=64, **LORA))
    engine.add_request(request)
    shutil.rmtree(folder)
    outputs = [output for _ in range(2 * MAX_TOKENS) if engine.has_unfinished() for output in engine.step()]
    assert [output.outputs[0].token_ids for output in outputs] == [reference.written[3][0]]
    with pytest.raises(ValueError, match="is no adapter"):
        engine.add_request(request)


def test_a_request_with_a_wrong_adapter_is_refused_alone(reference: Reference, tmp_path: Path) -> None:
    def request(adapter: LoRARequest) -> Request:
        prompt = np.array(reference.prompts[0], dtype=np.int32)
        params = SamplingParams(temperature=0, max_tokens=2)
        return Request(request_id="a", prompt_token_ids=prompt, sampling_params=params, lora_request=adapter)

    adapter = reference.adapters[RANK_LIMIT]
    assert adapter is not None
    plain = EngineConfig(model=str(reference.model), dtype="float32", device="cpu", max_model_len=64)
    with pytest.raises(ValueError, match="needs enable_lora=True"):
        Engine(plain).add_request(request(adapter))
    engine = Engine(
        EngineConfig(
            model=str(reference.model),
            dtype="float32",
            device="cpu",
            max_model_len=64,
            enable_lora=True,
            max_lora_rank=4,
        )
    )
    with pytest.raises(ValueError, match="max_lora_rank=4"):
        engine.add_request(request(adapter))
    with pytest.raises(ValueError, match="is no adapter"):
        engine.add_request(request(LoRARequest("b", 1, str(tmp_path))))
    assert not engine.has_unfinished()


def test_the_ranks_parts_of_an_adapter_make_the_whole(reference: Reference) -> None:
    config = ModelConfig.from_hf(json.loads((reference.model / "config.json").read_text()))
    adapter = reference.adapters[1]  # of all linears
    assert adapter is not None
    device = torch.device("cpu")

    def loaded(rank: int, size: int) -> AdapterSlots:
        shard = ModelShard(config, RankPlace(tp_rank=rank, tp_size=size))
        # Nothing of it is measured.
        slots = AdapterSlots(shard, {}, alone(device), num_slots=2, max_rank=RANK_LIMIT, dtype=torch.float32)
        slots.load(1, adapter.lora_path)
        return slots

    whole, ranks = loaded(0, 1), [loaded(rank, 2) for rank in range(2)]
    for layer in range(config.num_layers):
        for fused in ("self_attn.o_proj", "mlp.down_proj"):
            joined = torch.cat([rank.layers[layer][fused].a[1] for rank in ranks], dim=1)
            torch.testing.assert_close(joined, whole.layers[layer][fused].a[1])
            assert torch.equal(ranks[-1].layers[layer][fused].b[1], whole.layers[layer][fused].b[1])
        gate_up = [rank.layers[layer]["mlp.gate_up_proj"].b[1].chunk(2) for rank in ranks]
        joined = torch.cat([part[side] for side in (0, 1) for part in gate_up])
        torch.testing.assert_close(joined, whole.layers[layer]["mlp.gate_up_proj"].b[1])
        q = [rank.layers[layer]["self_attn.qkv_proj"] for rank in ranks]
        joined = torch.cat([one.b[1, : one.parts[0]] for one in q])
        assert torch.equal(joined, whole.layers[layer]["self_attn.qkv_proj"].b[1, : len(joined)])


def test_an_adapter_that_a_failed_step_was_to_copy_is_copied_later(
    reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> Any:
        raise RuntimeError("the device has failed")

    engine = Engine(EngineConfig(model=str(reference.model), dtype="float32", device="cpu", max_model_len=64, **LORA))
    request = Request(
        request_id="a",
        prompt_token_ids=np.array(reference.prompts[0], dtype=np.int32),
        sampling_params=SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True),
        lora_request=reference.adapters[3],
    )
    engine.add_request(request)
    with monkeypatch.context() as patch:
        patch.setattr(engine._worker, "launch", failing)
        with pytest.raises(RuntimeError, match="has failed"):
            engine.step()
    engine.abort_all()
    engine.add_request(request)
    outputs = [output for _ in range(2 * MAX_TOKENS) if engine.has_unfinished() for output in engine.step()]
    assert [output.outputs[0].token_ids for output in outputs] == [reference.written[3][0]]
    engine.check_integrity()


def test_an_adapter_is_read_once_however_many_requests_ask_for_it(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def counting(folder: Path, *arguments: Any, **settings: Any) -> Any:
        read.append(folder)
        return read_adapter(folder, *arguments, **settings)

    monkeypatch.setattr(adapter_cache, "read_adapter", counting)
    engine = Engine(EngineConfig(model=str(reference.model), dtype="float32", device="cpu", max_model_len=64, **LORA))
    there = reference.adapters[3]
    assert there is not None
    # More than are kept.
    folders = [tmp_path / str(number) for number in range(40)]
    for folder in folders:
        shutil.copytree(there.lora_path, folder)
    for number, folder in [*enumerate(folders)] * 2:
        request = Request(
            request_id="a",
            prompt_token_ids=np.array(reference.prompts[0], dtype=np.int32),
            sampling_params=SamplingParams(),
            lora_request=LoRARequest(str(number), 1 + number, str(folder)),
        )
        engine.check_request(request)
    assert read == folders
