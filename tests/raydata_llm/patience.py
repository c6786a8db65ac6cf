"""How long a test waits: generously for what must come, and fairly where a time is promised.

CI runs on two cores that others load too. What must come is waited for `PATIENCE` seconds, which no healthy run needs;
a promise of seconds holds for a machine of one's own, and is stretched by what else wants these cores.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from ray import cloudpickle

# Ray's workers do not have the tests' folder on their path.
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # type: ignore[no-untyped-call]

PATIENCE = 240.0


def wait_until(condition: Callable[[], object], seconds: float = PATIENCE) -> bool:
    """Whether the condition came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def on_this_machine(seconds: float) -> float:
    """What a promise for a quiet machine allows on this one, as loaded as it is."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
