"""Sums of small tensors over the GPUs of one host in one kernel, through memory that all of them map.

Owns the symmetric buffer. A decode step of few rows sums some tens of kilobytes twice a layer; there NCCL's latency is
what counts, and each GPU reading the others' buffers once is quicker. Multicast over NVLink is not used.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from raydata_llm.engine.redaction import masked_logger

logger = masked_logger(__name__)

# One shot moves (ranks - 1) times the data to each GPU: it pays where latency outweighs that.
_MOST_BYTES = 256 << 10
# What torch's kernel adds, 16 bytes at a time.
_DTYPES = (torch.float32, torch.bfloat16)
_ALIGNMENT = 16


class SmallSum:
    """See the module's docstring.

    Args:
        group: The ranks.
        buffer: Symmetric memory, made known to all of them.
    """

    def __init__(self, group: dist.ProcessGroup, buffer: torch.Tensor) -> None:
        self._group_name = group.group_name
        self._buffer = buffer

    @classmethod
    def make(cls, group: dist.ProcessGroup, device: torch.device) -> SmallSum | None:
        """The sum for this group, or None where the GPUs cannot map each other's memory."""
        if device.type != "cuda" or not _maps_peers(group, device):
            return None
        from torch.distributed import _symmetric_memory as symmetric

        # Read by torch where the buffer is made known: a multicast object is a scarce thing that no sum here uses.
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        buffer = symmetric.empty(_MOST_BYTES, dtype=torch.uint8, device=device)
        symmetric.rendezvous(buffer, group=group.group_name)
        logger.info("Sums of up to %d KiB go through symmetric memory", _MOST_BYTES >> 10)
        return cls(group, buffer)

    def takes(self, x: torch.Tensor) -> bool:
        """Whether `x` is small enough, and as the kernel wants it."""
        is_small = x.nbytes <= _MOST_BYTES and x.dtype in _DTYPES
        return is_small and x.is_contiguous() and x.nbytes % _ALIGNMENT == 0 and x.data_ptr() % _ALIGNMENT == 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks.

        Each rank adds in an order of its own, from itself on, so with three ranks or more their sums may differ in the
        last bit; tokens are chosen from what was gathered, and are the same.
        """
        shared = self._buffer[: x.nbytes].view(x.dtype).view(x.shape)
        # Copies `x` to the buffer, and waits for the others before it reads and before it ends, so that the next sum
        # may write there at once.
        total: torch.Tensor = torch.ops.symm_mem.one_shot_all_reduce_copy(shared, x, "sum", self._group_name)
        return total


def _maps_peers(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether all ranks are on one host with GPUs that reach each other; each rank comes to the same answer."""
    import socket

    mine = (socket.gethostname(), device.index, torch.cuda.device_count())
    everyone: list[tuple[str, int, int]] = [mine] * group.size()
    dist.all_gather_object(everyone, mine, group=group)
    hosts, devices = {entry[0] for entry in everyone}, {entry[1] for entry in everyone}
    # Where each process sees its own GPU alone, torch cannot tell whether they reach each other.
    if len(hosts) > 1 or len(devices) < group.size() or max(entry[2] for entry in everyone) < group.size():
        return False
    others = [entry[1] for entry in everyone if entry[1] != device.index]
    reaches = all(torch.cuda.can_device_access_peer(device.index, other) for other in others)
    answers = [reaches] * group.size()
    dist.all_gather_object(answers, reaches, group=group)
    return all(answers)
