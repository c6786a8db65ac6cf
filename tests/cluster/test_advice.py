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


def test_a_model_that_fits_one_gpu_is_not_split() -> None:
    best = advise(SHAPES["llama-3.2-1b"], GPUS["h100"])[0]
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
    assert "KV tokens" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no sizes up to 2 l4 hold this model"):
        main([str(tmp_path), "--gpu", "l4", "--gpus", "2"])
