"""A wrong setting that only the cluster can find, told to the user as the `ValueError` that it is.

Ray Data wraps what an operator raises into an error of its own; `except ValueError` around a job would not see it.
Owns that exception. Imported by operators alone, as it imports Ray.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ray.exceptions import UserCodeException

from raydata_llm.redaction import mask_error, redact


class JobValueError(UserCodeException, ValueError):
    """A `ValueError` that Ray Data takes for the user's, not for a fault of its own."""


@contextmanager
def told_plainly() -> Iterator[None]:
    """Let a `ValueError` reach the driver as one."""
    try:
        yield
    except ValueError as error:
        from ray.data import DataContext

        # The task's own copy: nothing outside this operator sees it.
        DataContext.get_current().raise_original_map_exception = True
        raise JobValueError(redact(str(error))) from mask_error(error)
