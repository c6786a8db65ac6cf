"""Batch LLM inference over Ray Datasets, with an engine of its own.

What a user imports lies here by name and is loaded on first use, so that `import raydata_llm` stays light: neither
torch nor transformers nor ray is imported until something needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raydata_llm.config import EngineProcessorConfig, ProcessorConfig, vLLMEngineProcessorConfig
    from raydata_llm.engine.beam_params import BeamSearchOutput, BeamSearchParams, BeamSearchSequence
    from raydata_llm.engine.failed_outputs import PromptError
    from raydata_llm.engine.flat_logprobs import FlatLogprobs
    from raydata_llm.engine.pooler_config import PoolerConfig
    from raydata_llm.engine.pooling_params import PoolingParams
    from raydata_llm.engine.pooling_request import (
        ClassificationOutput,
        ClassificationRequestOutput,
        EmbeddingOutput,
        EmbeddingRequestOutput,
        PoolingOutput,
        PoolingRequestOutput,
        ScoringOutput,
        ScoringRequestOutput,
    )
    from raydata_llm.engine.repetition import RepetitionDetectionParams
    from raydata_llm.engine.request import CompletionOutput, Logprob, LoRARequest, RequestOutput
    from raydata_llm.engine.request_stats import RequestStateStats
    from raydata_llm.engine.sampling_params import RequestOutputKind, SamplingParams
    from raydata_llm.engine.structured_outputs import StructuredOutputsParams
    from raydata_llm.engine.vllm_logits import (
        AdapterLogitsProcessor,
        BatchUpdate,
        LogitsProcessor,
        MoveDirectionality,
    )
    from raydata_llm.job_report import JobReport
    from raydata_llm.job_run import report_of
    from raydata_llm.llm import LLM
    from raydata_llm.processor import Processor, build_llm_processor, build_processor
    from raydata_llm.prompts import EmbedsPrompt, TextPrompt, TokensPrompt
    from raydata_llm.resume_config import ResumeConfig
    from raydata_llm.sink import WriteSummary, write_jsonl, write_parquet
    from raydata_llm.stage_config import (
        ChatTemplateStageConfig,
        DetokenizeStageConfig,
        PrepareMultimodalStageConfig,
        TokenizerStageConfig,
    )
    from raydata_llm.vllm_arguments import EngineArgs

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AdapterLogitsProcessor",
    "BatchUpdate",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "ChatTemplateStageConfig",
    "ClassificationOutput",
    "ClassificationRequestOutput",
    "CompletionOutput",
    "DetokenizeStageConfig",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "EmbedsPrompt",
    "EngineArgs",
    "EngineProcessorConfig",
    "FlatLogprobs",
    "JobReport",
    "LoRARequest",
    "LogitsProcessor",
    "Logprob",
    "MoveDirectionality",
    "PoolerConfig",
    "PoolingOutput",
    "PoolingParams",
    "PoolingRequestOutput",
    "PrepareMultimodalStageConfig",
    "Processor",
    "ProcessorConfig",
    "PromptError",
    "RepetitionDetectionParams",
    "RequestOutput",
    "RequestOutputKind",
    "RequestStateStats",
    "ResumeConfig",
    "SamplingParams",
    "ScoringOutput",
    "ScoringRequestOutput",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokenizerStageConfig",
    "TokensPrompt",
    "WriteSummary",
    "__version__",
    "build_llm_processor",
    "build_processor",
    "report_of",
    "vLLMEngineProcessorConfig",
    "write_jsonl",
    "write_parquet",
]

_MODULES = {
    "EngineArgs": "raydata_llm.vllm_arguments",
    "MoveDirectionality": "raydata_llm.engine.vllm_logits",
    "LogitsProcessor": "raydata_llm.engine.vllm_logits",
    "BatchUpdate": "raydata_llm.engine.vllm_logits",
    "AdapterLogitsProcessor": "raydata_llm.engine.vllm_logits",
    "PromptError": "raydata_llm.engine.failed_outputs",
    "BeamSearchOutput": "raydata_llm.engine.beam_params",
    "BeamSearchParams": "raydata_llm.engine.beam_params",
    "BeamSearchSequence": "raydata_llm.engine.beam_params",
    "PoolerConfig": "raydata_llm.engine.pooler_config",
    "PoolingParams": "raydata_llm.engine.pooling_params",
    "ClassificationOutput": "raydata_llm.engine.pooling_request",
    "ClassificationRequestOutput": "raydata_llm.engine.pooling_request",
    "EmbeddingOutput": "raydata_llm.engine.pooling_request",
    "EmbeddingRequestOutput": "raydata_llm.engine.pooling_request",
    "PoolingOutput": "raydata_llm.engine.pooling_request",
    "PoolingRequestOutput": "raydata_llm.engine.pooling_request",
    "ScoringOutput": "raydata_llm.engine.pooling_request",
    "ScoringRequestOutput": "raydata_llm.engine.pooling_request",
    "JobReport": "raydata_llm.job_report",
    "LLM": "raydata_llm.llm",
    "CompletionOutput": "raydata_llm.engine.request",
    "FlatLogprobs": "raydata_llm.engine.flat_logprobs",
    "Logprob": "raydata_llm.engine.request",
    "LoRARequest": "raydata_llm.engine.request",
    "RepetitionDetectionParams": "raydata_llm.engine.repetition",
    "RequestOutput": "raydata_llm.engine.request",
    "RequestOutputKind": "raydata_llm.engine.sampling_params",
    "RequestStateStats": "raydata_llm.engine.request_stats",
    "report_of": "raydata_llm.job_run",
    "SamplingParams": "raydata_llm.engine.sampling_params",
    "StructuredOutputsParams": "raydata_llm.engine.structured_outputs",
    "EmbedsPrompt": "raydata_llm.prompts",
    "TextPrompt": "raydata_llm.prompts",
    "TokensPrompt": "raydata_llm.prompts",
    "Processor": "raydata_llm.processor",
    "build_llm_processor": "raydata_llm.processor",
    "build_processor": "raydata_llm.processor",
    "ChatTemplateStageConfig": "raydata_llm.stage_config",
    "DetokenizeStageConfig": "raydata_llm.stage_config",
    "EngineProcessorConfig": "raydata_llm.config",
    "ProcessorConfig": "raydata_llm.config",
    "PrepareMultimodalStageConfig": "raydata_llm.stage_config",
    "TokenizerStageConfig": "raydata_llm.stage_config",
    "vLLMEngineProcessorConfig": "raydata_llm.config",
    "ResumeConfig": "raydata_llm.resume_config",
    "WriteSummary": "raydata_llm.sink",
    "write_jsonl": "raydata_llm.sink",
    "write_parquet": "raydata_llm.sink",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
