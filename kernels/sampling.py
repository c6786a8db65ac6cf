"""From logits to tokens: penalties, truncation of the distribution, and keyed noise.

    penalise:  l[v] = l[v] / r if l[v] > 0 else l[v] * r      v in prompt or output
               l[v] -= frequency * count[v] + presence * (count[v] > 0)          count over the output
    truncate:  min_p: p[v] >= min_p * max p;  then the top_k likeliest;  then of these the smallest set of
               probability >= top_p
    sample:    argmax_v l[v] + g(key, position, v),  g = -log(-log(u)) : a draw from softmax(l)

The noise is a hash of (key, position, v) and nothing else, so a row's draw never depends on its neighbours.

dtype policy: float32 logits; on a GPU also the model's own dtype, read as float32.
Shapes: N rows, V vocabulary; logits [N, V], per-row parameters [N].
"""

from __future__ import annotations

import torch

_INT32 = 0xFFFFFFFF


def penalise_(
    logits: torch.Tensor,
    in_prompt: torch.Tensor,
    output_counts: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
    repetition: torch.Tensor,
    pool_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply the three penalties in place.

    Args:
        in_prompt: [N, V] bool.
        output_counts: [N, V] integer.
        pool_rows: [N] integer. If given, the other arguments are pools of rows: which row of theirs each row of the
            logits has, -1 for one without penalties.
    """
    if logits.is_cuda:
        from raydata_llm.kernels.penalise_triton import launch_penalise

        return launch_penalise(logits, in_prompt, output_counts, presence, frequency, repetition, pool_rows)
    if pool_rows is not None:
        rows = (pool_rows >= 0).nonzero()[:, 0]
        pools = (pool[pool_rows[rows]] for pool in (in_prompt, output_counts, presence, frequency, repetition))
        logits[rows] = penalise_(logits[rows], *pools)
        return logits
    seen = in_prompt | (output_counts > 0)
    factor = torch.where(logits > 0, 1.0 / repetition[:, None], repetition[:, None])
    logits.mul_(torch.where(seen, factor, 1.0))
    logits.sub_(frequency[:, None] * output_counts)
    return logits.sub_(presence[:, None] * (output_counts > 0))


def truncate_ref(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """Set logits outside min-p, top-k and top-p to -inf, by a full sort.

    Args:
        top_k: 0 keeps all.
    """
    logits = logits.masked_fill(_below_min_p(logits, min_p), float("-inf"))
    ordered, order = logits.sort(dim=-1, descending=True)
    return _truncate_ordered(logits, ordered, order, top_k, top_p)


def truncate(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """As `truncate_ref`; where every row has a top_k, only that many are put in order, and on a GPU none."""
    if logits.is_cuda:
        from raydata_llm.kernels.truncate_triton import launch_truncate

        return launch_truncate(logits, top_k, top_p, min_p)
    logits = logits.masked_fill(_below_min_p(logits, min_p), float("-inf"))
    limit = int(top_k.max()) if bool((top_k > 0).all()) else logits.shape[-1]
    ordered, order = logits.topk(min(limit, logits.shape[-1]), dim=-1)
    return _truncate_ordered(logits, ordered, order, top_k, top_p)


def _below_min_p(logits: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    # p[v] < min_p * max p  <=>  l[v] < max l + log(min_p); log(0) = -inf keeps all.
    return logits < logits.amax(dim=-1, keepdim=True) + min_p.log()[:, None]


def _truncate_ordered(
    logits: torch.Tensor, ordered: torch.Tensor, order: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor
) -> torch.Tensor:
    rank = torch.arange(ordered.shape[-1], device=logits.device)
    ordered = ordered.masked_fill((rank >= top_k[:, None]) & (top_k[:, None] > 0), float("-inf"))
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    # A row that keeps everything must not lose its tail to rounding in the sum.
    ordered = ordered.masked_fill((before >= top_p[:, None]) & (top_p[:, None] < 1), float("-inf"))
    return torch.full_like(logits, float("-inf")).scatter_(-1, order, ordered)


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """The likeliest token a row, [N] int64."""
    if logits.is_cuda:
        from raydata_llm.kernels.draw_triton import launch_greedy

        return launch_greedy(logits)
    return logits.argmax(dim=-1)


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    *,
    any_truncated: bool = True,
    first_token: int = 0,
) -> torch.Tensor:
    """A token a row, [N] int64: the likeliest where the temperature is 0, otherwise a draw.

    Args:
        temperature: [N] float32.
        top_k, top_p, min_p: as in `truncate_ref`, of the logits divided by the temperature.
        keys, positions: [N] int64, as in `row_seeds`.
        any_truncated: False if the caller knows that no row has a top_k, top_p or min_p.
        first_token: The token of the first column, of logits that are a part of the vocabulary's; they cannot be
            truncated. Tokens are told from it on.
    """
    assert not (any_truncated and first_token), "a part of the logits cannot be truncated"
    if logits.is_cuda:
        from raydata_llm.kernels.draw_triton import launch_draw
        from raydata_llm.kernels.truncate_triton import launch_cut

        cut = None
        if any_truncated:
            cut = launch_cut(logits, temperature, top_k, top_p, min_p, keys, positions)
        return launch_draw(logits, temperature, keys, positions, cut, first_token)
    tokens = logits.argmax(dim=-1)
    rows = temperature.nonzero()[:, 0]
    scaled = logits[rows].float() / temperature[rows, None]
    cut_rows = (top_k[rows] > 0) | (top_p[rows] < 1) | (min_p[rows] > 0)
    if any_truncated and cut_rows.any():
        of = rows[cut_rows]
        scaled[cut_rows] = truncate(scaled[cut_rows], top_k[of], top_p[of], min_p[of])
    columns = torch.arange(first_token, first_token + logits.shape[-1], dtype=torch.int32, device=logits.device)
    noise = token_noise(row_seeds(keys[rows], positions[rows]), columns)
    tokens[rows] = (scaled + noise).argmax(dim=-1)
    return tokens


def row_seeds(keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Mix (key, position) to one 64-bit seed a row (splitmix64's finaliser; Steele et al., 2014).

    Args:
        keys, positions: [N] int64.
    """
    x = keys + (positions + 1) * -7046029254386353131  # 0x9E3779B97F4A7C15
    x = (x ^ _shift(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shift(x, 31)


def gumbel_noise(seeds: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise g(seed, v) for every token v: [N, vocab_size] float32.

    A 32-bit hash of v keyed by both halves of the seed (the rounds of Wellons' triple32, 2018), then the inverse of
    the distribution function. The uniform's small end, where float32 is fine, is what becomes large noise.
    """
    return token_noise(seeds, torch.arange(vocab_size, dtype=torch.int32, device=seeds.device))


def token_noise(seeds: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """`gumbel_noise` of some tokens alone, the same for all rows or each row's own: [N, C] float32.

    Args:
        token_ids: [C] or [N, C] int32.
    """
    low, high = _as_int32(seeds)[:, None], _as_int32(seeds >> 32)[:, None]
    x = token_ids * -1640531527 + low  # 0x9E3779B9
    x = (x ^ _shift32(x, 17)) * -312814405  # 0xED5AD4BB
    x = ((x ^ _shift32(x, 11)) + high) * -1404298415  # 0xAC4C1B51
    x = (x ^ _shift32(x, 15)) * 830770091  # 0x31848BAB
    x = x ^ _shift32(x, 14)
    uniform = ((x & 0x7FFFFFFF).float() + 0.5) * 2.0**-31
    exponential = uniform.clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_()
    return exponential.log_().neg_()


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _shift32(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int32."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _as_int32(x: torch.Tensor) -> torch.Tensor:
    """The low 32 bits of int64, as a signed int32."""
    return (((x & _INT32) ^ 0x80000000) - 0x80000000).to(torch.int32)
