"""A folder in any store, as the sinks use it: whole files in, whole files out, and a clear word when it cannot be.

Owns which client is used (pyarrow's own where it has one, fsspec's after), retries, and how a file appears at once.
Knows no rows. Invariant: a file under its own name is whole; what was under way when a process died is invisible, and
is removed by `clean` with the names that the caller started, no others.
"""

from __future__ import annotations

import contextlib
import os
import threading
import uuid
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from raydata_llm.redaction import redact
from raydata_llm.sink_errors import Patience, explain, first_line, is_store_error, patiently, secrets_in
from raydata_llm.sink_uploads import abort_uploads
from raydata_llm.store_address import OBJECT_STORES, check_bucket

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

_Result = TypeVar("_Result")

_CHECK_SECONDS = 30.0
_CHECK_PATIENCE = Patience(tries=3, first_wait=0.5)
# Larger than any file of ours, so that s3fs sends a file by one request, of which nothing is left when it is cut.
_ONE_REQUEST = 4 << 30


class Storage:
    """One folder of a file system; travels to tasks.

    Args:
        filesystem: Of pyarrow.
        root: The folder, as the file system names it.
        label: The folder, as the user named it, without credentials.
        patience: With a store that is busy or away.
    """

    def __init__(self, filesystem: FileSystem, root: str, label: str, patience: Patience | None = None) -> None:
        self.filesystem = filesystem
        self.root = root
        self.label = label
        self._patience = patience or Patience()

    @classmethod
    def open(cls, path: str | os.PathLike[str], filesystem: Any = None, patience: Patience | None = None) -> Storage:
        """Open a folder, which need not exist.

        Args:
            path: A local folder or an address such as `s3://bucket/folder`.
            filesystem: Of pyarrow or fsspec, in which `path` lies.
            patience: With a store that is busy or away.

        Raises:
            ValueError: naming the path, what is wrong and the remedy.
        """
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
            raise ValueError(f"path={path!r} is not valid: give a folder, such as s3://bucket/folder")
        text = os.fspath(path)
        check_bucket("path", redact(text))
        found, root = _resolve(text, filesystem)
        return cls(found, root.rstrip("/") or "/", redact(text), patience)

    def __repr__(self) -> str:
        return f"Storage({self.label!r})"

    @property
    def is_local(self) -> bool:
        """Whether the folder lies on the disk of one node."""
        return not _protocols(self.filesystem).isdisjoint(("local", "file"))

    def check_writable(self) -> None:
        """Write and delete a small file.

        Raises:
            ValueError: within 30 s, when that cannot be done, with the remedy.
        """
        outcome: list[BaseException | None] = []
        thread = threading.Thread(target=lambda: outcome.append(self._try_out()), daemon=True)
        thread.start()
        thread.join(_CHECK_SECONDS)
        if not outcome:
            raise ValueError(
                f"path={self.label!r} did not answer within {_CHECK_SECONDS:.0f} s: "
                "check the network and the endpoint (for S3: AWS_ENDPOINT_URL, AWS_REGION)"
            )
        if outcome[0] is not None:
            raise ValueError(self._words(outcome[0], "path=")) from None

    def put(self, name: str, content: Any) -> None:
        """Write a whole file; it replaces one of that name."""
        try:
            self._run(name, lambda: self._write(self._path(name), content))
        except OSError:
            if self._appears_whole:
                with contextlib.suppress(Exception):  # the store may still be away; the error under way says more
                    abort_uploads(self.filesystem, [self._path(name)])
            raise

    def get(self, name: str, start: int = 0, *, length: int | None = None) -> bytes:
        """A whole file, or a piece of it."""

        def read() -> bytes:
            with self.filesystem.open_input_file(self._path(name)) as stream:
                stream.seek(start)
                return bytes(stream.read(length))

        return self._run(name, read)

    def open_file(self, name: str) -> Any:
        """A file to read pieces of."""
        return self._run(name, lambda: self.filesystem.open_input_file(self._path(name)))

    def sizes(self, folder: str = "") -> dict[str, int]:
        """The names and sizes of the files that lie in a folder itself; empty when there is none."""
        from pyarrow.fs import FileSelector, FileType

        self._forget_listings()
        selector = FileSelector(self._path(folder), allow_not_found=True)
        infos = self._run(folder, lambda: self.filesystem.get_file_info(selector))
        return {info.base_name: info.size for info in infos if info.type == FileType.File}

    def size(self, name: str) -> int | None:
        """A file's size; None when it is not there."""
        from pyarrow.fs import FileType

        self._forget_listings()
        info = self._run(name, lambda: self.filesystem.get_file_info(self._path(name)))
        return int(info.size) if info.type == FileType.File else None

    def delete(self, name: str) -> None:
        """Delete a file; one that is gone already is fine."""

        def delete() -> None:
            with contextlib.suppress(FileNotFoundError):
                self.filesystem.delete_file(self._path(name))

        self._run(name, delete)

    def move(self, name: str, to: str) -> None:
        """Give a file another name inside the folder."""
        self._run(name, lambda: self.filesystem.move(self._path(name), self._path(to)))

    def clean(self, names: Iterable[str]) -> None:
        """Remove what unfinished writes of these files left behind."""
        names = set(names)
        if not names:
            return
        if self._appears_whole:
            self._run("", lambda: abort_uploads(self.filesystem, [self._path(name) for name in names]))
            return
        for folder in {name.rpartition("/")[0] for name in names}:
            for found in self.sizes(folder):
                target = f"{folder}/{_target(found)}".lstrip("/")
                if found != _target(found) and target in names:
                    self.delete(f"{folder}/{found}".lstrip("/"))

    @property
    def _appears_whole(self) -> bool:
        # Elsewhere a file is written aside and renamed.
        return not _protocols(self.filesystem).isdisjoint(OBJECT_STORES)

    def _forget_listings(self) -> None:
        # fsspec's file systems remember what they listed; other processes write here too.
        if _fsspec(self.filesystem) is not None:
            _fsspec(self.filesystem).invalidate_cache()

    def _path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}" if name else self.root

    def _run(self, name: str, operation: Callable[[], _Result]) -> _Result:
        try:
            return patiently(operation, self._patience)
        except Exception as error:
            if not is_store_error(error):
                raise
            raise OSError(self._words(error, f"{name} in " if name else "")) from None

    def _write(self, path: str, content: Any) -> None:
        if self._appears_whole:
            _upload(self.filesystem, path, content)
            return
        folder, _, base = path.rpartition("/")
        self.filesystem.create_dir(folder, recursive=True)
        aside = f"{folder}/{_aside(base)}"
        try:
            _upload(self.filesystem, aside, content)
            self.filesystem.move(aside, path)
        except BaseException:
            _forget(self.filesystem, aside)
            raise

    def _try_out(self) -> BaseException | None:
        name = f".raydata_llm-check-{uuid.uuid4().hex[:8]}"
        try:
            patiently(lambda: self._write(self._path(name), b"raydata_llm"), _CHECK_PATIENCE)
            patiently(lambda: self.filesystem.delete_file(self._path(name)), _CHECK_PATIENCE)
        except Exception as error:
            return error
        return None

    def _words(self, error: BaseException, prefix: str) -> str:
        cause = explain(error) or (
            "the store failed again and again: check the network and the endpoint "
            "(for S3: AWS_ENDPOINT_URL, AWS_REGION)"
        )
        own_words = redact(first_line(error), secrets_in(_options(self.filesystem)))
        return f"{prefix}{self.label!r} cannot be used: {cause} ({type(error).__name__}: {own_words})"


def _resolve(path: str, filesystem: Any) -> tuple[FileSystem, str]:
    import pyarrow
    from pyarrow.fs import FileSystem, LocalFileSystem

    if filesystem is not None:
        return _as_pyarrow(filesystem, path), path.partition("://")[2] or path
    if "://" not in path or path.startswith(("local://", "file://")):
        return LocalFileSystem(), os.path.abspath(os.path.expanduser(path.partition("://")[2] or path))
    try:
        found, root = FileSystem.from_uri(_quoted(path))
        return found, root
    except pyarrow.ArrowInvalid as error:
        if "Unrecognized filesystem" not in str(error):
            raise ValueError(f"path={redact(path)!r} is not a valid address: {redact(str(error))}") from None
    except OSError as error:
        cause = explain(error) or "check the network and the endpoint (for S3: AWS_ENDPOINT_URL, AWS_REGION)"
        raise ValueError(f"path={redact(path)!r} cannot be used: {cause} ({redact(first_line(error))})") from None
    return _open_with_fsspec(path)


def _quoted(path: str) -> str:
    """An address in which the folder's own characters mean themselves, as they do to Ray Data and to stores' tools.

    pyarrow drops what follows a `#`, reads `%20` as a space and refuses spaces.
    """
    address, mark, options = path.partition("?")
    scheme, _, rest = address.partition("://")
    host, slash, folder = rest.partition("/")
    return f"{scheme}://{host}{slash}{quote(folder, safe='/')}{mark}{options}"


def _open_with_fsspec(path: str) -> tuple[FileSystem, str]:
    import fsspec

    try:
        filesystem, root = fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"path={redact(path)!r} cannot be used: {redact(str(error))}; use s3://, gs:// or abfs://, "
            f"or install fsspec's package for {path.partition('://')[0]}://"
        ) from None
    return _as_pyarrow(filesystem, path), root


def _as_pyarrow(filesystem: Any, path: str) -> FileSystem:
    import fsspec
    from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

    if isinstance(filesystem, FileSystem):
        return filesystem
    if isinstance(filesystem, fsspec.AbstractFileSystem):
        return PyFileSystem(FSSpecHandler(filesystem))
    raise ValueError(
        f"filesystem={type(filesystem).__name__} is not valid for path={redact(path)!r}: "
        "give a file system of pyarrow.fs or of fsspec"
    )


def _fsspec(filesystem: FileSystem) -> Any:
    """The file system of fsspec inside one of pyarrow; None for pyarrow's own."""
    return getattr(getattr(filesystem, "handler", None), "fs", None)


def _protocols(filesystem: FileSystem) -> set[str]:
    inner = _fsspec(filesystem)
    if inner is None:
        return {filesystem.type_name}
    return {inner.protocol} if isinstance(inner.protocol, str) else set(inner.protocol)


def _upload(filesystem: FileSystem, path: str, content: Any) -> None:
    if _fsspec(filesystem) is not None and "s3" in _protocols(filesystem):
        _fsspec(filesystem).pipe_file(path, bytes(content), chunksize=_ONE_REQUEST)
        return
    stream = filesystem.open_output_stream(path)
    stream.write(content)
    stream.close()


def _aside(base: str) -> str:
    return f".{base}.{uuid.uuid4().hex[:8]}.part"


def _target(base: str) -> str:
    """The name that a file written aside was to get; any other file's own name."""
    pieces = base.split(".")
    is_aside = base.startswith(".") and base.endswith(".part") and len(pieces) > 3 and len(pieces[-2]) == 8
    return ".".join(pieces[1:-2]) if is_aside else base


def _forget(filesystem: FileSystem, path: str) -> None:
    # It was never made, or the store is away: the error under way says more.
    with contextlib.suppress(OSError):
        filesystem.delete_file(path)


def _options(filesystem: FileSystem) -> Any:
    """What a file system was made with, credentials among it."""
    inner = _fsspec(filesystem)
    return filesystem.__reduce__()[1] if inner is None else inner.storage_options
