"""Grammars that outputs must follow: compiled by threads, followed token by token, and asked for masks.

Owns llguidance. A grammar is compiled while its request waits outside the scheduler; many requests with one form share
what was compiled. Knows no device and no steps.

What was compiled, a table, grows as masks are asked for, under a lock: rows of one table are served one after the
other, whatever the threads. So a grammar that many rows share is compiled once a thread, and the rows that follow are
dealt out to its tables.
"""

from __future__ import annotations

import json
import os
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
# Grammars whose tables are kept: a few 100 KB each.
_KEPT = 64
# Outputs that are given one table before the next is compiled.
_OUTPUTS_A_TABLE = 32


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
        self._eos_token_ids = eos_token_ids

    def fork(self) -> GrammarGuide:
        """A guide at the same place that goes its own way from here."""
        return GrammarGuide(self.matcher.deep_copy(), self.table, self._eos_token_ids, self.threads)

    def note(self, token_id: int, *, is_allowed: bool) -> None:
        """The matcher has taken in a drawn token, or could not."""
        if not is_allowed:
            cause = self.matcher.get_error().split("\n")[0]
            self.error = f"ValueError: structured_outputs: no token that the grammar allows could be drawn ({cause})"
        self.ended = token_id in self._eos_token_ids


def advance_grammars(drawn: list[tuple[GrammarGuide, int]]) -> None:
    """Take in what was drawn for these guides, each once, on many threads."""
    if not drawn:
        return
    from llguidance.numpy import consume_token_par

    drawn.sort(key=lambda pair: pair[0].table)
    allowed = consume_token_par(drawn[0][0].threads, [(guide.matcher, token_id) for guide, token_id in drawn])
    for (guide, token_id), is_allowed in zip(drawn, allowed, strict=True):
        guide.note(token_id, is_allowed=is_allowed)


def fill_grammars(guides: list[tuple[int, GrammarGuide]], words: Words) -> None:
    """Write each guide's mask into its row of `words`, [M, W], on many threads."""
    if not guides:
        return
    from llguidance.numpy import fill_next_token_bitmask_par

    # A thread takes neighbours: these should be of one table.
    guides.sort(key=lambda pair: pair[1].table)
    fill_next_token_bitmask_par(guides[0][1].threads, [(guide.matcher, row) for row, guide in guides], words)


@dataclass
class _Form:
    """A grammar that some requests asked for: its tables, and how many outputs were given one."""

    tables: list[Future[Callable[[], GrammarGuide]]] = field(default_factory=list)
    num_outputs: int = 0


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
        self._num_tables = 0
        num_cores = os.cpu_count() or 2
        self._num_mask_threads = max(1, min(32, num_cores * 4 // 5))
        self._threads = ThreadPoolExecutor(max(1, min(8, num_cores // 2)), "compile-grammar")
        # Made here, not by the threads, which would all make one.
        self._tokens: Future[Any] = self._threads.submit(self._load_tokens)

    def compile(self, params: StructuredOutputsParams, num_outputs: int) -> Future[Callable[[], GrammarGuide]]:
        """Start compiling; the result makes a guide for each of a request's outputs.

        Raises:
            ValueError: (by the future) for a form that cannot be compiled.
        """
        key = json.dumps(params.to_mapping(), sort_keys=True)
        form = self._forms.setdefault(key, _Form())
        self._forms.move_to_end(key)
        if len(self._forms) > _KEPT:
            self._forms.popitem(last=False)
        number = form.num_outputs // _OUTPUTS_A_TABLE % self._num_mask_threads
        form.num_outputs += num_outputs
        if number >= len(form.tables):
            number = len(form.tables)
            form.tables.append(self._threads.submit(self._compile, params, self._num_tables))
            self._num_tables += 1
        return form.tables[number]

    def shutdown(self) -> None:
        """Stop the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    @cached_property
    def _mask_threads(self) -> Any:
        from llguidance import LLExecutor

        return LLExecutor(self._num_mask_threads)

    def _load_tokens(self) -> Any:
        from llguidance.hf import from_tokenizer

        if not self._eos_token_ids:
            raise ValueError("structured_outputs needs a model with an end-of-sequence token: set eos_token_id")
        try:
            size = max(self._vocab_size, len(self._tokenizer))
            return from_tokenizer(self._tokenizer, n_vocab=size, eos_token=list(self._eos_token_ids))
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"structured_outputs needs the model's own fast tokenizer, not a {type(self._tokenizer).__name__} "
                f"({error}): leave skip_tokenizer_init and tokenizer unset"
            ) from error

    def _compile(self, params: StructuredOutputsParams, table: int) -> Callable[[], GrammarGuide]:
        from llguidance import LLMatcher

        tokens = self._tokens.result()
        form, grammar = self._grammar(params, tokens)
        template = LLMatcher(tokens, grammar, log_level=0)
        if template.is_error():
            raise ValueError(f"structured_outputs: {form} cannot be compiled: {template.get_error().strip()}")
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
