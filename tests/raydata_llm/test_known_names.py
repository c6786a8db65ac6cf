"""Unknown names: the nearest known one, in a ValueError, from whatever takes keywords."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from raydata_llm import (
    LLM,
    BeamSearchParams,
    EngineProcessorConfig,
    PoolingParams,
    ResumeConfig,
    SamplingParams,
    StructuredOutputsParams,
    build_llm_processor,
    write_parquet,
)
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.known_names import nearest


def test_the_nearest_name_is_told_or_all() -> None:
    known = {"max_tokens", "model_source", "seed"}
    assert nearest("max_token", known) == "did you mean max_tokens?"
    assert nearest("model", known) == "did you mean model_source?"
    assert nearest("x", known) == "known are max_tokens, model_source, seed"


@pytest.mark.parametrize(
    ("make", "given", "complaint"),
    [
        (SamplingParams, {"max_token": 5}, "max_token=5 is not an argument of SamplingParams: did you mean max_tokens"),
        (SamplingParams.from_mapping, {"max_token": 5}, "unknown field.* max_token: did you mean max_tokens"),
        (SamplingParams, {"best_of": 2}, "best_of=2 is not supported: set n"),
        (SamplingParams.from_mapping, {"best_of": 2}, "best_of=2 is not supported: set n"),
        (SamplingParams, {"guided_choice": ["a"]}, r"set structured_outputs={'choice': \[...\]}"),
        (PoolingParams, {"dimension": 4}, "dimension=4 is not an argument of PoolingParams: did you mean dimensions"),
        (PoolingParams, {"extra_kwargs": {"a": 1}}, r"extra_kwargs\['a'\] is not known"),
        (BeamSearchParams, {"beam_widht": 4}, "did you mean beam_width"),
        (StructuredOutputsParams, {"jsn": {}}, "did you mean json"),
        (EngineProcessorConfig, {"model": "m"}, "model='m' is not a setting: did you mean model_source"),
        (LLM.generate, {"sampling_param": {}}, "not an argument of LLM.generate: did you mean sampling_params"),
        (
            LLM.chat,
            {"max_tokens": 5},
            r"max_tokens=5 is not an argument of LLM.chat: .* give sampling_params={'max_tokens'",
        ),
        (LLM.chat, {"answers": 5}, "answers=5 is not an argument of LLM.chat: known are"),
        (LLM.generate, {"prompt_token_ids": [[1]]}, r"give prompts=\[{'prompt_token_ids': \[...\]}\]"),
        (functools.partial(LLM, "m"), {"temperature": 0}, "temperature=0 is not an argument of LLM: it is a sampling"),
        (
            functools.partial(EngineConfig.from_mapping, "m"),
            {"engine_kwargs": {"top_p": 0.5}},
            r"engine_kwargs\['top_p'\]=0.5 is not a setting of the engine: it is a sampling parameter",
        ),
        (ResumeConfig, {"key": "id"}, "not an argument of ResumeConfig: did you mean key_column"),
        (write_parquet, {"mod": "append"}, "not an argument of write_parquet: did you mean mode"),
        (build_llm_processor, {"preproces": len}, "not an argument of build_llm_processor: did you mean preprocess"),
    ],
)
def test_a_mistyped_keyword_is_named(make: Callable[..., Any], given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make(given) if make == SamplingParams.from_mapping else make(**given)


def test_a_class_with_named_fields_is_still_a_dataclass() -> None:
    params = SamplingParams(n=2, best_of=None)  # type: ignore[call-arg]
    for copied in (pickle.loads(pickle.dumps(params)), copy.deepcopy(params), dataclasses.replace(params)):
        assert copied == params
    assert "max_tokens" in inspect.signature(SamplingParams).parameters
    with pytest.raises(TypeError, match="positional"):
        SamplingParams(5)  # type: ignore[call-arg]
