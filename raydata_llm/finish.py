"""The third operator: detokeniser and `postprocess` for one block, as a Ray task.

Owns the columns that a row has after the engine, and the shape of error rows. Knows no engine. Invariant: one output
row for each input row, in order.
"""

from __future__ import annotations

import functools
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from raydata_llm.block_memory import memory_of
from raydata_llm.engine.detokenizer import PromptTokens, output_text
from raydata_llm.engine.pooling_params import PoolingTask
from raydata_llm.engine.pooling_request import PoolingOutput, PoolingRequestOutput
from raydata_llm.engine.request import CompletionOutput, Logprob, RequestOutput
from raydata_llm.engine.rust_panics import no_panic
from raydata_llm.engine.sampling_params import SamplingParams
from raydata_llm.error_kinds import error_kinds
from raydata_llm.job_link import StatsSender
from raydata_llm.model_source import resolve_model
from raydata_llm.odd_values import why_too_deep
from raydata_llm.output_table import ASKED_COLUMNS, OUTPUT_COLUMNS, POOLED_COLUMNS, OutputRows
from raydata_llm.pooled_rows import CONSUMED_COLUMNS, pooled_columns
from raydata_llm.prepare_plan import Row, RowFunction
from raydata_llm.ray_blocks import block_number, block_part, block_rows, execution_id
from raydata_llm.redaction import masked_errors, masked_logger, redact
from raydata_llm.resume import mark_failed
from raydata_llm.row_payload import (
    CARRIED_COLUMN,
    ERROR_COLUMN,
    OUTPUT_COLUMN,
    REQUEST_COLUMN,
    RESERVED_COLUMNS,
    RESUME_COLUMN,
    Carried,
    RowOutput,
    RowRequest,
    check_made_names,
    describe_failure,
    error_text,
    open_block,
    raise_if_cancelled,
    row_error,
    unpack,
)
from raydata_llm.tokenizer import load_light_tokenizer

logger = masked_logger(__name__)

AnyOutput = RequestOutput | PoolingRequestOutput[PoolingOutput]

_CELLS = (CARRIED_COLUMN, REQUEST_COLUMN, OUTPUT_COLUMN)
# What `preprocess` says to the engine alone; a dataset's own columns of these names stay.
_CONSUMED = ("sampling_params", "tokenized_prompt", "tools", "chat_template_kwargs", *CONSUMED_COLUMNS)


@dataclass(frozen=True, kw_only=True, repr=False)
class FinishPlan:
    """What the third operator is told; it travels to its tasks.

    Args:
        model_source: Where the tokenizer comes from.
        skip_tokenizer: There is none: no row gets text.
        trust_remote_code: Run code that comes with the tokenizer.
        detokenize: Whether all rows get text; off, `sampling_params.detokenize` decides.
        postprocess: The user's function of a row; None keeps all columns.
        keep_going: Turn failures into error rows instead of raising.
        max_error_fraction: The share of rows that may fail before the job is stopped.
        output_schema: The columns and types of the output; None takes those of the first good row.
        task: Of a pooling model; None generates.
    """

    model_source: str
    skip_tokenizer: bool = False
    trust_remote_code: bool = False
    detokenize: bool = True
    postprocess: RowFunction | None = None
    keep_going: bool = False
    max_error_fraction: float | None = None
    output_schema: pa.Schema | None = None
    task: PoolingTask | None = None

    def tokenizer(self) -> Any:
        """The model's tokenizer, loaded once per process."""
        path = resolve_model(self.model_source, weights=False)
        return load_light_tokenizer(path, trust_remote_code=self.trust_remote_code)


@masked_errors()
def finish(table: pa.Table, plan: FinishPlan, stats_sender: StatsSender | None = None) -> pa.Table:
    """Turn a block with engine outputs into what the user asked for.

    Args:
        table: The block.
        plan: What to do.
        stats_sender: To whom its rows and errors are told.

    Raises:
        RowError: for a row that fails, unless `plan.keep_going`.
        TooManyErrorsError: when more rows failed than may.
    """
    table = open_block(table)
    cells = zip(*(table.column(name).to_pylist() for name in _CELLS), strict=True)
    source = table.drop_columns([name for name in RESERVED_COLUMNS if name in table.column_names])
    memory = memory_of(execution_id())
    rows = OutputRows(
        source,
        block_rows(source),
        keep_all=plan.postprocess is None,
        with_error=plan.keep_going,
        wanted=plan.output_schema,
        known=memory.schema,
        engine_columns=OUTPUT_COLUMNS if plan.task is None else POOLED_COLUMNS,
    )
    block = _Block(plan)
    for row, row_cells in zip(rows.inputs, cells, strict=True):
        columns = row
        try:
            beside, request, output = _unpack(row_cells)
            columns = {**row, **{name: value for name, value in beside.columns.items() if name not in _CONSUMED}}
            _add(rows, _finish_row(columns, beside, request, output, plan.postprocess, block))
        except _Failed as failure:
            if not plan.keep_going:
                raise row_error(row, str(failure)) from failure.__cause__
            rows.add_error(columns, str(failure))
    made = _table(rows, plan)
    _warn_of_errors(rows.errors)
    memory.count(rows.errors, plan.max_error_fraction)
    if stats_sender is not None:
        stats_sender.count_block((block_number(), block_part()), len(rows.inputs), error_kinds(rows.errors))
    if None in rows.errors:
        memory.schema = memory.schema or made.schema
    if RESUME_COLUMN not in table.column_names:
        return made
    marks = mark_failed(table.column(RESUME_COLUMN), [error is not None for error in rows.errors])
    return made.append_column(RESUME_COLUMN, marks)


def _unpack(cells: tuple[bytes, bytes, bytes | None]) -> tuple[Carried, RowRequest, RowOutput | None]:
    """The values of a row's cells, in the order of `_CELLS`."""
    carried, request, output = cells
    try:
        return unpack(carried), unpack(request), None if output is None else unpack(output)
    except BaseException as error:
        raise_if_cancelled(error)
        # An exception of two arguments is such a value: it is packed with its message alone.
        text = f"{type(error).__name__}: {error_text(error)}"
        cause = f"TypeError: what preprocess returned cannot be read again: {text}"
        raise _Failed(describe_failure(cause, "preprocess")) from error


def _table(rows: OutputRows, plan: FinishPlan) -> pa.Table:
    try:
        return rows.to_table()
    except Exception:
        refused = rows.refuse_unwritable()
        if not refused:
            raise
        if not plan.keep_going:
            index, error = next(iter(refused.items()))
            raise row_error(rows.inputs[index], error) from None
        return rows.to_table()


def _add(rows: OutputRows, row: Row) -> None:
    try:
        rows.add(row)
    except Exception as error:
        raise _Failed(describe_failure(error, "output_schema")) from error


class _Failed(Exception):
    """A row failed, here or before; the text says where and why."""


def _finish_row(
    columns: Row,
    beside: Carried,
    request: RowRequest,
    output: RowOutput | None,
    postprocess: RowFunction | None,
    block: _Block,
) -> Row:
    if output is None or output.output is None:
        raise _Failed(request.error if output is None else output.error)
    stage, finished = "detokenize", Row()
    try:
        engine = _engine_columns(output, output.output, request, beside, block)
        finished = {**columns, **engine}
        stage = "postprocess"
        made = finished if postprocess is None else _postprocess(finished, postprocess)
        stage = "output"
        _refuse_deep({name: value for name, value in made.items() if value is not engine.get(name)})
        return made
    except BaseException as error:
        raise_if_cancelled(error)
        raise _Failed(describe_failure(error, stage, finished)) from error


def _postprocess(columns: Row, postprocess: RowFunction) -> Row:
    made = postprocess(columns)
    if not isinstance(made, Mapping) or not made:
        raise TypeError(f"postprocess returned {made!r}: return a dict of columns")
    check_made_names(made)
    return dict(made)


def _refuse_deep(made: Row) -> None:
    for name, value in made.items():
        cause = why_too_deep(value)
        if cause is not None:
            raise TypeError(f"the column {name!r} {cause}")


class _Block:
    """What the rows of a block share: its id, and the tokenizer, loaded when the first of them needs it."""

    def __init__(self, plan: FinishPlan) -> None:
        self.batch_uuid = uuid.uuid4().hex
        self.task = plan.task
        self._plan = plan
        self._tokenizer: Any = None
        self._tokens: dict[int, str] = {}

    def of_output(self, prompt: PromptTokens, output: CompletionOutput, params: SamplingParams) -> str:
        if not self._wants_text(params):
            return ""
        return output_text(self._load(), prompt, output.token_ids, params, output.stop_reason, output.finish_reason)

    def of_token(self, token_id: int, params: SamplingParams) -> str | None:
        if not self._wants_text(params):
            return None
        if token_id not in self._tokens:
            with no_panic:
                self._tokens[token_id] = str(self._load().decode([token_id]))
        return self._tokens[token_id]

    def _wants_text(self, params: SamplingParams) -> bool:
        return not self._plan.skip_tokenizer and (self._plan.detokenize or params.detokenize)

    def _load(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = self._plan.tokenizer()
        return self._tokenizer


def _engine_columns(row: RowOutput, output: AnyOutput, request: RowRequest, beside: Carried, block: _Block) -> Row:
    if not isinstance(output, RequestOutput):
        return _pooled_columns(row, output, request, beside, block)
    params = _params(row.sampling_params)
    assert request.prompt_token_ids is not None, "it was answered"
    prompt_token_ids = output.prompt_token_ids or request.prompt_token_ids.tolist()
    before = prompt_token_ids if request.prompt_embeds is None else ()
    choices = [_choice(before, choice, params, block) for choice in output.outputs]
    first = choices[0]
    columns = {
        "prompt": beside.prompt,
        "prompt_token_ids": prompt_token_ids,
        "num_input_tokens": len(prompt_token_ids),
        "generated_tokens": first["token_ids"],
        "generated_text": first["text"],
        "num_generated_tokens": first["num_tokens"],
        "finish_reason": first["finish_reason"],
        "stop_reason": first["stop_reason"],
        "cumulative_logprob": first["cumulative_logprob"],
        "logprobs": first["logprobs"],
        "prompt_logprobs": _logprobs(output.prompt_logprobs, params, block),
        "embeddings": None,
        "metrics": None if output.metrics is None else vars(output.metrics).copy(),
        "request_id": row.request_id,
        "batch_uuid": block.batch_uuid,
        "time_taken_llm": row.seconds,
        "params": row.sampling_params,
        ERROR_COLUMN: "",
    }
    assert columns.keys() == OUTPUT_COLUMNS.keys() - ASKED_COLUMNS
    if output.prompt_token_id_logprobs is not None:
        columns["prompt_token_id_logprobs"] = output.prompt_token_id_logprobs.tolist()
    return columns if params.n == 1 else {**columns, "outputs": choices}


def _pooled_columns(
    row: RowOutput, output: PoolingRequestOutput[PoolingOutput], request: RowRequest, beside: Carried, block: _Block
) -> Row:
    assert request.prompt_token_ids is not None and output.outputs is not None, "it was answered"
    prompt_token_ids = output.prompt_token_ids or request.prompt_token_ids.tolist()
    columns = {
        "prompt": beside.prompt,
        "prompt_token_ids": prompt_token_ids,
        "num_input_tokens": len(prompt_token_ids),
        **pooled_columns(output.outputs, block.task),
        "request_id": row.request_id,
        "batch_uuid": block.batch_uuid,
        "time_taken_llm": row.seconds,
        "params": row.sampling_params,
        ERROR_COLUMN: "",
    }
    assert columns.keys() == POOLED_COLUMNS.keys()
    return columns


@functools.lru_cache(maxsize=1024)
def _params(text: str) -> SamplingParams:
    return SamplingParams.from_mapping(json.loads(text))


def _choice(prompt: PromptTokens, output: CompletionOutput, params: SamplingParams, block: _Block) -> Row:
    return {
        "index": output.index,
        "text": block.of_output(prompt, output, params),
        "token_ids": output.token_ids,
        "num_tokens": len(output.token_ids),
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
        "cumulative_logprob": output.cumulative_logprob,
        "logprobs": _logprobs(output.logprobs, params, block),
    }


def _logprobs(
    positions: Sequence[dict[int, Logprob] | None] | None, params: SamplingParams, block: _Block
) -> list[dict[int, Row] | None] | None:
    if positions is None:
        return None
    return [
        None
        if position is None
        else {
            token_id: {
                "logprob": entry.logprob,
                "rank": entry.rank,
                "decoded_token": entry.decoded_token or block.of_token(token_id, params),
            }
            for token_id, entry in position.items()
        }
        for position in positions
    ]


def _warn_of_errors(errors: Sequence[str | None]) -> None:
    causes = [error for error in errors if error is not None]
    if causes:
        logger.warning(
            "%d of %d rows of a block are error rows, the first with %s", len(causes), len(errors), redact(causes[0])
        )
