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
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from raydata_llm.engine.structured_outputs import StructuredOutputsParams
from raydata_llm.engine.tag_grammar import tag_grammar

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

Words = npt.NDArray[np.int32]
# Tables that are kept: 0.1 MB each, and 2 MB once 16 rows have written 150 tokens of objects with bounded strings.
_KEPT = 256
# Outputs that are given one table before the next is compiled.
_OUTPUTS_A_TABLE = 8
# A table costs 0.4 ms, and its first masks 5 to 20 ms more than the same masks later.
_TABLES_A_THREAD = 4
# Grammars that take longer to compile have one table a thread.
_QUICK_SECONDS = 0.01
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
        self._compilers = ThreadPoolExecutor(max(1, min(8, num_cores // 2)), "compile-grammar")
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
        from llguidance import LLMatcher

        tokens = self._tokens.result()
        name, grammar = self._grammar(params, tokens)
        template = LLMatcher(tokens, grammar, log_level=0)
        if template.is_error():
            cause = " ".join(template.get_error().split())  # its excerpts and arrows are lines of their own
            raise ValueError(f"structured_outputs: {name} cannot be compiled: {cause}")
        return lambda: GrammarGuide(template.deep_copy(), table, self._eos_token_ids, self._mask_threads)

    def _grammar(self, params: StructuredOutputsParams, tokens: Any) -> tuple[str, str]:
        """The form's name and its grammar in llguidance's terms."""
        tags = params.tags()
        if tags is None:
            return _grammar(params)
        from llguidance import LLMatcher

        added = self._tokenizer.get_added_vocab()
        special = {text: token_id for text, token_id in added.items() if tokens.is_special_token(token_id)}
        return "structural_tag", str(LLMatcher.grammar_from_lark(tag_grammar(tags, special)))


def _grammar(params: StructuredOutputsParams) -> tuple[str, str]:
    from llguidance import LLMatcher, grammar_from

    schema = params.json_schema()
    if schema is not None:
        name = "json_object" if params.json_object else "json"
        return name, LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=_json_options(params))
    if params.regex is not None:
        return "regex", LLMatcher.grammar_from_regex(params.regex)
    if params.choice is not None:
        return "choice", grammar_from("choice", json.dumps(params.choice, ensure_ascii=False))
    assert params.grammar is not None, "it has exactly one form"
    return "grammar", grammar_from("grammar", params.grammar)


def _json_options(params: StructuredOutputsParams) -> JsonCompileOptions:
    options: JsonCompileOptions = {"whitespace_flexible": not params.disable_any_whitespace}
    if params.whitespace_pattern is not None:
        options["whitespace_pattern"] = params.whitespace_pattern
    return options
