"""Adapters in each form that PEFT writes, rows of all in one batch, equal models with these adapters merged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from raydata_llm.engine.engine import Engine
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.request import LoRARequest, Request, RequestOutput
from raydata_llm.engine.sampling_params import SamplingParams
from tests.engine.peft_forms import EMBEDDING, FORMS, HEAD, RANK_LIMIT, Form, State, write_form

MAX_TOKENS = 6
LORA: dict[str, Any] = {"enable_lora": True, "max_lora_rank": RANK_LIMIT, "max_model_len": 64}
WAYS: dict[str, dict[str, Any]] = {
    "all at once": {"max_loras": len(FORMS)},
    "chunked prefill, one slot": {"max_loras": 1, "max_num_batched_tokens": 16, "max_num_seqs": 4},
    "shared prefixes": {"max_loras": 5, "block_size": 4, "steps_ahead": 2},
    "two ranks": {"max_loras": 3, "tensor_parallel_size": 2},
    "two stages": {"max_loras": 5, "pipeline_parallel_size": 2},
}


class Merged:
    """A model, adapters of it in all forms, and what it says with each of them merged."""

    def __init__(self, model: Path, folder: Path, forms: dict[str, Form]) -> None:
        rng = np.random.default_rng(0)
        self.path = model
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        own = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
        own.setdefault(f"{HEAD}.weight", own[f"{EMBEDDING}.weight"].clone())
        shared = rng.integers(3, 90, size=11).tolist()
        self.prompts = [rng.integers(3, 90, size=9).tolist(), [*shared, 5], [*shared, 6, 7]]
        self.adapters: dict[str, LoRARequest | None] = {"none": None}
        self.written = {"none": self.write(own)}
        for number, (name, form) in enumerate(forms.items()):
            merged = write_form(folder / str(number), form, own, seed=number)
            self.adapters[name] = LoRARequest(name, number + 1, str(folder / str(number)))
            self.written[name] = self.write(merged)

    def write(self, state: State) -> list[tuple[list[int], torch.Tensor]]:
        """For each prompt its greedy output and the log-probabilities of all positions."""
        config: Any = AutoConfig.from_pretrained(self.path)
        # Of a tied model the two weights are changed apart.
        config.tie_word_embeddings = False
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for name, tensor in state.items():
            module, _, kind = name.rpartition(".")
            # An adapter may bring a bias for a linear that has none.
            setattr(model.get_submodule(module), kind, torch.nn.Parameter(tensor))
        assert {name for name, _ in model.named_parameters()} == state.keys()
        results = []
        for prompt in self.prompts:
            whole = model.generate(
                torch.tensor([prompt]), max_new_tokens=MAX_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            with torch.inference_mode():
                results.append((whole[0, len(prompt) :].tolist(), model(whole).logits[0].log_softmax(-1)))
        return results

    def requests(self, names: list[str], **params: Any) -> list[Request]:
        """One for each adapter and prompt, in mixed order."""
        rows = [(name, index) for name in names for index in range(len(self.prompts))]
        np.random.default_rng(1).shuffle(rows)
        greedy = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, **params)
        return [
            Request(
                request_id=f"{name}/{index}",
                prompt_token_ids=np.array(self.prompts[int(index)], dtype=np.int32),
                sampling_params=greedy,
                lora_request=self.adapters[name],
            )
            for name, index in rows
        ]


def run(engine: Engine, requests: list[Request]) -> dict[str, RequestOutput]:
    for request in requests:
        engine.add_request(request)
    outputs: dict[str, RequestOutput] = {}
    while engine.has_unfinished():
        outputs |= {output.request_id: output for output in engine.step()}
        engine.check_integrity()
    return outputs


def check(outputs: dict[str, RequestOutput], merged: Merged, names: list[str], within: float = 2e-4) -> None:
    for name in names:
        for index, (tokens, logprobs) in enumerate(merged.written[name]):
            output = outputs[f"{name}/{index}"]
            assert output.outputs[0].token_ids == tokens, (name, index)
            scored = [*(output.prompt_logprobs or [])[1:], *(output.outputs[0].logprobs or [])]
            for position, scores in enumerate(scored):
                assert scores is not None
                for token, score in scores.items():
                    wanted = float(logprobs[position, token])
                    assert score.logprob == pytest.approx(wanted, abs=within), (name, index, position)


@pytest.fixture(scope="module")
def merged(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Merged:
    """Of a model whose q, k and v have biases."""
    one = Merged(tiny_model("qwen2"), tmp_path_factory.mktemp("forms"), FORMS)
    assert len({str([tokens for tokens, _ in written]) for written in one.written.values()}) == len(FORMS) + 1
    return one


@pytest.mark.parametrize("way", WAYS)
def test_rows_with_adapters_of_all_forms_equal_merged_models(way: str, merged: Merged) -> None:
    names = list(merged.adapters)
    engine = Engine(EngineConfig(model=str(merged.path), dtype="float32", device="cpu", **LORA, **WAYS[way]))
    try:
        scored = run(engine, merged.requests(names, logprobs=2, prompt_logprobs=2))
        plain = run(engine, merged.requests(names))
    finally:
        engine.shutdown()
    check(scored, merged, names)
    check(plain, merged, names)


def test_where_embedding_and_head_are_one_weight_each_changes_where_it_is_named(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    names = ("plain", "head", "embedding", "saved head", "saved embedding", "dora of head and embedding")
    tied = Merged(tiny_model("llama", tie_word_embeddings=True), tmp_path, {name: FORMS[name] for name in names})
    engine = Engine(EngineConfig(model=str(tied.path), dtype="float32", device="cpu", max_loras=3, **LORA))
    check(run(engine, tied.requests(list(tied.adapters), logprobs=2, prompt_logprobs=2)), tied, list(tied.adapters))


def test_an_engine_that_slept_has_the_adapters_anew(merged: Merged) -> None:
    names = ["none", "dora of head and embedding", "saved head and embedding", "saved linears"]
    engine = Engine(EngineConfig(model=str(merged.path), dtype="float32", device="cpu", max_loras=2, **LORA))
    check(run(engine, merged.requests(names)), merged, names)
    engine.sleep(1)
    engine.wake_weights()
    engine.wake_kv_cache()
    check(run(engine, merged.requests(names)), merged, names)
