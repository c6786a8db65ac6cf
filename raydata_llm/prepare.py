"""The first operator: `preprocess`, chat template and tokeniser for one block, as a Ray task.

Owns the order of the steps by which a row becomes a request, and what happens when one of them fails; which of its
columns is the prompt is `row_draft.py`'s. Knows no engine. Invariant: one output row for each input row, in order, with
the input columns untouched; a job that is resumed leaves out the rows that are done.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from raydata_llm.arrow_values import ArrowRow
from raydata_llm.engine.sampling_params import SamplingParams
from raydata_llm.job_link import StatsSender
from raydata_llm.least_tokens import LONG_TEXT, TOO_LONG, check_length
from raydata_llm.pooled_rows import read_pooling
from raydata_llm.pooling_prompts import PooledPrompt
from raydata_llm.prepare_plan import PreparePlan, RowFunction
from raydata_llm.ray_blocks import block_number, block_part, block_rows
from raydata_llm.redaction import masked_errors
from raydata_llm.row_draft import EMBEDS_COLUMN, Draft, choose_adapter, choose_prompt, read_asked
from raydata_llm.row_key import row_digest
from raydata_llm.row_payload import (
    CARRIED_COLUMN,
    REQUEST_COLUMN,
    TICKET_COLUMN,
    Carried,
    RowRequest,
    append_cells,
    check_column_names,
    check_made_names,
    describe_failure,
    error_text,
    pack,
    raise_if_cancelled,
    row_error,
)
from raydata_llm.row_ticket import append_tickets
from raydata_llm.tokenizer import encode_texts

# Different ones of a block: each takes 150 us, and this is for mistakes that all rows have in common.
_CHECKED_PARAMS = 16


@masked_errors()
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
    drafts = [Draft(row) for row in block_rows(table)]
    for draft in drafts:
        _read_row(draft, plan)
        _attempt(draft, plan, "chat template", lambda draft: choose_prompt(draft, plan, tokenizer))
    if plan.task is None:
        _check_params(drafts, plan)
        _tokenize(drafts, plan, tokenizer)
    else:
        _tokenize_whole(drafts, plan, tokenizer)
    if plan.adapters is not None:
        for draft in drafts:
            _attempt(draft, plan, "lora", lambda draft: choose_adapter(draft, plan))
    carried = [_carried(draft, plan) for draft in drafts]
    requests, cells = zip(*(_request(draft, plan) for draft in drafts), strict=True) if drafts else ((), ())
    table = append_cells(table, REQUEST_COLUMN, cells)
    table = append_tickets(table, TICKET_COLUMN, requests)
    table = append_cells(table, CARRIED_COLUMN, carried)
    if plan.resume is None:
        return table
    with told_plainly():
        table = plan.resume.admit(table, requests, [draft.row for draft in drafts], [draft.made for draft in drafts])
    if stats_sender is not None and table.num_rows < len(drafts):
        stats_sender.skip_rows((block_number(), block_part()), len(drafts) - table.num_rows)
    return table


def _read_row(draft: Draft, plan: PreparePlan) -> None:
    def preprocess(draft: Draft) -> None:
        # Before the user's function, which may change what the row holds.
        arrow = ArrowRow(None if plan.preprocess is None else draft.row)
        _preprocess(draft, plan.preprocess)
        arrows.append(arrow)

    arrows: list[ArrowRow] = []
    _attempt(draft, plan, "preprocess", preprocess)
    _attempt(draft, plan, "columns", lambda draft: read_asked(draft, arrows[0]))


def _carried(draft: Draft, plan: PreparePlan) -> bytes:
    """What passes by the replica, packed; a row whose values no other process can be given fails."""
    try:
        return pack(Carried(draft.carried, draft.prompt))
    except BaseException as error:
        _refuse_unsendable(draft, plan, error)
        return pack(Carried({}))


def _refuse_unsendable(draft: Draft, plan: PreparePlan, error: BaseException) -> None:
    raise_if_cancelled(error)
    cause = describe_failure(
        f"TypeError: what preprocess returned cannot be sent on: {error_text(error)}", "preprocess"
    )
    if not plan.keep_going:
        raise row_error(draft.row, cause) from error
    draft.error, draft.made, draft.asked, draft.prompt = draft.error or cause, {}, {}, None


def _request(draft: Draft, plan: PreparePlan) -> tuple[RowRequest, bytes]:
    """The row's request, and the same packed; a row whose parameters no other process can be given fails."""
    request = _make_request(draft)
    try:
        return request, pack(request)
    except BaseException as error:
        _refuse_unsendable(draft, plan, error)
        request = RowRequest(None, None, request.digest, draft.error)
        return request, pack(request)


def _make_request(draft: Draft) -> RowRequest:
    columns = draft.columns
    if draft.embeds is not None:
        # In whatever form they came, the same numbers are the same row.
        columns[EMBEDS_COLUMN] = draft.embeds
    digest = row_digest(columns)
    if draft.pooling is None:
        return RowRequest(
            draft.token_ids,
            draft.asked.get("sampling_params"),
            digest,
            draft.error,
            lora_request=draft.lora_request,
            prompt_embeds=draft.embeds,
            lora_root=draft.lora_root,
        )
    types = None if draft.token_types is None else np.asarray(draft.token_types, dtype=np.int32)
    return RowRequest(draft.token_ids, None, digest, draft.error, draft.pooling.to_mapping(), types)


def _attempt(draft: Draft, plan: PreparePlan, stage: str, step: Callable[[Draft], None]) -> None:
    if draft.error is not None:
        return
    try:
        step(draft)
    except BaseException as error:
        raise_if_cancelled(error)
        cause = describe_failure(error, stage, draft.row if stage == "preprocess" else ())
        if not plan.keep_going:
            raise row_error(draft.row, cause) from error
        draft.error = cause


def _check_params(drafts: Sequence[Draft], plan: PreparePlan) -> None:
    """Find a mistake in `sampling_params` before a model is loaded for it: most rows ask alike.

    The replica reads all of them, over the model's defaults.
    """
    known: set[bytes] = set()

    def check(draft: Draft) -> None:
        given = draft.asked.get("sampling_params")
        packed = b"" if given is None else pack(given)
        if packed and packed not in known:
            SamplingParams.from_mapping(given, {"max_tokens": None})
            known.add(packed)

    for draft in drafts:
        if len(known) < _CHECKED_PARAMS:
            _attempt(draft, plan, "sampling_params", check)


def _preprocess(draft: Draft, preprocess: RowFunction | None) -> None:
    if preprocess is None:
        return
    made = preprocess(dict(draft.row))
    if not isinstance(made, Mapping):
        raise TypeError(f"preprocess returned a {type(made).__name__}: return a dict of columns")
    check_made_names(made)
    draft.made = dict(made)


def _tokenize(drafts: Sequence[Draft], plan: PreparePlan, tokenizer: Any) -> None:
    for draft in drafts:
        if draft.token_ids is None:
            _attempt(draft, plan, "tokenize", lambda draft: _check_length(draft, plan, tokenizer))
    for templated in (False, True):
        group = [d for d in drafts if d.error is None and d.token_ids is None and d.templated == templated]
        try:
            _encode(group, tokenizer)
        except BaseException as error:  # one bad text fails the whole call: find it
            raise_if_cancelled(error)
            for draft in group:
                _attempt(draft, plan, "tokenize", lambda draft: _encode([draft], tokenizer))


def _check_length(draft: Draft, plan: PreparePlan, tokenizer: Any) -> None:
    """Refuse a text that is far too long, unless it is to be cut: tokenising 10 MB takes a minute and gigabytes."""
    text = draft.prompt or ""
    if len(text) < LONG_TEXT or plan.most_tokens is None:
        return
    params = draft.columns.get("sampling_params")
    keep = params.get("truncate_prompt_tokens") if isinstance(params, Mapping) else None
    if keep is None and getattr(params, "truncate_prompt_tokens", None) is None:
        check_length(tokenizer, text, plan.most_tokens, TOO_LONG)


def _tokenize_whole(drafts: Sequence[Draft], plan: PreparePlan, tokenizer: Any) -> None:
    """For a pooling model: pairs of texts too, and cut where a row asks for it."""
    task = plan.task
    assert task is not None

    def read(draft: Draft) -> None:
        draft.pooling = read_pooling(draft.asked, task)

    for draft in drafts:
        _attempt(draft, plan, "pooling_params", read)
    texts = [d for d in drafts if d.error is None and d.token_ids is None and d.pooling is not None]
    encoder = plan.pooled_texts(tokenizer) if texts else None
    rows = [(draft.asked, draft.prompt, draft.pooling) for draft in texts if draft.pooling is not None]
    for draft, prompt in zip(texts, [] if encoder is None else encoder.encode(rows), strict=True):
        _attempt(draft, plan, "tokenize", functools.partial(_take_encoded, prompt))


def _take_encoded(prompt: PooledPrompt, draft: Draft) -> None:
    if prompt.error is not None:
        raise ValueError(prompt.error.removeprefix("ValueError: "))
    draft.token_ids, draft.token_types = np.asarray(prompt.token_ids, dtype=np.int32), prompt.token_types


def _encode(group: Sequence[Draft], tokenizer: Any) -> None:
    if not group:
        return
    texts = [draft.prompt or "" for draft in group]
    encoded = encode_texts(tokenizer, texts, add_special_tokens=not group[0].templated)
    for draft, token_ids in zip(group, encoded, strict=True):
        draft.token_ids = np.asarray(token_ids, dtype=np.int32)
