"""On two GPUs: ranks write what one rank writes (but for near ties), sums agree, and graphs hold the sums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._C._distributed_c10d import TCPStore
from torch.multiprocessing.spawn import spawn

from raydata_llm.engine.engine import Engine
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.parallel import ParallelState
from raydata_llm.engine.request import Request, seeded_key
from raydata_llm.engine.sampling_params import SamplingParams
from raydata_llm.engine.shard import RankPlace
from tests.engine.tiny_shape import write_tiny_shape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.9},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    {"temperature": 0.8, "top_p": 0.5},
    {"temperature": 0.0, "repetition_penalty": 1.2, "logprobs": 2},
]


def written(folder: Path, **settings: Any) -> list[list[int]]:
    # float32, so that near ties are rare; the order of a sum still moves the last bit.
    config = EngineConfig(
        model=str(folder), load_format="dummy", dtype="float32", max_model_len=256, max_num_seqs=32, **settings
    )
    engine = Engine(config)
    rng = np.random.default_rng(0)
    tokens: dict[int, list[int]] = {}
    try:
        for index in range(40):
            prompt = rng.integers(3, 1000, size=3 + 4 * index % 70).astype(np.int32)
            params = SamplingParams(max_tokens=40, ignore_eos=True, **KINDS[index % len(KINDS)])
            engine.add_request(
                Request(
                    request_id=str(index),
                    prompt_token_ids=prompt,
                    sampling_params=params,
                    key=seeded_key(index, prompt),
                )
            )
        while engine.has_unfinished():
            tokens |= {int(output.request_id): output.outputs[0].token_ids for output in engine.step()}
    finally:
        engine.shutdown()
    return [tokens[index] for index in range(40)]


@pytest.mark.parametrize(
    "settings",
    [{}, {"enforce_eager": True}, {"disable_custom_all_reduce": True}],
    ids=["graphs", "eager", "NCCL alone"],
)
@pytest.mark.parametrize("sizes", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}], ids=str)
def test_two_gpus_write_what_one_does(sizes: dict[str, int], settings: dict[str, Any], tmp_path: Path) -> None:
    folder = write_tiny_shape(tmp_path)
    alone, together = written(folder), written(folder, **sizes, **settings)
    same = sum(one == other for one, other in zip(alone, together, strict=True))
    # A pipeline computes the very same sums; of tensor-parallel rows one in ten may part at a near tie.
    assert same == len(alone) if "pipeline_parallel_size" in sizes else same >= 0.9 * len(alone)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_sums_of_all_sizes_are_right_eagerly_and_from_a_graph(dtype: str) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    spawn(check_sums, (store.port, dtype), nprocs=2)


def check_sums(rank: int, port: int, dtype: str) -> None:
    """In a process of each rank."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    store = TCPStore("127.0.0.1", port, is_master=False)
    parallel = ParallelState(RankPlace(tp_rank=rank, tp_size=2), device, store, 60.0)
    for shape in ((1, 8), (1, 4096), (3, 88), (31, 4096), (32, 4096), (33, 4096), (700, 1024)):
        parts = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
        parts = [part.to(getattr(torch, dtype)) for part in parts]
        expected = parts[0].float() + parts[1].float()
        mine = parts[rank].to(device)
        found = parallel.all_reduce(mine.clone()).float().cpu()
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
        graph, source = torch.cuda.CUDAGraph(), mine.clone()
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream(device)):
            graph.capture_begin(capture_error_mode="thread_local")
            # Twice in a row: the second must not write where the first is still read.
            total = parallel.all_reduce(parallel.all_reduce(source.clone()) * 0.5)
            graph.capture_end()
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(total.float().cpu(), expected, rtol=1e-2, atol=1e-2)
