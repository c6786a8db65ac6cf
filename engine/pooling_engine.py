"""One replica of a pooling model: whole prompts in, an embedding, classes or a score each out.

Owns the queue and the batches: the longest prompts first, so that rows of a batch are of like length, packed up to a
budget of tokens. Knows no rows of a dataset, no text and no Ray. It serves under `EngineThread` as `Engine` does.

One thread drives an engine.
"""

from __future__ import annotations

import dataclasses
import heapq
import sys
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from raydata_llm.engine.decoder import Decoder
from raydata_llm.engine.decoder_backbone import DecoderBackbone
from raydata_llm.engine.device import choose_device, choose_dtype
from raydata_llm.engine.device_errors import explained
from raydata_llm.engine.encoder import Encoder
from raydata_llm.engine.encoder_config import EncoderConfig
from raydata_llm.engine.engine_config import NO_POOLED_EMBEDS, NO_POOLING_INVARIANCE, EngineConfig
from raydata_llm.engine.engine_stats import EngineStats
from raydata_llm.engine.idle_clock import IdleClock
from raydata_llm.engine.kv_budget import check_row_fits, check_weights_fit, rope_bytes
from raydata_llm.engine.model_config import ModelConfig
from raydata_llm.engine.model_files import ModelFiles
from raydata_llm.engine.packed_rows import PackedRows
from raydata_llm.engine.phases import announce
from raydata_llm.engine.pooler import PooledGroup, Pooler
from raydata_llm.engine.pooling_model import EMBEDDING, LM_HEAD, PoolingModel
from raydata_llm.engine.pooling_params import EMBED_TASKS, TOKEN_TASKS, PoolingParams, PoolingTask
from raydata_llm.engine.pooling_request import PoolingOutput, PoolingRequest, PoolingRequestOutput
from raydata_llm.engine.sentence_modules import SentenceLayer
from raydata_llm.engine.weights import load_weights

RawOutput = PoolingRequestOutput[PoolingOutput]
_STEP_REMEDY = "lower max_num_batched_tokens"


class PoolingEngine:
    """Loads a model and pools.

    Args:
        config: Settings.

    Raises:
        ValueError: for settings that the model or the device cannot meet.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        if config.num_ranks > 1:
            raise ValueError(
                f"tensor_parallel_size={config.tensor_parallel_size} and pipeline_parallel_size="
                f"{config.pipeline_parallel_size} are not supported for pooling models: leave them at 1, and set "
                "concurrency to as many replicas as there are GPUs"
            )
        if config.enable_lora:
            raise ValueError("enable_lora=True is not supported for pooling models: merge the adapter into its model")
        if config.logits_processors:
            raise ValueError(
                "logits_processors are not supported for pooling models, which draw no tokens: leave them out"
            )
        if config.batch_invariant:
            raise ValueError(NO_POOLING_INVARIANCE)
        if config.enable_prompt_embeds:
            raise ValueError(NO_POOLED_EMBEDS)
        files = ModelFiles.open(config.model, load_format=config.load_format, hf_overrides=config.hf_overrides)
        self.model = model = PoolingModel.open(files, config)
        self.default_sampling_params: dict[str, Any] = {}
        device = choose_device(config)
        dtype = choose_dtype(config, model.backbone, device)
        self.max_model_len, self.max_num_seqs, self._max_tokens = _sizes(config, model, device)
        if isinstance(model.backbone, ModelConfig):
            check_row_fits(self.max_model_len, rope_bytes(model.backbone.head_dim), config, device)
        check_weights_fit(model, dtype, device)
        announce("loading the weights")
        weights = load_weights(
            files,
            model,
            dtype=dtype,
            device=device,
            load_format=config.load_format,
            seed=config.seed,
            name_of=model.parameter_name,
        )
        self._backbone: Encoder | DecoderBackbone | None = None
        with explained("loading the weights", "use a smaller model, or a GPU with nothing else on it"):
            self._load(dict(weights), files, dtype, device)
        self._device = device
        self._steps_ahead = config.steps_ahead if config.steps_ahead is not None else int(device.type == "cuda")
        self._waiting: list[tuple[int, int, PoolingRequest]] = []
        self._in_flight: deque[_LaunchedBatch] = deque()
        self._unfinished: dict[str, PoolingRequest] = {}
        self._num_requests = self._num_prompt_tokens = self._num_steps = self._num_computed_tokens = 0
        self._idle_clock = IdleClock()

    def add_request(self, request: PoolingRequest) -> None:
        """Queue a request.

        Raises:
            ValueError: for one that cannot be run; nothing else is affected.
        """
        if request.request_id in self._unfinished:
            raise ValueError(f"request_id={request.request_id!r} is in use by an unfinished request")
        params = self._complete(request.pooling_params)
        prompt, types = self._checked_prompt(request)
        request = dataclasses.replace(request, prompt_token_ids=prompt, token_type_ids=types, pooling_params=params)
        if not self._unfinished:
            self._idle_clock.work_arrived()
        self._unfinished[request.request_id] = request
        heapq.heappush(self._waiting, (-len(prompt), self._num_requests, request))
        self._num_requests += 1

    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._unfinished)

    def num_wanted(self) -> int:
        """Requests that it would take before the next step: all there are, to pack those of like lengths together."""
        return sys.maxsize

    def step(self) -> list[RawOutput]:
        """Launch a batch if there is one, read the oldest if enough are in flight; returns finished requests."""
        requests = self._next_batch()
        if requests:
            self._idle_clock.step_launched()
            with explained(f"running a batch of {len(requests)} prompts", _STEP_REMEDY):
                self._in_flight.append(self._launch(requests))
            if len(self._in_flight) <= self._steps_ahead:
                return []
        return self._read_oldest() if self._in_flight else []

    def abort(self, request_ids: set[str]) -> list[RawOutput]:
        """End these requests now, without a result."""
        aborted = [self._unfinished.pop(name) for name in request_ids & self._unfinished.keys()]
        self._waiting = [entry for entry in self._waiting if entry[2].request_id in self._unfinished]
        heapq.heapify(self._waiting)
        if aborted and not self._unfinished:
            self._idle_clock.work_ended()
        return [request.refused("InterruptedError: aborted before it was run") for request in aborted]

    def abort_all(self) -> list[RawOutput]:
        """End every request."""
        return self.abort(set(self._unfinished))

    def stats(self) -> EngineStats:
        """Counts and present state."""
        num_running = sum(len(batch.requests) for batch in self._in_flight)
        idle_seconds, starved_seconds = self._idle_clock.seconds()
        return EngineStats(
            num_running=num_running,
            num_waiting=len(self._waiting),
            kv_usage=0.0,
            num_prompt_tokens=self._num_prompt_tokens,
            num_output_tokens=0,
            num_steps=self._num_steps,
            num_preemptions=0,
            num_decode_rows=0,
            num_computed_tokens=self._num_computed_tokens,
            num_sampled_tokens=0,
            idle_seconds=idle_seconds,
            starved_seconds=starved_seconds,
        )

    def shutdown(self) -> None:
        """Abort everything and free the device; the engine cannot be used after."""
        self.abort_all()
        self._in_flight.clear()
        self._backbone = None

    def _load(
        self, parameters: dict[str, torch.Tensor], files: ModelFiles, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._pooler = Pooler(self.model, _take_head(self.model, parameters, files), self._load_layers(files, device))
        backbone = self.model.backbone
        if isinstance(backbone, EncoderConfig):
            if device.type == "cpu":
                # They may be views of the checkpoint's file, which would be read again under memory pressure.
                parameters = {name: tensor.clone() for name, tensor in parameters.items()}
            self._backbone = Encoder(backbone, parameters)
            return
        weights = ((name, parameters.pop(name)) for name in list(parameters))
        decoder = Decoder(backbone, weights, max_model_len=self.max_model_len, dtype=dtype, device=device)
        self._backbone = DecoderBackbone(decoder, max_tokens=self._max_tokens, max_rows=self.max_num_seqs)

    def _load_layers(self, files: ModelFiles, device: torch.device) -> dict[SentenceLayer, dict[str, torch.Tensor]]:
        """Parameters of sentence-transformers' layers, in float32; on the CPU copied out of their files."""
        load_format, seed = self.config.load_format, self.config.seed
        layers = {}
        for layer, own in self.model.layer_files(files, load_format):
            weights = load_weights(own, layer, dtype=torch.float32, device=device, load_format=load_format, seed=seed)
            layers[layer] = {name: tensor.clone() for name, tensor in weights}
        return layers

    def _next_batch(self) -> list[PoolingRequest]:
        """The longest prompts that wait, as many as the budget of tokens holds."""
        batch: list[PoolingRequest] = []
        room = self._max_tokens
        while self._waiting and len(batch) < self.max_num_seqs and -self._waiting[0][0] <= room:
            request = heapq.heappop(self._waiting)[2]
            room -= len(request.prompt_token_ids)
            batch.append(request)
        return batch

    @torch.inference_mode()
    def _launch(self, requests: list[PoolingRequest]) -> _LaunchedBatch:
        if self._backbone is None:
            raise RuntimeError("the engine was shut down")
        rows = PackedRows.of(requests, self._device)
        groups = self._pooler.pool(self._backbone.forward(rows), rows, [request.pooling_params for request in requests])
        self._num_steps += 1
        self._num_computed_tokens += rows.starts[-1]
        return _LaunchedBatch.of(requests, groups)

    def _read_oldest(self) -> list[RawOutput]:
        batch = self._in_flight.popleft()
        with explained(f"running a batch of {len(batch.requests)} prompts", _STEP_REMEDY):
            values = batch.read()
        if not self._in_flight:
            self._idle_clock.steps_read()
        outputs = []
        for request, data in zip(batch.requests, values, strict=True):
            if self._unfinished.pop(request.request_id, None) is None:
                continue  # aborted
            prompt: list[int] = request.prompt_token_ids.tolist()
            self._num_prompt_tokens += len(prompt)
            outputs.append(PoolingRequestOutput(request.request_id, PoolingOutput(data), prompt))
        if outputs and not self._unfinished:
            self._idle_clock.work_ended()
        return outputs

    def _complete(self, params: PoolingParams) -> PoolingParams:
        """The parameters with a task and what the model says of normalisation."""
        tasks = self.model.tasks
        task = params.task or tasks[0]
        if task not in tasks:
            raise ValueError(
                f"task={task!r} does not fit this {self.model.architecture}, which does {', '.join(tasks)}: "
                "set convert='embed' or 'classify', or use another model"
            )
        steps = self._steps(params, task)
        if task not in EMBED_TASKS:
            for name in ("dimensions", "normalize"):
                if getattr(params, name) is not None:
                    raise ValueError(f"{name}={getattr(params, name)!r} does not fit task={task!r}: leave it out")
            activates = self.model.activates if params.use_activation is None else params.use_activation
            return PoolingParams(task=task, use_activation=activates, **steps)
        asks = params.normalize is not None or params.use_activation is not None
        dimensions = params.dimensions or self.model.dimensions
        self._check_dimensions(dimensions)
        normalize = params.normalizes if asks else self.model.normalize
        return PoolingParams(task=task, dimensions=dimensions, normalize=normalize, **steps)

    def _steps(self, params: PoolingParams, task: PoolingTask) -> dict[str, Any]:
        """Which tokens and classes are returned, by the request, else by the model."""
        steps: dict[str, Any] = {}
        for name, fits in (("step_tag_id", task in TOKEN_TASKS), ("returned_token_ids", task == "token_classify")):
            given = getattr(params, name)
            if given is not None and not fits:
                remedy = "leave it out, or ask for token_classify"
                raise ValueError(f"{name}={given!r} does not fit task={task!r}: {remedy}")
            steps[name] = getattr(self.model, name) if given is None and fits else given
        returned, count = steps["returned_token_ids"], self.model.num_labels
        if returned is not None and max(returned) >= count:
            asked = f"returned_token_ids={list(returned)}"
            raise ValueError(f"{asked} is not valid: the model's classes are 0 to {count - 1}")
        return steps

    def _check_dimensions(self, dimensions: int | None) -> None:
        if dimensions is None:
            return
        allowed, size = self.model.matryoshka_dimensions, self.model.embedding_size
        if allowed is None:
            raise ValueError(
                f"dimensions={dimensions} is not valid: the model's config does not say that embeddings may be cut; "
                "set hf_overrides={'is_matryoshka': True} if it was trained so"
            )
        if dimensions > size or (allowed and dimensions not in allowed):
            remedy = f"choose one of {', '.join(map(str, allowed))}" if allowed else f"give {size} or less"
            raise ValueError(f"dimensions={dimensions} is not valid: {remedy}")

    def _checked_prompt(self, request: PoolingRequest) -> tuple[Any, Any]:
        prompt = np.asarray(request.prompt_token_ids, dtype=np.int32)
        types = None if request.token_type_ids is None else np.asarray(request.token_type_ids, dtype=np.int32)
        if prompt.ndim != 1 or not len(prompt):
            raise ValueError("prompt_token_ids is empty: give at least one token")
        backbone = self.model.backbone
        _check_ids("prompt_token_ids", prompt, backbone.vocab_size)
        if types is not None and isinstance(backbone, EncoderConfig) and backbone.type_vocab_size:
            if types.shape != prompt.shape:
                raise ValueError(f"token_type_ids has {types.size} entries for {len(prompt)} tokens: give one each")
            # RoBERTa has one type for both texts.
            types = types if backbone.type_vocab_size > 1 else None
        else:
            types = None
        if types is not None:
            _check_ids("token_type_ids", types, 2)
        keep = request.pooling_params.truncate_prompt_tokens
        if keep is not None:
            keep = self.max_model_len if keep == -1 else keep
            prompt, types = prompt[:keep], None if types is None else types[:keep]
        if len(prompt) > self.max_model_len:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, more than max_model_len={self.max_model_len}: shorten it, or "
                "set truncate_prompt_tokens=-1"
            )
        return prompt, types


@dataclass(frozen=True)
class _LaunchedBatch:
    """A batch on its way; its results are copied to the host behind it, so that the next one can be launched."""

    requests: list[PoolingRequest]
    groups: list[PooledGroup]
    done: torch.cuda.Event | None

    @classmethod
    def of(cls, requests: list[PoolingRequest], groups: list[PooledGroup]) -> _LaunchedBatch:
        if not groups[0].values.is_cuda:
            return cls(requests, groups, None)
        on_host = [dataclasses.replace(group, values=_to_host(group.values)) for group in groups]
        done = torch.cuda.Event()
        done.record()
        return cls(requests, on_host, done)

    def read(self) -> list[Any]:
        """Each request's values, as NumPy arrays of their own."""
        if self.done is not None:
            self.done.synchronize()
        values: list[Any] = [None] * len(self.requests)
        for group in self.groups:
            array = group.values.numpy()
            parts = np.split(array, np.cumsum(group.lens)[:-1]) if group.lens is not None else list(array)
            for row, part in zip(group.rows, parts, strict=True):
                # A copy: a view would keep the whole batch's results alive.
                values[row] = part.copy()
        return values


def _take_head(model: PoolingModel, parameters: dict[str, torch.Tensor], files: ModelFiles) -> dict[str, torch.Tensor]:
    """Take the head's parameters out of all."""
    if model.token_head is None:
        return {name: parameters.pop(name) for name in model.head_shapes()}
    whole = parameters[EMBEDDING] if model.ties_head else parameters.pop(LM_HEAD)
    (name,) = model.head_shapes()
    return {name: model.token_head.weight(whole, model.token_head.token_ids(files.path))}


def _to_host(values: torch.Tensor) -> torch.Tensor:
    on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return on_host.copy_(values, non_blocking=True)


def _check_ids(name: str, ids: Any, count: int) -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= count:
        bad = low if low < 0 else high
        raise ValueError(f"{name} holds {bad}, outside the {count} that the model has: use this model's tokenizer")


def _sizes(config: EngineConfig, model: PoolingModel, device: torch.device) -> tuple[int, int, int]:
    """max_model_len, rows of a batch, tokens of a batch."""
    on_gpu, max_model_len = device.type == "cuda", model.max_model_len(config)
    max_tokens = config.max_num_batched_tokens or max(max_model_len, 16384 if on_gpu else 4096)
    if max_tokens < max_model_len:
        raise ValueError(
            f"max_num_batched_tokens={max_tokens} is less than max_model_len={max_model_len}, and prompts are "
            f"computed whole: give {max_model_len} or more, or lower max_model_len"
        )
    return max_model_len, config.max_num_seqs or (1024 if on_gpu else 256), max_tokens
