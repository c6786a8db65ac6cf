"""What the first operator is told: plain data, made on the driver, and what it loads in a task's process.

Owns which tokenizer a task uses, and how a pooling model takes texts. Knows no rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.model_files import ModelFiles
from raydata_llm.engine.pooling_model import PoolingModel
from raydata_llm.engine.pooling_params import PoolingTask
from raydata_llm.model_source import resolve_model
from raydata_llm.pooled_rows import PooledTexts
from raydata_llm.pooling_prompts import PairForm
from raydata_llm.resume import ResumePlan
from raydata_llm.tokenizer import load_light_tokenizer, load_tokenizer

Row = dict[str, Any]
RowFunction = Callable[[Row], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True, repr=False)
class PreparePlan:
    """What the first operator is told; it travels to its tasks.

    Args:
        model_source: Where the tokenizer comes from.
        skip_tokenizer: There is none: rows bring `tokenized_prompt`.
        trust_remote_code: Run code that comes with the tokenizer.
        preprocess: The user's function of a row; None leaves rows as they are.
        apply_chat_template: Whether `messages` are taken.
        chat_template: Instead of the model's own.
        chat_template_kwargs: Variables of the template.
        tokenize: Off, `tokenized_prompt` is taken before anything else.
        keep_going: Turn failures into error rows instead of raising.
        resume: Leave out rows that are committed.
        adapters: The folder of the adapters that rows name in their `model` column, "" for none; None takes no
            adapters.
        adapter_sources: Other places that rows may name there.
        adapters_of: The model that such a column may name too.
        prompt_embeds: Take `prompt_embeds` for the prompt, before anything else.
        task: Of a pooling model; None generates.
        engine: The engine's settings.
    """

    model_source: str
    skip_tokenizer: bool = False
    trust_remote_code: bool = False
    preprocess: RowFunction | None = None
    apply_chat_template: bool = True
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    tokenize: bool = True
    keep_going: bool = False
    resume: ResumePlan | None = None
    adapters: str | None = None
    adapter_sources: tuple[str, ...] = ()
    adapters_of: str = ""
    prompt_embeds: bool = False
    task: PoolingTask | None = None
    engine: EngineConfig | None = None

    def pooled_texts(self, tokenizer: Any) -> PooledTexts:
        """How a pooling model takes texts, as its files and the settings say."""
        assert self.engine is not None, "a plan with a task has the engine's settings"
        path = resolve_model(self.model_source, weights=False)
        files = ModelFiles.open(path, load_format="dummy", hf_overrides=self.engine.hf_overrides)
        model = PoolingModel.open(files, self.engine)
        form = PairForm(
            joins=model.joins_pairs, chat_template=self.chat_template, chat_template_kwargs=self.chat_template_kwargs
        )
        return PooledTexts(tokenizer, model.max_model_len(self.engine), form)

    @functools.cached_property
    def most_tokens(self) -> int | None:
        """Tokens that a prompt may have, by the settings or the model's files; None where only the engine knows."""
        if self.engine is None:
            return None
        given = self.engine.max_model_len
        if given is not None and given > 0:
            return given - 1
        try:
            path = resolve_model(self.engine.model, weights=False)
            files = ModelFiles.open(path, load_format="dummy", hf_overrides=self.engine.hf_overrides)
            return files.model_config().context_length - 1
        except (OSError, ValueError):
            return None  # whatever is wrong with them, the replica says it

    def tokenizer(self) -> Any:
        """The model's tokenizer, loaded once per process; None if there is none."""
        if self.skip_tokenizer:
            return None
        path = resolve_model(self.model_source, weights=False)
        # Texts that are read whole, in pairs or cut, are left to transformers.
        load = load_light_tokenizer if self.task is None else load_tokenizer
        return load(path, trust_remote_code=self.trust_remote_code)
