"""A decoder as the backbone of a pooling model: whole prompts in, the hidden state of every token out.

Owns the scratch memory of keys and values, one layer's, which all layers use in turn: nothing is decoded after, so no
layer's keys outlive it. Knows no requests and no pooling.
"""

from __future__ import annotations

import torch

from raydata_llm.engine.batch import ForwardBatch, PrefillRows
from raydata_llm.engine.decoder import Decoder, KVCache
from raydata_llm.engine.packed_rows import PackedRows

_BLOCK_SIZE = {"cpu": 16, "cuda": 64}


class DecoderBackbone:
    """A decoder that computes packed rows.

    Args:
        decoder: The loaded model.
        max_tokens, max_rows: Of one call.
    """

    def __init__(self, decoder: Decoder, *, max_tokens: int, max_rows: int) -> None:
        self._decoder = decoder
        self._block_size = _BLOCK_SIZE[decoder.device.type]
        # Each row's last block may be all but empty.
        num_blocks = max_tokens // self._block_size + max_rows
        one = KVCache.allocate(decoder.config, num_blocks, self._block_size, decoder.dtype, decoder.device).layers[0]
        self._cache = KVCache([one] * decoder.config.num_layers)

    def forward(self, rows: PackedRows) -> torch.Tensor:
        """The hidden states after the last norm: [T, hidden]."""
        device, size = self._decoder.device, self._block_size
        lens = torch.tensor(rows.lens)
        counts = (lens + size - 1) // size
        first_blocks = counts.cumsum(0) - counts
        table = first_blocks[:, None] + torch.arange(int(counts.max()))[None, :]
        # Columns past a row's end name blocks of the next rows; no context reaches them.
        table = table.clamp(max=int(counts.sum()) - 1).to(device, torch.int32)
        prefill = PrefillRows(
            slots=torch.arange(rows.num_rows, device=device),
            context_lens=lens.to(device, torch.int32),
            query_starts=torch.tensor(rows.starts, dtype=torch.int32).to(device),
            longest=max(rows.lens),
        )
        batch = ForwardBatch(
            token_ids=rows.token_ids,
            positions=rows.positions,
            slot_mapping=(first_blocks * size).to(device)[rows.row_of] + rows.positions,
            block_table=table,
            decode=None,
            prefill=prefill,
            sampled=None,
        )
        return self._decoder.forward(batch, self._cache)
