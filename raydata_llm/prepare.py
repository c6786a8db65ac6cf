"""The first operator: `preprocess`, chat template and tokeniser for one block, as a Ray task.

Owns how a row becomes a request: which of its columns is the prompt, and what happens when one of these steps fails.
Knows no engine. Invariant: one output row for each input row, in order, with the input columns untouched; a job
that is resumed leaves out the rows that are done.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from raydata_llm.engine.engine_config import EngineConfig
from raydata_llm.engine.model_files import ModelFiles
from raydata_llm.engine.pooling_model import PoolingModel
from raydata_llm.engine.pooling_params import PoolingParams, PoolingTask
from raydata_llm.engine.prompt_embeds import Embeds, as_embeds
from raydata_llm.engine.request import LoRARequest
from raydata_llm.engine.sampling_params import SamplingParams
from raydata_llm.job_link import StatsSender
from raydata_llm.model_source import resolve_model
from raydata_llm.pooled_rows import PooledTexts, is_pair, read_pooling
from raydata_llm.pooling_prompts import PairForm, PooledPrompt
from raydata_llm.ray_blocks import block_number, block_part, block_rows
from raydata_llm.resume import ResumePlan
from raydata_llm.row_key import row_digest
from raydata_llm.row_payload import (
    CARRIED_COLUMN,
    REQUEST_COLUMN,
    ROW_FAILURES,
    TICKET_COLUMN,
    Carried,
    RowRequest,
    append_cells,
    append_packed,
    check_column_names,
    check_made_names,
    describe_failure,
    pack,
    row_error,
)
from raydata_llm.row_ticket import append_tickets
from raydata_llm.tokenizer import encode_texts, load_light_tokenizer, load_tokenizer, render_chat
from raydata_llm.vllm_settings import refuse_arguments

# Different ones of a block: each takes 150 us, and this is for mistakes that all rows have in common.
_CHECKED_PARAMS = 16
EMBEDS_COLUMN = "prompt_embeds"
Row = dict[str, Any]
RowFunction = Callable[[Row], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
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
        adapters: The folder of the adapters that rows name in their `model` column, "" where the name is the place;
            None takes no adapters.
        adapters_of: The model that such a column may name too.
        prompt_embeds: Take `prompt_embeds` for the prompt, before anything else.
        task: Of a pooling model; None generates.
        engine: The engine's settings, for a pooling model.
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
        form = PairForm(joins=model.joins_pairs, chat_template=self.chat_template)
        return PooledTexts(tokenizer, model.max_model_len(self.engine), form)

    def tokenizer(self) -> Any:
        """The model's tokenizer, loaded once per process; None if there is none."""
        if self.skip_tokenizer:
            return None
        path = resolve_model(self.model_source, weights=False)
        # Texts that are read whole, in pairs or cut, are left to transformers.
        load = load_light_tokenizer if self.task is None else load_tokenizer
        return load(path, trust_remote_code=self.trust_remote_code)


@dataclass
class _Draft:
    """One row on its way to a request."""

    row: Row
    made: Row = field(default_factory=dict)
    prompt: str | None = None
    templated: bool = False
    token_ids: Any = None
    embeds: Embeds | None = None
    error: str | None = None
    pooling: PoolingParams | None = None
    token_types: list[int] | None = None
    lora_request: LoRARequest | None = None

    @property
    def columns(self) -> Row:
        return {**self.row, **self.made}

    @property
    def carried(self) -> Row:
        """What `preprocess` made, without what the engine alone needs, which is large."""
        return self.made if self.embeds is None else {n: v for n, v in self.made.items() if n != EMBEDS_COLUMN}


def prepare(table: pa.Table, plan: PreparePlan, stats_sender: StatsSender | None = None) -> pa.Table:
    """Append a request and what passes by the replica to each row of a block.

    Args:
        table: The block.
        plan: What to do.
        stats_sender: To whom rows are told that an earlier run had written.

    Raises:
        RowError: for a row that fails, unless `plan.keep_going`.
        ValueError: for columns named like ours, or a tokenizer that cannot be loaded.
    """
    from raydata_llm.plain_errors import told_plainly  # imports Ray

    with told_plainly():
        check_column_names(table.column_names)
        tokenizer = plan.tokenizer()
    drafts = [_Draft(row) for row in block_rows(table)]
    for draft in drafts:
        _attempt(draft, plan, "preprocess", lambda draft: _preprocess(draft, plan.preprocess))
        _attempt(draft, plan, "chat template", lambda draft: _choose_prompt(draft, plan, tokenizer))
    if plan.task is None:
        _check_params(drafts, plan)
        _tokenize(drafts, plan, tokenizer)
    else:
        _tokenize_whole(drafts, plan, tokenizer)
    if plan.adapters is not None:
        for draft in drafts:
            _attempt(draft, plan, "lora", lambda draft: _choose_adapter(draft, plan))
    carried = [_carried(draft, plan) for draft in drafts]
    requests = [_request(draft, draft.columns) for draft in drafts]
    table = append_packed(table, REQUEST_COLUMN, requests)
    table = append_tickets(table, TICKET_COLUMN, requests)
    table = append_cells(table, CARRIED_COLUMN, carried)
    if plan.resume is None:
        return table
    with told_plainly():
        table = plan.resume.admit(table, requests, [draft.row for draft in drafts], [draft.made for draft in drafts])
    if stats_sender is not None and table.num_rows < len(drafts):
        stats_sender.skip_rows((block_number(), block_part()), len(drafts) - table.num_rows)
    return table


def _carried(draft: _Draft, plan: PreparePlan) -> bytes:
    """What passes by the replica, packed; a row whose values no other process can be given fails."""
    try:
        return pack(Carried(draft.carried, draft.prompt))
    except Exception as error:
        cause = describe_failure(TypeError(f"what preprocess returned cannot be sent on: {error}"), "preprocess")
        if not plan.keep_going:
            raise row_error(draft.row, cause) from error
        draft.error, draft.made, draft.prompt = draft.error or cause, {}, None
        return pack(Carried({}))


def _request(draft: _Draft, columns: Row) -> RowRequest:
    if draft.embeds is not None:
        # In whatever form they came, the same numbers are the same row.
        columns[EMBEDS_COLUMN] = draft.embeds
    digest = row_digest(columns)
    if draft.pooling is None:
        return RowRequest(
            draft.token_ids,
            columns.get("sampling_params"),
            digest,
            draft.error,
            lora_request=draft.lora_request,
            prompt_embeds=draft.embeds,
        )
    types = None if draft.token_types is None else np.asarray(draft.token_types, dtype=np.int32)
    return RowRequest(draft.token_ids, None, digest, draft.error, draft.pooling.to_mapping(), types)


def _choose_adapter(draft: _Draft, plan: PreparePlan) -> None:
    """Take the row's `model` column, where it names another model than the job's, as the name of an adapter."""
    name = draft.columns.get("model")
    if name is None or name == plan.adapters_of:
        return
    if not isinstance(name, str):
        raise TypeError(f"model={name!r} is a {type(name).__name__}: give the name of an adapter")
    draft.lora_request = LoRARequest(name, lora_path=f"{plan.adapters.rstrip('/')}/{name}" if plan.adapters else name)


def _attempt(draft: _Draft, plan: PreparePlan, stage: str, step: Callable[[_Draft], None]) -> None:
    if draft.error is not None:
        return
    try:
        step(draft)
    except ROW_FAILURES as error:
        cause = describe_failure(error, stage, draft.row if stage == "preprocess" else ())
        if not plan.keep_going:
            raise row_error(draft.row, cause) from error
        draft.error = cause


def _check_params(drafts: Sequence[_Draft], plan: PreparePlan) -> None:
    """Find a mistake in `sampling_params` before a model is loaded for it: most rows ask alike.

    The replica reads all of them, over the model's defaults.
    """
    known: set[bytes] = set()

    def check(draft: _Draft) -> None:
        given = draft.columns.get("sampling_params")
        packed = b"" if given is None else pack(given)
        if packed and packed not in known:
            SamplingParams.from_mapping(given, {"max_tokens": None})
            known.add(packed)

    for draft in drafts:
        if len(known) < _CHECKED_PARAMS:
            _attempt(draft, plan, "sampling_params", check)


def _preprocess(draft: _Draft, preprocess: RowFunction | None) -> None:
    if preprocess is None:
        return
    made = preprocess(dict(draft.row))
    if not isinstance(made, Mapping):
        raise TypeError(f"preprocess returned a {type(made).__name__}: return a dict of columns")
    check_made_names(made)
    draft.made = dict(made)


def _choose_prompt(draft: _Draft, plan: PreparePlan, tokenizer: Any) -> None:
    columns = draft.columns
    refuse_arguments(multimodal_data=columns.get("multimodal_data"))
    if plan.task == "score" and is_pair(columns) and not plan.skip_tokenizer:
        return
    if plan.prompt_embeds and columns.get(EMBEDS_COLUMN) is not None:
        draft.embeds = as_embeds(columns[EMBEDS_COLUMN])
        draft.token_ids = np.zeros(len(draft.embeds), dtype=np.int32)
        draft.prompt = columns.get("prompt")
        return
    given = {name for name in ("messages", "prompt", "tokenized_prompt") if columns.get(name) is not None}
    prefer_ids = not plan.tokenize or plan.skip_tokenizer or given == {"tokenized_prompt"}
    if "tokenized_prompt" in given and prefer_ids:
        draft.token_ids = _token_array(columns["tokenized_prompt"])
        draft.prompt = columns.get("prompt")
    elif given and plan.skip_tokenizer:
        raise KeyError("the row has text, but skip_tokenizer_init=True leaves the tokenizer out: give tokenized_prompt")
    elif "messages" in given and plan.apply_chat_template:
        draft.templated = True
        draft.prompt = render_chat(
            tokenizer,
            columns["messages"],
            chat_template=plan.chat_template,
            chat_template_kwargs=plan.chat_template_kwargs,
            tools=columns.get("tools"),
        )
    elif "prompt" in given:
        draft.prompt = _text(columns["prompt"])
    else:
        raise KeyError(_missing_prompt(columns, given))


def _missing_prompt(columns: Row, given: set[str]) -> str:
    if "messages" in given:
        return "the row has messages, but the chat template stage is off: switch it on or give prompt"
    if columns.get(EMBEDS_COLUMN) is not None:
        return f"the row has {EMBEDS_COLUMN}: set engine_kwargs={{'enable_prompt_embeds': True}} to have them taken"
    return (
        f"the row has none of messages, prompt, tokenized_prompt, only {', '.join(columns)}: "
        "let preprocess return one of them"
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"prompt={value!r} is a {type(value).__name__}: give text")
    return value


def _token_array(value: object) -> np.ndarray[Any, Any]:
    remedy = "give a list of token ids (whole numbers from 0 on)"
    token_ids = np.asarray(value)
    if token_ids.ndim != 1 or token_ids.size == 0 or token_ids.dtype.kind not in "iu":
        raise TypeError(f"tokenized_prompt={value!r} is not valid: {remedy}")
    if token_ids.min() < 0 or token_ids.max() >= 2**31:
        raise ValueError(f"tokenized_prompt={value!r} is not valid: {remedy}")
    return token_ids.astype(np.int32)


def _tokenize(drafts: Sequence[_Draft], plan: PreparePlan, tokenizer: Any) -> None:
    for templated in (False, True):
        group = [d for d in drafts if d.error is None and d.token_ids is None and d.templated == templated]
        try:
            _encode(group, tokenizer)
        except Exception:  # one bad text fails the whole call: find it
            for draft in group:
                _attempt(draft, plan, "tokenize", lambda draft: _encode([draft], tokenizer))


def _tokenize_whole(drafts: Sequence[_Draft], plan: PreparePlan, tokenizer: Any) -> None:
    """For a pooling model: pairs of texts too, and cut where a row asks for it."""
    task = plan.task
    assert task is not None

    def read(draft: _Draft) -> None:
        draft.pooling = read_pooling(draft.columns, task)

    for draft in drafts:
        _attempt(draft, plan, "pooling_params", read)
    texts = [d for d in drafts if d.error is None and d.token_ids is None and d.pooling is not None]
    encoder = plan.pooled_texts(tokenizer) if texts else None
    rows = [(draft.columns, draft.prompt, draft.pooling) for draft in texts if draft.pooling is not None]
    for draft, prompt in zip(texts, [] if encoder is None else encoder.encode(rows), strict=True):
        _attempt(draft, plan, "tokenize", functools.partial(_take_encoded, prompt))


def _take_encoded(prompt: PooledPrompt, draft: _Draft) -> None:
    if prompt.error is not None:
        raise ValueError(prompt.error.removeprefix("ValueError: "))
    draft.token_ids, draft.token_types = np.asarray(prompt.token_ids, dtype=np.int32), prompt.token_types


def _encode(group: Sequence[_Draft], tokenizer: Any) -> None:
    if not group:
        return
    texts = [draft.prompt or "" for draft in group]
    encoded = encode_texts(tokenizer, texts, add_special_tokens=not group[0].templated)
    for draft, token_ids in zip(group, encoded, strict=True):
        draft.token_ids = np.asarray(token_ids, dtype=np.int32)
