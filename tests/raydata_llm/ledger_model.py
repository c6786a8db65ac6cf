"""A model of runs that share a folder: the real ledger on a store in memory, one storage call at a time.

Each run is a thread that stops before every storage call until the schedule lets it go on, so one number, the seed,
decides which call comes next, which run is killed before which call, and what is damaged afterwards. A killed run does
nothing more; a call that reaches the store late is a run that was held before it.
"""

from __future__ import annotations

import contextlib
import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from raydata_llm.ledger import Ledger, RunSupersededError
from raydata_llm.ledger_entry import add_to_parquet
from raydata_llm.ledger_index import KEY_BYTES
from raydata_llm.ledger_layout import file_name

# Seven rows, of which two are alike.
ROWS = [bytes([65 + row]) * KEY_BYTES for row in (0, 1, 2, 3, 4, 5, 5)]
_REMEDY = re.compile(r"delete '([^']+)'")
_OTHER_FOLDER = "give the job another folder"


class Killed(BaseException):
    """A run's process dies here."""


class WrongError(AssertionError):
    """A schedule ended in what must not be."""


class SerialPool:
    """Stands in for a thread pool: a run has one thread."""

    def __init__(self, size: int) -> None:
        pass

    def __enter__(self) -> SerialPool:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def map(self, function: Callable[[Any], Any], values: Iterable[Any]) -> list[Any]:
        return [function(value) for value in values]


class ModelStorage:
    """One run's view of the store: the calls of `raydata_llm.sink_storage.Storage` that the ledger makes.

    Args:
        objects: The store, by path.
        pause: Called before each call; may raise `Killed`.
        moves_at_once: Whether a move is one step, as on disks, or a copy and a deletion, as on object stores.
    """

    label = "model"

    def __init__(self, objects: dict[str, bytes], pause: Callable[[], None], *, moves_at_once: bool) -> None:
        self._objects = objects
        self._pause = pause
        self._moves_at_once = moves_at_once

    def put(self, name: str, content: Any) -> None:
        self._pause()
        self._objects[name] = bytes(content)

    def get(self, name: str, start: int = 0, *, length: int | None = None) -> bytes:
        self._pause()
        if name not in self._objects:
            raise FileNotFoundError(name)
        end = None if length is None else start + length
        return self._objects[name][start:end]

    def sizes(self, folder: str = "") -> dict[str, int]:
        self._pause()
        prefix = f"{folder}/" if folder else ""
        found = {
            path.removeprefix(prefix): len(body) for path, body in self._objects.items() if path.startswith(prefix)
        }
        return {name: size for name, size in found.items() if "/" not in name}

    def size(self, name: str) -> int | None:
        self._pause()
        return len(self._objects[name]) if name in self._objects else None

    def delete(self, name: str) -> None:
        self._pause()
        self._objects.pop(name, None)

    def move(self, name: str, to: str) -> None:
        self._pause()
        if name not in self._objects:
            raise FileNotFoundError(name)
        body = self._objects[name]
        if not self._moves_at_once:
            self._pause()  # the copy was asked for, and reaches its place later
        self._objects[to] = body
        if not self._moves_at_once:
            self._pause()
        self._objects.pop(name, None)

    def clean(self, names: Iterable[str]) -> None:
        self._pause()


@dataclass
class Job:
    """What one run is to do.

    Args:
        token: The run's.
        space: Its key space.
        fails: The rows, by number, whose answers are errors.
        mends: Whether it brings the first earlier file to another schema.
        repeats: Whether its write tasks are repeated, their first attempts having seen one more row fail.
        suffix: Of its files.
    """

    token: str
    space: str
    suffix: str
    fails: frozenset[int] = frozenset()
    mends: bool = False
    repeats: bool = False

    def run(self, storage: Any) -> None:
        """One run of the job, as the sink does it."""
        ledger, entries = Ledger.begin(storage, storage, self.space, self.token, {}, retry_errors=True)
        committed: Counter[bytes] = Counter()
        for keys in ledger.read_keys(entries):
            committed.update(_split(keys))
        names = {entry.name for entry in entries}
        todo = []
        for number, row in enumerate(ROWS):
            if committed[row]:
                committed[row] -= 1
            else:
                todo.append((number, row))
        for number, start in enumerate(range(0, len(todo), 3)):
            some = todo[start : start + 3]
            if self.repeats:
                self._write(ledger, number, some, fails=self.fails | {some[0][0]})
            names |= self._write(ledger, number, some, fails=self.fails)
        if self.mends and entries and self.suffix == ".parquet":
            keys = ledger.keys_of(entries[0].name)
            ledger.replace(entries[0].name, _encode(_split(keys), self.suffix, 9), keys)
        ledger.finish({}, names)

    def _write(self, ledger: Ledger, number: int, rows: list[tuple[int, bytes]], *, fails: frozenset[int]) -> set[str]:
        """One attempt at a file, in the steps of `raydata_llm.sink_task.write_file`."""
        names = {errors: file_name(self.token, number, self.suffix, errors=errors) for errors in (True, False)}
        for name in names.values():
            ledger.withdraw(name)
        written = set()
        for errors in (False, True):
            some = [row for index, row in rows if (index in fails) == errors]
            if some:
                ledger.commit(names[errors], _encode(some, self.suffix, number), b"".join(some))
                written.add(names[errors])
        return written


def _split(keys: bytes) -> list[bytes]:
    return [keys[start : start + KEY_BYTES] for start in range(0, len(keys), KEY_BYTES)]


def _encode(rows: list[bytes], suffix: str, padding: int) -> bytes:
    body = b"PAR1" + bytes([len(rows)]) + b"".join(rows) + bytes(padding)
    if suffix != ".parquet":
        return body
    return bytes(add_to_parquet(body + bytes(4) + b"PAR1", b"".join(rows)))


def rows_of(objects: dict[str, bytes]) -> Counter[bytes]:
    """What a plain reader of the folder finds."""
    found: Counter[bytes] = Counter()
    for path, body in objects.items():
        if "/" not in path:
            found.update(_split(body[5 : 5 + body[4] * KEY_BYTES]))
    return found


class Actor(threading.Thread):
    """A run under way, which goes on by one storage call at a time."""

    def __init__(self, job: Job, objects: dict[str, bytes], *, moves_at_once: bool) -> None:
        super().__init__(daemon=True)
        self._storage = ModelStorage(objects, self._pause, moves_at_once=moves_at_once)
        self.job = job
        self._go = threading.Semaphore(0)
        self._stopped = threading.Semaphore(0)
        self.is_killed = False
        self.is_over = False
        self.error: BaseException | None = None
        self.start()

    def step(self, *, kill: bool = False) -> None:
        """Do the next storage call and what follows it, up to the one after; or die before it."""
        self.is_killed |= kill
        self._go.release()
        self._stopped.acquire()

    def run(self) -> None:
        self._go.acquire()
        try:
            self.job.run(self._storage)
        except BaseException as error:
            self.error = error
        self.is_over = True
        self._stopped.release()

    def _pause(self) -> None:
        if not self.is_killed:
            self._stopped.release()
            self._go.acquire()
        if self.is_killed:
            raise Killed


@dataclass
class Schedule:
    """One schedule, drawn from a seed.

    Args:
        seed: What decides everything.
        damage: Whether one object of the ledger is lost, cut or garbled before the last run.
        kills: Whether runs are killed.
    """

    seed: int
    damage: bool = False
    kills: bool = True
    story: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)

    def check(self) -> str:
        """Play it; returns how it ended: "whole", or "stopped" where a damaged folder was refused for good.

        Raises:
            WrongError: when rows are lost or doubled, or a run ends in an error that it should not.
        """
        draw = random.Random(self.seed)
        suffix = draw.choice([".parquet", ".jsonl"])
        names = iter(f"{number}{number:07x}"[-8:] for number in draw.sample(range(1 << 20), 8))
        tokens = (name.replace("g", "0") for name in names)
        if draw.random() < 0.7:
            self._alone(Job(next(tokens), "a", suffix, fails=frozenset(draw.sample(range(7), draw.choice([0, 0, 1])))))
        jobs = [self._draw_job(draw, next(tokens), suffix) for _ in range(draw.choice([2, 2, 3]))]
        ended = self._interleave(draw, jobs)
        for actor in ended:
            if not isinstance(actor.error, (Killed, RunSupersededError, type(None))):
                raise self._wrong(f"{actor.job.token} ended in {actor.error!r}") from actor.error
        finished = [actor for actor in ended if actor.error is None]
        if not any(actor.is_killed for actor in ended):
            if not finished:
                raise self._wrong("every run was superseded")
            self._check_rows("after all runs")
        if self.damage:
            self._damage(draw)
        for space in (draw.choice("ab"), draw.choice("ab")):
            if not self._run_to_the_end(Job(next(tokens), space, suffix)):
                return "stopped"
            self._check_rows(f"after a clean run of {space}")
            if any(path.startswith(f"_raydata_llm/{space}/") and path.endswith(".staged") for path in self.objects):
                raise self._wrong("staged files of the visible space are left")
        return "whole"

    def _draw_job(self, draw: random.Random, token: str, suffix: str) -> Job:
        fails = frozenset(number for number in range(7) if draw.random() < 0.1)
        mends, repeats = draw.random() < 0.4, draw.random() < 0.2
        return Job(token, draw.choice("ab"), suffix, fails, mends, repeats)

    def _interleave(self, draw: random.Random, jobs: list[Job]) -> list[Actor]:
        moves_at_once = draw.random() < 0.5
        actors = [Actor(job, self.objects, moves_at_once=moves_at_once) for job in jobs]
        ends = [draw.randrange(90) if self.kills and draw.random() < 0.4 else -1 for _ in actors]
        # Held for long, mostly: what goes wrong needs a run that sleeps through another's steps.
        burst = draw.choice([1.0, 4.0, 20.0])
        steps = [0] * len(actors)
        while alive := [index for index, actor in enumerate(actors) if not actor.is_over]:
            index = draw.choice(alive)
            for _ in range(1 + int(draw.expovariate(1 / burst))):
                actors[index].step(kill=steps[index] == ends[index])
                steps[index] += 1
                if actors[index].is_over:
                    break
        for actor in actors:
            actor.join()
        self.story = [
            f"{a.job.token} {a.job.space}: {n} calls, {a.error!r}" for a, n in zip(actors, steps, strict=True)
        ]
        return actors

    def _alone(self, job: Job) -> None:
        job.run(ModelStorage(self.objects, lambda: None, moves_at_once=True))

    def _damage(self, draw: random.Random) -> None:
        path = draw.choice(sorted(path for path in self.objects if "/" in path and not path.endswith(".staged")))
        body = self.objects[path]
        kind = draw.choice(["lost", "emptied", "cut to whole keys", "cut", "garbled"])
        self.story.append(f"{path} {kind}")
        if kind == "lost":
            del self.objects[path]
        elif kind == "garbled":
            self.objects[path] = bytes(
                byte ^ 255 if index == len(body) // 2 else byte for index, byte in enumerate(body)
            )
        else:
            end = {"emptied": 0, "cut": draw.randrange(len(body) + 1)}.get(
                kind, KEY_BYTES * (len(body) // KEY_BYTES // 2)
            )
            self.objects[path] = body[:end]

    def _run_to_the_end(self, job: Job) -> bool:
        """Run a job, doing what its errors say; False when they say that the folder cannot be used."""
        for attempt in range(5):
            job.token = f"{attempt}{job.token[1:]}"
            try:
                self._alone(job)
                return True
            except (ValueError, OSError) as error:
                self.story.append(f"{job.token}: {error}")
                found = _REMEDY.search(str(error))
                if not self.damage or not (found or _OTHER_FOLDER in str(error)):
                    raise self._wrong(f"a clean run ended in {error!r}") from error
                if found is None:
                    return False
                self.objects.pop(found[1], None)
            except Exception as error:
                raise self._wrong(f"a clean run ended in {error!r}") from error
        raise self._wrong("the remedies do not help")

    def _check_rows(self, when: str) -> None:
        found = rows_of(self.objects)
        if found != Counter(ROWS):
            lost, doubled = Counter(ROWS) - found, found - Counter(ROWS)
            raise self._wrong(f"{when}: {lost.total()} rows are lost, {doubled.total()} doubled")

    def _wrong(self, what: str) -> WrongError:
        return WrongError("\n".join([f"seed {self.seed}: {what}", *self.story, *sorted(self.objects)]))


@contextlib.contextmanager
def one_thread_a_run(patch: Any) -> Iterator[None]:
    """Have the ledger's parallel requests come one after another, so that a schedule is the same each time."""
    with patch.context() as inner:
        inner.setattr("raydata_llm.ledger_layout.ThreadPoolExecutor", SerialPool)
        yield
