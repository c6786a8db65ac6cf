"""What, beside the rows, decides a job's answers: worked out from the processor's config and the model's files.

Two jobs with the same of it continue each other. Settings that only change the speed are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from raydata_llm.engine.engine_config import FIELD_NAMES
from raydata_llm.model_fingerprint import model_fingerprint
from raydata_llm.resume import ResumePlan

if TYPE_CHECKING:
    from raydata_llm.config import EngineProcessorConfig

# Another number where rows that name a seed draw otherwise than they did: their answers do not mix with older ones.
_NOISE = 2
# All other settings of the engine start a key space of their own, those that are yet to come too. The model is known by
# its fingerprint.
_SPEED_SETTINGS = {
    "model",
    "device",
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "num_gpu_blocks_override",
    "enable_prefix_caching",
    "enable_chunked_prefill",
    "trust_remote_code",
    "enforce_eager",
    "disable_cascade_attn",
    "steps_ahead",
    "num_threads",
    "disable_custom_all_reduce",
    "tensor_parallel_size",
    "pipeline_parallel_size",
}


def resume_plan(config: EngineProcessorConfig) -> ResumePlan | None:
    """The plan of a processor that can be resumed; None for one that cannot.

    Raises:
        ValueError: when the model's files cannot be read.
    """
    if config.resume is None:
        return None
    engine = config.engine_config()
    about: dict[str, Any] = {
        "model": model_fingerprint(config.model_source, load_format=engine.load_format),
        "version": config.resume.version,
        "task_type": config.task_type,
        "noise": _NOISE,
        "engine": {name: _plain(getattr(engine, name)) for name in sorted(FIELD_NAMES - _SPEED_SETTINGS)},
    }
    if config.task_type != "generate":
        about["pooling"] = [config.task_type, engine.convert, repr(engine.pooler_config)]
    return ResumePlan(config=config.resume, about=about)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(value[name]) for name in sorted(value)}
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)
