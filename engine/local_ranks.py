"""Ranks as processes of this host.

Owns how they are started: a fresh interpreter each, which runs nothing of the user's script, with this one's import
path. Invariant: an engine that ends, ends them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.rank_launcher import RankHandle
from raydata_llm.engine.rank_line import LineAddress

_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
_CODE = "from raydata_llm.engine.rank_process import main; main()"


class LocalRanks:
    """Starts ranks here.

    Args:
        config: Says on what they run, and with how many threads.
        first_gpu: Which GPU the first rank has.
        num_engines: Engines that share this host's CPUs.

    Raises:
        ValueError: for more ranks than there are GPUs.
    """

    host: str | None = None

    def __init__(self, config: EngineConfig, first_gpu: int = 0, num_engines: int = 1) -> None:
        check_gpus(config, num_engines)
        self._threads = config.num_threads
        self._first_gpu, self._num_engines = first_gpu, num_engines

    def launch(self, address: LineAddress, num_ranks: int) -> list[RankHandle]:
        """Start the processes."""
        threads = self._threads or max(1, (os.cpu_count() or 1) // (num_ranks * self._num_engines))
        environment = {
            # Threads that spin while they wait keep the other ranks' from running.
            "OMP_WAIT_POLICY": "PASSIVE",
            "OMP_NUM_THREADS": str(threads),
            **os.environ,
            # All are on this host: what gloo and NCCL listen on is nobody else's to reach.
            "GLOO_SOCKET_IFNAME": _LOOPBACK,
            "NCCL_SOCKET_IFNAME": f"={_LOOPBACK}",
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        }
        return [_LocalRank(address, rank, self._first_gpu + rank, environment) for rank in range(num_ranks)]


def check_gpus(config: EngineConfig, num_engines: int = 1) -> None:
    """Refuse more ranks than this machine has GPUs, if they run on GPUs.

    Raises:
        ValueError: with both numbers.
    """
    import torch

    num_gpus = torch.cuda.device_count()
    if config.device == "cpu" or (config.device == "auto" and num_gpus == 0):
        return
    num_ranks = num_engines * config.num_ranks
    if num_ranks > num_gpus:
        sizes = f"tensor_parallel_size={config.tensor_parallel_size} times pipeline_parallel_size="
        sizes += f"{config.pipeline_parallel_size}"
        if num_engines > 1:
            sizes += f" times data_parallel_size={num_engines}"
        raise ValueError(
            f"{sizes} is {num_ranks} ranks, and this machine has {num_gpus} GPU(s): choose sizes whose product is "
            f"{num_gpus} or less, or device='cpu'"
        )


class _LocalRank:
    def __init__(self, address: LineAddress, rank: int, gpu: int, environment: dict[str, str]) -> None:
        # A session of its own: Ctrl-C is the engine's to take.
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE],
            stdin=subprocess.PIPE,
            env=environment,
            text=True,
            start_new_session=True,
        )
        self.pid = self._process.pid
        assert self._process.stdin is not None
        told = {"address": address.address, "key": address.key, "rank": rank, "gpu": gpu}
        # By a pipe, as others may read a process's arguments.
        self._process.stdin.write(json.dumps(told) + "\n")
        self._process.stdin.close()

    def end(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.wait()

    def fate(self) -> str | None:
        """How it ended."""
        code = self._process.poll()
        if code is None:
            return None
        return f"killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"
