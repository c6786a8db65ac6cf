"""One replica: requests in, request outputs out, token ids on both sides.

Owns the loop: schedule, launch, and read the oldest step once enough are in flight. Knows no rows, no prompt text and
no Ray.

One thread drives an engine; `engine_thread.EngineThread` serves many callers.
"""

from __future__ import annotations

import pickle
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from raydata_llm.engine.batch import ScheduledBatch
from raydata_llm.engine.beam_params import BeamRequest, BeamSearchParams
from raydata_llm.engine.beam_search import BeamSearch
from raydata_llm.engine.block_manager import BlockManager
from raydata_llm.engine.detokenizer import Tokenizer
from raydata_llm.engine.device import choose_device
from raydata_llm.engine.device_errors import explained
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.engine_stats import EngineStats
from raydata_llm.engine.guides import Bitmask, Guides
from raydata_llm.engine.idle_clock import IdleClock
from raydata_llm.engine.local_ranks import LocalRanks
from raydata_llm.engine.logprobs import wanted_of_outputs, wanted_of_prompt
from raydata_llm.engine.model_files import ModelFiles, settle_overrides
from raydata_llm.engine.model_runner import LaunchedStep
from raydata_llm.engine.output_watch import watch_of
from raydata_llm.engine.parallel import alone
from raydata_llm.engine.position_logprobs import PositionLogprobs
from raydata_llm.engine.prompt_embeds import block_keys
from raydata_llm.engine.prompt_scores import PromptScores
from raydata_llm.engine.rank_gang import RankGang, RemoteStep
from raydata_llm.engine.rank_launcher import LauncherFactory
from raydata_llm.engine.request import Request, RequestOutput, TokenArray
from raydata_llm.engine.request_check import RequestCheck
from raydata_llm.engine.request_stats import RequestStateStats
from raydata_llm.engine.row_target import RowTarget
from raydata_llm.engine.sampler import SampledLogprobs
from raydata_llm.engine.sampling_params import SamplingParams
from raydata_llm.engine.scheduler import Scheduler
from raydata_llm.engine.scheduler_limits import SchedulerLimits
from raydata_llm.engine.sequence import FinishedSequence, Sequence
from raydata_llm.engine.shard import check_split
from raydata_llm.engine.unfinished_request import UnfinishedRequest
from raydata_llm.engine.worker import MOST_PENALTY_SEQS, Worker

# Requests that wait are enough to choose from; while fewer do, the next ones are worth the device's wait.
_WAITING_WANTED = 256
# With none at all, the device begins on so many.
_FIRST_WANTED = 32
# Tokens that a device computes while the host takes in a request (30 to 110 us of host time, for 2,112 tokens).
_TOKENS_PER_REQUEST = 64
_STEP_REMEDY = "lower gpu_memory_utilization, or max_num_batched_tokens and max_num_seqs"


class Engine:
    """Loads a model and generates.

    Args:
        config: Settings.
        tokenizer: Needed by requests with stop strings only.
        launch_ranks: Makes what starts the ranks of an engine that has several.
        own_process: Whether a rank alone may run in this process.

    Raises:
        ValueError: for settings that the model or the device cannot meet, with those that would do.
    """

    def __init__(
        self,
        config: EngineConfig,
        tokenizer: Tokenizer | None = None,
        launch_ranks: LauncherFactory = LocalRanks,
        *,
        own_process: bool = True,
    ) -> None:
        # Other ranks are told values; a function stays here.
        self.config = config = replace(config, hf_overrides=settle_overrides(config.model, config.hf_overrides))
        self._tokenizer = tokenizer
        files = ModelFiles.open(config.model, load_format=config.load_format, hf_overrides=config.hf_overrides)
        self.model_config = files.model_config()
        self.default_sampling_params: dict[str, Any] = files.default_sampling_params(
            config.override_generation_config, with_own=config.generation_config == "auto"
        )
        self._eos_token_ids = files.eos_token_ids(self.model_config)
        # Before anything is loaded; the ranks would each find it as well.
        check_split(self.model_config, config.tensor_parallel_size, config.pipeline_parallel_size)
        self._worker: Worker | RankGang | None = None
        worker = self._worker = self._make_worker(files, launch_ranks, own_process)
        self.num_kv_blocks = worker.num_kv_blocks()
        sizes = worker.sizes.fitted(self.num_kv_blocks)
        self.max_model_len = sizes.max_model_len
        self.max_num_seqs = sizes.max_num_seqs
        limits = SchedulerLimits(
            max_num_seqs=sizes.max_num_seqs,
            max_num_batched_tokens=sizes.max_num_batched_tokens,
            max_model_len=sizes.max_model_len,
            block_size=sizes.block_size,
            max_penalty_seqs=min(sizes.max_num_seqs, MOST_PENALTY_SEQS),
            enable_chunked_prefill=config.enable_chunked_prefill,
            enable_prefix_caching=config.enable_prefix_caching,
            share_prefixes=config.shares_prefixes,
            num_lanes=min(config.pipeline_parallel_size, sizes.max_num_seqs),
            max_loras=config.max_loras if config.enable_lora else 0,
            least_slots=sizes.num_slots,
        )
        worker.start(self.num_kv_blocks)
        self._scheduler = Scheduler(limits, BlockManager(self.num_kv_blocks), RowTarget(worker.bucket_seconds()))
        ahead = config.steps_ahead if config.steps_ahead is not None else int(worker.device_type == "cuda")
        # As many steps in flight as stages, and those that hide the host's work.
        self._steps_ahead = ahead + config.pipeline_parallel_size - 1
        self._in_flight: deque[tuple[ScheduledBatch, LaunchedStep | RemoteStep]] = deque()
        # Ended, and not yet in their requests' results: these are made while the device has a step to run.
        self._ended: list[FinishedSequence] = []
        self._unfinished: dict[str, UnfinishedRequest] = {}
        self._checks = RequestCheck(config, self.model_config, self.max_model_len, has_tokenizer=tokenizer is not None)
        self._beams: BeamSearch | None = None
        self._next_seq_id = 0
        self._num_prompt_tokens = self._num_output_tokens = self._num_steps = self._num_decode_rows = 0
        self._num_computed_tokens = self._num_sampled_tokens = 0
        self._idle_clock = IdleClock()
        self._last_read = 0.0
        self._guides = Guides(
            config, tokenizer, self.model_config.vocab_size, self._eos_token_ids, device_type=worker.device_type
        )

    def add_request(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ValueError: for one that cannot be run; whatever is raised, nothing else is affected.
            RuntimeError: while a beam search is open.
        """
        self._check_no_beams()
        if request.request_id in self._unfinished:
            raise ValueError(f"request_id={request.request_id!r} is in use by an unfinished request")
        prompt = self.check_request(request)
        params = request.sampling_params
        sequences = self._sequences_of(request, prompt)
        if not self._unfinished:
            self._idle_clock.work_arrived()
        stats = RequestStateStats.queued(request.arrival_time)
        self._unfinished[request.request_id] = UnfinishedRequest(request, prompt, [None] * params.n, stats)
        try:
            if params.structured_outputs is not None:
                self._guides.hold(sequences)
                return
            for sequence in sequences:
                self._scheduler.add(sequence)
        except BaseException:
            self._forget(request.request_id)
            raise

    def _sequences_of(self, request: Request, prompt: TokenArray) -> list[Sequence]:
        """A request's n sequences, with what follows each of them."""
        params = request.sampling_params
        room = self.max_model_len if params.max_tokens is None else len(prompt) + params.max_tokens
        eos = () if params.ignore_eos else self._eos_token_ids
        embeds, token_bytes = request.prompt_embeds, None
        if embeds is not None:
            embeds = embeds[-len(prompt) :]
            if self.config.enable_prefix_caching:  # once for all n
                token_bytes = block_keys(embeds, prompt[:0], self._scheduler.limits.block_size)
        sequences = []
        for index in range(params.n):
            sequence = Sequence(
                seq_id=self._next_seq_id,
                request=request,
                index=index,
                token_ids=prompt,
                num_prompt=len(prompt),
                max_tokens=min(room, self.max_model_len),
                stop_token_ids=tuple(dict.fromkeys((*eos, *params.stop_token_ids))),
                num_embedded=0 if embeds is None else len(embeds),
                prompt_embeds=embeds,
                token_bytes=token_bytes,
            )
            self._attach_logprobs(sequence)
            most_tokens = sequence.max_tokens - sequence.num_prompt
            seen = prompt if embeds is None else ()
            sequence.stop_watch = watch_of(params, self._tokenizer, seen, most_tokens)
            self._guides.attach(sequence)
            self._next_seq_id += 1
            sequences.append(sequence)
        return sequences

    def check_request(self, request: Request) -> TokenArray:
        """The prompt as it would be run, truncated.

        Raises:
            ValueError: for a request that cannot be run.
        """
        return self._checks.check(request)

    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._unfinished)

    def num_wanted(self) -> int:
        """Requests that it would take before the next step: enough to choose from, too few to keep a device waiting."""
        if not self._unfinished:
            return _FIRST_WANTED
        if self._scheduler.intake.num_waiting < _WAITING_WANTED:
            return _WAITING_WANTED
        under_way = self._in_flight[-1][0].num_tokens if self._in_flight else 0
        return max(_FIRST_WANTED, under_way // _TOKENS_PER_REQUEST)

    def step(self) -> list[RequestOutput]:
        """Launch a step if there is one, read the oldest if enough are in flight; returns finished requests.

        Whatever is raised, the requests under way are gone then, and the engine takes new ones.

        Raises:
            RuntimeError: while a beam search is open.
        """
        self._check_no_beams()
        with self._starting_over_if_it_fails():
            return self._step()

    def _step(self) -> list[RequestOutput]:
        finished = self._take_ready() if self._guides.any_waiting else []
        batch = self._scheduler.schedule(len(self._in_flight))
        if batch is not None:
            self._idle_clock.step_launched()
            self._note_scheduled(batch)

            def bitmask() -> Bitmask | None:
                while self._in_flight:
                    self._read_oldest(under_way=True)
                return self._guides.bitmask(batch, self._scheduler.table)

            has_guided = bool(self._scheduler.table.guided[batch.sample_slots].any())
            with explained(f"launching a step of {batch.num_tokens} tokens", _STEP_REMEDY):
                launched = self._live_worker().launch(batch, bitmask if has_guided else None)
            assert launched is not None, "a worker alone samples"
            self._in_flight.append((batch, launched))
            self._count(batch)
        finished += self._collect_ended()
        if self._in_flight and (batch is None or len(self._in_flight) > self._steps_ahead):
            self._read_oldest()
            if not self._in_flight:
                finished += self._collect_ended()
        return finished

    def beam_search(self) -> BeamSearch:
        """A beam search, which has the engine to itself until it is closed.

        Raises:
            RuntimeError: while requests are unfinished, or another search is open.
        """
        self._check_no_beams()
        if self._unfinished:
            raise RuntimeError(
                f"a beam search cannot begin while {len(self._unfinished)} requests are unfinished: finish them with "
                "step(), or abort them"
            )
        self._live_worker()
        # What is still in flight belongs to requests that have ended; its slots and blocks are the search's from now.
        self._read_all()
        self._beams = BeamSearch(self._scheduler, self._eos_token_ids, self._run_beams, self._guides.maker)
        return self._beams

    def check_beam_request(self, request: BeamRequest) -> None:
        """Check what a beam search cannot run.

        Raises:
            ValueError: as `check_request`.
        """
        self.check_beam_params(request.params)
        self.check_request(
            Request(
                request_id=request.request_id,
                prompt_token_ids=request.prompt_token_ids,
                sampling_params=SamplingParams(),
                lora_request=request.lora_request,
            )
        )

    def check_beam_params(self, params: BeamSearchParams) -> None:
        """Check what no beam search of this engine can do.

        Raises:
            ValueError: naming the field.
        """
        most = self._scheduler.limits.num_slots
        if params.beam_width > most:
            raise ValueError(
                f"beam_width={params.beam_width} is more than max_num_batched_tokens={most}: lower it, or raise "
                "max_num_batched_tokens"
            )
        self._checks.check_in_vocabulary("allowed_token_ids", params.allowed_token_ids or ())
        if params.form is not None:
            self._guides.maker(params.form, 0)

    @contextmanager
    def _starting_over_if_it_fails(self) -> Iterator[None]:
        """If a step fails, forget every request, every slot and every cached prefix.

        The step may have ended anywhere: with blocks that are shared but were never computed, or a sequence half
        admitted. What is in flight is still read later; of its rows nobody is left.
        """
        try:
            yield
        except BaseException:
            self._guides.abort(set(self._unfinished))
            self._unfinished.clear()
            self._ended.clear()
            self._scheduler.reset()
            self._idle_clock.work_ended()
            raise

    def _forget(self, request_id: str) -> None:
        """Drop a request that was not wholly taken in."""
        self._guides.abort({request_id})
        self._scheduler.abort({request_id})
        del self._unfinished[request_id]
        if not self._unfinished:
            self._idle_clock.work_ended()

    def _check_no_beams(self) -> None:
        if self._beams is not None and self._beams.is_open:
            raise RuntimeError("a beam search has the engine to itself: finish it, and close() it first")

    def _run_beams(self, batch: ScheduledBatch) -> SampledLogprobs | None:
        """Launch a beam search's step and read it."""
        self._idle_clock.step_launched()
        with explained(f"running a step of {batch.num_tokens} tokens", _STEP_REMEDY):
            launched = self._live_worker().launch(batch)
            assert launched is not None, "a worker alone samples"
            _, logprobs = launched.read()
        self._idle_clock.steps_read()
        self._count(batch)
        return logprobs

    def _count(self, batch: ScheduledBatch) -> None:
        self._num_steps += 1
        self._num_decode_rows += batch.num_decodes
        self._num_computed_tokens += batch.num_tokens
        self._num_sampled_tokens += len(batch.sample_slots)

    def _take_ready(self) -> list[RequestOutput]:
        """Hand sequences whose grammar is compiled to the scheduler; returns the requests whose grammar failed."""
        idle = not self._in_flight and not self._scheduler.has_unfinished()
        failed = []
        for sequence in self._guides.release(may_wait=idle):
            if sequence.error is None:
                self._scheduler.add(sequence)
            else:
                failed.append(FinishedSequence(sequence, [], "error", None))
        return self._collect(failed)

    def abort(self, request_ids: set[str]) -> list[RequestOutput]:
        """End these requests now; their outputs hold what was read so far."""
        ended = [one for one in self._ended if one.sequence.request.request_id in request_ids]
        self._ended = [one for one in self._ended if one.sequence.request.request_id not in request_ids]
        outputs = self._collect(ended)
        known = request_ids & self._unfinished.keys()
        waiting = [FinishedSequence(sequence, [], "abort", None) for sequence in self._guides.abort(known)]
        return [*outputs, *self._collect([*waiting, *self._scheduler.abort(known)])]

    def abort_all(self) -> list[RequestOutput]:
        """End every request."""
        return self.abort(set(self._unfinished))

    def stats(self) -> EngineStats:
        """Counts and present state."""
        blocks = self._scheduler.blocks
        idle_seconds, starved_seconds = self._idle_clock.seconds()
        return EngineStats(
            num_running=self._scheduler.table.num_running,
            num_waiting=self._scheduler.intake.num_waiting,
            kv_usage=blocks.num_held / blocks.num_usable,
            num_prompt_tokens=self._num_prompt_tokens,
            num_output_tokens=self._num_output_tokens,
            num_steps=self._num_steps,
            num_preemptions=self._scheduler.num_preemptions,
            num_decode_rows=self._num_decode_rows,
            num_computed_tokens=self._num_computed_tokens,
            num_sampled_tokens=self._num_sampled_tokens,
            idle_seconds=idle_seconds,
            starved_seconds=starved_seconds,
        )

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        args: Seq[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
        dumps: Callable[[Any], bytes] = pickle.dumps,
    ) -> list[Any]:
        """As `Worker.call`, on every rank, between steps.

        Args:
            timeout: Of ranks in other processes.
            dumps: What pickles a function for them.
        """
        worker = self._live_worker()
        if isinstance(worker, RankGang):
            return worker.call(method, tuple(args), dict(kwargs or {}), timeout=timeout, dumps=dumps)
        return [worker.call(method, args, kwargs or {})]

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes."""
        self._scheduler.blocks.reset_prefix_cache()

    def sleep(self, level: int = 1) -> None:
        """Free the memory of weights, KV and graphs until `wake_up`; every request must have ended.

        Args:
            level: 1 keeps the weights on the host, 2 reads them anew.

        Raises:
            ValueError: for several ranks.
        """
        worker = self._live_worker()
        if isinstance(worker, RankGang):
            raise ValueError(
                f"sleep(level={level}) is not supported with engines in several processes: shut the LLM down, and make "
                "it anew"
            )
        self._check_no_beams()
        assert not self._unfinished, "the caller waits, or aborts"
        self._read_all()
        self.reset_prefix_cache()
        self._scheduler.intake.adapters.forget()
        worker.sleep(keep_weights=level == 1)

    def wake_weights(self) -> None:
        """Bring the weights back from sleep."""
        worker = self._live_worker()
        assert isinstance(worker, Worker), "only these sleep"
        worker.wake_weights()

    def wake_kv_cache(self) -> None:
        """Take memory for KV again, as much as before, and capture graphs; the weights are back."""
        self._live_worker().start(self.num_kv_blocks)

    def check_integrity(self) -> None:
        """Assert the scheduler's and block manager's invariants (for tests)."""
        self._scheduler.check_integrity()

    def shutdown(self) -> None:
        """Abort everything, a beam search too, and free the device; the engine cannot be used after."""
        if self._beams is not None:
            self._beams.close()
        self.abort_all()
        self._in_flight.clear()
        self._guides.shutdown()
        if isinstance(self._worker, RankGang):
            self._worker.shutdown()
        self._worker = None

    def _make_worker(self, files: ModelFiles, launch_ranks: LauncherFactory, own_process: bool) -> Worker | RankGang:
        if self.config.num_ranks > 1 or not own_process:
            return RankGang(self.config, launch_ranks(self.config))
        return Worker(self.config, files, self.model_config, alone(choose_device(self.config)))

    def _live_worker(self) -> Worker | RankGang:
        if self._worker is None:
            raise RuntimeError("the engine was shut down")
        return self._worker

    def _read_all(self) -> None:
        """Read what is in flight, of requests that have ended."""
        with self._starting_over_if_it_fails():
            while self._in_flight:
                self._read_oldest()

    def _read_oldest(self, *, under_way: bool = False) -> None:
        """Read a step; `under_way`: the device has another one's forward pass to run."""
        batch, launched = self._in_flight.popleft()
        with explained(f"running a step of {batch.num_tokens} tokens", _STEP_REMEDY):
            token_ids, logprobs = launched.read()
        if not self._in_flight and not under_way:
            self._idle_clock.steps_read()
        self._last_read = time.monotonic()
        self._note_first_tokens(batch)
        if logprobs is not None:
            self._add_logprobs(batch, logprobs)
        self._ended += self._scheduler.update(batch, token_ids)

    def _note_scheduled(self, batch: ScheduledBatch) -> None:
        now = time.monotonic()
        for _, sequence in batch.admitted:
            self._unfinished[sequence.request.request_id].stats.scheduled(now)

    def _note_first_tokens(self, batch: ScheduledBatch) -> None:
        """Tell the requests of the sequences whose prefill ended in the step."""
        sequences, first = self._scheduler.table.sequences, batch.num_decodes
        rows = zip(batch.sample_slots[first:].tolist(), batch.sample_seq_ids[first:].tolist(), strict=True)
        for slot, seq_id in rows:
            sequence = sequences[slot]
            if sequence is not None and sequence.seq_id == seq_id:
                self._unfinished[sequence.request.request_id].stats.prefilled(self._last_read)

    def _attach_logprobs(self, sequence: Sequence) -> None:
        params, vocab_size = sequence.request.sampling_params, self.model_config.vocab_size
        if (wanted := wanted_of_outputs(params, vocab_size)) is not None:
            sequence.logprobs = PositionLogprobs(wanted, of_prompt=False)
        if (wanted := wanted_of_prompt(params, vocab_size)) is not None and sequence.index == 0:
            sequence.prompt_logprobs = PositionLogprobs(wanted, of_prompt=True)
        if params.prompt_logprob_token_ids is not None and sequence.index == 0:
            sequence.prompt_scores = PromptScores(params, sequence.num_prompt)

    def _add_logprobs(self, batch: ScheduledBatch, logprobs: SampledLogprobs) -> None:
        sequences = self._scheduler.table.sequences
        slots, seq_ids = batch.sample_slots[logprobs.rows].tolist(), batch.sample_seq_ids[logprobs.rows].tolist()
        positions = logprobs.values.positions(logprobs.wanted)
        for slot, seq_id, position in zip(slots, seq_ids, positions, strict=True):
            sequence = sequences[slot]
            if sequence is not None and sequence.seq_id == seq_id:
                assert sequence.logprobs is not None, "only rows of sequences that asked have an answer"
                sequence.logprobs.add(position)

    def _collect_ended(self) -> list[RequestOutput]:
        ended, self._ended = self._ended, []
        return self._collect(ended)

    def _collect(self, finished: list[FinishedSequence]) -> list[RequestOutput]:
        """Put ended sequences into their requests; returns the requests of which all have ended."""
        complete = []
        for ended in finished:
            request_id = ended.sequence.request.request_id
            unfinished = self._unfinished[request_id]
            unfinished.take(ended)
            if unfinished.num_missing == 0:
                del self._unfinished[request_id]
                output = unfinished.output()
                self._num_prompt_tokens += len(output.prompt_token_ids)
                num_tokens = sum(len(one.token_ids) for one in output.outputs)
                self._num_output_tokens += num_tokens
                unfinished.stats.finished(num_tokens, self._last_read)
                complete.append(output)
        if complete and not self._unfinished:
            self._idle_clock.work_ended()
        return complete
