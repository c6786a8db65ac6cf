"""Grammars that outputs must follow, compiled by threads.

Owns llguidance. A grammar is compiled while its request waits outside the scheduler; many requests with one form share
what was compiled. Knows no device and no steps.

What was compiled, a table, grows as masks are asked for, under a lock that is held for the whole of a mask: rows of one
table are served one after the other, whatever the threads. So a grammar that many rows share is compiled anew for every
few rows, up to some tables a thread: then what a thread takes from another's share is mostly a table of its own, and
rows whose masks take long (those within a bounded string) are spread.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from raydata_llm.engine.redaction import masked_logger
from raydata_llm.engine.relaxed_schema import name_literal_patterns, relax
from raydata_llm.engine.structured_outputs import StructuredOutputsParams
from raydata_llm.engine.tag_grammar import tag_grammar

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

logger = masked_logger(__name__)

Words = npt.NDArray[np.int32]
# Tables that are kept: 0.1 MB each, and 2 MB once 16 rows have written 150 tokens of objects with bounded strings.
_KEPT = 256
# Outputs that are given one table before the next is compiled.
_OUTPUTS_A_TABLE = 8
# A table costs 0.4 ms, and its first masks 5 to 20 ms more than the same masks later.
_TABLES_A_THREAD = 4
# Grammars that take longer to compile have one table a thread.
_QUICK_SECONDS = 0.01
# Alternatives that may begin at one place: llguidance allows 2,000, too few for some forms. A mask looks at 50,000 at
# most in any case, which takes 2.5 ms.
_MOST_ALTERNATIVES = 50_000
# Of the lists of texts that grammars and choices are; 120,000 labels were compiled.
_LEXER_FUEL = 20_000_000
# Rules that name each other in a row are compiled by recursion, 3 to 4 kB each: 3,000 of them end a process whose
# threads have the usual 8 MB, as no error could. Grammars' text is bounded, so that these are enough.
_STACK_BYTES = 512 << 20
_MOST_ERROR = 500
# What may stand in a JSON string as it is. llguidance takes the tokens of a slice as allowed without a look at each if
# all that the slice describes is: one slice a length serves strings that end somewhere. Its own three (10, 30, any)
# take 229 us for a mask within a string of 40 characters at most, these 139 (median of all masks: 3 us with both).
_PLAIN = r'[^"\\\x00-\x1F\x7F]'
_SLICES = [f"{_PLAIN}{{1,{length}}}" for length in (1, 2, 3, 4, 6, 8, 10, 12, 15, 20, 30)] + [f"{_PLAIN}+"]


class GrammarGuide:
    """Where one output stands in its grammar.

    Args:
        matcher: llguidance's; this guide's own.
        table: Number of what the matcher shares with others.
        eos_token_ids: What may follow a complete output, and nothing else.
        threads: llguidance's, for many guides at once.
    """

    def __init__(self, matcher: Any, table: int, eos_token_ids: tuple[int, ...], threads: Any) -> None:
        self.matcher = matcher
        self.table = table
        self.ended = False
        self.error: str | None = None
        self.threads = threads
        self.eos_token_ids = eos_token_ids

    def fork(self) -> GrammarGuide:
        """A guide at the same place that goes its own way from here."""
        return GrammarGuide(self.matcher.deep_copy(), self.table, self.eos_token_ids, self.threads)

    def advance(self, token_id: int) -> None:
        """Take in a token; `GrammarSlots` does so for many guides at once."""
        is_allowed = bool(self.matcher.consume_token(token_id))
        if not is_allowed or token_id in self.eos_token_ids:
            self.note(token_id, is_allowed=is_allowed)

    def fill(self, words: Words, row: int) -> None:
        """Write what may come next into a row of `words`, [M, W]."""
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self.matcher, words, row)

    def note(self, token_id: int, *, is_allowed: bool) -> None:
        """The matcher has taken in a token that ends the output, or could not take in the one drawn."""
        if not is_allowed:
            cause = self.matcher.get_error().split("\n")[0]
            self.error = f"ValueError: structured_outputs: no token that the grammar allows could be drawn ({cause})"
        elif not self.matcher.is_accepting():
            # llguidance allows the end where nothing else may follow, though the output is not complete.
            self.error = (
                "ValueError: structured_outputs: the output came to a place from which the form cannot be completed; "
                "properties whose names are all taken leave no way on: name them in `properties`"
            )
        self.ended = token_id in self.eos_token_ids


@dataclass
class _Form:
    """A grammar that some requests asked for: its tables, and how many outputs were given one.

    Args:
        seconds: Of a core, what its first table took; 0 until it is known.
    """

    tables: list[Future[Callable[[], GrammarGuide]]] = field(default_factory=list)
    num_outputs: int = 0
    seconds: float = 0.0


class GrammarCompiler:
    """Compiles grammars for one tokenizer, and fills masks, on threads of its own.

    Args:
        tokenizer: A fast transformers tokenizer.
        vocab_size: Of the model's logits.
        eos_token_ids: What ends a complete output.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._forms: OrderedDict[str, _Form] = OrderedDict()
        self._num_tables = self._num_kept = 0
        num_cores = os.cpu_count() or 2
        # All cores: whoever asks for masks waits for them.
        self._num_threads = min(32, num_cores)
        self._compilers = _deep_threads(max(1, min(8, num_cores // 2)))
        # Keywords of schemas that were relaxed, each told once.
        self._told: set[str] = set()
        self._telling = threading.Lock()
        # Made here, not by the threads, which would all make one.
        self._tokens: Future[Any] = self._compilers.submit(self._load_tokens)

    def compile(self, params: StructuredOutputsParams, num_outputs: int) -> Future[Callable[[], GrammarGuide]]:
        """Start compiling; the result makes a guide for each of some outputs, of one table.

        Raises:
            ValueError: (by the future) for a form that cannot be compiled.
        """
        # Properties as they stand: an object's are written in the order in which its schema names them.
        key = json.dumps(params.to_mapping())
        form = self._forms.setdefault(key, _Form())
        self._forms.move_to_end(key)
        number = form.num_outputs // _OUTPUTS_A_TABLE % (self._num_threads * _TABLES_A_THREAD)
        form.num_outputs += num_outputs
        if number >= len(form.tables):
            number = len(form.tables)
            form.tables.append(self._compilers.submit(self._make_table, form, number, params, self._num_tables))
            self._num_tables += 1
            self._num_kept += 1
            self._forget_oldest()
        return form.tables[number]

    def _forget_oldest(self) -> None:
        while self._num_kept > _KEPT and len(self._forms) > 1:
            _, form = self._forms.popitem(last=False)
            self._num_kept -= len(form.tables)

    def shutdown(self) -> None:
        """Stop the threads."""
        self._compilers.shutdown(wait=False, cancel_futures=True)

    @cached_property
    def _mask_threads(self) -> Any:
        from llguidance import LLExecutor

        return LLExecutor(self._num_threads)

    def _load_tokens(self) -> Any:
        from llguidance.hf import from_tokenizer

        if not self._eos_token_ids:
            raise ValueError("structured_outputs needs a model with an end-of-sequence token: set eos_token_id")
        try:
            size = max(self._vocab_size, len(self._tokenizer))
            return from_tokenizer(self._tokenizer, n_vocab=size, eos_token=list(self._eos_token_ids), slices=_SLICES)
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"structured_outputs needs the model's own fast tokenizer, not a {type(self._tokenizer).__name__} "
                f"({error}): leave skip_tokenizer_init and tokenizer unset"
            ) from error

    def _make_table(
        self, form: _Form, number: int, params: StructuredOutputsParams, table: int
    ) -> Callable[[], GrammarGuide]:
        """What makes guides with a table of their own, the form's `number`th; of a slow grammar, an earlier table."""
        if form.seconds > _QUICK_SECONDS and number >= self._num_threads:
            return form.tables[number % self._num_threads].result()
        self._tokens.result()
        began = time.thread_time()
        make_guide = self._compile(params, table)
        form.seconds = form.seconds or time.thread_time() - began
        return make_guide

    def _compile(self, params: StructuredOutputsParams, table: int) -> Callable[[], GrammarGuide]:
        params.check_size()
        if params.has_schema:
            params = params.with_schemas(name_literal_patterns)
        template, error = self._template(self._grammar(params))
        if error is not None and params.has_schema:
            params = self._relaxed(params, error)
            template, error = self._template(self._grammar(params))
        if error is not None:
            raise _refused(params, error)
        return lambda: GrammarGuide(template.deep_copy(), table, self._eos_token_ids, self._mask_threads)

    def _template(self, make_grammar: Callable[[], str]) -> tuple[Any, str | None]:
        """llguidance's matcher of a grammar, and why it cannot be compiled."""
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(max_items_in_row=_MOST_ALTERNATIVES, initial_lexer_fuel=_LEXER_FUEL)
        try:
            template = LLMatcher(self._tokens.result(), make_grammar(), log_level=0, limits=limits)
        except BaseException as error:  # a panic of its is no Exception; nothing interrupts these threads
            return None, f"{type(error).__name__}: {error}"
        return template, template.get_error() if template.is_error() else None

    def _relaxed(self, params: StructuredOutputsParams, error: str) -> StructuredOutputsParams:
        """The form with schemas that compile, as near to its own as that takes."""
        from llguidance import LLMatcher

        def find_error(schema: Any) -> str | None:
            options = _json_options(params)
            return self._template(lambda: LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=options))[1]

        relaxed: dict[str, None] = {}

        def relax_one(schema: Any) -> Any:
            changed, names = relax(schema, find_error)
            relaxed.update(dict.fromkeys(names))
            return changed

        try:
            changed = params.with_schemas(relax_one)
        except ValueError as refusal:
            raise _refused(params, str(refusal)) from None
        if not relaxed:
            raise _refused(params, error)
        self._tell(list(relaxed))
        return changed

    def _tell(self, names: list[str]) -> None:
        with self._telling:
            fresh = [name for name in names if name not in self._told]
            self._told.update(fresh)
        if fresh:
            logger.warning(
                "structured_outputs: grammars cannot enforce %s of JSON schemas; outputs follow the rest of their "
                "schemas and may break these (told once)",
                ", ".join(fresh),
            )

    def _grammar(self, params: StructuredOutputsParams) -> Callable[[], str]:
        """What makes the form's grammar in llguidance's terms."""
        tags = params.tags()
        if tags is None:
            return lambda: _grammar(params)
        from llguidance import LLMatcher

        tokens = self._tokens.result()
        added = self._tokenizer.get_added_vocab()
        special = {text: token_id for text, token_id in added.items() if tokens.is_special_token(token_id)}
        return lambda: LLMatcher.grammar_from_lark(tag_grammar(tags, special))


def _deep_threads(count: int) -> ThreadPoolExecutor:
    """Threads with room for deep recursion; the memory is taken as it is used."""
    made = ThreadPoolExecutor(count, "compile-grammar")
    all_there = threading.Barrier(count + 1)
    before = threading.stack_size(_STACK_BYTES)
    try:  # a thread is started for each piece of work that none is free for
        for _ in range(count):
            made.submit(all_there.wait)
    finally:
        threading.stack_size(before)
    all_there.wait()
    return made


def _refused(params: StructuredOutputsParams, error: str) -> ValueError:
    # Its excerpts, arrows and frames of a panic are lines of their own.
    cause = " ".join(error.split("<backtrace>")[0].split("\n<state>")[0].split())
    cause = cause if len(cause) <= _MOST_ERROR else f"{cause[:_MOST_ERROR]}..."
    return ValueError(f"structured_outputs: {params.form} cannot be compiled: {cause}")


def _grammar(params: StructuredOutputsParams) -> str:
    from llguidance import LLMatcher, grammar_from

    schema = params.json_schema()
    if schema is not None:
        return LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=_json_options(params))
    if params.regex is not None:
        return LLMatcher.grammar_from_regex(params.regex)
    if params.choice is not None:
        # One terminal of all: as alternatives of a rule each would be followed by itself.
        texts = (json.dumps(text, ensure_ascii=False) for text in params.choice)
        return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {' | '.join(texts)}")
    assert params.grammar is not None, "it has exactly one form"
    return grammar_from("grammar", params.grammar)


def _json_options(params: StructuredOutputsParams) -> JsonCompileOptions:
    options: JsonCompileOptions = {"whitespace_flexible": not params.disable_any_whitespace}
    if params.whitespace_pattern is not None:
        options["whitespace_pattern"] = params.whitespace_pattern
    return options
