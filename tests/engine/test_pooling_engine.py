"""A pooling engine's results equal transformers', whatever is packed together; what it refuses is one error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.pooling_engine import PoolingEngine
from raydata_llm.engine.pooling_params import PoolingParams
from raydata_llm.engine.pooling_request import PoolingRequest
from tests.engine.tiny_pooling import draw_prompts, run_each, save_pooling_model

FAMILIES = ("bert", "roberta", "xlm-roberta", "distilbert")


def run(
    engine: PoolingEngine, prompts: list[list[int]], types: list[list[int]] | None = None, **params: Any
) -> list[Any]:
    """Each prompt's values."""
    for index, prompt in enumerate(prompts):
        request = PoolingRequest(
            request_id=str(index),
            prompt_token_ids=np.array(prompt, dtype=np.int32),
            pooling_params=PoolingParams(**params),
            token_type_ids=None if types is None else np.array(types[index], dtype=np.int32),
        )
        engine.add_request(request)
    outputs: dict[str, Any] = {}
    while engine.has_unfinished():
        outputs |= {output.request_id: output for output in engine.step()}
    assert [outputs[str(index)].prompt_token_ids for index in range(len(prompts))] == prompts
    return [outputs[str(index)].outputs.data for index in range(len(prompts))]


def assert_close(got: list[Any], wanted: list[torch.Tensor], tolerance: float = 1e-4) -> None:
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, other.numpy(), atol=tolerance, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_of_an_encoder_equal_transformers(family: str, tmp_path: Path) -> None:
    model = save_pooling_model(tmp_path, family)
    engine = PoolingEngine(EngineConfig(model=str(tmp_path), max_num_batched_tokens=100))
    prompts = draw_prompts()
    wanted = [output.last_hidden_state[0] for output in run_each(model, prompts)]
    assert_close(run(engine, prompts, task="token_embed", normalize=False), wanted)
    assert engine.stats().num_steps > 1 and engine.stats().num_computed_tokens == sum(map(len, prompts))


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_an_embedding_is_a_pooled_state_of_length_1(pooling: str, tmp_path: Path) -> None:
    model = save_pooling_model(tmp_path, "bert")
    engine = PoolingEngine(EngineConfig(model=str(tmp_path), pooler_config={"pooling_type": pooling.upper()}))
    prompts = draw_prompts()
    pool: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "cls": lambda states: states[0],
        "mean": lambda states: states.mean(0),
        "last": lambda states: states[-1],
    }
    pooled = [pool[pooling](output.last_hidden_state[0]) for output in run_each(model, prompts)]
    assert_close(run(engine, prompts), [torch.nn.functional.normalize(state, dim=-1) for state in pooled])
    assert_close(run(engine, prompts, normalize=False), pooled)


@pytest.mark.parametrize("num_labels", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_classes_of_an_encoder_equal_transformers(family: str, num_labels: int, tmp_path: Path) -> None:
    model = save_pooling_model(tmp_path, family, "AutoModelForSequenceClassification", num_labels=num_labels)
    engine = PoolingEngine(EngineConfig(model=str(tmp_path)))
    prompts = draw_prompts()
    logits = [output.logits[0] for output in run_each(model, prompts)]
    assert_close(run(engine, prompts, use_activation=False), logits)
    assert_close(run(engine, prompts), [one.sigmoid() if num_labels == 1 else one.softmax(-1) for one in logits])


def test_a_pair_is_scored_with_its_token_types(tmp_path: Path) -> None:
    model = save_pooling_model(tmp_path, "bert", "AutoModelForSequenceClassification", num_labels=1)
    engine = PoolingEngine(EngineConfig(model=str(tmp_path)))
    prompts = [prompt for prompt in draw_prompts() if len(prompt) > 2]
    types = [[0] * 2 + [1] * (len(prompt) - 2) for prompt in prompts]
    with torch.no_grad():
        logits = [
            model(torch.tensor([prompt]), token_type_ids=torch.tensor([one])).logits[0]
            for prompt, one in zip(prompts, types, strict=True)
        ]
    assert_close(run(engine, prompts, types, task="score"), [one.sigmoid() for one in logits])
    plain = run(engine, prompts, task="score")
    assert not np.allclose(plain, [one.sigmoid().numpy() for one in logits], atol=1e-4), "types count"


def test_a_cross_encoders_own_activation_counts_for_scores_alone(tmp_path: Path) -> None:
    named = {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}
    model = save_pooling_model(tmp_path, "bert", "AutoModelForSequenceClassification", num_labels=1, **named)
    engine = PoolingEngine(EngineConfig(model=str(tmp_path)))
    prompts = draw_prompts()
    logits = [output.logits[0] for output in run_each(model, prompts)]
    assert_close(run(engine, prompts, task="score"), logits)
    assert_close(run(engine, prompts, task="classify"), [one.sigmoid() for one in logits])


def test_each_tokens_classes_equal_transformers(tmp_path: Path) -> None:
    model = save_pooling_model(tmp_path, "bert", "AutoModelForTokenClassification", num_labels=5)
    engine = PoolingEngine(EngineConfig(model=str(tmp_path)))
    prompts = draw_prompts()
    assert_close(run(engine, prompts), [output.logits[0].softmax(-1) for output in run_each(model, prompts)])


STEP_PROMPTS = [[9, 7, 7, 30, 7], [7], [11, 12], [7, 20, 31, 7, 44, 7, 5]]
STEP = 7


@pytest.mark.parametrize("where", ["request", "settings"])
def test_the_ends_of_steps_alone_have_classes(where: str, tmp_path: Path) -> None:
    model = save_pooling_model(tmp_path, "bert", "AutoModelForTokenClassification", num_labels=5)
    asked: dict[str, Any] = {"step_tag_id": STEP, "returned_token_ids": [4, 1]}
    pooler = {"tok_pooling_type": "STEP", **asked} if where == "settings" else None
    engine = PoolingEngine(EngineConfig(model=str(tmp_path), pooler_config=pooler))
    logits = [output.logits[0] for output in run_each(model, STEP_PROMPTS)]
    ends = [torch.tensor(prompt) == STEP for prompt in STEP_PROMPTS]
    wanted = [one[end][:, [4, 1]].softmax(-1) for one, end in zip(logits, ends, strict=True)]
    found = run(engine, STEP_PROMPTS, **({} if where == "settings" else asked))
    assert [one.shape for one in found] == [(3, 2), (1, 2), (0, 2), (3, 2)]
    assert_close(found, wanted)
    if where == "settings":
        other = run(engine, STEP_PROMPTS, step_tag_id=30, returned_token_ids=[0], use_activation=False)
        assert_close(other, [one[torch.tensor(p) == 30][:, [0]] for one, p in zip(logits, STEP_PROMPTS, strict=True)])


def test_requests_for_steps_and_for_all_tokens_share_a_batch(tmp_path: Path) -> None:
    model = save_pooling_model(tmp_path, "bert")
    engine = PoolingEngine(EngineConfig(model=str(tmp_path)))
    kinds: list[dict[str, Any]] = [{"step_tag_id": STEP}, {}, {"step_tag_id": STEP}, {"step_tag_id": 31}]
    for index, (prompt, kind) in enumerate(zip(STEP_PROMPTS, kinds, strict=True)):
        params = PoolingParams(task="token_embed", normalize=False, **kind)
        ids = np.array(prompt, dtype=np.int32)
        engine.add_request(PoolingRequest(request_id=str(index), prompt_token_ids=ids, pooling_params=params))
    outputs: dict[str, Any] = {output.request_id: output for output in engine.step()}
    assert engine.stats().num_steps == 1
    states = [output.last_hidden_state[0] for output in run_each(model, STEP_PROMPTS)]
    wanted = [states[0][[1, 2, 4]], states[1], states[2][:0], states[3][[2]]]
    assert_close([outputs[str(index)].outputs.data for index in range(4)], wanted)


@pytest.mark.parametrize(("architecture", "labels"), [("Qwen2ForProcessRewardModel", 2), ("Qwen2ForRewardModel", 1)])
def test_a_reward_models_head_is_two_linears(
    architecture: str, labels: int, tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    """Their code comes with their checkpoints, so the reference is the published formula over transformers' decoder."""
    auto: Any = transformers.AutoModel
    model = auto.from_pretrained(tiny_model("qwen2"), dtype=torch.float32)
    hidden = model.config.hidden_size
    torch.manual_seed(3)
    score = torch.nn.Sequential(torch.nn.Linear(hidden, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, labels))
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"score.{name}": tensor for name, tensor in score.state_dict().items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    config = {**model.config.to_dict(), "architectures": [architecture], "use_cache": False}
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    engine = PoolingEngine(EngineConfig(model=str(tmp_path), max_num_batched_tokens=1024))
    with torch.no_grad():
        logits = [score(output.last_hidden_state[0]) for output in run_each(model, STEP_PROMPTS)]
    if labels == 1:
        assert_close(run(engine, STEP_PROMPTS), logits)
        return
    # The token that its tokenizer ends steps with is not in this small vocabulary.
    assert [len(one) for one in run(engine, STEP_PROMPTS)] == [0] * len(STEP_PROMPTS)
    ends = [one[torch.tensor(prompt) == STEP] for one, prompt in zip(logits, STEP_PROMPTS, strict=True)]
    assert_close(run(engine, STEP_PROMPTS, step_tag_id=STEP), [one.softmax(-1) for one in ends])


def test_a_settings_activation_counts_where_a_request_says_nothing(tmp_path: Path) -> None:
    model = save_pooling_model(tmp_path, "bert", "AutoModelForSequenceClassification", num_labels=3)
    engine = PoolingEngine(EngineConfig(model=str(tmp_path), pooler_config={"use_activation": False}))
    logits = [output.logits[0] for output in run_each(model, STEP_PROMPTS)]
    assert_close(run(engine, STEP_PROMPTS), logits)
    assert_close(run(engine, STEP_PROMPTS, use_activation=True), [one.softmax(-1) for one in logits])


def test_parameters_of_steps_are_checked(tmp_path: Path) -> None:
    save_pooling_model(tmp_path, "bert", "AutoModelForTokenClassification", num_labels=5)
    engine = PoolingEngine(EngineConfig(model=str(tmp_path)))
    with pytest.raises(ValueError, match=r"returned_token_ids=\[5\] is not valid: the model's classes are 0 to 4"):
        run(engine, STEP_PROMPTS, returned_token_ids=[5])
    params = PoolingParams(step_tag_id=STEP, returned_token_ids=[1, 0], skip_reading_prefix_cache=True)
    assert (
        PoolingParams.from_mapping(params.to_mapping())
        == params
        == PoolingParams.from_mapping({"step_tag_id": 7.0, "returned_token_ids": np.array([1, 0])})
    )
    for wrong in ({"step_tag_id": -1}, {"returned_token_ids": 3}, {"returned_token_ids": ["a"]}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PoolingParams.from_mapping(wrong)
    with pytest.raises(ValueError, match=r"late_chunking_params=.* is not supported: ask for task='token_embed'"):
        PoolingParams.from_mapping({"late_chunking_params": {"chunk_size": 3}})


@pytest.mark.parametrize("field", [{"step_tag_id": 3}, {"returned_token_ids": [0]}])
def test_steps_do_not_fit_results_of_whole_prompts(field: dict[str, Any], tmp_path: Path) -> None:
    save_pooling_model(tmp_path, "bert", "AutoModelForSequenceClassification", num_labels=3)
    engine = PoolingEngine(EngineConfig(model=str(tmp_path)))
    with pytest.raises(ValueError, match=f"{next(iter(field))}=.* does not fit task='classify'"):
        run(engine, STEP_PROMPTS, **field)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_a_decoders_last_state_is_its_embedding(family: str, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model(family, **({"sliding_window": 37} if family == "mistral" else {}))
    engine = PoolingEngine(EngineConfig(model=str(folder), runner="pooling", max_num_batched_tokens=1024))
    auto: Any = transformers.AutoModel
    model = auto.from_pretrained(folder, dtype=torch.float32)
    prompts = draw_prompts(1031, (1, 16, 17, 100, 5, 64))
    states = [output.last_hidden_state[0] for output in run_each(model, prompts)]
    assert_close(run(engine, prompts, task="token_embed", normalize=False), states)
    assert_close(run(engine, prompts), [torch.nn.functional.normalize(state[-1], dim=-1) for state in states])


def test_a_decoders_classes_equal_transformers(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    config = transformers.AutoConfig.from_pretrained(tiny_model("llama")).to_dict()
    settings = {name: value for name, value in config.items() if name not in ("model_type", "architectures")}
    kind = "AutoModelForSequenceClassification"
    model = save_pooling_model(tmp_path, "llama", kind, **{**settings, "num_labels": 3})
    engine = PoolingEngine(EngineConfig(model=str(tmp_path)))
    prompts = draw_prompts(1031)
    assert_close(run(engine, prompts), [output.logits[0].softmax(-1) for output in run_each(model, prompts)])


def test_a_checkpoint_without_the_decoders_prefix_is_read(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("qwen3")
    auto: Any = transformers.AutoModel
    auto.from_pretrained(folder, dtype=torch.float32).save_pretrained(tmp_path)
    prompts = draw_prompts(1031)
    whole = run(PoolingEngine(EngineConfig(model=str(folder), runner="pooling")), prompts)
    bare = run(PoolingEngine(EngineConfig(model=str(tmp_path))), prompts)
    assert_close(bare, [torch.from_numpy(one) for one in whole], 1e-6)


def test_dimensions_cut_before_the_length_is_1(tmp_path: Path) -> None:
    save_pooling_model(tmp_path, "bert", matryoshka_dimensions=[8, 16])
    engine = PoolingEngine(EngineConfig(model=str(tmp_path)))
    prompts = draw_prompts()
    whole = [torch.from_numpy(one) for one in run(engine, prompts, normalize=False)]
    assert_close(run(engine, prompts, dimensions=8), [torch.nn.functional.normalize(one[:8], dim=-1) for one in whole])


def test_requests_that_ask_differently_share_a_batch(tmp_path: Path) -> None:
    model = save_pooling_model(tmp_path, "bert", is_matryoshka=True)
    engine = PoolingEngine(EngineConfig(model=str(tmp_path)))
    prompts = draw_prompts(lengths=(9, 4, 7, 2))
    asked = [
        PoolingParams(normalize=False),
        PoolingParams(task="token_embed", normalize=False),
        PoolingParams(normalize=False, dimensions=5),
        PoolingParams(task="token_embed", normalize=False),
    ]
    for index, (prompt, params) in enumerate(zip(prompts, asked, strict=True)):
        ids = np.array(prompt, dtype=np.int32)
        engine.add_request(PoolingRequest(request_id=str(index), prompt_token_ids=ids, pooling_params=params))
    outputs = {output.request_id: output for output in engine.step()}
    states = [output.last_hidden_state[0] for output in run_each(model, prompts)]
    got = [outputs[str(index)].outputs for index in range(4)]
    assert_close([one.data for one in got if one], [states[0][0], states[1], states[2][0, :5], states[3]])


BAD: dict[str, tuple[dict[str, Any], list[int], str]] = {
    "an empty prompt": ({}, [], "at least one token"),
    "a prompt that is too long": ({}, [7] * 91, "max_model_len=90"),
    "a token outside the vocabulary": ({}, [7, 331], "331"),
    "a task of other models": ({"task": "classify"}, [7], "task='classify'"),
    "dimensions of a model that has one length": ({"dimensions": 8}, [7], "is_matryoshka"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_request_that_cannot_be_run_is_refused_alone(case: str, tmp_path: Path) -> None:
    params, prompt, message = BAD[case]
    save_pooling_model(tmp_path, "bert")
    engine = PoolingEngine(EngineConfig(model=str(tmp_path)))
    ids = np.array(prompt, dtype=np.int32)
    with pytest.raises(ValueError, match=message):
        engine.add_request(
            PoolingRequest(request_id="bad", prompt_token_ids=ids, pooling_params=PoolingParams(**params))
        )
    assert not engine.has_unfinished()
    assert len(run(engine, draw_prompts())) == len(draw_prompts())


def test_a_long_prompt_is_cut_where_that_is_asked_for(tmp_path: Path) -> None:
    save_pooling_model(tmp_path, "bert")
    engine = PoolingEngine(EngineConfig(model=str(tmp_path)))
    prompt = draw_prompts(lengths=(120,))[0]
    request = PoolingRequest(
        request_id="long",
        prompt_token_ids=np.array(prompt, dtype=np.int32),
        pooling_params=PoolingParams(truncate_prompt_tokens=-1),
    )
    engine.add_request(request)
    assert engine.step()[0].prompt_token_ids == prompt[:90]


def test_aborted_requests_are_told_and_the_others_finish(tmp_path: Path) -> None:
    save_pooling_model(tmp_path, "bert")
    engine = PoolingEngine(EngineConfig(model=str(tmp_path), steps_ahead=1, max_num_seqs=1))
    for name in "abc":
        ids = np.array([7, 8, 9], dtype=np.int32)
        engine.add_request(PoolingRequest(request_id=name, prompt_token_ids=ids, pooling_params=PoolingParams()))
    assert engine.step() == []  # a is in flight
    assert sorted(output.request_id for output in engine.abort({"a", "b"})) == ["a", "b"]
    finished = []
    while engine.has_unfinished():
        finished += engine.step()
    assert [output.request_id for output in finished] == ["c"]


def test_dummy_weights_need_no_checkpoint(tmp_path: Path) -> None:
    save_pooling_model(tmp_path, "roberta", "AutoModelForSequenceClassification", num_labels=4)
    (tmp_path / "model.safetensors").unlink()
    engine = PoolingEngine(EngineConfig(model=str(tmp_path), load_format="dummy"))
    assert all(len(one) == 4 and np.isclose(one.sum(), 1) for one in run(engine, draw_prompts()))


def test_settings_of_engines_that_generate_are_refused(tmp_path: Path) -> None:
    save_pooling_model(tmp_path, "bert")
    for settings, message in (
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2 and .* not supported for pooling models"),
        ({"logits_processors": ["a:B"]}, "logits_processors are not supported for pooling models"),
        ({"max_num_batched_tokens": 40}, "max_num_batched_tokens=40 is less than max_model_len=90"),
        ({"max_model_len": 91}, "max_model_len=91 is more"),
        ({"pooler_config": {"pooling_type": "MAX"}}, "choose one of CLS, LAST, MEAN, ALL, STEP"),
        ({"pooler_config": {"seq_pooling_type": "STEP"}}, "choose one of CLS, LAST, MEAN"),
        ({"pooler_config": {"tok_pooling_type": "LAST"}}, "choose one of ALL, STEP"),
        ({"pooler_config": {"step_tag_id": 3}}, "step_tag_id=3 needs tok_pooling_type='STEP'"),
    ):
        with pytest.raises(ValueError, match=message):
            PoolingEngine(EngineConfig(model=str(tmp_path), **cast(Any, settings)))
