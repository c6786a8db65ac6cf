"""On a GPU, the benchmarks' model shapes through the kernels are as exact as through the reference ops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raydata_llm.engine import decoder
from raydata_llm.engine import worker as worker_module
from raydata_llm.engine.decoder import Decoder
from raydata_llm.engine.engine import Engine
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.request import Request
from raydata_llm.engine.sampling_params import SamplingParams
from raydata_llm.engine.weights import load_weights
from raydata_llm.kernels.paged_attention import paged_attention_ref
from raydata_llm.kernels.qkv_to_cache import qkv_to_cache_ref
from raydata_llm.kernels.rms_norm import rms_norm_ref
from raydata_llm.kernels.swiglu import swiglu_ref
from tests.benchmarks.workloads import SHAPES, write_shape

# One after the other also where a GPU's tests share it: the largest shape in float32 takes 32 GB.
pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("shapes")]

PROMPT_LENGTHS = (3, 64, 65, 127, 200, 333, 90, 250)
NUM_TOKENS = 4


def add_rms_norm_ref(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
    return rms_norm_ref(x + residual, weight, eps), x + residual


def decode_ref(
    q: torch.Tensor, *arguments: Any, table_rows: torch.Tensor, shared: Any, out: torch.Tensor | None
) -> torch.Tensor:
    k_cache, v_cache, table, context, scale, window = arguments
    starts = torch.arange(len(q) + 1, device=q.device)
    return prefill_ref(q, k_cache, v_cache, table, context, starts, scale, window, table_rows=table_rows, out=out)


def prefill_ref(*arguments: Any, out: torch.Tensor | None, longest: int | None = None, **settings: Any) -> torch.Tensor:
    attended = paged_attention_ref(*arguments, **settings)
    return attended if out is None else out.copy_(attended)


REFERENCE_OPS: dict[str, Callable[..., Any]] = {
    "rms_norm": rms_norm_ref,
    "add_rms_norm": add_rms_norm_ref,
    "swiglu": swiglu_ref,
    "qkv_to_cache": qkv_to_cache_ref,
    "paged_decode_attention": decode_ref,
    "paged_prefill_attention": prefill_ref,
}


def load_rounded_weights(*arguments: Any, **settings: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every dtype computes with the same weights, those of bfloat16, so that only the arithmetic differs."""
    for name, weight in load_weights(*arguments, **settings):
        yield name, weight.bfloat16().to(weight.dtype)


def step_logits(model: Path, dtype: str, monkeypatch: pytest.MonkeyPatch, *, reference_ops: bool) -> torch.Tensor:
    """Logits of every sampled row of every step: chunked prefills, then decode steps whose tokens are given."""
    recorded: list[torch.Tensor] = []
    original = Decoder.part_logits

    def record(self: Decoder, hidden: torch.Tensor, *adapted: Any) -> torch.Tensor:
        logits = original(self, hidden, *adapted)
        recorded.append(logits.float().cpu())
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "part_logits", record)  # one rank's part is all
        patch.setattr(worker_module, "load_weights", load_rounded_weights)
        for name, op in REFERENCE_OPS.items() if reference_ops else ():
            patch.setattr(decoder, name, op)
        engine = Engine(
            EngineConfig(
                model=str(model),
                load_format="dummy",
                dtype=dtype,
                max_model_len=512,
                max_num_seqs=16,
                max_num_batched_tokens=384,
                kv_cache_memory_bytes=1 << 30,
                enforce_eager=reference_ops,  # the reference waits for the device, which no graph can hold
            )
        )
        recorded.clear()  # the warm-up's
        rng = np.random.default_rng(0)
        for index, length in enumerate(PROMPT_LENGTHS):
            prompt = rng.integers(100, 100_000, size=length).astype(np.int32)
            params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, allowed_token_ids=[1000 + index])
            engine.add_request(Request(request_id=str(index), prompt_token_ids=prompt, sampling_params=params))
        while engine.has_unfinished():
            engine.step()
        engine.shutdown()
    del engine
    torch.cuda.empty_cache()
    return torch.cat(recorded)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_models_logits_are_as_exact_through_the_kernels_as_through_the_reference(
    shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_shape(shape, tmp_path)
    exact = step_logits(model, "float32", monkeypatch, reference_ops=True)
    assert len(exact) == len(PROMPT_LENGTHS) * NUM_TOKENS
    gaps = {}
    for reference_ops in (False, True):
        gap = (step_logits(model, "bfloat16", monkeypatch, reference_ops=reference_ops) - exact).abs()
        gaps[reference_ops] = gap
    spread = float(exact.std())
    kernels, reference = gaps[False], gaps[True]
    print(
        f"{shape}: of a spread of {spread:.3f}, mean {kernels.mean() / spread:.5f} / {reference.mean() / spread:.5f}, "
        f"max {kernels.max() / spread:.4f} / {reference.max() / spread:.4f}"
    )
    assert math.isfinite(float(kernels.max()))
    assert kernels.mean() <= 1.5 * reference.mean()
    assert kernels.max() <= 1.5 * reference.max()
