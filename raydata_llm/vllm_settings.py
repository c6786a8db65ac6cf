"""vLLM's settings, sorted by what they mean here.

Owns the lists: what is left out because it cannot change an answer, and what would change answers and is therefore
refused unless it has the value that means "off". Names that are in neither list are the engine's own (or mistakes,
which `EngineConfig` names).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

logger = logging.getLogger(__name__)

# How vLLM runs, watches or places itself: the same answers with or without.
_LEFT_OUT = {
    "async_scheduling",
    "collect_detailed_traces",
    "compilation_config",
    "cpu_offload_gb",
    "cudagraph_capture_sizes",
    "cuda_graph_sizes",
    "data_parallel_backend",
    "disable_async_output_proc",
    "disable_custom_all_reduce",
    "disable_hybrid_kv_cache_manager",
    "disable_log_requests",
    "disable_log_stats",
    "distributed_executor_backend",
    "enable_log_requests",
    "enable_sleep_mode",
    "guided_decoding_backend",
    "long_prefill_token_threshold",
    "max_logprobs",
    "max_long_partial_prefills",
    "max_num_partial_prefills",
    "max_parallel_loading_workers",
    "max_seq_len_to_capture",
    "model",
    "model_loader_extra_config",
    "num_lookahead_slots",
    "num_scheduler_steps",
    "observability_config",
    "optimization_level",
    "otlp_traces_endpoint",
    "performance_mode",
    "preemption_mode",
    "prefix_caching_hash_algo",
    "ray_workers_use_nsight",
    "safetensors_load_strategy",
    "scheduler_cls",
    "scheduler_delay_factor",
    "scheduling_policy",
    "show_hidden_metrics_for_version",
    "stream_interval",
    "swap_space",
    "task_type",
    "use_tqdm_on_load",
    "use_v2_block_manager",
    "worker_cls",
    "worker_extension_cls",
}

# What would change answers, with the values that ask for nothing.
_OFF: dict[str, tuple[Any, ...]] = {
    "calculate_kv_scales": (None, False),
    "config_format": (None, "auto", "hf"),
    "convert": (None, "auto", "none"),
    "data_parallel_size": (None, 1),
    "enable_expert_parallel": (None, False),
    "enable_lora": (None, False),
    "enable_prompt_embeds": (None, False),
    "kv_cache_dtype": (None, "auto"),
    "limit_mm_per_prompt": (None, {}),
    "logits_processors": (None, []),
    "lora_modules": (None, []),
    "max_cpu_loras": (None,),
    "max_lora_rank": (None,),
    "max_loras": (None, 1),
    "mm_processor_kwargs": (None, {}),
    "model_impl": (None, "auto"),
    "override_generation_config": (None, {}),
    "override_pooler_config": (None,),
    "quantization": (None,),
    "revision": (None,),
    "rope_scaling": (None, {}),
    "rope_theta": (None,),
    "runner": (None, "auto", "generate"),
    "skip_tokenizer_init": (None, False, True),  # text is made outside the engine in either case
    "speculative_config": (None,),
    "task": (None, "auto", "generate"),
    "tokenizer": (None,),
    "tokenizer_mode": (None, "auto", "hf"),
    "tokenizer_revision": (None,),
}
_REMEDY = {
    "rope_scaling": "set hf_overrides={'rope_parameters': ...}",
    "rope_theta": "set hf_overrides={'rope_parameters': ...}",
    "tokenizer": "set tokenize_stage={'model_source': ...}",
    "revision": "download that revision and give its folder as model_source",
    "override_generation_config": "set these values in each row's sampling_params",
}

# Loaders of the same weights: this engine reads them its own way.
_LOADERS = {"runai_streamer", "fastsafetensors", "instanttensor"}

# The peer's own fields beside engine_kwargs.
_FIELDS_LEFT_OUT = {"log_engine_metrics", "placement_group_config", "experimental"}
_FIELDS_OFF: dict[str, tuple[Any, ...]] = {
    "dynamic_lora_loading_path": (None,),
    "has_image": (None, False),
    "prepare_image_stage": (None, False),
    "prepare_multimodal_stage": (None, False),
}


def split_vllm_settings(values: Mapping[str, Any], *, known: Collection[str]) -> dict[str, Any]:
    """A processor's fields as this package takes them, from those that Ray Data LLM and vLLM take.

    Args:
        values: Fields of Ray Data LLM's `vLLMEngineProcessorConfig`.
        known: Fields of this package's config, which stay.

    Raises:
        ValueError: for a setting that would change answers and is not there.
    """
    fields, left_out = _split(values, _FIELDS_LEFT_OUT - set(known), _FIELDS_OFF)
    given = fields.get("engine_kwargs")
    if isinstance(given, Mapping):
        engine_kwargs, ignored = _split(given, _LEFT_OUT, _OFF)
        left_out += [f"engine_kwargs[{name!r}]" for name in ignored]
        if engine_kwargs.get("load_format") in _LOADERS:
            left_out.append(f"engine_kwargs['load_format']={engine_kwargs['load_format']!r}")
            engine_kwargs["load_format"] = "auto"
        fields["engine_kwargs"] = engine_kwargs
    if left_out:
        logger.warning("vLLMEngineProcessorConfig: left out, as they mean nothing here: %s", ", ".join(left_out))
    return fields


def _split(
    values: Mapping[str, Any], left_out: Collection[str], off: Mapping[str, tuple[Any, ...]]
) -> tuple[dict[str, Any], list[str]]:
    kept: dict[str, Any] = {}
    for name, value in values.items():
        if name in off and not any(value is none or value == none for none in off[name]):
            raise ValueError(f"{name}={value!r} is not supported yet: {_REMEDY.get(name, 'leave it out')}")
        if name not in left_out and name not in off:
            kept[name] = value
    return kept, sorted(name for name in values if name in left_out)
