"""What ranks say to one another on their devices: sums, gathers, hidden states and tokens.

Owns the process groups. Knows no model and no host messages. A rank alone has no groups, and every call is then an
`if` and no more. Invariant: each group is used by all its ranks in the same order; the two directions of a pipeline
have groups of their own, as one direction's transfers must not wait for the other's.
"""

from __future__ import annotations

from collections import deque
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store, Work

from raydata_llm.engine.shard import RankPlace
from raydata_llm.engine.small_sum import SmallSum

# Its name from torch 2.13 on, which warns of the older one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
# Transfers begun whose tensors are kept until they are done.
_MOST_SENDS = 64


class ParallelState:
    """See the module's docstring.

    Args:
        place: This rank's.
        device: Where its tensors are.
        store: Where the ranks find each other; None for a rank alone.
        timeout_s: After which a transfer fails.
        small_sums: Whether small sums may go through symmetric memory.
    """

    def __init__(
        self,
        place: RankPlace,
        device: torch.device,
        store: Store | None = None,
        timeout_s: float = 600.0,
        *,
        small_sums: bool = True,
    ) -> None:
        self.place = place
        self.device = device
        self._tp_group: dist.ProcessGroup | None = None
        self._forward: list[dist.ProcessGroup] = []
        self._back: dist.ProcessGroup | None = None
        self._sends: deque[tuple[Work, torch.Tensor]] = deque()
        self.small_sum: SmallSum | None = None
        if place.num_ranks == 1:
            return
        assert store is not None, "ranks that are not alone need a store"
        # torch keeps a store that is written in Python no longer than somebody here does.
        self._store = store
        self._join(store, timedelta(seconds=timeout_s))
        if small_sums and self._tp_group is not None:
            self.small_sum = SmallSum.make(self._tp_group, device)

    def _join(self, store: Store, timeout: timedelta) -> None:
        on_gpu = self.device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=store,
            rank=self.place.rank,
            world_size=self.place.num_ranks,
            timeout=timeout,
            device_id=self.device if on_gpu else None,
        )
        tp_size, pp_size = self.place.tp_size, self.place.pp_size
        # Every rank makes every group, in the same order.
        if tp_size > 1:
            for stage in range(pp_size):
                group = dist.new_group(list(range(stage * tp_size, (stage + 1) * tp_size)), timeout=timeout)
                if stage == self.place.pp_rank:
                    self._tp_group = group
        for stage in range(pp_size if pp_size > 1 else 0):
            for lane in range(tp_size):
                pair = sorted({stage * tp_size + lane, (stage + 1) % pp_size * tp_size + lane})
                group = dist.new_group(pair, timeout=timeout)
                if self.place.rank not in pair:
                    continue
                if stage == pp_size - 1:
                    self._back = group
                else:
                    self._forward.append(group)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the tensor-parallel ranks; `x` may be changed."""
        if self._tp_group is None or not x.numel():
            return x
        if self.small_sum is not None and self.small_sum.takes(x):
            return self.small_sum(x)
        return self.all_reduce_by_group(x)

    def all_reduce_by_group(self, x: torch.Tensor) -> torch.Tensor:
        """As `all_reduce`, of any size and in place, by NCCL or gloo."""
        dist.all_reduce(x, group=self._tp_group)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """All tensor-parallel ranks' `x`, of one shape, one after the other: [tp_size, *x.shape]."""
        if self._tp_group is None:
            return x[None]
        gathered = x.new_empty((self.place.tp_size, *x.shape))
        _all_gather(gathered.flatten(0, 1) if x.dim() else gathered, x.contiguous(), self._tp_group)
        return gathered

    def send_hidden(self, hidden: torch.Tensor) -> None:
        """Hand hidden states to the next stage; they may be overwritten after."""
        if len(hidden):
            self._send(hidden.clone(), self.place.rank + self.place.tp_size, self._forward[-1])

    def receive_hidden(self, buffer: torch.Tensor) -> None:
        """Fill `buffer` with the last stage's hidden states."""
        if len(buffer):
            dist.recv(buffer, self.place.rank - self.place.tp_size, group=self._forward[0])

    def send_tokens(self, tokens: torch.Tensor) -> None:
        """Hand sampled tokens from the last stage to the first."""
        if len(tokens):
            assert self._back is not None
            self._send(tokens.clone(), self.place.tp_rank, self._back)

    def receive_tokens(self, count: int) -> torch.Tensor:
        """The tokens of the oldest step not yet received, on the first stage."""
        tokens = torch.empty(count, dtype=torch.int64, device=self.device)
        if count:
            assert self._back is not None
            dist.recv(tokens, (self.place.pp_size - 1) * self.place.tp_size + self.place.tp_rank, group=self._back)
        return tokens

    def _send(self, tensor: torch.Tensor, to: int, group: dist.ProcessGroup) -> None:
        work = dist.isend(tensor, to, group=group)
        assert work is not None
        self._sends.append((work, tensor))
        while self._sends and (len(self._sends) > _MOST_SENDS or self._sends[0][0].is_completed()):
            self._sends.popleft()[0].wait()


def alone(device: torch.device) -> ParallelState:
    """The state of a rank that has no others."""
    return ParallelState(RankPlace(), device)
