"""Outputs whose next token depends on those before it: what may be drawn is settled on the host.

Owns which guides a request has, the requests that wait for their grammar, outside the scheduler, and what each step's
guided rows may draw: a bitmask of allowed tokens, and users' own functions of the logits.

A guided row needs its last token on the host before its next draw, not before its next forward pass. So a step with
guided rows is launched in two parts: the forward pass, at once; and, while the device runs it, the step before is read,
guides take in its tokens, threads fill the masks, and then the draw is launched. Rows without a guide are in every step
as ever: what they may wait for is a host that takes longer for the masks than the device for the forward pass. Steps
without guided rows are launched whole, as far ahead as is set.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from raydata_llm.engine.bad_words import BadWords, BadWordsGuide, bad_word_tokens
from raydata_llm.engine.batch import ScheduledBatch
from raydata_llm.engine.bits import clear_bits
from raydata_llm.engine.detokenizer import TextEncoder
from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.grammar import GrammarCompiler, GrammarGuide, Words
from raydata_llm.engine.logits_processor import LogitsProcessor, RequestProcessor, load_logits_processors
from raydata_llm.engine.redaction import redact
from raydata_llm.engine.sampling_params import SamplingParams
from raydata_llm.engine.sequence import Sequence, SequenceTable
from raydata_llm.engine.structured_outputs import StructuredOutputsParams
from raydata_llm.engine.thinking import Markers, ThinkingEnd, ThinkingGuide

# How long a step waits for a grammar when there is nothing else to do.
_WAIT_SECONDS = 0.05
# Rows that memory for words is made for at first.
_ROWS_AT_FIRST = 256
# Lists of bad words whose tokens are kept.
_KEPT = 256


class Guide(Protocol):
    """Follows one output and says what may not come next."""

    def advance(self, token_id: int) -> None:
        """Take in a drawn token."""
        ...

    def forbid(self, words: Words) -> None:
        """Clear the bits of tokens that may not follow the output so far."""
        ...


@dataclass(frozen=True)
class Bitmask:
    """What M of a step's sampled rows may draw.

    Args:
        rows: [M] their numbers.
        words: [M, W] int32 on the host, a bit a token; pinned where a GPU reads it. The next bitmask overwrites them.
        processors: Number of a row, and what is made of its logits, [V] float32.
    """

    rows: npt.NDArray[np.int64]
    words: torch.Tensor
    processors: list[tuple[int, Callable[[torch.Tensor], torch.Tensor]]] = field(default_factory=list)


@dataclass
class _Waiting:
    sequence: Sequence
    make_guide: Future[Callable[[], GrammarGuide]]


def _settings_of(config: EngineConfig, vocab_size: int) -> Any:
    """What vLLM's classes of logits processors read of its `vllm_config`."""
    model = SimpleNamespace(model=config.model, seed=config.seed, get_vocab_size=lambda: vocab_size)
    scheduler = SimpleNamespace(max_num_seqs=config.max_num_seqs or 1024)
    return SimpleNamespace(model_config=model, scheduler_config=scheduler, speculative_config=None)


class Guides:
    """See the module's docstring.

    Args:
        config: The engine's settings.
        tokenizer: The model's; None if it was left out.
        device_type: Where logits are, as torch names it.

    Raises:
        ValueError: for `logits_processors` that cannot be loaded.
    """

    def __init__(
        self,
        config: EngineConfig,
        tokenizer: Any,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        *,
        device_type: str,
    ) -> None:
        self._tokenizer = tokenizer
        self._reasoning_config, self._reasoning_parser = config.reasoning_config, config.reasoning_parser
        self._processors = load_logits_processors(
            config.logits_processors, vocab_size, torch.device(device_type), _settings_of(config, vocab_size)
        )
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._pinned = device_type == "cuda"
        self._words = torch.empty((0, 0), dtype=torch.int32)
        self._json_style: dict[str, Any] = {
            name: True for name, wanted in config.structured_outputs_config.items() if wanted
        }
        self._compiler: GrammarCompiler | None = None
        self._waiting: list[_Waiting] = []
        # Most rows ask alike, and 50 words take the thread that feeds the device 1 ms or more.
        self._bad_words = lru_cache(maxsize=_KEPT)(self._encoded_bad_words)
        self._markers = lru_cache(maxsize=2)(self._encoded_markers)

    @property
    def any_waiting(self) -> bool:
        """Whether a request waits for its grammar."""
        return bool(self._waiting)

    def attach(self, sequence: Sequence) -> None:
        """Give a new sequence the guides that its request asks for, but for its grammar's.

        Raises:
            ValueError: for a request that cannot be guided.
        """
        params = sequence.request.sampling_params
        if params.bad_words:
            sequence.guides.append(BadWordsGuide(self._bad_words(tuple(params.bad_words))))
        if params.thinking_token_budget is not None:
            budget, prompt = params.thinking_token_budget, sequence.prompt_token_ids
            sequence.guides.append(ThinkingGuide(self._markers("thinking_token_budget"), budget, prompt))
        if params.structured_outputs is not None and self._reasoning_parser:
            sequence.thinking = ThinkingEnd(self._markers("reasoning_parser"), sequence.prompt_token_ids)
        made = (_request_processor(processor, params) for processor in self._processors)
        sequence.processors = [one for one in made if one is not None]

    def _encoded_bad_words(self, words: tuple[str, ...]) -> BadWords:
        sequences = bad_word_tokens(self._encoder("bad_words"), words)
        # A tokenizer may have more tokens than its model, which writes none of these.
        return BadWords([one for one in sequences if max(one) < self._vocab_size])

    def _encoded_markers(self, name: str) -> Markers:
        markers = Markers.of(self._encoder(name), self._reasoning_config, self._reasoning_parser)
        if max(markers.end) >= self._vocab_size:
            raise ValueError(
                f"{name} needs a model that can end its thinking: token {max(markers.end)} of the "
                f"marker is outside its vocabulary of {self._vocab_size} tokens; set reasoning_config, or leave it out"
            )
        return markers

    def _encoder(self, name: str) -> TextEncoder:
        if self._tokenizer is None or not hasattr(self._tokenizer, "encode"):
            raise ValueError(f"{name} needs the model's tokenizer: load it (skip_tokenizer_init=False)")
        encoder: TextEncoder = self._tokenizer
        return encoder

    def hold(self, sequences: list[Sequence]) -> None:
        """Keep a request's sequences until the grammar of its output is compiled."""
        params = sequences[0].request.sampling_params.structured_outputs
        assert params is not None
        self._waiting += [_Waiting(sequence, self._compile(params, 1)) for sequence in sequences]

    def maker(self, params: StructuredOutputsParams, num_outputs: int) -> Callable[[], GrammarGuide]:
        """What makes guides of a grammar, once it is compiled, which is waited for.

        Args:
            num_outputs: How many outputs will have a guide; 0 to see whether it can be compiled.

        Raises:
            ValueError: for a form that cannot be compiled.
        """
        return self._compile(params, num_outputs).result()

    def _compile(self, params: StructuredOutputsParams, num_outputs: int) -> Future[Callable[[], GrammarGuide]]:
        if self._compiler is None:
            self._compiler = GrammarCompiler(self._tokenizer, self._vocab_size, self._eos_token_ids)
        if self._json_style:
            params = replace(params, **self._json_style)
        return self._compiler.compile(params, num_outputs)

    def release(self, *, may_wait: bool) -> list[Sequence]:
        """The sequences whose grammar is compiled, or failed (then `error` is set).

        Args:
            may_wait: There is nothing else to do.
        """
        if may_wait:
            wait([one.make_guide for one in self._waiting], _WAIT_SECONDS, FIRST_COMPLETED)
        ready: list[_Waiting] = []
        waiting: list[_Waiting] = []
        for one in self._waiting:
            (ready if one.make_guide.done() else waiting).append(one)
        self._waiting = waiting
        return [_with_guide(one) for one in ready]

    def abort(self, request_ids: set[str]) -> list[Sequence]:
        """Forget requests that wait; returns their sequences."""
        gone = [one for one in self._waiting if one.sequence.request.request_id in request_ids]
        self._waiting = [one for one in self._waiting if one.sequence.request.request_id not in request_ids]
        return [one.sequence for one in gone]

    def bitmask(self, batch: ScheduledBatch, table: SequenceTable) -> Bitmask | None:
        """What the step's guided rows may draw; all tokens that were drawn must be known.

        So all steps before it have been read, and the words of the last bitmask are free to be overwritten.
        """
        slots = batch.sample_slots
        live = table.guided[slots] & (table.seq_id[slots] == batch.sample_seq_ids)
        rows = np.flatnonzero(live)
        if not len(rows):
            return None
        slots = slots[rows]
        tensor = self._words_of(len(rows), table.num_slots)
        words: Words = tensor.numpy()
        table.grammars.fill(slots, words)
        for place in np.flatnonzero(table.num_known[slots] < table.min_tokens[slots]).tolist():
            _forbid_end(words[place], table.sequence(slots[place]))
        processors: list[tuple[int, Callable[[torch.Tensor], torch.Tensor]]] = []
        for place in np.flatnonzero(table.guided_singly[slots]).tolist():
            sequence = table.sequence(slots[place])
            for guide in sequence.guides:
                guide.forbid(words[place])
            if sequence.processors:
                # Made for these alone: a list of 4,000 tokens takes 11 us, in each step.
                prompt, written = sequence.prompt_token_ids.tolist(), table.output_token_ids(slots[place])
                row = int(rows[place])
                processors += [(row, partial(process, prompt, written)) for process in sequence.processors]
        return Bitmask(rows, tensor, processors)

    def _words_of(self, num_rows: int, most_rows: int) -> torch.Tensor:
        """Memory for so many rows' words, the same each time: to pin some waits for the device."""
        if num_rows > len(self._words):
            held = min(most_rows, max(_ROWS_AT_FIRST, 1 << (num_rows - 1).bit_length()))
            shape = (held, -(-self._vocab_size // 32))
            self._words = torch.empty(shape, dtype=torch.int32, pin_memory=self._pinned)
        return self._words[:num_rows]

    def shutdown(self) -> None:
        """Stop the threads."""
        if self._compiler is not None:
            self._compiler.shutdown()


def _request_processor(processor: LogitsProcessor, params: SamplingParams) -> RequestProcessor | None:
    """What a user's class makes of a request; whatever it raises is that request's error, not the engine's end."""
    try:
        return processor.new_request_processor(params)
    except ValueError:
        raise
    except Exception as error:
        name = getattr(processor, "name", type(processor).__name__)
        raise ValueError(
            f"extra_args={params.extra_args!r} is not valid: {name}.new_request_processor raised "
            f"{type(error).__name__}: {error}"
        ) from error


def _forbid_end(words: Words, sequence: Sequence) -> None:
    """Nothing that ends the output, unless it is complete: then nothing else is left."""
    without = words.copy()
    clear_bits(without, sequence.stop_token_ids)
    if without.any():
        words[:] = without


def _with_guide(one: _Waiting) -> Sequence:
    try:
        one.sequence.grammar = one.make_guide.result()()
    except Exception as failure:
        one.sequence.error = redact(f"{type(failure).__name__}: {failure}")
    return one.sequence
