"""vLLM's settings, sorted by what they mean here.

Owns the lists: what would change answers, or what is returned, and is therefore refused unless it has a value that
asks for nothing. What else vLLM knows (`vllm_arguments.py`) cannot change an answer and is left out, with a warning
unless it is vLLM's default. Other names are the engine's own, or a mistake, which `EngineConfig` names.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from raydata_llm.engine.engine_config import FIELD_NAMES, JSON_STYLES
from raydata_llm.engine.known_names import nearest
from raydata_llm.engine.sampling_params import SAMPLING_REMEDIES
from raydata_llm.model_source import with_revision
from raydata_llm.redaction import masked_logger, shown
from raydata_llm.vllm_arguments import ARGUMENTS

logger = masked_logger(__name__)

# What would change answers or what is returned, with the values that ask for nothing beside vLLM's default; names of
# former versions among them.
_OFF: dict[str, tuple[Any, ...]] = {
    "allow_deprecated_quantization": (),
    "aux_output_config": (),
    "config_format": ("auto", "hf"),
    "data_parallel_size": (),
    "default_mm_loras": (),
    "device_ids": (),
    "diffusion_config": (),
    "disable_sliding_window": (),
    "enable_prompt_adapter": (False,),
    "enable_return_routed_experts": (),
    "enable_trace_replay": (),
    "engram_config": (),
    "hf_config_path": (),
    "hf_token": (False, True),
    "io_processor_plugin": (),
    "lora_modules": ([],),
    "lora_target_modules": (),
    "mm_encoder_only": (),
    "model_class_overrides": (),
    "model_weights": (),
    "qlora_adapter_name_or_path": (),
    "quantization": (),
    "quantization_config": ({},),
    "quantization_param_path": (),
    "return_sampling_mask": (),
    "revision": ("main",),
    "rope_scaling": ({},),
    "rope_theta": (),
    "task": ("auto", "generate"),
    "task_type": ("generate",),
    "tokenizer": (),
    "tokenizer_mode": ("auto", "hf", "slow"),
    "tokenizer_revision": ("main",),
    "watermark_config": (),
}
_REMEDY = {
    "data_parallel_size": "set concurrency to as many replicas",
    "device_ids": "choose GPUs by CUDA_VISIBLE_DEVICES",
    "enable_return_routed_experts": "the engine runs dense models",
    "enable_trace_replay": "give the tokens as the prompt's end, and set prompt_logprobs=0",
    "hf_token": "set the environment variable HF_TOKEN, for workers in runtime_env",
    "lora_target_modules": "leave the other modules out of the adapter's own files",
    "model_weights": "give their folder as the model",
    "return_sampling_mask": "set logprobs and logprobs_mode='processed_logprobs' to see what was left to draw from",
    "revision": "download that revision and give its folder as the model",
    "rope_scaling": "set hf_overrides={'rope_parameters': ...}",
    "rope_theta": "set hf_overrides={'rope_parameters': ...}",
    "task": "set the processor's task_type",
    "task_type": "set the processor's task_type",
    "tokenizer": "set tokenize_stage={'model_source': ...}",
    "tokenizer_revision": "set tokenize_stage={'model_source': 'org/name@revision'}, of LLM tokenizer=",
    "watermark_config": "write it as one of the engine's logits_processors",
}
# Of former versions; these too say only how vLLM runs.
_FORMER = """
    api_process_count calculate_kv_scales cuda_graph_sizes disable_async_output_proc disable_log_requests
    disable_logprobs_during_spec_decoding disable_mm_preprocessor_cache enable_log_requests enable_lora_bias
    eplb_log_balancedness eplb_step_interval eplb_window_size guided_decoding_backend
    guided_decoding_disable_fallback intial_incremental_detokenization_offset logits_processor_pattern
    long_lora_scaling_factors lora_extra_vocab_size max_long_partial_prefills max_num_partial_prefills
    max_prompt_adapter_token max_prompt_adapters max_seq_len_to_capture multi_step_stream_outputs
    ngram_prompt_lookup_max ngram_prompt_lookup_min num_lookahead_slots num_redundant_experts num_scheduler_steps
    num_speculative_tokens observability_config override_attention_dtype override_neuron_config placement_group
    preemption_mode scheduler_delay_factor spec_decoding_acceptance_method speculative_disable_by_batch_size
    speculative_disable_mqa_scorer speculative_draft_tensor_parallel_size speculative_max_model_len
    speculative_model speculative_model_quantization swap_space tokenizer_pool_extra_config tokenizer_pool_size
    tokenizer_pool_type typical_acceptance_sampler_posterior_alpha typical_acceptance_sampler_posterior_threshold
    use_v2_block_manager worker_use_ray
"""
# How vLLM runs, watches or places itself: the same answers with or without.
_LEFT_OUT = (ARGUMENTS.keys() | set(_FORMER.split())) - _OFF.keys() - (FIELD_NAMES - {"model"})

_NO_ARGUMENTS = {
    "lora_request": "pooling models take no adapters (merge one into its model)",
    "mm_processor_kwargs": "models of text are run",
    "multi_modal_data": "models of text are run",
    "multimodal_data": "models of text are run",
}

# Loaders of the same weights: this engine reads them its own way.
_LOADERS = {"hf", "runai_streamer", "runai_streamer_sharded", "fastsafetensors", "instanttensor"}

# What `LLM` takes beside the engine's settings.
_LLM_ARGUMENTS = {
    *("chat_template", "data_parallel_size", "on_error", "profiler_config", "revision"),
    *("tokenizer", "tokenizer_revision"),
}

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
        given, source = dict(given), fields.get("model_source")
        if isinstance(source, str):
            fields["model_source"] = with_revision(source, given.pop("revision", None))
            if given.get("tokenizer") == source:
                del given["tokenizer"]
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
    """Without vLLM's defaults, of which None is one, and without what the model's files say themselves."""
    kept = {name: value for name, value in given.items() if value is not None and not _is_default(name, value)}
    if kept.get("quantization") == "gguf":
        del kept["quantization"]
    if "override_pooler_config" in kept:
        kept.setdefault("pooler_config", kept.pop("override_pooler_config"))
    return kept


def _is_default(name: str, value: Any) -> bool:
    """Whether it is vLLM's default, and not a setting of the engine, which has defaults of its own."""
    if name not in ARGUMENTS or name in FIELD_NAMES:
        return name in FIELD_NAMES and is_empty(value)
    default = ARGUMENTS[name]
    return bool(type(value) is type(default) and value == default) or (default in ({}, ()) and is_empty(value))


def is_empty(value: Any) -> bool:
    """Whether it is an empty collection, or one of vLLM's objects of settings as it is made without any."""
    if isinstance(value, (str, bytes, type)) or callable(value):
        return False
    if isinstance(value, Collection):
        return not value
    try:
        make: Any = type(value)
        return bool(is_dataclass(value) and value == make())
    except Exception:  # others' classes, which may need arguments
        return False


def _take_forms(kept: dict[str, Any]) -> list[str]:
    """Take what vLLM's settings, and their older names, say of thinking and of JSON; gives the names of the rest."""
    given = kept.pop("structured_outputs_config", {})
    if is_dataclass(given) and not isinstance(given, type):
        given = asdict(given)
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
            if value is not None and not any(value is none or value == none for none in off[name]):
                raise ValueError(
                    f"{name}={shown(name, value)} is not supported yet: {_REMEDY.get(name, 'leave it out')}"
                )
        elif name in left_out:
            ignored.append(name)
        else:
            kept[name] = value
    return kept, sorted(ignored)
