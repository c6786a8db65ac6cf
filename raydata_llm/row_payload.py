"""What travels between our three operators beside the user's columns: opaque bytes, one cell a row.

Python values cross as pickles, so `sampling_params`, messages and nested values arrive exactly as given; an Arrow
struct would fill in other rows' keys with None and turn `top_k=5` into `5.0`. The user's own columns are left as Arrow
slices. Knows no model and no Ray Data. Invariant: a table never loses or reorders a row here.

    input columns                                     -> prepare
    input columns | request | ticket | carried          -> dispatcher
    input columns | request |          carried | output -> finish
"""

from __future__ import annotations

import pickle
import reprlib
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from raydata_llm.engine.param_values import check_text
from raydata_llm.engine.pooling_request import PoolingOutput, PoolingRequestOutput
from raydata_llm.engine.prompt_embeds import Embeds
from raydata_llm.engine.request import LoRARequest, RequestOutput, TokenArray
from raydata_llm.redaction import redact

REQUEST_COLUMN = "__raydata_llm_request"
CARRIED_COLUMN = "__raydata_llm_carried"
OUTPUT_COLUMN = "__raydata_llm_output"
TICKET_COLUMN = "__raydata_llm_ticket"
BLOCK_COLUMN = "__raydata_llm_block"
RESUME_COLUMN = "__raydata_llm_resume"
RESERVED_COLUMNS = (REQUEST_COLUMN, TICKET_COLUMN, CARRIED_COLUMN, OUTPUT_COLUMN, BLOCK_COLUMN, RESUME_COLUMN)
ERROR_COLUMN = "__inference_error__"

_ROW_TEXT_LIMIT = 500
_NAMES_LIMIT = 400
# Of an error's text: a user's function may put its whole row into one.
_TEXT_LIMIT = 20_000


class RowRequest(NamedTuple):
    """What a replica needs to know of a row; `digest` tells rows apart, `error` says why there is no request.

    `pooling_params` (a mapping with a task) and `token_type_ids` are those of a row for a pooling model; `lora_request`
    names the row's adapter, wherever it is, and `lora_root` the folder that a local one may not lead out of.
    `prompt_embeds` are the prompt in the place of its token ids, which are 0.
    """

    prompt_token_ids: TokenArray | None
    sampling_params: Any
    digest: bytes
    error: str | None = None
    pooling_params: Mapping[str, Any] | None = None
    token_type_ids: TokenArray | None = None
    lora_request: LoRARequest | None = None
    prompt_embeds: Embeds | None = None
    lora_root: str = ""


class Carried(NamedTuple):
    """What passes by the replica: the columns that `preprocess` made and the prompt's text."""

    columns: Mapping[str, Any]
    prompt: str | None = None


class RowOutput(NamedTuple):
    """What a replica says of a row; `sampling_params` is JSON, and `error` says why it has no output.

    The output's prompt is left out where it is the request's own.
    """

    output: RequestOutput | PoolingRequestOutput[PoolingOutput] | None
    sampling_params: str
    request_id: int
    seconds: float
    error: str | None = None


class RowError(RuntimeError):
    """A row that failed, named by its input columns, the stage and the cause."""


def row_error(row: Mapping[str, Any], cause: str) -> RowError:
    """The error that stops a job whose rows must all succeed.

    Args:
        row: The row's input columns.
        cause: From `describe_failure`.
    """
    return RowError(
        f"a row failed with {redact(cause)}. Its input columns: {abbreviate(row)}. "
        "Mend or filter such rows, or set should_continue_on_error=True to get them as rows with "
        f"{ERROR_COLUMN} set."
    )


def describe_failure(error: BaseException | str, stage: str, columns: Collection[str] = ()) -> str:
    """`Type: message (stage)`, without credentials; engine errors come with their type already.

    Whoever knows the variables that such a text may hold makes it: the task, the replica, the dispatcher.

    Args:
        columns: What a function of the user's was given: named if it looked for another.
    """
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error_text(error)}".rstrip()
    if isinstance(error, KeyError) and columns and error.args and _is_missing(error.args[0], columns):
        text += f"; the row has {textwrap.shorten(', '.join(columns), _NAMES_LIMIT, placeholder=' ...')}"
    # No column can hold half a character.
    return f"{redact(_shortened(text))} ({stage})".encode("utf-8", "backslashreplace").decode()


def _is_missing(key: object, columns: Collection[str]) -> bool:
    return isinstance(key, str) and key not in columns


def error_text(error: BaseException) -> str:
    """The message of any error, a user's own class included."""
    if isinstance(error, RecursionError):
        return f"nested too deep ({error}): give fewer levels, or JSON's text"
    try:
        return str(error)
    except BaseException as broken:
        raise_if_cancelled(broken)
        return f"its message cannot be made, for {type(broken).__name__}"


def raise_if_cancelled(error: BaseException) -> None:
    """Go on with an error that is none of a row: Ray ends tasks that nobody wants any more by KeyboardInterrupt.

    Whatever else comes out of a row's work is that row's error: `sys.exit()` would end the task's process, which Ray
    would start again, to meet the same row.
    """
    from raydata_llm.ray_blocks import is_cancelled  # imports Ray

    if isinstance(error, KeyboardInterrupt) and is_cancelled():
        raise error


def abbreviate(row: Mapping[str, Any]) -> str:
    """A row's columns as text of at most 500 characters, credentials masked and long values shortened first."""
    shortened = _MaskedRepr()
    columns = [f"{name!r}: {shortened.repr(row[name])}" for name in row if name not in RESERVED_COLUMNS]
    text = redact(f"{{{', '.join(columns)}}}")
    return text if len(text) <= _ROW_TEXT_LIMIT else f"{text[:_ROW_TEXT_LIMIT]}..."


class _MaskedRepr(reprlib.Repr):
    """Short reprs: a value is masked before it is cut, as half of a credential is too much."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 120

    def repr1(self, x: Any, level: int) -> str:
        if isinstance(x, str):
            return super().repr1(redact(_shortened(x)), level)
        if not hasattr(self, f"repr_{type(x).__name__}"):
            # Of a class that it does not know, reprlib cuts the repr; of one without a repr it tells the name.
            try:
                x = _Text(redact(_shortened(repr(x))))
            except Exception:
                return super().repr1(x, level)
        return super().repr1(x, level)


class _Text:
    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def _shortened(text: str) -> str:
    """Both ends of a text that is too long to be looked through."""
    half = _TEXT_LIMIT // 2
    return text if len(text) <= _TEXT_LIMIT else f"{text[:half]} ... {text[-half:]}"


def check_column_names(names: Iterable[str]) -> None:
    """Refuse datasets whose columns are named like ours.

    Raises:
        ValueError: naming the column.
    """
    for name in names:
        if name in RESERVED_COLUMNS:
            raise ValueError(f"the dataset's column {name!r} has a name that raydata_llm needs itself: rename it")


def check_made_names(made: Mapping[Any, Any]) -> None:
    """Refuse a row of the user's function whose columns are not named by text, or are named like ours.

    Raises:
        TypeError, ValueError: naming the column.
    """
    for name in made:
        if type(name) is not str:
            raise TypeError(f"the column {name!r} is named by a {type(name).__name__}: give names as text")
        if name in RESERVED_COLUMNS:
            raise ValueError(f"the column {name!r} has a name that raydata_llm needs itself: give it another")
        check_text("the name of a column", name)


def pack(value: object) -> bytes:
    """Pickle a value; what plain pickle cannot name (classes of the driver's script, lambdas) goes by value."""
    try:
        return pickle.dumps(value, protocol=5)
    except (pickle.PicklingError, AttributeError, TypeError):
        from ray import cloudpickle

        return bytes(cloudpickle.dumps(value, protocol=5))  # type: ignore[no-untyped-call]


def unpack(cell: bytes) -> Any:
    """Undo `pack`."""
    return pickle.loads(cell)


def append_packed(table: pa.Table, name: str, values: Iterable[object]) -> pa.Table:
    """The table with one more column, a pickle a row."""
    return append_cells(table, name, [pack(value) for value in values])


def append_cells(table: pa.Table, name: str, cells: Sequence[bytes | None]) -> pa.Table:
    """The table with one more column of packed values."""
    return table.append_column(name, pa.array(cells, type=pa.large_binary()))


def unpack_column(table: pa.Table, name: str) -> list[Any]:
    """The values of a column made by `append_packed`; None where there is no cell."""
    return [None if cell is None else unpack(cell) for cell in table.column(name).to_pylist()]


def seal_block(table: pa.Table, limit: int | None) -> pa.Table:
    """The table itself, or, from `limit` bytes on, a table of one row that holds it.

    Ray Data cuts a task's output into blocks by bytes and replays a retried task by block number. Regenerated text has
    other lengths, so other cuts: rows would be lost and repeated in silence. One row cannot be cut.
    """
    if limit is None or table.nbytes < limit:
        return table
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    sealed = pa.array([sink.getvalue().to_pybytes()], type=pa.large_binary())
    return pa.table({BLOCK_COLUMN: sealed})


def open_block(table: pa.Table) -> pa.Table:
    """Undo `seal_block`."""
    if table.column_names != [BLOCK_COLUMN]:
        return table
    with pa.ipc.open_stream(table.column(BLOCK_COLUMN)[0].as_buffer()) as reader:
        return reader.read_all()
