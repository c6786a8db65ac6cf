"""What a long start is doing right now, told to whoever listens.

Owns the one channel: records of the logger `raydata_llm.phase`, whose message is the phase ("loading the weights").
Knows no listeners; without one, a phase costs nothing and is seen with INFO logs only.
"""

from __future__ import annotations

import logging

PHASE_LOGGER = "raydata_llm.phase"


def announce(phase: str) -> None:
    """Say what begins now, in a few words that fit behind a replica's name: "loading the weights"."""
    logging.getLogger(PHASE_LOGGER).info(phase)
