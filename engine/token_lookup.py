"""The rows of a table over the vocabulary, of which each rank holds a share.

Knows no models; the ranks' parts are still to be summed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from raydata_llm.engine.shard import ModelShard


def lookup(table: torch.Tensor, token_ids: torch.Tensor, shard: ModelShard) -> torch.Tensor:
    """This rank's part of the tokens' rows: zeros for tokens that other ranks hold.

    Args:
        table: [tokens of this rank, columns].
        token_ids: [T].
    """
    if shard.place.tp_size == 1:
        return F.embedding(token_ids, table)
    local = token_ids - shard.tokens.start
    elsewhere = (local < 0) | (local >= len(shard.tokens))
    return F.embedding(local.masked_fill(elsewhere, 0), table).masked_fill_(elsewhere[:, None], 0)
