"""What a store's failure means: whether to wait and try again, and what to tell the user.

Owns the words by which stores' errors are known. Knows no paths and does no input or output.
"""

from __future__ import annotations

import errno
import random
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from raydata_llm.redaction import is_telling

_Result = TypeVar("_Result")

_MISSING_BUCKET = ("NO_SUCH_BUCKET", "NoSuchBucket", "bucket does not exist", "allow_bucket_creation")
_REFUSED = (
    "ACCESS_DENIED",
    "AccessDenied",
    "INVALID_ACCESS_KEY",
    "InvalidAccessKeyId",
    "SIGNATURE",
    "SignatureDoesNotMatch",
    "INVALID_CLIENT_TOKEN",
    "EXPIRED",
    "ExpiredToken",
    "Forbidden",
    "HTTP status 403",
    "Unable to locate credentials",
)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
# Stores whose client libraries raise errors of their own beside OSError.
_STORE_PACKAGES = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "azure", "adlfs", "obstore")
_QUOTED = re.compile(r"(?<!\w)'[^']*'")


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a store that is busy or away is tried again.

    Args:
        tries: Attempts in all.
        first_wait: Seconds before the second attempt, doubled for each further one.
        longest_wait: Seconds between two attempts at most.
        seconds: After which no further attempt begins, as clients have retries of their own inside each.
    """

    # S3 splits a busy prefix within two minutes or so, and a store's restart takes less.
    tries: int = 12
    first_wait: float = 0.5
    longest_wait: float = 20.0
    seconds: float = 180.0

    def waits(self) -> Iterable[float]:
        """Seconds before each further attempt, jittered so that tasks throttled together don't come back together."""
        for number in range(self.tries - 1):
            yield min(self.first_wait * 2**number, self.longest_wait) * random.uniform(0.5, 1.0)


def patiently(operation: Callable[[], _Result], patience: Patience) -> _Result:
    """Run an operation of a store, again while its failure may pass."""
    deadline = time.monotonic() + patience.seconds
    for wait in patience.waits():
        try:
            return operation()
        except Exception as error:
            if not may_pass(error) or time.monotonic() + wait > deadline:
                raise
        time.sleep(wait)
    return operation()


def is_store_error(error: BaseException) -> bool:
    """Whether an error comes from a store, and not from a mistake in the code that calls it."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _STORE_PACKAGES


def may_pass(error: BaseException) -> bool:
    """Whether trying again may help: throttling, cut connections and faults inside the store."""
    return is_store_error(error) and explain(error) is None


def explain(error: BaseException) -> str | None:
    """What went wrong for good, with the remedy; None for what may pass."""
    # A folder may be called EXPIRED: what is quoted is a name.
    text, number = _QUOTED.sub("", str(error)), getattr(error, "errno", None)
    if number in _FULL or "No space left on device" in text:
        return "the disk is full: make room, or write to another place, and run again"
    if any(word in text for word in _MISSING_BUCKET):
        return "its bucket does not exist: check the bucket's name, or make it first"
    if any(word in text for word in _REFUSED) or (isinstance(error, PermissionError) and number is None):
        return (
            "access was refused: check the credentials (for S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) "
            "and their right to write, list and delete there"
        )
    if number in _UNWRITABLE or isinstance(error, (PermissionError, NotADirectoryError, IsADirectoryError)):
        return "it cannot be written: check the folder and its permissions"
    if isinstance(error, FileNotFoundError):
        return "it does not exist: check bucket and folder"
    return None


def first_line(error: BaseException) -> str:
    """An error's own words, without the store's request numbers and further lines."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__).partition(" (Request ID")[0].partition(" Detail: Python")[0]


def secrets_in(options: Any) -> list[str]:
    """The values that are named like credentials in a file system's nested options."""
    found: list[str] = []
    if isinstance(options, dict):
        for name, value in options.items():
            if isinstance(value, str) and is_telling(name):
                found.append(value)
            found += secrets_in(value)
    elif isinstance(options, (list, tuple)):
        for value in options:
            found += secrets_in(value)
    return found
