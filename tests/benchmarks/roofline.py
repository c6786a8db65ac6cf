"""The least time a GPU needs for a workload: its products and attention's, then the KV it must read, without a pause.

Owns the count of work (as ../shared/bench/roofline.py) and the ceilings it is divided by. Left out are activations,
small kernels and weights read for small batches: a real engine pays 5 to 15 % on top.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.benchmarks.workloads import SHAPES, Work

# What large bf16 products reach on Hopper; H100 and H200 are the same chip.
_PRODUCTS = 700e12
# Copy bandwidth as measured (bytes read and written).
_COPY = {"NVIDIA H100 80GB HBM3": 3.03e12, "NVIDIA H200": 4.256e12}
# Tokens of the prefixes that prompts share.
_PREFIX = 2048


@dataclass(frozen=True)
class _Model:
    """Per token: parameters of the layers and of the head, KV bytes, and attention FLOPs for one key."""

    body: int
    head: int
    kv_bytes: int
    attention: int

    @classmethod
    def of(cls, name: str) -> _Model:
        shape = SHAPES[name]
        hidden, layers, heads = shape["hidden_size"], shape["num_hidden_layers"], shape["num_attention_heads"]
        head_dim, kv_heads = shape["head_dim"], shape["num_key_value_heads"]
        projections = hidden * head_dim * (heads + 2 * kv_heads) + heads * head_dim * hidden
        return cls(
            body=layers * (projections + 3 * hidden * shape["intermediate_size"]),
            head=hidden * shape["vocab_size"],
            kv_bytes=layers * 2 * kv_heads * head_dim * 2,
            attention=layers * 4 * heads * head_dim,
        )


def bound_s(model: str, work: Work, gpu: str, num_shared: int = 0) -> float | None:
    """Seconds; None for a GPU whose ceilings were not measured.

    Args:
        num_shared: Prefixes of 2048 tokens, one of which each prompt begins with: computed and read once.
    """
    if gpu not in _COPY:
        return None
    shared = _PREFIX if num_shared else 0
    size = _Model.of(model)
    prompts, outputs = [len(prompt) for prompt, _ in work], [max_tokens for _, max_tokens in work]
    num_computed = num_shared * shared + sum(prompts) - shared * len(work)
    products = 2 * size.body * (num_computed + sum(outputs)) + 2 * size.head * sum(outputs)
    own = [prompt - shared for prompt in prompts]
    scores = num_shared * shared**2 / 2 + sum(prompt**2 / 2 for prompt in own)
    scores += sum(shared * (prompt + output) for prompt, output in zip(own, outputs, strict=True)) if shared else 0
    keys_read = sum(prompt * output + output**2 / 2 for prompt, output in zip(own, outputs, strict=True))
    return (products + size.attention * scores) / _PRODUCTS + size.kv_bytes * keys_read / _COPY[gpu]
