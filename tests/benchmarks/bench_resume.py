"""What a job that is run again costs before its first new row: memory and time against the number of committed keys.

    python -m tests.benchmarks.bench_resume [--millions 1 10 100] [--keys-per-file 131072] [--folder FOLDER]

A ledger of random keys is written first (its files of rows are a byte each). Then a process of its own does what a run
does: it finds the files that count, reads and sorts their keys, and asks for all of them, in blocks of 1024 rows in the
order in which they were committed. Printed as JSON: seconds of each step, the most memory of the process's own (anon)
and with the pages of the sorted file that the system keeps for it (rss), beside those before the first step, in MB. It
fails unless each key is found once and not a second time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from raydata_llm.ledger import Ledger
from raydata_llm.ledger_index import KEY_BYTES
from raydata_llm.ledger_layout import Entry, file_name
from raydata_llm.resume_broker import Claimant, ResumeBroker
from raydata_llm.sink_storage import Storage

_BLOCK_ROWS = 1024
_SAMPLE_SECONDS = 0.01
_MEMORY = re.compile(r"(VmRSS|RssAnon):\s+(\d+) kB")


class MemorySampler(threading.Thread):
    """The most memory of this process while it runs, in MB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = {"VmRSS": 0.0, "RssAnon": 0.0}
        self._stopped = threading.Event()
        self.first = self._sample()

    def run(self) -> None:
        while not self._stopped.wait(_SAMPLE_SECONDS):
            self.most = {name: max(value, self.most[name]) for name, value in self._sample().items()}

    def stop(self) -> None:
        """No more."""
        self._stopped.set()
        self.join()

    @staticmethod
    def _sample() -> dict[str, float]:
        found = _MEMORY.findall(Path("/proc/self/status").read_text())
        return {name: int(kilobytes) / 1024 for name, kilobytes in found}


def begin(folder: Path, token: str) -> tuple[Ledger, list[Entry]]:
    """Begin a run there."""
    storage = Storage.open(folder)
    return Ledger.begin(storage, storage, "space", token, {}, retry_errors=True)


def fill(folder: Path, keys: int, keys_per_file: int) -> None:
    """Commit so many keys."""
    ledger, _ = begin(folder, "aaaaaaaa")
    draw = np.random.default_rng(0)
    for number, start in enumerate(range(0, keys, keys_per_file)):
        name = file_name("aaaaaaaa", number, ".parquet", errors=False)
        ledger.commit(name, b"x", draw.bytes(min(keys_per_file, keys - start) * KEY_BYTES))


def resume(folder: Path, keys: int) -> dict[str, float]:
    """Do what a run does with the keys."""
    sampler = MemorySampler()
    sampler.start()
    times = [time.perf_counter()]
    ledger, entries = begin(folder, "bbbbbbbb")
    times.append(time.perf_counter())
    broker = ResumeBroker(ledger)
    assert broker.load(entries) == keys
    times.append(time.perf_counter())
    loaded = dict(sampler.most)
    found = ask(broker, ledger, entries)
    times.append(time.perf_counter())
    sampler.stop()
    assert found == keys, f"{found} of {keys} keys were found"
    again = next(iter(ledger.read_keys(entries[:1])))[: _BLOCK_ROWS * KEY_BYTES]
    assert not np.frombuffer(broker.claim(Claimant("prepare", -1, 0), again), np.uint8).any(), "found twice"
    begun, load, lookups = np.diff(times)
    return {
        "keys": keys,
        "files": len(entries),
        "begin_s": begun,
        "load_s": load,
        "ask_s": lookups,
        "asked/s": keys / lookups,
        "anon_before": sampler.first["RssAnon"],
        "anon_load": loaded["RssAnon"],
        "anon_ask": sampler.most["RssAnon"],
        "rss_load": loaded["VmRSS"],
        "rss_ask": sampler.most["VmRSS"],
        "sorted_file": keys * KEY_BYTES / (1 << 20),
    }


def ask(broker: ResumeBroker, ledger: Ledger, entries: list[Entry]) -> int:
    """Ask for all keys; returns how many were found."""
    found = number = 0
    for piece in ledger.read_keys(entries):
        for start in range(0, len(piece), _BLOCK_ROWS * KEY_BYTES):
            keys = piece[start : start + _BLOCK_ROWS * KEY_BYTES]
            answer = np.frombuffer(broker.claim(Claimant("prepare", number, 0), keys), np.uint8)
            found += int(np.unpackbits(answer, count=len(keys) // KEY_BYTES).sum())
            number += 1
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=float, nargs="+", default=[1, 10, 100])
    parser.add_argument("--keys-per-file", type=int, default=1 << 17)
    parser.add_argument("--folder", type=Path, help="with room for twice 16 bytes a key")
    parser.add_argument("--filled", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.filled is not None:
        figures = resume(arguments.filled, int(arguments.millions[0] * 1e6))
        print(json.dumps({name: round(value, 2) for name, value in figures.items()}), flush=True)
        return
    for millions in arguments.millions:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            fill(Path(folder), int(millions * 1e6), arguments.keys_per_file)
            command = [sys.executable, "-m", "tests.benchmarks.bench_resume", "--filled", folder]
            subprocess.run([*command, "--millions", str(millions)], check=True, env={**os.environ, "TMPDIR": folder})


if __name__ == "__main__":
    main()
