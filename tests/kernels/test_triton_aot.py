"""Every Triton kernel compiles for the GPUs we support, at the shapes of real models, on a machine without a GPU.

The launchers run on CPU tensors with the kernels' launch replaced by the compiler, so what is compiled is what would
be launched. Checked: shared memory within a program's limit, and few or no spilled registers.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from raydata_llm.kernels import tuning
from raydata_llm.kernels.paged_attention import SharedPrefixes

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter cannot compile", allow_module_level=True)

# Bytes of shared memory that a program may take.
SHARED_LIMIT = {(8, 0): 163 * 1024, (9, 0): 227 * 1024}
# Heads, KV heads, head_dim, hidden_size, intermediate_size.
MODELS = {
    "llama-3.2-1b": (32, 8, 64, 2048, 8192),
    "llama-3.1-8b": (32, 8, 128, 4096, 14336),
    "qwen3-0.6b": (16, 8, 128, 1024, 3072),
    "smollm-135m": (9, 3, 64, 576, 1536),
    "gemma-like": (8, 1, 256, 2048, 16384),
    "odd": (10, 2, 80, 800, 2160),
}


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of one launch."""

    name: str
    shared: int
    spilled_bytes: int
    ttgir: str


@dataclass
class Compiler:
    """Takes the place of `kernel[grid](...)`: compiles for `capability` what is launched."""

    capability: tuple[int, int]
    folder: Path
    launches: list[Compiled] = field(default_factory=list)

    def compile(self, kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        values = dict(zip(kernel.arg_names, arguments, strict=False))
        values |= {name: value for name, value in options.items() if name in kernel.arg_names}
        flags = {name: value for name, value in options.items() if name not in kernel.arg_names}
        signature = {p.name: "constexpr" if p.is_constexpr else _type_of(values[p.name]) for p in kernel.params}
        constants = {name: values[name] for name, kind in signature.items() if kind == "constexpr"}
        # As at run time: memory that torch allocates is aligned.
        aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
        source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
        major, minor = self.capability
        target = triton.backends.compiler.GPUTarget("cuda", 10 * major + minor, 32)
        binary = triton.compile(source, target=target, options=flags)
        spilled = _spilled_bytes(binary.asm["cubin"], self.folder)
        self.launches.append(Compiled(kernel.__name__, binary.metadata.shared, spilled, binary.asm["ttgir"]))

    def check(self) -> None:
        """Assert that what was launched would run, and run well."""
        assert self.launches
        for launch in self.launches:
            assert launch.shared <= SHARED_LIMIT[self.capability], launch.name
            assert launch.spilled_bytes <= 64, (launch.name, launch.spilled_bytes)


def _type_of(value: Any) -> str:
    names = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
    names |= {torch.int64: "*i64", torch.bool: "*i1", torch.int16: "*i16"}
    if value is None:
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return names[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _spilled_bytes(cubin: bytes, folder: Path) -> int:
    """The stack that a program takes: what did not fit in registers."""
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(int(count) for count in re.findall(r"STACK:(\d+)", report))


@pytest.fixture(params=tuning.BY_CAPABILITY, ids=lambda capability: "sm_{}{}".format(*capability))
def compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Compiler]:
    capability = request.param
    result = Compiler(capability, tmp_path)

    def launcher(kernel: Any, grid: Any) -> Any:
        return lambda *arguments, **options: result.compile(kernel, arguments, options)

    monkeypatch.setattr(triton.JITFunction, "__getitem__", launcher)
    monkeypatch.setattr(tuning, "tuning_of", lambda device: tuning.BY_CAPABILITY[capability])
    monkeypatch.setattr(tuning, "num_sms", lambda device: 132)
    yield result


Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def rows_of(model: str, block_size: int, dtype: torch.dtype = torch.bfloat16) -> Rows:
    """Queries, K cache, V cache, block table and lengths of two rows."""
    heads, kv_heads, head_dim, _, _ = MODELS[model]
    q = torch.zeros((2, heads, head_dim), dtype=dtype)
    cache = torch.zeros((2, kv_heads, block_size, head_dim), dtype=dtype)
    return q, cache, cache, torch.zeros((2, 64), dtype=torch.int32), torch.ones(2, dtype=torch.int32)


@pytest.mark.parametrize("model", MODELS)
def test_small_kernels(model: str, compiler: Compiler) -> None:
    from raydata_llm.kernels.decode_inputs_triton import launch_decode_inputs
    from raydata_llm.kernels.qkv_to_cache_triton import launch_qkv_to_cache
    from raydata_llm.kernels.rms_norm_triton import launch_add_rms_norm, launch_rms_norm
    from raydata_llm.kernels.swiglu_triton import launch_swiglu

    slots = torch.zeros(2, dtype=torch.int32)
    launch_decode_inputs(slots, torch.zeros(2, dtype=torch.int64), slots, rows_of(model, 64)[3], 64)
    heads, kv_heads, head_dim, hidden, intermediate = MODELS[model]
    x, weight = torch.zeros((2, hidden), dtype=torch.bfloat16), torch.zeros(hidden, dtype=torch.bfloat16)
    launch_rms_norm(x, weight, 1e-5)
    launch_add_rms_norm(x, x, weight, 1e-5)
    launch_swiglu(torch.zeros((2, 2 * intermediate), dtype=torch.bfloat16))
    qkv = torch.zeros((2, (heads + 2 * kv_heads) * head_dim), dtype=torch.bfloat16)
    cache = rows_of(model, 64)[1]
    token, norm = torch.zeros(2, dtype=torch.int64), torch.zeros(head_dim, dtype=torch.bfloat16)
    launch_qkv_to_cache(qkv, token, token, torch.zeros((8, head_dim)), cache, cache)
    launch_qkv_to_cache(qkv, token, token, torch.zeros((8, head_dim)), cache, cache, norm, norm, 1e-6)
    compiler.check()


@pytest.mark.parametrize("model", MODELS)
def test_decode_attention(model: str, compiler: Compiler) -> None:
    from raydata_llm.kernels.paged_decode_triton import launch_paged_decode_attention

    launch_paged_decode_attention(*rows_of(model, 64), 0.1, num_splits=1)
    launch_paged_decode_attention(*rows_of(model, 16), 0.1, window=4096, num_splits=4)
    number = torch.zeros(2, dtype=torch.int32)
    shared = SharedPrefixes(starts=torch.zeros(3, dtype=torch.int32), lens=number, table_rows=number, row_lens=number)
    launch_paged_decode_attention(*rows_of(model, 64), 0.1, table_rows=number, shared=shared, num_splits=1)
    compiler.check()
    # Keys and values come by asynchronous copies, several iterations ahead.
    assert compiler.launches[0].ttgir.count("async_copy_global_to_local") >= 4


def test_decode_attention_in_float32(compiler: Compiler) -> None:
    from raydata_llm.kernels.paged_decode_triton import launch_paged_decode_attention

    for model in ("llama-3.1-8b", "gemma-like"):
        launch_paged_decode_attention(*rows_of(model, 64, torch.float32), 0.1, num_splits=1)
    compiler.check()


@pytest.mark.parametrize("model", MODELS)
def test_prefill_attention(model: str, compiler: Compiler) -> None:
    from raydata_llm.kernels.paged_prefill_triton import launch_paged_prefill_attention

    q, k_cache, v_cache, table, lens = rows_of(model, 64)
    starts = torch.tensor([0, 1, 2], dtype=torch.int32)
    launch_paged_prefill_attention(q, k_cache, v_cache, table, lens, starts, 0.1)
    launch_paged_prefill_attention(q, k_cache, v_cache, table, lens, starts, 0.1, longest=512)
    launch_paged_prefill_attention(q, k_cache, v_cache, table, lens, starts, 0.1, window=4096)
    compiler.check()
    if compiler.capability[0] == 9:
        assert "warp_group_dot" in compiler.launches[0].ttgir


def test_prefill_attention_in_float32(compiler: Compiler) -> None:
    from raydata_llm.kernels.paged_prefill_triton import launch_paged_prefill_attention

    for model in ("llama-3.1-8b", "gemma-like"):
        q, k_cache, v_cache, table, lens = rows_of(model, 64, torch.float32)
        launch_paged_prefill_attention(q, k_cache, v_cache, table, lens, torch.tensor([0, 1, 2]).int(), 0.1)
    compiler.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", ["llama-3.2-1b", "llama-3.1-8b", "gemma-like"])
def test_batch_invariant_kernels(model: str, dtype: torch.dtype, compiler: Compiler) -> None:
    from raydata_llm.kernels.invariant_attention_triton import launch_invariant_attention
    from raydata_llm.kernels.invariant_linear_triton import launch_invariant_linear

    hidden, intermediate = MODELS[model][3:]
    x, bias = torch.zeros((2, hidden), dtype=dtype), torch.zeros(hidden, dtype=dtype)
    launch_invariant_linear(x, torch.zeros((2 * intermediate, hidden), dtype=dtype))
    launch_invariant_linear(x, torch.zeros((hidden, hidden), dtype=dtype), bias)
    q, k_cache, v_cache, table, lens = rows_of(model, 64, dtype)
    launch_invariant_attention(q, k_cache, v_cache, table, lens, None, 0.1, table_rows=lens)
    launch_invariant_attention(q, k_cache, v_cache, table, lens, None, 0.1, 4096, table_rows=lens)
    compiler.check()
    if compiler.capability[0] == 9 and dtype == torch.bfloat16:
        # Tensor cores fed by asynchronous copies, several iterations ahead.
        assert all("warp_group_dot" in launch.ttgir for launch in compiler.launches[:2])
        assert all("async_copy_global_to_local" in launch.ttgir for launch in compiler.launches)


@pytest.mark.parametrize("rank", [8, 64])
@pytest.mark.parametrize("model", MODELS)
def test_lora(model: str, rank: int, compiler: Compiler) -> None:
    from raydata_llm.kernels.lora import AdapterTiles, Affine
    from raydata_llm.kernels.lora_triton import launch_add_lora

    heads, kv_heads, head_dim, hidden, _ = MODELS[model]
    parts = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    number = torch.zeros(2, dtype=torch.int32)
    x, y = torch.zeros((2, hidden), dtype=torch.bfloat16), torch.zeros((2, sum(parts)), dtype=torch.bfloat16)
    a = torch.zeros((1, 3 * rank, hidden), dtype=torch.bfloat16)
    b = torch.zeros((1, sum(parts), rank), dtype=torch.bfloat16)
    affine = Affine(torch.zeros((1, sum(parts))), torch.zeros((1, sum(parts))), number)
    launch_add_lora(y, x, a, b, affine, AdapterTiles(rows=number, slots=number, starts=number, ends=number), parts)
    compiler.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sampling(dtype: torch.dtype, compiler: Compiler) -> None:
    from raydata_llm.kernels.bitmask_triton import launch_apply_bitmask
    from raydata_llm.kernels.draw_triton import launch_draw, launch_greedy
    from raydata_llm.kernels.logprobs_triton import launch_logprob_records
    from raydata_llm.kernels.penalise_triton import launch_penalise
    from raydata_llm.kernels.truncate_triton import launch_cut, launch_truncate

    vocab, number, whole = 128256, torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    logits = torch.zeros((2, vocab), dtype=dtype)
    launch_greedy(logits)
    cut = launch_cut(logits, number, whole, number, number, whole, whole)
    launch_draw(logits, number, whole, whole)
    launch_logprob_records(logits, whole, 5)
    launch_logprob_records(logits, whole, 5, whole)
    launch_apply_bitmask(logits, torch.zeros((2, vocab // 32), dtype=torch.int32), whole)
    launch_apply_bitmask(logits[:, :50257], torch.zeros((2, 1571), dtype=torch.int32), whole)
    launch_draw(logits, number, whole, whole, cut)
    launch_truncate(logits, whole, number, number)
    in_prompt, counts = torch.zeros((2, vocab), dtype=torch.bool), torch.zeros((2, vocab), dtype=torch.int32)
    launch_penalise(logits, in_prompt, counts, number, number, number, whole)
    compiler.check()
