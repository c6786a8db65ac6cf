"""How OpenMP's threads wait, settled before torch is imported.

Owns that environment variable. Imports nothing.
"""

from __future__ import annotations

import os


def wait_passively() -> None:
    """Let waiting threads sleep, unless the user says otherwise; without effect where torch is imported already.

    By default they spin, and on a CPU that others share a spinning thread keeps the one it waits for from running:
    steps of 64 rows took 10 to 50 s instead of 1 to 4 beside feeding tasks, 24 rows 89 s instead of 13 beside tests.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
