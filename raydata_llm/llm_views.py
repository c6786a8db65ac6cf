"""What scripts for vLLM read of an `LLM` beside its methods: `llm.model_config`, and `llm.llm_engine`.

Owns these two views. They hold nothing of their own: what they tell is the engine's, and what they do is the LLM's.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from raydata_llm.engine.model_files import ModelFiles

if TYPE_CHECKING:
    from raydata_llm.engine.engine_config import EngineConfig
    from raydata_llm.llm import LLM


class ModelConfigView:
    """The model and its limits, under the names of vLLM's `ModelConfig`.

    Args:
        config: The engine's settings.
        named: The model as it was given.
        max_model_len: Of the engine.
        runner_type: "generate" or "pooling".
    """

    def __init__(self, config: EngineConfig, named: str, max_model_len: int, runner_type: str) -> None:
        self._config = config
        self.model, self.served_model_name, self.tokenizer = named, named, named
        self.max_model_len, self.runner_type = max_model_len, runner_type
        self.seed, self.trust_remote_code = config.seed, config.trust_remote_code
        self.skip_tokenizer_init, self.enforce_eager = config.skip_tokenizer_init, config.enforce_eager
        self.logprobs_mode, self.generation_config = config.logprobs_mode, config.generation_config
        self.is_multimodal_model = self.is_encoder_decoder = False
        self.quantization = self.revision = self.tokenizer_revision = None

    @functools.cached_property
    def _values(self) -> Mapping[str, Any]:
        config = self._config
        return ModelFiles.open(config.model, load_format="dummy", hf_overrides=config.hf_overrides).hf_config

    @functools.cached_property
    def hf_config(self) -> Any:
        """The model's config as transformers has it."""
        from transformers import AutoConfig

        values = dict(self._values)
        return AutoConfig.for_model(values.pop("model_type"), **values)

    @property
    def hf_text_config(self) -> Any:
        """The same: the models that are run are models of text."""
        return self.hf_config

    @functools.cached_property
    def dtype(self) -> Any:
        """The torch dtype of weights and activations."""
        from raydata_llm.engine.device import choose_device, choose_dtype
        from raydata_llm.engine.pooling_model import PoolingModel

        config = self._config
        files = ModelFiles.open(config.model, load_format=config.load_format, hf_overrides=config.hf_overrides)
        is_pooling = self.runner_type == "pooling"
        model: Any = PoolingModel.open(files, config).backbone if is_pooling else files.model_config()
        return choose_dtype(config, model, choose_device(config))

    @property
    def architectures(self) -> list[str]:
        """As the config names them."""
        return list(self._values.get("architectures") or ())

    @property
    def architecture(self) -> str:
        """The first of them."""
        return next(iter(self.architectures), "")

    @property
    def embedding_size(self) -> int:
        """Values of an embedding, before `dimensions`."""
        return self.get_hidden_size()

    def get_vocab_size(self) -> int:
        """Tokens that the model has."""
        return int(self._values["vocab_size"])

    def get_hidden_size(self) -> int:
        """Values of a hidden state."""
        return int(self.hf_config.hidden_size)

    def get_head_size(self) -> int:
        """Values of an attention head."""
        head_dim = getattr(self.hf_config, "head_dim", None)
        return int(head_dim or self.hf_config.hidden_size // self.hf_config.num_attention_heads)

    def get_total_num_kv_heads(self) -> int:
        """KV heads of a layer, over all ranks."""
        heads = self.hf_config.num_attention_heads
        return int(getattr(self.hf_config, "num_key_value_heads", None) or heads)

    def get_total_num_hidden_layers(self) -> int:
        """Layers, over all ranks."""
        return int(self.hf_config.num_hidden_layers)

    def __repr__(self) -> str:
        return f"ModelConfigView(model={self.model!r}, max_model_len={self.max_model_len})"


# Of vLLM's engine, what is a method of `LLM` here.
_METHODS = {
    *("get_tokenizer", "get_metrics", "collective_rpc", "apply_model", "start_profile", "stop_profile"),
    *("reset_prefix_cache", "sleep", "wake_up"),
}


class EngineView:
    """What vLLM's scripts reach by `llm.llm_engine`."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    @property
    def model_config(self) -> ModelConfigView:
        """As the LLM's."""
        return self._llm.model_config

    @property
    def tokenizer(self) -> Any:
        """The tokenizer; None if it was left out."""
        return self._llm._tokenizer

    @property
    def vllm_config(self) -> Any:
        """The settings by vLLM's groups, as far as there are such here."""
        config = self._llm._config
        parallel = SimpleNamespace(
            tensor_parallel_size=config.tensor_parallel_size,
            pipeline_parallel_size=config.pipeline_parallel_size,
            data_parallel_size=self._llm._data_parallel_size,
            world_size=config.num_ranks,
            world_size_across_dp=config.num_ranks * self._llm._data_parallel_size,
        )
        cache = SimpleNamespace(
            block_size=config.block_size,
            enable_prefix_caching=config.enable_prefix_caching,
            gpu_memory_utilization=config.gpu_memory_utilization,
        )
        scheduler = SimpleNamespace(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=self.model_config.max_model_len,
            enable_chunked_prefill=True,
        )
        return SimpleNamespace(
            model_config=self.model_config, parallel_config=parallel, cache_config=cache, scheduler_config=scheduler
        )

    def get_num_unfinished_requests(self) -> int:
        """Enqueued prompts whose results were not taken."""
        return self._llm.num_enqueued

    def has_unfinished_requests(self) -> bool:
        """Whether there are any."""
        return self.get_num_unfinished_requests() > 0

    def is_sleeping(self) -> bool:
        """As the LLM's."""
        return self._llm.is_sleeping

    def __getattr__(self, name: str) -> Any:
        if name in _METHODS:
            return getattr(self._llm, name)
        known = sorted({*_METHODS, *(one for one in dir(type(self)) if not one.startswith("_"))})
        raise AttributeError(f"llm_engine.{name} is not there: known are {', '.join(known)}")
