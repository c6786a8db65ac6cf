"""One rank: its share of the model, its KV cache, and the steps it runs.

Owns the order of a start: weights, then room for KV, then, once it is settled how much all ranks have, cache, warm-up.
Knows no requests. It is the same whether it is alone, in the engine's own process, or one of many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from raydata_llm.engine.batch import ScheduledBatch
from raydata_llm.engine.decoder import Decoder, KVCache
from raydata_llm.engine.device import check_batch_invariant, choose_dtype
from raydata_llm.engine.device_errors import explained
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.guides import Bitmask
from raydata_llm.engine.kv_budget import Sizes, check_sizes, check_slots_fit, check_weights_fit, num_kv_blocks
from raydata_llm.engine.laid_by import LaidBy
from raydata_llm.engine.model_config import ModelConfig
from raydata_llm.engine.model_files import ModelFiles
from raydata_llm.engine.model_runner import LaunchedStep, ModelRunner
from raydata_llm.engine.model_view import ModelView
from raydata_llm.engine.parallel import ParallelState
from raydata_llm.engine.phases import announce
from raydata_llm.engine.profiling import RankProfile
from raydata_llm.engine.shard import ModelShard
from raydata_llm.engine.weights import NamedTensor, load_weights

# Rows with penalties at once at most.
MOST_PENALTY_SEQS = 1024


class Worker:
    """Loads a rank's weights.

    Args:
        parallel: Who it is, where it runs, and the other ranks.

    Raises:
        ValueError: for settings that the model or the device cannot meet, with those that would do.
    """

    def __init__(
        self, config: EngineConfig, files: ModelFiles, model_config: ModelConfig, parallel: ParallelState
    ) -> None:
        self._config = config
        self.device = parallel.device
        check_batch_invariant(config, self.device)
        self._shard = ModelShard(model_config, parallel.place)
        self._dtype = choose_dtype(config, model_config, self.device)
        self.sizes: Sizes = check_sizes(config, model_config, self.device)
        check_slots_fit(config, self._shard.config, self.sizes, self._dtype, self.device)
        check_weights_fit(model_config, self._dtype, self.device, self._shard.shapes)
        self._files, self._model_config = files, model_config
        announce("loading the weights")
        weights = self._read_weights()
        with explained("loading the weights", "use a smaller model, or a GPU with nothing else on it"):
            self._decoder = Decoder(
                model_config,
                weights,
                max_model_len=self.sizes.max_model_len,
                dtype=self._dtype,
                device=self.device,
                parallel=parallel,
                batch_invariant=config.batch_invariant,
                max_loras=config.max_loras if config.enable_lora else 0,
                max_lora_rank=config.max_lora_rank,
            )
        self._runner: ModelRunner | None = None
        self._laid_by: LaidBy | None = None
        self._profile: RankProfile | None = None

    def _read_weights(self) -> Iterator[NamedTensor]:
        return load_weights(
            self._files,
            self._model_config,
            dtype=self._dtype,
            device=self.device,
            load_format=self._config.load_format,
            seed=self._config.seed,
            shard=self._shard,
        )

    @property
    def device_type(self) -> str:
        """What it runs on."""
        return self.device.type

    @property
    def is_speaker(self) -> bool:
        """Whether it is the one that tells the engine what was sampled."""
        return self._shard.place.is_last and self._shard.place.tp_rank == 0

    def num_kv_blocks(self) -> int:
        """Blocks that this rank has room for."""
        announce("making room for the KV cache")
        ranks = self._shard.place.num_ranks
        return num_kv_blocks(self._config, self._shard.config, self.sizes, self._dtype, self.device, ranks)

    def start(self, num_blocks: int) -> None:
        """Take the memory for KV, and warm up."""
        sizes = self.sizes = self.sizes.fitted(num_blocks)
        self._runner = ModelRunner(
            self._decoder,
            KVCache.allocate(self._shard.config, num_blocks, sizes.block_size, self._dtype, self.device),
            num_slots=sizes.num_slots,
            max_blocks=-(-sizes.max_model_len // sizes.block_size),
            block_size=sizes.block_size,
            max_num_batched_tokens=sizes.max_num_batched_tokens,
            num_penalty_rows=min(sizes.max_num_seqs, MOST_PENALTY_SEQS),
            use_graphs=self.device.type == "cuda" and not self._config.enforce_eager,
            share_prefixes=self._config.shares_prefixes,
            processed_logprobs=self._config.logprobs_mode == "processed_logprobs",
        )
        announce("warming up")
        with explained("capturing CUDA graphs", "set enforce_eager=True, or lower gpu_memory_utilization"):
            self._runner.warm_up()

    def bucket_seconds(self) -> dict[int, float]:
        """As `ModelRunner.bucket_seconds`, of a rank that has started."""
        assert self._runner is not None
        return self._runner.bucket_seconds

    def sleep(self, *, keep_weights: bool) -> None:
        """Give up the memory of KV, graphs and weights; no step may be in flight.

        Args:
            keep_weights: On the host, pinned; otherwise they are read anew.
        """
        self._runner = None
        parameters = self._decoder.unload()
        self._laid_by = LaidBy.of(parameters) if keep_weights else None
        del parameters
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def wake_weights(self) -> None:
        """Bring the weights back; `start` makes the rest anew, graphs too, since nothing is where it was."""
        remedy = "free what else was put onto the device meanwhile"
        with explained("waking the weights", remedy):
            if self._laid_by is not None:
                self._decoder.load(self._laid_by.on(self.device))
                self._laid_by = None
                return
            announce("loading the weights")
            self._decoder.fill(self._read_weights())

    def call(self, method: str | Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call a method of this worker by its name, or a function that takes the worker first.

        Raises:
            ValueError: for a name that is none of its methods.
        """
        if callable(method):
            return method(self, *args, **kwargs)
        found = None if method.startswith("_") else getattr(self, method, None)
        if not callable(found):
            raise ValueError(
                f"method={method!r} is not a method of a rank's worker: give a function that takes the worker first"
            )
        return found(*args, **kwargs)

    def get_model(self) -> ModelView:
        """This rank's parameters as a torch module."""
        return ModelView(self._decoder.parameters, self._shard.config)

    def apply_model(self, function: Callable[[ModelView], Any]) -> Any:
        """What the function makes of this rank's `get_model()`."""
        return function(self.get_model())

    @property
    def rank(self) -> int:
        """Its number among the engine's ranks."""
        return self._shard.place.rank

    def start_profile(self, settings: Mapping[str, Any], prefix: str) -> None:
        """Profile from now on.

        Args:
            settings: vLLM's `profiler_config`.
            prefix: How the names of its files begin.
        """
        if self._profile is None:
            place = self._shard.place
            name = f"{prefix}_pp{place.pp_rank}_tp{place.tp_rank}"
            self._profile = RankProfile(settings, name, self.device.type)

    def stop_profile(self) -> None:
        """Write the profile that is under way, if one is."""
        profile, self._profile = self._profile, None
        if profile is not None:
            profile.stop()

    def launch(self, batch: ScheduledBatch, bitmask: Callable[[], Bitmask | None] | None = None) -> LaunchedStep | None:
        """As `ModelRunner.launch`."""
        if self._runner is None:
            raise RuntimeError("the engine was shut down")
        return self._runner.launch(batch, bitmask)
