"""The advice on sizes fits the memory and the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raydata_llm.cluster.advice import GPUS, advise, main
from tests.benchmarks.workloads import SHAPES

LARGE = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
}


@pytest.mark.parametrize("model", ["qwen3-0.6b", "llama-3.2-1b", "llama-3.1-8b"])
def test_a_model_that_fits_one_gpu_is_not_split(model: str) -> None:
    best = advise(SHAPES[model], GPUS["h100"])[0]
    assert (best.tp_size, best.pp_size) == (1, 1)


def test_a_model_of_141_gb_is_split_until_it_fits() -> None:
    advice = advise(LARGE, GPUS["h100"])
    assert advice and all(one.tp_size * one.pp_size > 2 for one in advice)
    assert all(one.weight_bytes < 0.85 * 80e9 and one.kv_tokens > 1024 for one in advice)
    whole = [one for one in advice if (one.tp_size, one.pp_size) == (4, 1)]
    assert whole[0].weight_bytes == pytest.approx(141.1e9 / 4, rel=0.01)


def test_the_command_prints_a_table_or_says_that_nothing_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LARGE))
    main([str(tmp_path), "--gpu", "h200"])
    said = capsys.readouterr().out
    assert "KV tokens" in said and "advised: tensor_parallel_size=4, pipeline_parallel_size=1" in said
    with pytest.raises(SystemExit, match="no sizes up to 2 l4 hold this model"):
        main([str(tmp_path), "--gpu", "l4", "--gpus", "2"])


@pytest.mark.parametrize(
    ("model", "measured"), [("qwen3-0.6b", 84_291), ("llama-3.2-1b", 129_454), ("llama-3.1-8b", 26_452)]
)
def test_estimates_are_near_what_was_measured_on_one_gpu(model: str, measured: int) -> None:
    # `decode` on an H200 at d75e0e9: rows of 64 tokens and 512 more, so 320 on average.
    estimate = advise(SHAPES[model], GPUS["h200"], num_gpus=1, row_tokens=320)[0].tokens_per_gpu
    assert estimate == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read as a config.json"),
        (json.dumps({"text_config": LARGE}), "has no hidden_size, .*vocab_size"),
        (json.dumps({**LARGE, "num_local_experts": 8}), "num_local_experts=8: the engine runs no mixture of experts"),
    ],
)
def test_what_is_no_dense_decoder_is_refused_in_a_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SystemExit, match=said):
        main([str(tmp_path), "--gpu", "h100"])
    with pytest.raises(SystemExit, match=r"nowhere\.json cannot be read"):
        main([str(tmp_path / "nowhere.json"), "--gpu", "h100"])
