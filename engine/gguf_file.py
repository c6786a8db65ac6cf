"""A GGUF file as if it were a Hugging Face checkpoint: config, parameter names and float32 weights.

Owns the translation of llama.cpp's metadata and tensor names, and undoing its order of Q and K rows. Knows no torch and
not the binary format (gguf_header.py); the gguf package, which undoes the quantisations, is imported when needed.
Invariant: names and values leave this file in Hugging Face's terms only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from raydata_llm.engine.config_fields import REMEDY, bad_field
from raydata_llm.engine.gguf_header import GgufTensor, read_gguf_header
from raydata_llm.engine.regular_file import shown
from raydata_llm.engine.safetensors_file import TensorEntry

FloatArray = npt.NDArray[np.float32]

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_ROPE_FREQS = "rope_freqs.weight"
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "expert_count": "num_experts",
}
_ROPE_SCALING = {
    "type": "rope_type",
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
_ROPE_TYPES = {"none": "default"}
_PLAIN_DTYPES = {"F32": "float32", "F16": "float16"}
_UNREADABLE = ("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K")


@dataclass(frozen=True)
class GgufFile:
    """An open GGUF file; `tensors` by Hugging Face name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Read the header.

        Raises:
            ValueError: when the file is damaged, or its architecture is not run.
        """
        header = read_gguf_header(path)
        architecture = header.metadata.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in _ARCHITECTURES:
            known = ", ".join(_ARCHITECTURES)
            raise ValueError(
                f"general.architecture={shown(architecture)} of model={str(path)!r} is not supported: "
                f"choose one of {known}"
            )
        count = header.metadata.get("split.count", 0)
        if count not in (0, 1):
            count = shown(count)
            raise ValueError(
                f"split.count={count} of model={str(path)!r} is not supported: join the files with "
                "llama.cpp's `llama-gguf-split --merge`"
            )
        tensors = {_hf_name(name): tensor for name, tensor in header.tensors.items()}
        return cls(path=path, metadata=header.metadata, tensors=tensors)

    def hf_config(self) -> dict[str, Any]:
        """The config.json that this file's metadata amount to."""
        config = {name: self._field(key) for key, name in _SIZES.items() if self._field(key) is not None}
        sliding = "sliding_window" in config and self._architecture == "llama"
        return {
            **config,
            # llama.cpp files Mistral under llama; a window tells them apart.
            "model_type": "mistral" if sliding else self._architecture,
            "architectures": ["MistralForCausalLM" if sliding else _ARCHITECTURES[self._architecture]],
            "vocab_size": self._num_rows("model.embed_tokens.weight"),
            "head_dim": config.get("head_dim") or self._field("rope.dimension_count"),
            "partial_rotary_factor": self._rotary_share(),
            "rope_parameters": self._rope_parameters(),
            "tie_word_embeddings": "lm_head.weight" not in self.tensors,
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in self.tensors,
            "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in self.tensors,
            "use_sliding_window": False,
            "dtype": self._dtype(),
            "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._eos_token_ids(),
        }

    def entries(self) -> dict[str, TensorEntry]:
        """What the file holds, to be checked against a config; types that can be undone count as F32."""
        return {
            name: TensorEntry(dtype=tensor.type_name if tensor.type_name in _UNREADABLE else "F32", shape=tensor.shape)
            for name, tensor in self.tensors.items()
            if name != _ROPE_FREQS
        }

    def read(self, name: str, rows: slice | None = None) -> FloatArray:
        """One parameter, dequantised, its rows in Hugging Face's order; the array is the caller's own.

        Args:
            rows: Only these are read; of queries and keys they must be whole heads.
        """
        tensor = self.tensors[name]
        num_rows = tensor.shape[0]
        start, stop, _ = (rows or slice(None)).indices(num_rows)
        # A row is a whole number of blocks.
        row_bytes = (tensor.end - tensor.start) // num_rows
        raw = np.memmap(
            self.path,
            dtype=np.uint8,
            mode="r",
            offset=tensor.start + start * row_bytes,
            shape=((stop - start) * row_bytes,),
        )
        values = _dequantize(raw, tensor.type_name).reshape(stop - start, *tensor.shape[1:])
        if self._architecture == "llama" and ".self_attn.q_proj." in name:
            num_heads = self._field("attention.head_count")
        elif self._architecture == "llama" and ".self_attn.k_proj." in name:
            num_heads = self._field("attention.head_count_kv") or self._field("attention.head_count")
        else:
            return values
        return _restore_rows(values, num_heads * (stop - start) // num_rows)

    @property
    def _architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    def _field(self, key: str) -> Any:
        return self.metadata.get(f"{self._architecture}.{key}")

    def _num_rows(self, name: str) -> int | None:
        return self.tensors[name].shape[0] if name in self.tensors else None

    def _rotary_share(self) -> float:
        """The part of a head that RoPE turns; the config refuses any but 1."""
        head_dim, rotary = self._field("attention.key_length"), self._field("rope.dimension_count")
        if not (head_dim and rotary):
            return 1.0
        if not (isinstance(head_dim, int) and isinstance(rotary, int)):
            raise bad_field("rope.dimension_count", rotary, f"it must be a whole number; {REMEDY}")
        return rotary / head_dim

    def _rope_parameters(self) -> dict[str, Any]:
        scaling = {name: self._field(f"rope.scaling.{key}") for key, name in _ROPE_SCALING.items()}
        parameters = {name: value for name, value in scaling.items() if value is not None}
        if "rope_type" in parameters:
            named = str(parameters["rope_type"])
            parameters["rope_type"] = _ROPE_TYPES.get(named, named)
        parameters["rope_theta"] = self._field("rope.freq_base") or 10000.0
        if _ROPE_FREQS in self.tensors:
            parameters["freq_factors"] = self.read(_ROPE_FREQS).tolist()
        return parameters

    def _dtype(self) -> str:
        """The dtype of the weight matrices; bfloat16, which has float32's range, for quantised ones."""
        tensor = self.tensors.get("model.layers.0.mlp.down_proj.weight")
        return _PLAIN_DTYPES.get(tensor.type_name, "bfloat16") if tensor else "bfloat16"

    def _eos_token_ids(self) -> list[int]:
        ids = (self.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
        return [token_id for token_id in ids if token_id is not None]


def _hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; an unknown name stays as it is."""
    stem, _, suffix = name.rpartition(".")
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.{suffix}"
    block, _, rest = stem.partition(".")
    layer, _, module = rest.partition(".")
    if block == "blk" and module in _LAYER_NAMES:
        return f"model.layers.{layer}.{_LAYER_NAMES[module]}.{suffix}"
    return name


def _dequantize(raw: npt.NDArray[np.uint8], type_name: str) -> FloatArray:
    import gguf

    quantization = gguf.GGMLQuantizationType[type_name]
    block_size, type_size = gguf.GGML_QUANT_SIZES[quantization]
    num_blocks = raw.size // type_size
    # The package works on 16 rows at a time, and blocks know nothing of rows: rows of about 4096 elements instead of
    # the tensor's own 576 took SmolLM2-135M from 3.3 s to 0.8 s.
    row_bytes = math.gcd(num_blocks, max(1, 4096 // block_size)) * type_size
    values: FloatArray = gguf.dequantize(raw.reshape(-1, row_bytes), quantization)
    return values if values.flags.writeable else values.copy()


def _restore_rows(values: FloatArray, num_heads: int) -> FloatArray:
    """Undo llama.cpp's order of rows: within a head it interleaves the two halves that RoPE pairs.

    llama.cpp (conversion of llama models): h0 d0, h0 d(dim/2), h0 d1, h0 d(dim/2 + 1), ...
    """
    pairs = values.reshape(num_heads, -1, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
