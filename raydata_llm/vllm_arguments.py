"""vLLM's engine arguments and their defaults, of its version 0.33.

Owns the table, and `EngineArgs`, which holds such arguments as vLLM's class of that name does. What each means here is
said by `vllm_settings.py`. A default that is an object of vLLM's is written as an empty dict or tuple.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from typing import Any

from raydata_llm.engine.known_names import named_fields

ARGUMENTS: dict[str, Any] = {
    # The engine's own settings.
    "model": "Qwen/Qwen3-0.6B",
    "runner": "auto",
    "convert": "auto",
    "skip_tokenizer_init": False,
    "enable_prompt_embeds": False,
    "trust_remote_code": False,
    "load_format": "auto",
    "dtype": "auto",
    "seed": 0,
    "max_model_len": None,
    "pipeline_parallel_size": 1,
    "tensor_parallel_size": 1,
    "block_size": None,
    "enable_prefix_caching": None,
    "disable_cascade_attn": None,
    "gpu_memory_utilization": 0.92,
    "kv_cache_memory_bytes": None,
    "max_num_batched_tokens": None,
    "max_num_seqs": None,
    "logprobs_mode": "raw_logprobs",
    "hf_overrides": {},
    "enforce_eager": False,
    "disable_custom_all_reduce": False,
    "enable_lora": False,
    "max_loras": 1,
    "max_lora_rank": 16,
    "num_gpu_blocks_override": None,
    "enable_chunked_prefill": None,
    "structured_outputs_config": {},
    "reasoning_parser": "",
    "pooler_config": None,
    "reasoning_config": None,
    "generation_config": "auto",
    "override_generation_config": {},
    "logits_processors": None,
    # Weights, how they are found and read.
    "model_weights": "",
    "served_model_name": None,
    "allowed_local_media_path": "",
    "allowed_media_domains": None,
    "download_dir": None,
    "safetensors_load_strategy": None,
    "safetensors_prefetch_num_threads": 8,
    "safetensors_prefetch_block_size": 16777216,
    "code_revision": None,
    "model_class_overrides": {},
    "model_loader_extra_config": {},
    "ignore_patterns": ["original/**/*"],
    "model_impl": "auto",
    "use_tqdm_on_load": True,
    "pt_load_map_location": "cpu",
    "weight_transfer_config": None,
    # Processes, devices and their links.
    "distributed_executor_backend": None,
    "master_addr": "127.0.0.1",
    "master_port": 29501,
    "nnodes": 1,
    "node_rank": 0,
    "distributed_timeout_seconds": None,
    "cpu_distributed_timeout_seconds": None,
    "numa_bind": False,
    "numa_bind_nodes": None,
    "numa_bind_cpus": None,
    "device_ids": None,
    "prefill_context_parallel_size": 1,
    "decode_context_parallel_size": 1,
    "dcp_comm_backend": None,
    "dcp_q_replicate": None,
    "dcp_kv_cache_interleave_size": 1,
    "cp_kv_cache_interleave_size": None,
    "data_parallel_rank": None,
    "data_parallel_start_rank": None,
    "data_parallel_size_local": None,
    "data_parallel_address": None,
    "data_parallel_rpc_port": None,
    "data_parallel_hybrid_lb": False,
    "data_parallel_external_lb": False,
    "data_parallel_multi_port_external_lb": False,
    "data_parallel_backend": "mp",
    "enable_hc_sp": False,
    "enable_expert_parallel": False,
    "enable_batch_sharded_sampling": None,
    "enable_ep_weight_filter": False,
    "moe_backend": "auto",
    "all2all_backend": "allgather_reducescatter",
    "enable_elastic_ep": False,
    "elastic_ep_max_dp_size": None,
    "enable_dbo": False,
    "ubatch_size": 0,
    "dbo_decode_token_threshold": 32,
    "dp_sync_interval": 16,
    "dbo_prefill_token_threshold": 512,
    "disable_nccl_for_dp_synchronization": None,
    "eplb_config": {},
    "enable_eplb": False,
    "expert_placement_strategy": "linear",
    "_api_process_count": 1,
    "_api_process_rank": 0,
    "max_parallel_loading_workers": None,
    "enable_shm_tensor_arena": False,
    "ray_workers_use_nsight": False,
    "worker_cls": "auto",
    "worker_extension_cls": "",
    "enable_sleep_mode": False,
    "sleep_mode_backend": "cumem",
    "sleep_mode_offload_cudagraph": False,
    "sleep_preserve_parameter_names": (),
    "enable_cumem_allocator": False,
    "enable_nccl_comm_suspend": False,
    "fault_tolerance_config": {},
    "enable_fault_tolerance": False,
    "shutdown_timeout": 0,
    "watchdog_config": {},
    "fail_on_environ_validation": False,
    # KV cache, its place and precision.
    "kv_cache_dtype": "auto",
    "prefix_caching_hash_algo": "sha256",
    "prefix_cache_retention_interval": 0,
    "offload_backend": "auto",
    "cpu_offload_gb": 0,
    "cpu_offload_params": (),
    "offload_group_size": 0,
    "offload_num_in_group": 1,
    "offload_prefetch_step": 1,
    "offload_params": (),
    "disable_hybrid_kv_cache_manager": None,
    "kv_cache_metrics": False,
    "kv_cache_metrics_sample": 0.01,
    "kv_transfer_config": None,
    "kv_events_config": None,
    "ec_transfer_config": None,
    "kv_cache_dtype_skip_layers": (),
    "kv_sharing_fast_prefill": False,
    "kv_offloading_size": None,
    "kv_offloading_backend": "native",
    # Scheduling, kernels, compilation.
    "cudagraph_capture_sizes": None,
    "max_cudagraph_capture_size": None,
    "ir_op_priority": {},
    "linear_backend": "auto",
    "sparse_indexer_topk_backend": "auto",
    "max_num_scheduled_tokens": None,
    "long_prefill_token_threshold": 0,
    "long_prefill_token_threshold_adaptive": False,
    "max_num_active_seqs": None,
    "max_num_queued_reqs": None,
    "max_num_queued_tokens": None,
    "use_fp64_gumbel": False,
    "scheduler_reserve_full_isl": True,
    "prefill_schedule_interval": 1,
    "watermark": 0.0,
    "cudagraph_metrics": False,
    "jit_monitor_mode": "warn",
    "jit_monitor_verbose": False,
    "scheduling_policy": "fcfs",
    "scheduler_cls": None,
    "compilation_config": {},
    "attention_config": {},
    "kernel_config": {},
    "enable_flashinfer_autotune": None,
    "monokernel": False,
    "attention_backend": None,
    "prefix_match_unit": None,
    "additional_config": {},
    "async_scheduling": None,
    "stream_interval": 1,
    "swa_bounded_replay": True,
    "optimization_level": 2,
    "performance_mode": "balanced",
    "gdn_prefill_backend": None,
    "kda_prefill_backend": None,
    "kda_decode_backend": None,
    # Speculative decoding: the same answers, drawn in another way.
    "speculative_config": None,
    "spec_method": None,
    "spec_model": None,
    "spec_tokens": None,
    # Logs, traces and metrics.
    "enable_trace_replay": False,
    "disable_log_stats": False,
    "aggregate_engine_logging": False,
    "show_hidden_metrics_for_version": None,
    "otlp_traces_endpoint": None,
    "collect_detailed_traces": None,
    "per_request_spec_decode_metrics": "none",
    "custom_histogram_buckets": None,
    "enable_layerwise_nvtx_tracing": False,
    "enable_mfu_metrics": False,
    "enable_logging_iteration_details": False,
    "enable_mm_processor_stats": False,
    "profiler_config": {},
    "logging_config": None,
    "log_level": None,
    "log_config_file": None,
    # Text, and the backend of grammars.
    "max_logprobs": 20,
    "renderer_num_workers": 1,
    "reasoning_parser_plugin": None,
    "tokens_only": False,
    # Parts of models that are not run here: images, adapters, state spaces.
    "language_model_only": False,
    "limit_mm_per_prompt": {},
    "enable_mm_embeds": False,
    "interleave_mm_strings": False,
    "media_io_kwargs": {},
    "mm_processor_kwargs": None,
    "mm_processor_cache_gb": 4,
    "mm_processor_cache_type": "lru",
    "mm_hasher_algorithm": "blake3",
    "mm_shm_cache_max_object_size_mb": 128,
    "mm_encoder_only": False,
    "mm_encoder_tp_mode": "weights",
    "mm_encoder_attn_backend": None,
    "mm_encoder_attn_dtype": None,
    "mm_encoder_fp8_scale_path": None,
    "mm_encoder_fp8_scale_save_path": None,
    "mm_encoder_fp8_scale_save_margin": 1.5,
    "skip_mm_profiling": False,
    "video_pruning_rate": None,
    "video_pruning_method": "evs",
    "mm_tensor_ipc": "direct_rpc",
    "mm_processor_device": "auto",
    "mm_ipc_gpu_memory_gb": 0,
    "mm_device_do_normalize": True,
    "default_mm_loras": None,
    "fully_sharded_loras": False,
    "max_cpu_loras": None,
    "lora_dtype": "auto",
    "lora_target_modules": None,
    "enable_tower_connector_lora": False,
    "specialize_active_lora": False,
    "enable_mixed_moe_lora_format": False,
    "enable_moe_shared_loras": False,
    "max_lora_cls_labels": None,
    "disable_chunked_mm_input": False,
    "mamba_config": {},
    "ec_manager_config": {},
    "mamba_cache_dtype": "auto",
    "mamba_ssm_cache_dtype": "auto",
    "mamba_block_size": None,
    "mamba_cache_mode": None,
    "enable_mamba_shared_prefix_checkpoint": False,
    "replayssm_buffer_len": 16,
    "use_replayssm": False,
    "mamba_backend": "triton",
    "mamba_ssu_algorithm": None,
    "enable_mamba_cache_stochastic_rounding": False,
    "mamba_cache_philox_rounds": 0,
    # What is returned, and what answers are.
    "enable_return_routed_experts": False,
    "return_sampling_mask": False,
    "aux_output_config": {},
    "watermark_config": None,
    "diffusion_config": None,
    "engram_config": None,
    # The model, and how it is changed.
    "tokenizer": None,
    "hf_config_path": None,
    "tokenizer_mode": "auto",
    "config_format": "auto",
    "data_parallel_size": 1,
    "disable_sliding_window": False,
    "revision": None,
    "hf_token": None,
    "tokenizer_revision": None,
    "quantization": None,
    "quantization_config": None,
    "allow_deprecated_quantization": False,
    "io_processor_plugin": None,
}


class _CommandLine:
    """What `EngineArgs` has for programs that take its arguments from their command line."""

    @classmethod
    def add_cli_args(cls, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Add an option for each argument, such as `--max-model-len`."""
        for name, default in ARGUMENTS.items():
            option = f"--{name.strip('_').replace('_', '-')}"
            if isinstance(default, bool):
                parser.add_argument(option, dest=name, action=argparse.BooleanOptionalAction, default=default)
            else:
                read = str if isinstance(default, str) else _read_option
                parser.add_argument(option, dest=name, type=read, default=default)
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> Any:
        """The arguments among a parser's results."""
        return cls(**{name: value for name, value in vars(args).items() if name in ARGUMENTS})


def _read_option(text: str) -> Any:
    """A number, list or dict as JSON, or else text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _field(default: Any) -> Any:
    is_kept_apart = isinstance(default, (dict, list))
    return dataclasses.field(default_factory=lambda: copy.copy(default)) if is_kept_apart else default


# Read by type checkers as anything: its fields are the table's.
EngineArgs: Any = named_fields({})(
    dataclasses.make_dataclass(
        "EngineArgs",
        [(name, Any, _field(default)) for name, default in ARGUMENTS.items()],
        bases=(_CommandLine,),
    )
)
EngineArgs.__module__ = __name__
EngineArgs.__doc__ = """vLLM's engine arguments, for `LLM.from_engine_args`, where they are checked."""
