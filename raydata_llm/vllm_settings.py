"""vLLM's settings, sorted by what they mean here.

Owns the lists: what is left out because it cannot change an answer, and what would change answers and is therefore
refused unless it has a value that asks for nothing. A name in neither list is the engine's own, or a mistake, which
`EngineConfig` names; the engine's own names are never looked up here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from raydata_llm.engine.engine_config import FIELD_NAMES, JSON_STYLES
from raydata_llm.engine.known_names import nearest
from raydata_llm.engine.sampling_params import SAMPLING_REMEDIES
from raydata_llm.redaction import masked_logger, shown

logger = masked_logger(__name__)

# How vLLM runs, watches or places itself: the same answers with or without.
_LEFT_OUT_FOR = {
    "weights, how they are found and read": """
        allowed_local_media_path allowed_media_domains code_revision download_dir ignore_patterns model
        model_impl model_loader_extra_config model_weights pt_load_map_location safetensors_load_strategy
        safetensors_prefetch_num_threads served_model_name use_tqdm_on_load weight_transfer_config
    """,
    "processes, devices and their links": """
        all2all_backend api_process_count cp_kv_cache_interleave_size data_parallel_address
        data_parallel_backend data_parallel_external_lb data_parallel_hybrid_lb data_parallel_rank
        data_parallel_rpc_port data_parallel_size_local data_parallel_start_rank dbo_decode_token_threshold
        dbo_prefill_token_threshold dcp_comm_backend dcp_kv_cache_interleave_size decode_context_parallel_size
        disable_custom_all_reduce disable_nccl_for_dp_synchronization distributed_executor_backend
        distributed_timeout_seconds enable_dbo enable_elastic_ep enable_ep_weight_filter enable_eplb
        enable_expert_parallel enable_sleep_mode eplb_config eplb_log_balancedness eplb_step_interval
        eplb_window_size expert_placement_strategy fail_on_environ_validation master_addr master_port
        max_parallel_loading_workers moe_backend nnodes node_rank num_redundant_experts numa_bind numa_bind_cpus
        numa_bind_nodes placement_group prefill_context_parallel_size ray_workers_use_nsight shutdown_timeout
        ubatch_size worker_cls worker_extension_cls worker_use_ray
    """,
    "KV cache, its place and precision": """
        calculate_kv_scales cpu_offload_gb cpu_offload_params disable_hybrid_kv_cache_manager ec_transfer_config
        kv_cache_dtype kv_cache_dtype_skip_layers kv_cache_metrics kv_cache_metrics_sample kv_events_config
        kv_offloading_backend kv_offloading_size kv_sharing_fast_prefill kv_transfer_config offload_backend
        offload_group_size offload_num_in_group offload_params offload_prefetch_step
        prefix_cache_retention_interval prefix_caching_hash_algo swap_space
    """,
    "scheduling, kernels, compilation": """
        additional_config async_scheduling attention_backend attention_config compilation_config
        cuda_graph_sizes cudagraph_capture_sizes cudagraph_metrics disable_async_output_proc
        enable_flashinfer_autotune gdn_prefill_backend ir_op_priority kernel_config linear_backend
        long_prefill_token_threshold max_cudagraph_capture_size max_long_partial_prefills
        max_num_partial_prefills max_num_scheduled_tokens max_seq_len_to_capture multi_step_stream_outputs
        num_lookahead_slots num_scheduler_steps optimization_level override_attention_dtype
        override_neuron_config performance_mode preemption_mode prefill_schedule_interval scheduler_cls
        scheduler_delay_factor scheduler_reserve_full_isl scheduling_policy stream_interval use_v2_block_manager
        watermark
    """,
    "speculative decoding: the same answers, drawn in another way": """
        disable_logprobs_during_spec_decoding ngram_prompt_lookup_max ngram_prompt_lookup_min
        num_speculative_tokens spec_decoding_acceptance_method speculative_config
        speculative_disable_by_batch_size speculative_disable_mqa_scorer speculative_draft_tensor_parallel_size
        speculative_max_model_len speculative_model speculative_model_quantization
        typical_acceptance_sampler_posterior_alpha typical_acceptance_sampler_posterior_threshold
    """,
    "logs, traces and metrics": """
        aggregate_engine_logging collect_detailed_traces disable_log_requests disable_log_stats
        enable_layerwise_nvtx_tracing enable_log_requests enable_logging_iteration_details enable_mfu_metrics
        enable_mm_processor_stats observability_config otlp_traces_endpoint profiler_config
        show_hidden_metrics_for_version
    """,
    "text, and the backend of grammars": """
        guided_decoding_backend guided_decoding_disable_fallback
        intial_incremental_detokenization_offset logits_processor_pattern max_logprobs
        reasoning_parser_plugin renderer_num_workers
        tokenizer_pool_extra_config tokenizer_pool_size tokenizer_pool_type
        tokens_only
    """,
    "parts of models that are not run here: images, adapters, state spaces": """
        default_mm_loras disable_chunked_mm_input disable_mm_preprocessor_cache enable_lora_bias
        enable_mamba_cache_stochastic_rounding enable_mm_embeds enable_tower_connector_lora fully_sharded_loras
        interleave_mm_strings language_model_only limit_mm_per_prompt long_lora_scaling_factors lora_dtype
        lora_extra_vocab_size lora_target_modules mamba_backend mamba_block_size mamba_cache_dtype
        mamba_cache_mode mamba_cache_philox_rounds mamba_config mamba_ssm_cache_dtype max_cpu_loras
        max_prompt_adapter_token max_prompt_adapters media_io_kwargs
        mm_encoder_attn_backend mm_encoder_attn_dtype mm_encoder_fp8_scale_path mm_encoder_fp8_scale_save_margin
        mm_encoder_fp8_scale_save_path mm_encoder_only mm_encoder_tp_mode mm_processor_cache_gb
        mm_processor_cache_type mm_processor_kwargs mm_shm_cache_max_object_size_mb mm_tensor_ipc
        skip_mm_profiling specialize_active_lora video_pruning_rate
    """,
}
_LEFT_OUT = {name for names in _LEFT_OUT_FOR.values() for name in names.split()}

# What would change answers, with the values that ask for nothing.
_OFF: dict[str, tuple[Any, ...]] = {
    "allow_deprecated_quantization": (None, False),
    "config_format": (None, "auto", "hf"),
    "data_parallel_size": (None, 1),
    "disable_sliding_window": (None, False),
    "enable_prompt_adapter": (None, False),
    "hf_config_path": (None,),
    "hf_token": (None, False, True),
    "io_processor_plugin": (None,),
    "lora_modules": (None, []),
    "qlora_adapter_name_or_path": (None,),
    "quantization": (None,),
    "quantization_config": (None, {}),
    "quantization_param_path": (None,),
    "revision": (None,),
    "rope_scaling": (None, {}),
    "rope_theta": (None,),
    "task": (None, "auto", "generate"),
    "task_type": (None, "generate"),
    "tokenizer": (None,),
    "tokenizer_mode": (None, "auto", "hf", "slow"),
    "tokenizer_revision": (None,),
}
_REMEDY = {
    "data_parallel_size": "set concurrency to as many replicas",
    "hf_token": "set the environment variable HF_TOKEN, for workers in runtime_env",
    "revision": "download that revision and give its folder as model_source",
    "rope_scaling": "set hf_overrides={'rope_parameters': ...}",
    "rope_theta": "set hf_overrides={'rope_parameters': ...}",
    "task": "set the processor's task_type",
    "task_type": "set the processor's task_type",
    "tokenizer": "set tokenize_stage={'model_source': ...}",
}

_NO_ARGUMENTS = {
    "lora_request": "pooling models take no adapters (merge one into its model)",
    "mm_processor_kwargs": "models of text are run",
    "multi_modal_data": "models of text are run",
    "multimodal_data": "models of text are run",
}

# Loaders of the same weights: this engine reads them its own way.
_LOADERS = {"runai_streamer", "runai_streamer_sharded", "fastsafetensors", "instanttensor"}

# What `LLM` takes beside the engine's settings.
_LLM_ARGUMENTS = {"tokenizer", "data_parallel_size"}

# Fields that Ray Data LLM had once.
_OLDER_FIELDS: dict[str, tuple[Any, ...]] = {"has_image": (None, False), "prepare_image_stage": (None, False)}


def refuse_arguments(**given: Any) -> None:
    """Refuse arguments of vLLM's methods, and parts of its prompts, that would change answers and mean nothing here.

    Raises:
        ValueError: naming the first that asks for something.
    """
    for name, value in given.items():
        if value is not None and value != {} and value != []:
            raise ValueError(f"{name} is not supported, as {_NO_ARGUMENTS[name]}: leave it out")


def split_vllm_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """A processor's fields as this package takes them, from those that Ray Data LLM and vLLM take.

    Args:
        values: Fields of Ray Data LLM's `vLLMEngineProcessorConfig`, of any version.

    Raises:
        ValueError: for a setting that would change answers and is not there.
    """
    fields, _ = _split(values, (), _OLDER_FIELDS)
    left_out = _take_experimental(fields)
    given = fields.get("engine_kwargs")
    if isinstance(given, Mapping):
        engine_kwargs, ignored = _engine_settings(given)
        left_out += [f"engine_kwargs[{name!r}]" for name in ignored]
        fields["engine_kwargs"] = engine_kwargs
    if left_out:
        logger.warning("vLLMEngineProcessorConfig: left out, as they mean nothing here: %s", ", ".join(left_out))
    return fields


def split_llm_settings(engine_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The engine's settings from those that vLLM's `LLM` takes; what means nothing here is named in a warning.

    Raises:
        ValueError: for a setting that would change answers and is not there.
    """
    kept, left_out = _engine_settings(engine_kwargs)
    for name in kept.keys() - FIELD_NAMES:
        hint = nearest(name, FIELD_NAMES | _LLM_ARGUMENTS, SAMPLING_REMEDIES)
        if name == "engine_kwargs":
            hint = "give its entries one by one, as LLM(model, max_model_len=4096)"
        raise ValueError(f"{name}={shown(name, kept[name])} is not an argument of LLM: {hint}")
    if left_out:
        logger.warning("LLM: left out, as they mean nothing here: %s", ", ".join(left_out))
    return kept


def _engine_settings(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    known = _known_values(given)
    of_forms = _take_forms(known)
    kept, left_out = _split(known, _LEFT_OUT, _OFF)
    left_out += of_forms
    if kept.get("load_format") in _LOADERS:
        left_out.append(f"load_format={kept['load_format']}")
        kept["load_format"] = "auto"
    return kept, left_out


def _known_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is None, vLLM's word for a default, and without what the model's files say themselves."""
    kept = {name: value for name, value in given.items() if value is not None}
    if kept.get("quantization") == "gguf":
        del kept["quantization"]
    if "override_pooler_config" in kept:
        kept.setdefault("pooler_config", kept.pop("override_pooler_config"))
    return kept


def _take_forms(kept: dict[str, Any]) -> list[str]:
    """Take what vLLM's settings, and their older names, say of thinking and of JSON; gives the names of the rest."""
    given = kept.pop("structured_outputs_config", {})
    if not isinstance(given, Mapping):
        raise ValueError(f"structured_outputs_config={given!r} is not valid: give a dict")
    forms = dict(given)
    older = {name: kept.pop(f"guided_decoding_{name}", False) for name in JSON_STYLES}
    parser, is_bound = forms.pop("reasoning_parser", None), forms.pop("enable_in_reasoning", False)
    parser = kept.pop("reasoning_parser", None) or parser
    if parser and is_bound:
        kept["reasoning_config"] = {"reasoning_parser": parser, **kept.get("reasoning_config", {})}
    elif parser:
        kept["reasoning_parser"] = parser
    style = {name: True for name in JSON_STYLES if forms.pop(name, False) or older[name]}
    if style:
        kept["structured_outputs_config"] = style
    return [f"structured_outputs_config[{name!r}]" for name in sorted(forms)]


def _take_experimental(fields: dict[str, Any]) -> list[str]:
    """Move what became a field of its own out of `experimental`; gives the rest's names."""
    experimental = fields.pop("experimental", None) or {}
    moved = "max_tasks_in_flight_per_actor"
    if experimental.get(moved) is not None:
        fields.setdefault(moved, experimental[moved])
    return [f"experimental[{name!r}]" for name in sorted(experimental) if name != moved]


def _split(
    values: Mapping[str, Any], left_out: Collection[str], off: Mapping[str, tuple[Any, ...]]
) -> tuple[dict[str, Any], list[str]]:
    kept: dict[str, Any] = {}
    ignored: list[str] = []
    for name, value in values.items():
        if name in FIELD_NAMES and name != "model":
            kept[name] = value
        elif name in off:
            if not any(value is none or value == none for none in off[name]):
                raise ValueError(
                    f"{name}={shown(name, value)} is not supported yet: {_REMEDY.get(name, 'leave it out')}"
                )
        elif name in left_out:
            ignored.append(name)
        else:
            kept[name] = value
    return kept, sorted(ignored)
