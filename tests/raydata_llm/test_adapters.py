"""LoRA adapters as users name them: for `LLM`, for rows of a processor, local and in a store."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from transformers import AutoModelForCausalLM

from raydata_llm import LLM, EngineProcessorConfig, LoRARequest, SamplingParams
from raydata_llm.adapter_source import resolve_adapter
from raydata_llm.engine.request import RequestOutput
from raydata_llm.replica import Replica
from raydata_llm.row_payload import RowOutput, RowRequest, pack, unpack
from tests.engine.lora_adapters import RANK_LIMIT, adapter_pairs, save_adapter
from tests.raydata_llm.processor_chain import prepared
from tests.raydata_llm.tiny_tokenizer import save_tokenizer

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "max_model_len": 96,
    "max_num_seqs": 8,
    "enable_lora": True,
    "max_lora_rank": RANK_LIMIT,
}
PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYDATA_LLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def model_folder(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(tiny_model("llama"), folder)
    return save_tokenizer(folder)


@pytest.fixture(scope="module")
def adapters(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the adapters `zero` and `one`."""
    folder = tmp_path_factory.mktemp("adapters")
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder)
    for number, name in enumerate(("zero", "one")):
        save_adapter(folder / name, *adapter_pairs(model, number))
    return folder


@pytest.fixture(scope="module")
def answers(model_folder: Path, adapters: Path) -> dict[str | None, list[int]]:
    """What each adapter, and the model alone, writes to PROMPT."""
    with LLM(str(model_folder), **SETTINGS) as llm:
        requests = [None, *(LoRARequest(name, 1, str(adapters / name)) for name in ("zero", "one"))]
        results = llm.generate([{"prompt_token_ids": PROMPT}] * 3, GREEDY, lora_request=requests)
    assert [result.lora_request for result in results] == requests
    assert [result.outputs[0].lora_request for result in results] == requests
    return {
        None if one is None else one.lora_name: result.outputs[0].token_ids
        for one, result in zip(requests, results, strict=True)
    }


def test_each_prompt_of_a_call_has_its_adapter(
    model_folder: Path, adapters: Path, answers: dict[str | None, list[int]], tmp_path: Path
) -> None:
    assert len({tuple(tokens) for tokens in answers.values()}) == 3
    one = LoRARequest("one", 1, str(adapters / "one"))
    with LLM(str(model_folder), **SETTINGS) as llm:
        alone = llm.generate([{"prompt_token_ids": PROMPT}], GREEDY, lora_request=one)
        assert alone[0].outputs[0].token_ids == answers["one"]
        nothing = LoRARequest("nothing", 2, str(tmp_path))
        failed, good = llm.generate([{"prompt_token_ids": PROMPT}] * 2, GREEDY, lora_request=[nothing, one])
        assert failed.error is not None and "is no adapter" in failed.error
        assert good.outputs[0].token_ids == answers["one"]
        with pytest.raises(ValueError, match="lora_request has 1 entries for 2 prompts"):
            llm.generate([{"prompt_token_ids": PROMPT}] * 2, GREEDY, lora_request=[one])
        with pytest.raises(ValueError, match="give a LoRARequest"):
            llm.generate([{"prompt_token_ids": PROMPT}], GREEDY, lora_request="one")  # type: ignore[arg-type]


def test_a_rows_model_column_names_its_adapter(adapters: Path, model_folder: Path) -> None:
    table = pa.table({"tokenized_prompt": [PROMPT] * 4, "model": ["one", None, "m", 3 * "x"]})
    config = EngineProcessorConfig(
        model_source="m", engine_kwargs={"enable_lora": True}, dynamic_lora_loading_path=f"{adapters}/"
    )
    assert config.dynamic_lora_loading_path is not None
    plan = {"adapters": config.dynamic_lora_loading_path, "adapters_of": "m"}
    requests, _ = prepared(table, str(model_folder), **plan)
    paths = [request.lora_request and request.lora_request.lora_path for request in requests]
    assert paths == [f"{adapters}/one", None, None, f"{adapters}/xxx"]
    # Without `enable_lora` such a column means nothing.
    assert [request.lora_request for request in prepared(table, str(model_folder))[0]] == [None] * 4
    wrong = pa.table({"tokenized_prompt": [PROMPT], "model": [3]})
    [request], _ = prepared(wrong, str(model_folder), keep_going=True, **plan)
    assert request.error is not None and "model=3" in request.error


def test_rows_with_adapters_run_in_one_engine(
    model_folder: Path, adapters: Path, answers: dict[str | None, list[int]]
) -> None:
    replica = Replica(str(model_folder), SETTINGS)
    replica.start()
    names = [None, "one", "zero", "none such", "one"]
    rows = []
    for number, name in enumerate(names):
        adapter = None if name is None else LoRARequest(name, 1, str(adapters / name))
        params = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}
        request = RowRequest(np.array(PROMPT, np.int32), params, b"d" * 16, lora_request=adapter)
        rows.append((number, (number, pack(request))))
    replica.feed(rows)
    outputs: dict[int, RowOutput] = {}
    while len(outputs) < len(rows):
        outputs |= {outcome.row_id: unpack(outcome.cell) for outcome in replica.collect(5.0).outcomes}
    for number, name in enumerate(names):
        output, error = outputs[number].output, outputs[number].error
        if name == "none such":
            assert error is not None and "none such" in error and "(lora)" in error
        else:
            assert isinstance(output, RequestOutput) and output.outputs[0].token_ids == answers[name]


def test_an_adapter_in_a_store_is_fetched(adapters: Path) -> None:
    memory = fsspec.filesystem("memory")
    for file in (adapters / "one").iterdir():
        memory.pipe(f"/lora/one/{file.name}", file.read_bytes())
    folder = Path(resolve_adapter("memory://lora/one"))
    assert sorted(file.name for file in folder.iterdir() if not file.name.startswith(".")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    with pytest.raises(ValueError, match=r"^lora_path='memory://lora/two' not found"):
        resolve_adapter("memory://lora/two")
