"""The kernels of `batch_invariant` give a row the same bits wherever it stands; exact equality, poisoned memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from raydata_llm.kernels.paged_attention import paged_attention_ref
from raydata_llm.kernels.tuning import LinearTile, Tile

Close = Callable[..., None]
MakeRows = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
LINEAR = LinearTile(block_m=32, block_n=32, block_k=32, num_warps=4, num_stages=2)
ATTENTION = Tile(block_m=32, block_n=16, num_warps=4, num_stages=2)


def draw(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("tile", [LINEAR, None], ids=["small tiles", "the GPU's tiles"])
@pytest.mark.parametrize(("width", "out", "has_bias"), [(33, 5, True), (96, 100, False)])
def test_a_rows_linear_does_not_depend_on_the_other_rows(
    width: int,
    out: int,
    has_bias: bool,
    tile: LinearTile | None,
    triton_dtype: torch.dtype,
    triton_device: torch.device,
    close: Close,
) -> None:
    from raydata_llm.kernels.invariant_linear_triton import launch_invariant_linear

    device = triton_device
    x, weight = draw(150, width, dtype=triton_dtype, seed=0), draw(out, width, dtype=triton_dtype, seed=1)
    bias = draw(out, dtype=triton_dtype, seed=2) if has_bias else None
    on_device = (weight.to(device), None if bias is None else bias.to(device))
    whole = launch_invariant_linear(x.to(device), *on_device, tile=tile)
    expected = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    # Half a unit of bfloat16's last place is 2^-8 of the smallest number that has it.
    torch.testing.assert_close(whole.cpu().double(), expected, atol=2e-2, rtol=2**-8 + 1e-3)
    shuffled = torch.randperm(150, generator=torch.Generator().manual_seed(3))
    parts = [range(0, 1), range(7, 40), range(140, 141), range(5, 134), range(0)]
    for rows in [torch.tensor(part, dtype=torch.int64) for part in parts] + [shuffled]:
        part = launch_invariant_linear(x[rows].to(device), *on_device, tile=tile)
        assert torch.equal(part, whole[rows.to(device)]), (len(rows), tile)


def test_a_row_in_the_middle_of_a_tensor_is_read_as_one_at_its_start(
    triton_dtype: torch.dtype, triton_device: torch.device
) -> None:
    from raydata_llm.kernels.invariant_linear_triton import launch_invariant_linear

    # Rows of 33 elements begin at addresses that are no multiple of 16.
    x = draw(9, 33, dtype=triton_dtype, seed=0).to(triton_device)
    weight = draw(40, 33, dtype=triton_dtype, seed=1).to(triton_device)
    whole = launch_invariant_linear(x, weight)
    assert torch.equal(launch_invariant_linear(x[3:5], weight), whole[3:5])
    assert torch.equal(launch_invariant_linear(x.t().contiguous().t()[8:], weight), whole[8:])


def test_what_is_not_a_number_stays_in_its_row(triton_device: torch.device) -> None:
    from raydata_llm.kernels.invariant_linear_triton import launch_invariant_linear

    x = draw(40, 48, dtype=torch.float32, seed=0).to(triton_device)
    weight = draw(24, 48, dtype=torch.float32, seed=1).to(triton_device)
    clean = launch_invariant_linear(x, weight, tile=LINEAR)
    x[3] = float("nan")
    dirty = launch_invariant_linear(x, weight, tile=LINEAR)
    assert dirty[3].isnan().all()
    assert torch.equal(dirty[:3], clean[:3]) and torch.equal(dirty[4:], clean[4:])


class Attended:
    """Rows' keys and queries, all known, and what attention gives for a choice of them."""

    def __init__(
        self,
        lengths: list[int],
        make_rows: MakeRows,
        device: torch.device,
        dtype: torch.dtype,
        sizes: tuple[int, int, int, int],
        window: int | None,
    ) -> None:
        self.heads, kv_heads, head_dim, block_size = sizes
        self.lengths, self.window, self.device = lengths, window, device
        self.k_cache, self.v_cache, self.table = make_rows(lengths, kv_heads, head_dim, block_size, dtype)
        self.q = [draw(length, self.heads, head_dim, dtype=dtype, seed=row) for row, length in enumerate(lengths)]

    def chunks(self, chunks: list[tuple[int, int, int]], tile: Tile | None = ATTENTION) -> list[torch.Tensor]:
        """Attention of (row, first position, end) each, in one launch."""
        from raydata_llm.kernels.invariant_attention_triton import launch_invariant_attention

        counts = [end - first for _, first, end in chunks]
        starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
        out = launch_invariant_attention(
            torch.cat([self.q[row][first:end] for row, first, end in chunks]).to(self.device),
            self.k_cache,
            self.v_cache,
            self.table,
            torch.tensor([end for *_, end in chunks], dtype=torch.int32, device=self.device),
            None if all(count == 1 for count in counts) else starts.to(self.device),
            0.2,
            self.window,
            table_rows=torch.tensor([row for row, *_ in chunks], device=self.device),
            tile=tile,
        )
        return list(out.cpu().split(counts))

    def expected(self) -> list[torch.Tensor]:
        """The reference's, whole prompts."""
        host = (self.k_cache.cpu().float(), self.v_cache.cpu().float())
        table = torch.where(self.table == 2**31 - 1, 0, self.table).cpu()
        starts = torch.tensor([0, *torch.tensor(self.lengths).cumsum(0).tolist()])
        lens = torch.tensor(self.lengths)
        out = paged_attention_ref(torch.cat(self.q).float(), *host, table, lens, starts, 0.2, self.window)
        return list(out.split(self.lengths))


@pytest.mark.parametrize(
    ("sizes", "window", "tile"),
    [((6, 2, 24, 4), None, ATTENTION), ((3, 1, 64, 16), None, None), ((3, 1, 16, 32), 20, ATTENTION)],
    ids=["small tiles", "the GPU's tiles", "window"],
)
def test_a_tokens_attention_does_not_depend_on_chunks_or_neighbours(
    sizes: tuple[int, int, int, int],
    window: int | None,
    tile: Tile | None,
    triton_dtype: torch.dtype,
    triton_device: torch.device,
    make_rows: MakeRows,
    close: Close,
) -> None:
    attended = Attended([45, 3, 70], make_rows, triton_device, triton_dtype, sizes, window)
    whole = attended.chunks([(0, 0, 45), (1, 0, 3), (2, 0, 70)], tile)
    for row, expected in zip(whole, attended.expected(), strict=True):
        close(row, expected)
    # A prompt alone; cut where no tile is; after a cached prefix; beside others, in another order.
    assert torch.equal(attended.chunks([(2, 0, 70)], tile)[0], whole[2])
    for border in (1, 33):
        first, second = attended.chunks([(2, 0, border)], tile)[0], attended.chunks([(2, border, 70)], tile)[0]
        assert torch.equal(torch.cat([first, second]), whole[2]), border
    mixed = attended.chunks([(2, 20, 52), (0, 44, 45), (1, 1, 3)], tile)
    for part, (number, first_position, end) in zip(mixed, [(2, 20, 52), (0, 44, 45), (1, 1, 3)], strict=True):
        assert torch.equal(part, whole[number][first_position:end]), number
    # Decode, alone and together: what a preempted row computed, and computes again as a part of its prompt.
    for position in (0, 15, 16, 44):
        assert torch.equal(attended.chunks([(0, position, position + 1)], tile)[0], whole[0][position : position + 1])
    decoded = attended.chunks([(2, 69, 70), (0, 40, 41), (1, 2, 3)], tile)
    for part, (number, position) in zip(decoded, [(2, 69), (0, 40), (1, 2)], strict=True):
        assert torch.equal(part[0], whole[number][position]), number


def test_padding_rows_leave_the_others_alone(triton_device: torch.device, make_rows: MakeRows) -> None:
    attended = Attended([20, 9], make_rows, triton_device, torch.float32, (2, 1, 16, 16), None)
    alone = attended.chunks([(0, 19, 20)])[0]
    from raydata_llm.kernels.invariant_attention_triton import launch_invariant_attention

    padded = launch_invariant_attention(
        attended.q[0][19:].expand(4, -1, -1).contiguous().to(triton_device),
        attended.k_cache,
        attended.v_cache,
        attended.table,
        torch.tensor([20, 0, 0, 0], dtype=torch.int32, device=triton_device),
        None,
        0.2,
        table_rows=torch.zeros(4, dtype=torch.int64, device=triton_device),
        tile=ATTENTION,
    )
    assert torch.equal(padded[:1].cpu(), alone)


def test_a_rows_adapter_adds_the_same_bits_in_any_tile(triton_dtype: torch.dtype, triton_device: torch.device) -> None:
    from raydata_llm.kernels.lora_triton import launch_add_lora
    from tests.kernels.test_lora import affine_of, tiles_on

    width, rank, parts = 300, 16, (130, 8, 8)
    x, y = draw(50, width, dtype=triton_dtype, seed=0), draw(50, sum(parts), dtype=triton_dtype, seed=1)
    a = draw(3, len(parts) * rank, width, dtype=triton_dtype, seed=2).to(triton_device)
    b = draw(3, sum(parts), rank, dtype=triton_dtype, seed=3).to(triton_device)

    affine = affine_of(3, sum(parts), triton_device)

    def added(rows: list[int], slots: list[int]) -> torch.Tensor:
        result = y[rows].to(triton_device)
        launch_add_lora(result, x[rows].to(triton_device), a, b, affine, tiles_on(triton_device, slots), parts)
        return result.cpu()

    slots = [row % 4 - 1 for row in range(50)]
    whole = added(list(range(50)), slots)
    for rows in ([7], [49, 3, 2, 11], list(range(20, 45))):
        assert torch.equal(added(rows, [slots[row] for row in rows]), whole[rows])


def test_a_rows_draw_does_not_depend_on_what_others_ask_for(
    triton_dtype: torch.dtype, triton_device: torch.device
) -> None:
    """As the sampler does in this mode: logits in float32, and truncation asked for whether or not a row has it."""
    from raydata_llm.kernels.draw_triton import launch_draw
    from raydata_llm.kernels.truncate_triton import launch_cut

    device, count = triton_device, 12
    # Few values, so that ties are many.
    logits = (draw(count, 1031, dtype=torch.float32, seed=0) * 4).round().to(triton_dtype).float() / 4
    temperature = torch.tensor([0.0, 0.7, 1.0, 1.3] * 3)
    top_k = torch.tensor([0, 0, 5, 0, 40, 0] * 2)
    top_p = torch.tensor([1.0, 1.0, 0.9, 0.5] * 3)
    min_p = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.1] * 2)
    keys, positions = torch.arange(count) * 7919, torch.arange(count) + 3

    def drawn(rows: list[int]) -> torch.Tensor:
        some = [tensor[rows].to(device) for tensor in (temperature, top_k, top_p, min_p, keys, positions)]
        there = logits[rows].to(device)
        cut = launch_cut(there, *some)
        return launch_draw(there, some[0], some[4], some[5], cut).cpu()

    whole = drawn(list(range(count)))
    for rows in [[row] for row in range(6)] + [[5, 1, 9], list(range(count))[::-1]]:
        assert torch.equal(drawn(rows), whole[rows]), rows
