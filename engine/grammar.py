"""Grammars that outputs must follow: compiled by threads, followed token by token, and asked for masks.

Owns llguidance. A grammar is compiled while its request waits outside the scheduler; many requests with one form share
what was compiled. Knows no device and no steps.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from raydata_llm.engine.structured_outputs import StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

Words = npt.NDArray[np.int32]
# Compiled grammars that are kept: a few 100 KB each.
_KEPT = 64


class GrammarGuide:
    """Where one output stands in its grammar.

    Args:
        matcher: llguidance's; this guide's own.
        eos_token_ids: What may follow a complete output, and nothing else.
    """

    def __init__(self, matcher: Any, eos_token_ids: tuple[int, ...]) -> None:
        self.matcher = matcher
        self.ended = False
        self.error: str | None = None
        self._eos_token_ids = eos_token_ids

    def advance(self, token_id: int) -> None:
        """Take in a drawn token."""
        if not self.matcher.consume_token(token_id):
            cause = self.matcher.get_error().split("\n")[0]
            self.error = f"ValueError: structured_outputs: no token that the grammar allows could be drawn ({cause})"
        self.ended = token_id in self._eos_token_ids

    def forbid(self, words: Words, token_ids: list[int]) -> None:
        """Nothing: `GrammarCompiler.fill` has done it, for all rows at once."""


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
        self._compiled: OrderedDict[str, Future[Any]] = OrderedDict()
        self._threads = ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 2) // 2)), "compile-grammar")
        # Made here, not by the threads, which would all make one.
        self._tokens: Future[Any] = self._threads.submit(self._load_tokens)

    def compile(self, params: StructuredOutputsParams) -> Future[Callable[[], GrammarGuide]]:
        """Start compiling; the result makes a guide for an output.

        Raises:
            ValueError: (by the future) for a form that cannot be compiled.
        """
        key = json.dumps(params.to_mapping(), sort_keys=True)
        if key not in self._compiled:
            self._compiled[key] = self._threads.submit(self._compile, params)
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        return self._compiled[key]

    def fill(self, guides: list[tuple[int, GrammarGuide]], words: Words) -> None:
        """Write each guide's mask into its row of `words`, [M, W], on many threads."""
        from llguidance.numpy import fill_next_token_bitmask_par

        fill_next_token_bitmask_par(self._mask_threads, [(guide.matcher, row) for row, guide in guides], words)

    def shutdown(self) -> None:
        """Stop the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    @cached_property
    def _mask_threads(self) -> Any:
        from llguidance import LLExecutor

        return LLExecutor()

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

    def _compile(self, params: StructuredOutputsParams) -> Callable[[], GrammarGuide]:
        from llguidance import LLMatcher

        form, grammar = _grammar(params)
        tokens = self._tokens.result()
        template = LLMatcher(tokens, grammar, log_level=0)
        if template.is_error():
            raise ValueError(f"structured_outputs: {form} cannot be compiled: {template.get_error().strip()}")
        return lambda: GrammarGuide(template.deep_copy(), self._eos_token_ids)


def _grammar(params: StructuredOutputsParams) -> tuple[str, str]:
    """The form's name and its grammar in llguidance's terms."""
    from llguidance import LLMatcher, grammar_from

    schema = params.json_schema()
    if schema is not None:
        name = "json_object" if params.json_object else "json"
        return name, LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=_json_options(params))
    if params.regex is not None:
        return "regex", LLMatcher.grammar_from_regex(params.regex)
    if params.choice is not None:
        return "choice", grammar_from("choice", json.dumps(params.choice, ensure_ascii=False))
    if params.grammar is not None:
        return "grammar", grammar_from("grammar", params.grammar)
    return "structural_tag", _tag_grammar(params)


def _json_options(params: StructuredOutputsParams) -> JsonCompileOptions:
    options: JsonCompileOptions = {"whitespace_flexible": not params.disable_any_whitespace}
    if params.whitespace_pattern is not None:
        options["whitespace_pattern"] = params.whitespace_pattern
    return options


def _tag_grammar(params: StructuredOutputsParams) -> str:
    from llguidance import LLMatcher, StructTag

    tags = [
        StructTag(trigger=tag["trigger"], begin=tag["begin"], grammar=tag["schema"], end=tag["end"])
        for tag in params.tags() or ()
    ]
    return str(LLMatcher.grammar_from_lark(StructTag.to_grammar(tags)))
