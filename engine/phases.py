"""What a long start is doing right now, told to whoever listens.

Owns the one channel: records of the logger `raydata_llm.phase`, whose message is the phase ("loading the weights").
Knows no listeners; without one, a phase costs nothing and is seen with INFO logs only.
"""

from __future__ import annotations

from raydata_llm.engine.redaction import masked_logger

PHASE_LOGGER = "raydata_llm.phase"


def announce(phase: str) -> None:
    """Say what begins now, in a few words that fit behind a replica's name: "loading the weights"."""
    masked_logger(PHASE_LOGGER).info(phase)
