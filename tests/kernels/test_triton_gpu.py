"""What only a GPU can show of the Triton kernels: real sizes, far addresses, graphs, no waiting, no late compiling."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from raydata_llm.kernels import sampling
from raydata_llm.kernels.paged_attention import gather_kv, paged_decode_attention, paged_prefill_attention
from raydata_llm.kernels.qkv_to_cache import qkv_to_cache
from raydata_llm.kernels.rms_norm import add_rms_norm, rms_norm
from raydata_llm.kernels.swiglu import swiglu

pytestmark = pytest.mark.gpu

# Heads, KV heads, head_dim.
SHAPES = {"qwen3-0.6b": (16, 8, 128), "llama-3.2-1b": (32, 8, 64), "llama-3.1-8b": (32, 8, 128), "wide": (8, 1, 256)}
# Of attention over unit-normal values, whose outputs are well below 1.
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def paged(
    lengths: list[int], kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """K cache, V cache and block table; keys past a row's end are NaN."""
    columns = -(-max(lengths) // block_size)
    blocks = len(lengths) * columns
    caches = [normal(blocks, kv_heads, block_size, head_dim, dtype=dtype) for _ in range(2)]
    table = torch.randperm(blocks, device="cuda", dtype=torch.int32).view(len(lengths), columns)
    ends = torch.tensor(lengths, device="cuda")[:, None]
    stale = torch.arange(columns * block_size, device="cuda")[None, :] >= ends
    row, key = stale.nonzero(as_tuple=True)
    for cache in caches:
        cache[table[row, key // block_size].long(), :, key % block_size] = float("nan")
    return caches[0], caches[1], table


def expected_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, table: torch.Tensor, length: int, window: int | None
) -> torch.Tensor:
    """One row's queries [n, H, D], in float32."""
    count, heads, _ = q.shape
    group = heads // k_cache.shape[1]
    columns = -(-length // k_cache.shape[2])
    k, v = (gather_kv(cache, table[None, :columns])[0, :, :length].float() for cache in (k_cache, v_cache))
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    position = torch.arange(length - count, length, device="cuda")[:, None]
    key = torch.arange(length, device="cuda")[None, :]
    visible = (key <= position) & (position - key < (window or length))
    scores = q.float().transpose(0, 1) @ k.transpose(1, 2) * q.shape[2] ** -0.5
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    out: torch.Tensor = (weights @ v).transpose(0, 1)
    return out


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("block_size", [16, 64, 128])
@pytest.mark.parametrize("model", SHAPES)
def test_decode_of_real_sizes(model: str, block_size: int, dtype: torch.dtype) -> None:
    heads, kv_heads, head_dim = SHAPES[model]
    lengths = [
        1,
        2048,
        63,
        64,
        65,
        *torch.randint(100, 2048, (27,), generator=torch.Generator().manual_seed(0)).tolist(),
    ]
    caches = paged(lengths, kv_heads, head_dim, block_size, dtype)
    q = normal(len(lengths), heads, head_dim, dtype=dtype)
    context = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    for window in (None, 500):
        result = paged_decode_attention(q, *caches, context, head_dim**-0.5, window).float()
        for row, length in enumerate(lengths):
            expected = expected_attention(q[row : row + 1], *caches[:2], caches[2][row], length, window)
            torch.testing.assert_close(result[row : row + 1], expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("block_size", [16, 64, 128])
@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("is_short", [False, True], ids=["any length", "short"])
def test_prefill_of_real_sizes(is_short: bool, model: str, block_size: int, dtype: torch.dtype) -> None:
    heads, kv_heads, head_dim = SHAPES[model]
    # (context, queries)
    rows = [(512, 512), (1, 1), (700, 1), (333, 333), (1000, 129)]
    rows += [] if is_short else [(2112, 64), (2048, 2048)]
    lengths = [length for length, _ in rows]
    caches = paged(lengths, kv_heads, head_dim, block_size, dtype)
    starts = [0, *torch.tensor([count for _, count in rows]).cumsum(0).tolist()]
    q = normal(starts[-1], heads, head_dim, dtype=dtype)
    context = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    on_device = torch.tensor(starts, dtype=torch.int32, device="cuda")
    for window in (None, 500):
        result = paged_prefill_attention(
            q, *caches, context, on_device, head_dim**-0.5, window, longest=max(lengths)
        ).float()
        for row, length in enumerate(lengths):
            chunk = slice(starts[row], starts[row + 1])
            expected = expected_attention(q[chunk], *caches[:2], caches[2][row], length, window)
            torch.testing.assert_close(result[chunk], expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_addresses_past_two_to_the_31() -> None:
    """The last blocks of a cache of 2.6e9 elements: written by the QKV pass, read by both attentions."""
    heads, kv_heads, head_dim, block_size = 16, 8, 128, 64
    blocks = 40_000
    if torch.cuda.mem_get_info()[0] < 14e9:
        pytest.skip("needs 14 GB of free GPU memory")
    k_cache, v_cache = (
        torch.zeros((blocks, kv_heads, block_size, head_dim), device="cuda", dtype=torch.bfloat16) for _ in range(2)
    )
    tokens = 100
    qkv = normal(tokens, (heads + 2 * kv_heads) * head_dim)
    positions = torch.arange(tokens, device="cuda")
    table = torch.tensor([[blocks - 1, blocks - 2]], dtype=torch.int32, device="cuda")
    slots = table[0, positions // block_size].long() * block_size + positions % block_size
    rope = torch.cat([torch.ones((tokens, 64)), torch.zeros((tokens, 64))], dim=1).cuda()
    q = qkv_to_cache(qkv, positions, slots, rope, k_cache, v_cache)
    assert torch.equal(q.flatten(1), qkv[:, : heads * head_dim])
    context = torch.tensor([tokens], dtype=torch.int32, device="cuda")
    starts = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
    expected = expected_attention(q, k_cache, v_cache, table[0], tokens, None)
    assert expected.abs().max() > 0.5
    prefill = paged_prefill_attention(q, k_cache, v_cache, table, context, starts, head_dim**-0.5)
    torch.testing.assert_close(prefill.float(), expected, atol=8e-3, rtol=8e-3)
    decode = paged_decode_attention(q[-1:], k_cache, v_cache, table, context, head_dim**-0.5)
    torch.testing.assert_close(decode.float(), expected[-1:], atol=8e-3, rtol=8e-3)


@pytest.mark.parametrize("vocab", [128256, 151936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spread", [0.9, 3.0], ids=["flat", "peaked"])
def test_tokens_of_real_vocabularies(vocab: int, dtype: torch.dtype, spread: float) -> None:
    rows = 64
    logits = (normal(rows, vocab, dtype=torch.float32) * spread).to(dtype)
    temperature = torch.rand(rows, device="cuda") + 0.5
    temperature[::5] = 0.0
    top_k = torch.tensor([0, 50, 1, 0, 1000, 0, 20, 0], device="cuda").repeat(8)
    top_p = torch.tensor([1.0, 0.95, 1.0, 0.9, 1.0, 0.5, 0.999, 1.0], device="cuda").repeat(8)
    min_p = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.1], device="cuda").repeat(8)
    keys, positions = torch.arange(rows, device="cuda") * 2**40, torch.arange(rows, device="cuda")
    arguments = (temperature, top_k, top_p, min_p, keys, positions)
    result = sampling.sample(logits, *arguments)
    expected = sampling.sample(logits.float().cpu(), *(tensor.cpu() for tensor in arguments))
    # A draw may fall on a token that rounding puts on the other side of top_p, or between two equals.
    assert (result.cpu() == expected).float().mean() >= (0.95 if dtype == torch.float32 else 0.8)
    values, reference = (logits.float().cpu().gather(1, tokens.cpu()[:, None]) for tokens in (result, expected))
    assert torch.equal(values[::5], reference[::5]), "greedy rows"
    assert torch.equal(sampling.greedy(logits).cpu(), logits.float().cpu().argmax(dim=-1))


class Step:
    """The kernels of a decode step on fixed buffers."""

    def __init__(self, rows: int) -> None:
        self.heads, self.kv_heads, self.head_dim, self.block_size = 8, 2, 64, 16
        self.context = torch.full((rows,), 33, dtype=torch.int32, device="cuda")
        self.k_cache, self.v_cache, self.table = paged([48] * rows, 2, 64, 16, torch.bfloat16)
        self.x, self.weight = normal(rows, 768), normal(768)
        self.rope = normal(48, 64, dtype=torch.float32)
        self.temperature, self.top_p = torch.ones(rows, device="cuda"), torch.full((rows,), 0.9, device="cuda")
        self.zero, self.whole = torch.zeros(rows, device="cuda"), torch.zeros(rows, dtype=torch.int64, device="cuda")

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        normed, total = add_rms_norm(self.x, self.x, self.weight, 1e-5)
        positions = self.context.long() - 1
        block = self.table.gather(1, positions[:, None] // self.block_size)[:, 0].long()
        slots = block * self.block_size + positions % self.block_size
        q = qkv_to_cache(normed, positions, slots, self.rope, self.k_cache, self.v_cache)
        out = paged_decode_attention(q, self.k_cache, self.v_cache, self.table, self.context, 0.125).flatten(1)
        out = swiglu(torch.cat([out, rms_norm(out, self.weight[:512], 1e-5)], dim=1))
        logits = torch.cat([out, total], dim=1)
        parameters = (self.temperature, self.whole, self.top_p, self.zero, self.whole, self.whole)
        return out, sampling.sample(logits, *parameters)


@pytest.fixture
def waiting_fails() -> Iterator[Callable[[], None]]:
    """A function from whose call on an operation that waits for the device raises."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def test_no_launch_waits_for_the_device(waiting_fails: Callable[[], None]) -> None:
    step, q = Step(5), normal(5, 8, 64)
    starts = torch.arange(6, dtype=torch.int32, device="cuda")
    waiting_fails()
    step.run()
    paged_prefill_attention(q, step.k_cache, step.v_cache, step.table, step.context, starts, 0.125)


def test_a_captured_step_follows_its_buffers() -> None:
    step = Step(6)
    step.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        captured = step.run()
    for lengths in ([33, 1, 48, 16, 17, 2], [48, 48, 3, 40, 5, 31]):
        step.context.copy_(torch.tensor(lengths, dtype=torch.int32))
        step.x.copy_(normal(*step.x.shape))
        graph.replay()
        for mine, expected in zip(captured, step.run(), strict=True):
            assert torch.equal(mine, expected)


def test_other_batch_sizes_compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    compiled: list[str] = []

    def note(*, key: str, **kwargs: object) -> bool:
        compiled.append(key)
        return False

    run = _all_sizes()
    # What sizes choose between: split and unsplit, so the first has both.
    for rows in (3, 300, 2200):
        run(rows)
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", note)
    for rows in (1, 2, 16, 17, 31, 513, 1024, 4001):
        run(rows)
    assert not compiled


def _all_sizes() -> Callable[[int], None]:
    def run(rows: int) -> None:
        step = Step(rows)
        step.run()
        starts = torch.arange(rows + 1, dtype=torch.int32, device="cuda")
        q = normal(rows, 8, 64)
        paged_prefill_attention(q, step.k_cache, step.v_cache, step.table, step.context, starts, 0.125)
        sampling.greedy(normal(rows, 700))

    return run
