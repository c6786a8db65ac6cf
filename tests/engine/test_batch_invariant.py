"""`batch_invariant`: refused where it cannot be kept; where it can, a row's tokens do not depend on its batch.

The promise itself is for a GPU (test_gpu_invariant.py). Here the engine's part of it runs over kernels that are
interpreted, in a process of their own (see tests/kernels/test_triton_interpreter.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raydata_llm.engine import decoder as decoder_module
from raydata_llm.engine import worker as worker_module
from raydata_llm.engine.admission import Admission
from raydata_llm.engine.engine import Engine
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.logprobs import row_logprobs
from raydata_llm.engine.pooling_engine import PoolingEngine
from raydata_llm.engine.position_logprobs import Wanted
from raydata_llm.engine.request import Request, seeded_key
from raydata_llm.engine.sampling_params import SamplingParams
from raydata_llm.kernels.tuning import LinearTile, Tile
from tests.kernels.test_triton_interpreter import interpreter_works

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LENGTHS = (5, 19, 28, 22)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"batch_invariant": 1}, "batch_invariant=1 is not valid"),
        ({"device": "cpu"}, "batch_invariant=True needs a GPU"),
        ({"runner": "pooling"}, "batch_invariant=True is not supported for pooling models"),
        ({"tensor_parallel_size": 2}, "batch_invariant=True is not supported with tensor_parallel_size=2"),
        ({"pipeline_parallel_size": 2}, "batch_invariant=True is not supported with pipeline_parallel_size=2"),
    ],
    ids=str,
)
def test_what_cannot_be_kept_is_refused_by_name(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        EngineConfig(model="any", **{"batch_invariant": True, **settings})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_refuses(tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"batch_invariant=True needs a GPU.*device='cuda'"):
        Engine(EngineConfig(model=str(tiny_model("llama")), batch_invariant=True))


def test_pooling_models_refuse(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_invariant=True is not supported for pooling models"):
        PoolingEngine(EngineConfig(model=str(tmp_path), batch_invariant=True))


def test_no_prefix_is_attended_to_for_many_rows() -> None:
    assert EngineConfig(model="any").shares_prefixes
    assert not EngineConfig(model="any", batch_invariant=True).shares_prefixes


def test_of_equally_likely_tokens_the_first_are_named() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0, 1.0]]).repeat(3, 1)
    rows = row_logprobs(logits, torch.tensor([0, 1, 2]), [Wanted(4)])
    assert rows.top_ids.tolist() == [[1, 3, 2, 4]] * 3


@pytest.mark.skipif(INTERPRETED, reason="this is the process")
def test_the_engine_over_interpreted_kernels() -> None:
    if not interpreter_works():
        pytest.skip("Triton before 3.7 cannot interpret with NumPy 2.4 or later")
    # NumPy's product stands for a GPU's there. OpenBLAS's kernels for Haswell and Zen sum a row in another order where
    # it stands elsewhere in a tile.
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_CORETYPE": "Prescott"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "any_batch"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert "passed" in run.stdout and "skipped" not in run.stdout, run.stdout[-1000:]


def outputs_of(model: Path, order: list[int], *, tight: bool = False, **settings: Any) -> dict[int, Any]:
    """Tokens, log-probabilities and likeliest tokens of rows by number, sampled."""
    config = EngineConfig(
        model=str(model), batch_invariant=True, dtype="float32", max_model_len=64, block_size=16, **settings
    )
    engine = Engine(config)
    rng = np.random.default_rng(0)
    head = rng.integers(3, 499, size=16)
    prompts = [np.concatenate([head, rng.integers(3, 499, size=length)])[:length] for length in LENGTHS]
    for index in order:
        # Rows ask for different things, of the sampler too.
        params = SamplingParams(
            temperature=(0.0, 0.8, 1.0, 1.2)[index],
            top_p=0.9 if index == 2 else 1.0,
            presence_penalty=0.5 if index == 3 else 0.0,
            logprobs=3,
            max_tokens=7,
            ignore_eos=True,
        )
        prompt = prompts[index].astype(np.int32)
        engine.add_request(
            Request(
                request_id=str(index),
                prompt_token_ids=prompt,
                sampling_params=params,
                key=seeded_key(100 + index, prompt),
            )
        )
    found: dict[int, Any] = {}
    while engine.has_unfinished():
        for output in engine.step():
            one = output.outputs[0]
            found[int(output.request_id)] = (list(one.token_ids), one.logprobs)
    assert (engine.stats().num_preemptions > 0) == tight
    engine.shutdown()
    return found


@pytest.mark.skipif(not INTERPRETED, reason="run by the test above")
def test_a_rows_bits_are_the_same_in_any_batch(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from raydata_llm.kernels.invariant_attention_triton import launch_invariant_attention
    from raydata_llm.kernels.invariant_linear_triton import launch_invariant_linear

    # The interpreter's time is by program, whatever their size.
    linear_tile = LinearTile(block_m=16, block_n=512, block_k=128, num_warps=4, num_stages=2)
    tile = Tile(block_m=64, block_n=32, num_warps=4, num_stages=2)
    monkeypatch.setattr(decoder_module, "invariant_linear", partial(launch_invariant_linear, tile=linear_tile))
    monkeypatch.setattr(decoder_module, "invariant_attention", partial(launch_invariant_attention, tile=tile))
    monkeypatch.setattr(worker_module, "check_batch_invariant", lambda *_: None)
    model = tiny_model("qwen2", num_hidden_layers=2, vocab_size=499)
    whole = outputs_of(model, [0, 1, 2, 3])
    assert len({tuple(tokens) for tokens, _ in whole.values()}) == len(LENGTHS)
    assert {index: outputs_of(model, [index])[index] for index in (0, 2)} == {0: whole[0], 2: whole[2]}
    small: dict[str, Any] = {"enable_prefix_caching": False, "max_num_batched_tokens": 11, "max_num_seqs": 3}
    assert outputs_of(model, [3, 1, 2, 0], **small) == whole
    monkeypatch.setattr(Admission, "_keeps_peak", lambda *_: True)
    assert outputs_of(model, [1, 0, 3, 2], tight=True, num_gpu_blocks_override=5) == whole
