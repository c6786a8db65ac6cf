"""On a GPU, the promise of `batch_invariant`: 500 sampled rows write the same tokens however they are run."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raydata_llm.engine.admission import Admission
from raydata_llm.engine.engine import Engine
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.request import Request, seeded_key
from raydata_llm.engine.sampling_params import SamplingParams
from tests.benchmarks.workloads import write_shape
from tests.engine.tiny_shape import write_tiny_shape

pytestmark = pytest.mark.gpu

NUM_ROWS = 500
NUM_TOKENS = 48

ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "shuffled": {},
    "eager": {"enforce_eager": True},
    "37 at a time, in small chunks": {"max_num_seqs": 37, "max_num_batched_tokens": 100},
    "without the prefix cache": {"enable_prefix_caching": False},
    "preempted": {"num_gpu_blocks_override": 260, "preempted": True},
    "preempted, without the prefix cache": {
        "num_gpu_blocks_override": 260,
        "preempted": True,
        "enable_prefix_caching": False,
    },
    "blocks of 16 tokens": {"block_size": 16},
}


@cache
def prompts(vocab_size: int) -> list[list[int]]:
    """Two fifths of the rows begin alike, to a block border or not; 1 to 396 tokens."""
    rng = np.random.default_rng(0)

    def draw(count: int) -> list[int]:
        drawn: list[int] = rng.integers(3, vocab_size, size=count).tolist()
        return drawn

    heads = [draw(128), draw(70)]
    tails = [draw(int(rng.integers(1, 150 + row % 3 * 60))) for row in range(NUM_ROWS)]
    return [heads[row % 5] + tail if row % 5 < 2 else tail for row, tail in enumerate(tails)]


def parameters(row: int) -> SamplingParams:
    """A tenth greedy; rows differ in what they ask of the sampler."""
    return SamplingParams(
        temperature=0.0 if row % 10 == 0 else 0.7 + row % 4 * 0.2,
        top_p=0.9 if row % 4 == 1 else 1.0,
        top_k=40 if row % 7 == 2 else 0,
        repetition_penalty=1.1 if row % 11 == 3 else 1.0,
        logprobs=2 if row % 3 == 0 else None,
        max_tokens=NUM_TOKENS,
        ignore_eos=True,
    )


def engine_of(model: Path, **settings: Any) -> Engine:
    return Engine(
        EngineConfig(
            model=str(model),
            load_format="dummy",
            dtype="bfloat16",
            max_model_len=512,
            kv_cache_memory_bytes=2 << 30,
            batch_invariant=True,
            **settings,
        )
    )


def write(engine: Engine, order: list[int], at_once: int = NUM_ROWS) -> dict[int, tuple[list[int], list[Any]]]:
    """What the rows write, `at_once` of them in the engine."""
    given = prompts(engine.model_config.vocab_size)
    found: dict[int, tuple[list[int], list[Any]]] = {}
    for begin in range(0, len(order), at_once):
        for row in order[begin : begin + at_once]:
            engine.add_request(
                Request(
                    request_id=str(row),
                    prompt_token_ids=np.array(given[row], dtype=np.int32),
                    sampling_params=parameters(row),
                    key=seeded_key(row, given[row]),
                )
            )
        while engine.has_unfinished():
            for output in engine.step():
                one = output.outputs[0]
                found[int(output.request_id)] = (list(one.token_ids), list(one.logprobs or []))
    return found


@pytest.fixture(scope="module", params=["tiny", "qwen3-0.6b"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("invariant")
    return write_tiny_shape(folder) if request.param == "tiny" else write_shape(request.param, folder)


@pytest.fixture(scope="module")
def together(model: Path) -> dict[int, tuple[list[int], list[Any]]]:
    """All rows at once, in their order."""
    engine = engine_of(model)
    written = write(engine, list(range(NUM_ROWS)))
    engine.shutdown()
    assert len({tuple(tokens) for tokens, _ in written.values()}) > NUM_ROWS // 2
    return written


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_500_rows_write_the_same_tokens_in_any_arrangement(
    arrangement: str,
    model: Path,
    together: dict[int, tuple[list[int], list[Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = dict(ARRANGEMENTS[arrangement])
    preempted = settings.pop("preempted", False)
    if preempted:
        monkeypatch.setattr(Admission, "_keeps_peak", lambda *_: True)
    engine = engine_of(model, **settings)
    written = write(engine, np.random.default_rng(len(arrangement)).permutation(NUM_ROWS).tolist())
    assert (engine.stats().num_preemptions > 0) == preempted
    engine.shutdown()
    different = [row for row in range(NUM_ROWS) if written[row] != together[row]]
    assert not different, f"{len(different)} rows, {different[:5]} among them"


def test_rows_alone_write_what_they_write_together(
    model: Path, together: dict[int, tuple[list[int], list[Any]]]
) -> None:
    engine = engine_of(model)
    alone = write(engine, list(range(NUM_ROWS)), at_once=1)
    engine.shutdown()
    different = [row for row in range(NUM_ROWS) if alone[row] != together[row]]
    assert not different, f"{len(different)} rows, {different[:5]} among them"
