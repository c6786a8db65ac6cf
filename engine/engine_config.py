"""The engine's settings: frozen, keyword-only, with defaults that run.

Owns names, types and ranges; what only the device can tell (KV room, dtype support) is settled by the engine.
Knows no tensors (importing it must not import torch), so a driver can check a job's settings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from raydata_llm.engine.known_names import nearest
from raydata_llm.engine.pooler_config import PoolerConfig
from raydata_llm.engine.regular_file import shown
from raydata_llm.engine.sampling_params import SAMPLING_REMEDIES, SamplingParams

# How JSON is written, of `StructuredOutputsParams`.
JSON_STYLES = ("disable_any_whitespace", "disable_additional_properties")
NO_CPU_INVARIANCE = (
    "batch_invariant=True needs a GPU: on a CPU the order of a product's sums is the BLAS library's choice, by the "
    "number of rows; leave batch_invariant at False, or run on a GPU with device='cuda'"
)
NO_POOLING_INVARIANCE = (
    "batch_invariant=True is not supported for pooling models, whose attention chooses its tiles by the batch: leave "
    "batch_invariant at False"
)
NO_POOLED_EMBEDS = "enable_prompt_embeds=True is not supported for pooling models, which take tokens: leave it at False"
DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
_DTYPE_ALIASES = {"float": "float32", "half": "float16", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of one engine; names as vLLM's where it has the setting.

    Args:
        model: A local folder in Hugging Face's layout, or a GGUF file.
        dtype: Of weights and activations; "auto" takes the checkpoint's, as far as the device is fast at it.
        device: "auto" takes the GPU if there is one; "cpu", "cuda" or "cuda:1".
        max_model_len: Prompt plus output tokens of a row at most, as a number or as "8k" (8000) or "8K" (8192); None
            takes the model's own limit; -1 or "auto" that too, or what there is KV memory for, if that is less.
        max_num_seqs: Sequences run at once at most; None: 64 on a CPU, 1024 on a GPU.
        max_num_batched_tokens: Tokens of one step at most; None: 1024 on a CPU, 16384 on a GPU.
        block_size: Tokens of one KV block; None: 16 on a CPU, 64 on a GPU.
        gpu_memory_utilization: Share of the GPU's memory for weights, activations and KV together.
        kv_cache_memory_bytes: KV memory, instead of what the device has left.
        num_gpu_blocks_override: KV blocks, instead of what the device has left.
        enable_prefix_caching: Reuse the KV of equal prompt prefixes.
        enable_chunked_prefill: Let a prompt be computed over several steps.
        seed: Of the noise of rows without a seed, and of dummy weights.
        load_format: "auto", "safetensors", "pt" (torch's weights-only loader), "gguf" or "dummy" (seeded normal).
        trust_remote_code: Run code that comes with the tokenizer or config.
        skip_tokenizer_init: Token ids in, token ids out: whoever holds the engine loads no tokenizer for it.
        enforce_eager: No CUDA graphs.
        disable_cascade_attn: Let each row read a prefix that it shares with others for itself.
        steps_ahead: Steps launched before the oldest one's tokens are read; None: 0 on a CPU, 1 on a GPU.
        num_threads: CPU threads of the engine; None leaves torch's setting.
        generation_config: "auto" takes the model's generation_config as the default sampling parameters;
            "vllm" leaves the neutral defaults.
        override_generation_config: Values that replace those of the generation_config, such as {"temperature": 0.5}.
        batch_invariant: Make a row's tokens the same on one kind of GPU, bit for bit, whatever the batch it runs in, at
            any temperature; slower, as `engine/README.md` says.
        disable_custom_all_reduce: Sum small tensors over GPUs by NCCL too, not through memory that they all map.
        hf_overrides: Values that replace those of the model's config.json, or a function that changes the config it
            is given (`hf_overrides.py`) and returns it.
        enable_lora: Take requests with an adapter.
        max_loras: Adapters on the device, so in one step, at most.
        max_lora_rank: The largest rank of an adapter.
        runner: "generate", "pooling" (embeddings, classes, scores), or "auto": what the model's files are made for.
        convert: "embed" leaves a classifier's head out, "classify" asks for one; "auto" takes what the config names.
        pooler_config: How a pooling model pools, such as {"pooling_type": "MEAN"}; None: as its files say.
        logprobs_mode: Of outputs: "raw_logprobs" are the model's own, "processed_logprobs" those that tokens are drawn
            by, after penalties, bans, temperature and cuts.
        reasoning_config: `reasoning_start_str` and `reasoning_end_str`, between which a model thinks, for
            `thinking_token_budget` and `reasoning_parser`; what is left out is "<think>" and "</think>".
        reasoning_parser: That of a model that thinks, such as "qwen3": outputs follow their `structured_outputs` from
            the end of their thinking on. "" has them follow it from the start, as beams always do.
        structured_outputs_config: `disable_any_whitespace`, `disable_additional_properties`, for all rows.
        enable_prompt_embeds: Take prompts as embeddings, [tokens, hidden_size], instead of token ids.
        logits_processors: Classes, or "module:Class", as `logits_processor.py` describes.
        tensor_parallel_size: GPUs that split each layer.
        pipeline_parallel_size: GPUs that split the stack of layers.

    Raises:
        ValueError: naming the field, its value and the remedy.
    """

    model: str
    dtype: str = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int | None = None
    gpu_memory_utilization: float = 0.92
    kv_cache_memory_bytes: int | None = None
    num_gpu_blocks_override: int | None = None
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    seed: int = 0
    load_format: str = "auto"
    trust_remote_code: bool = False
    skip_tokenizer_init: bool = False
    enforce_eager: bool = False
    disable_cascade_attn: bool = False
    steps_ahead: int | None = None
    num_threads: int | None = None
    generation_config: str = "auto"
    override_generation_config: Mapping[str, Any] = field(default_factory=dict)
    hf_overrides: Mapping[str, Any] | Callable[[Any], Any] = field(default_factory=dict)
    enable_lora: bool = False
    max_loras: int = 1
    max_lora_rank: int = 16
    runner: str = "auto"
    convert: str = "auto"
    pooler_config: PoolerConfig | Mapping[str, Any] | None = None
    disable_custom_all_reduce: bool = False
    batch_invariant: bool = False
    enable_prompt_embeds: bool = False
    logprobs_mode: str = "raw_logprobs"
    reasoning_config: Mapping[str, str] = field(default_factory=dict)
    reasoning_parser: str = ""
    structured_outputs_config: Mapping[str, bool] = field(default_factory=dict)
    logits_processors: Sequence[str | type[Any]] = ()
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", _dtype_name(self.dtype))
        object.__setattr__(self, "max_model_len", _model_len(self.max_model_len))
        for name, most in _POSITIVE_INTEGERS.items():
            _check_integer(name, getattr(self, name), low=1, high=most)
        _check_integer("seed", self.seed)
        _check_integer("steps_ahead", self.steps_ahead, low=0, high=_MOST_STEPS_AHEAD)
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} is not valid: give True or False")
        share = self.gpu_memory_utilization
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise ValueError(f"gpu_memory_utilization={shown(share)} is not valid: give a share in (0, 1]")
        _check_choice("load_format", self.load_format, ("auto", "safetensors", "pt", "gguf", "dummy"))
        _check_choice("generation_config", self.generation_config, ("auto", "vllm"))
        _check_choice("runner", self.runner, ("auto", "generate", "pooling"))
        _check_choice("logprobs_mode", self.logprobs_mode, ("raw_logprobs", "processed_logprobs"))
        _check_choice("convert", self.convert, ("auto", "none", "embed", "classify"))
        object.__setattr__(self, "pooler_config", PoolerConfig.from_mapping(self.pooler_config))
        _check_device(self.device)
        self._check_batch_invariant()
        if self.enable_prompt_embeds and self.runner == "pooling":
            raise ValueError(NO_POOLED_EMBEDS)
        _check_reasoning(self.reasoning_config)
        _check_forms(self.structured_outputs_config)
        if not isinstance(self.reasoning_parser, str):
            raise ValueError(f"reasoning_parser={self.reasoning_parser!r} is not valid: give a name such as 'qwen3'")
        if not isinstance(self.hf_overrides, Mapping) and not callable(self.hf_overrides):
            kind = type(self.hf_overrides).__name__
            raise ValueError(f"hf_overrides is a {kind}, which is not valid: give a dict, or a function of the config")
        _check_generation(self.override_generation_config)
        if isinstance(self.logits_processors, str) or not isinstance(self.logits_processors, Sequence):
            raise ValueError(f"logits_processors={self.logits_processors!r} is not valid: give a list of classes")
        if self.num_ranks > 1 and ":" in self.device:
            raise ValueError(
                f"device={self.device!r} names one GPU, and tensor_parallel_size={self.tensor_parallel_size} times "
                f"pipeline_parallel_size={self.pipeline_parallel_size} is {self.num_ranks}: give 'cuda', and choose "
                "GPUs by CUDA_VISIBLE_DEVICES"
            )
        if self.logits_processors and self.num_ranks > 1:
            asked = f"tensor_parallel_size={self.tensor_parallel_size} times pipeline_parallel_size="
            raise ValueError(
                f"logits_processors are run by engines of one GPU, and {asked}{self.pipeline_parallel_size} is "
                f"{self.num_ranks}: leave both at 1"
            )

    def _check_batch_invariant(self) -> None:
        if not self.batch_invariant:
            return
        if self.device == "cpu":
            raise ValueError(NO_CPU_INVARIANCE)
        if self.runner == "pooling":
            raise ValueError(NO_POOLING_INVARIANCE)
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            if getattr(self, name) > 1:
                raise ValueError(
                    f"batch_invariant=True is not supported with {name}={getattr(self, name)}: sums over GPUs are "
                    f"taken in an order that the batch's size decides; leave {name} at 1, and set concurrency (of LLM: "
                    "data_parallel_size) to as many replicas as there are GPUs"
                )

    @property
    def shares_prefixes(self) -> bool:
        """Whether rows read a prefix that they share together."""
        return self.enable_prefix_caching and not self.disable_cascade_attn and not self.batch_invariant

    @property
    def fits_model_len(self) -> bool:
        """Whether a row may have as many tokens as the model takes and KV memory holds."""
        return self.max_model_len == -1

    @property
    def num_ranks(self) -> int:
        """Processes that one engine is spread over."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @classmethod
    def from_mapping(cls, model: str, engine_kwargs: Mapping[str, Any]) -> EngineConfig:
        """Build from a user's `engine_kwargs`.

        Raises:
            ValueError: for an unknown name, with the nearest known one.
        """
        for name in engine_kwargs:
            if name not in FIELD_NAMES or name == "model":
                asked = f"engine_kwargs[{name!r}]={engine_kwargs[name]!r}"
                hint = nearest(name, FIELD_NAMES - {"model"}, SAMPLING_REMEDIES)
                raise ValueError(f"{asked} is not a setting of the engine: {hint}")
        return cls(model=model, **engine_kwargs)


FIELD_NAMES = {f.name for f in fields(EngineConfig)}
# The largest values that are taken: far above what any device can use, and what is above is a slip of the finger.
_POSITIVE_INTEGERS = {
    "max_num_seqs": 2**20,
    "max_num_batched_tokens": 2**24,
    "block_size": 2**16,
    "kv_cache_memory_bytes": 2**50,
    "num_gpu_blocks_override": 2**31 - 1,
    "num_threads": 2**12,
    "max_loras": 2**12,
    "max_lora_rank": 2**16,
    "tensor_parallel_size": 2**12,
    "pipeline_parallel_size": 2**12,
}
_MOST_STEPS_AHEAD = 64
_MOST_MODEL_LEN = 2**31 - 1
_FLAGS = (
    "enable_prefix_caching",
    "enable_chunked_prefill",
    "trust_remote_code",
    "skip_tokenizer_init",
    "enable_lora",
    "enforce_eager",
    "disable_cascade_attn",
    "disable_custom_all_reduce",
    "batch_invariant",
    "enable_prompt_embeds",
)


def _dtype_name(dtype: object) -> str:
    name = str(dtype).removeprefix("torch.")
    name = _DTYPE_ALIASES.get(name, name)
    _check_choice("dtype", name, ("auto", "float32", "bfloat16", "float16"))
    return name


_MULTIPLES = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}


def _model_len(value: object) -> int | None:
    """A number of tokens, as vLLM's command line takes it too; -1 for as many as fit."""
    if value is None or value in (-1, "-1", "auto"):
        return None if value is None else -1
    read: Any = value
    if isinstance(value, str):
        written = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgKMG]?)", value.strip())
        read = None if written is None else float(written[1]) * _MULTIPLES.get(written[2], 1)
        read = int(read) if read is not None and read == int(read) else value
    if isinstance(read, bool) or not isinstance(read, int) or not 1 <= read <= _MOST_MODEL_LEN:
        raise ValueError(f"max_model_len={value!r} is not valid: give a number of tokens, such as 8192 or '8k', or -1")
    return read


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not valid: choose one of {', '.join(choices)}")


def _check_integer(name: str, value: Any, *, low: int | None = None, high: int | None = None) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}={shown(value)} is not valid: give a whole number")
    if low is not None and value < low:
        raise ValueError(f"{name}={shown(value)} is not valid: give {low} or more")
    if high is not None and value > high:
        raise ValueError(f"{name}={shown(value)} is not valid: give {high} or less")


def _check_reasoning(config: Any) -> None:
    known = {"reasoning_start_str", "reasoning_end_str", "reasoning_parser"}
    named = isinstance(config, Mapping) and set(config) <= known
    if not named or not all(isinstance(value, str) for value in config.values()):
        remedy = 'give {"reasoning_start_str": ..., "reasoning_end_str": ...}'
        raise ValueError(f"reasoning_config={config!r} is not valid: {remedy}")


def _check_forms(config: Any) -> None:
    named = isinstance(config, Mapping) and set(config) <= set(JSON_STYLES)
    if not named or not all(isinstance(value, bool) for value in config.values()):
        raise ValueError(f"structured_outputs_config={config!r} is not valid: give True or False for {JSON_STYLES}")


def _check_generation(config: Any) -> None:
    known = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens", "do_sample")
    if not isinstance(config, Mapping) or not set(config) <= set(known):
        remedy = f"give a dict of {', '.join(known)}"
        raise ValueError(f"override_generation_config={config!r} is not valid: {remedy}")
    named = {"max_tokens" if name == "max_new_tokens" else name: config[name] for name in config if name != "do_sample"}
    try:
        SamplingParams.from_mapping(named)
    except ValueError as error:
        raise ValueError(f"override_generation_config={config!r} is not valid: {error}") from error


def _check_device(device: object) -> None:
    kind, _, index = str(device).partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
        raise ValueError(f"device={device!r} is not valid: use 'auto', 'cpu', 'cuda' or 'cuda:N'")
