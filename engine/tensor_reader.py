"""Reading the tensors of safetensors files into a device's memory, as fast as the disk gives them.

Owns the threads that read, the page-locked buffers that the pieces of a tensor pass through, and the order between
CUDA streams: a piece is copied on its buffer's stream, and the taker's stream waits for it. Knows no models.
Invariant: tensors come whole and in the order asked for; when the iterator ends, fails or is closed, none of its
threads, copies and open files is left.
"""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue

import torch

from raydata_llm.engine.safetensors_file import StoredTensor

# Eight reads of 8 MiB under way keep local and network disks busy. Copies to the device take a tenth of a read's time
# or less, so with two more buffers than threads no thread waits for a copy.
PIECE_BYTES = 8 << 20
_NUM_THREADS = 8
_NUM_BUFFERS = _NUM_THREADS + 2
# Bytes of tensors begun and not yet taken. Enough for the threads to stay busy while one tensor is taken, and little
# enough of the device's memory.
_AHEAD_BYTES = 512 << 20
# Of reads past the page cache: offset, length and address.
_ALIGNMENT = 4096


def read_tensors(
    tensors: Iterable[tuple[str, StoredTensor, torch.dtype]], device: torch.device, *, direct: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each of `tensors` with its name, in their order, ready for use on the current stream.

    Args:
        tensors: Name, place and dtype of each; the disk is fastest in the order of the files.
        device: Where the tensors are put.
        direct: Read past the page cache: less work for the CPU, but the next process to load the files, and those of
            this machine that load them now, read the disk again.

    Raises:
        ValueError: for a file that is cut short.
        OSError: from the disk.
    """
    with closing(_Reader(device, direct)) as reader:
        begun: deque[_BegunTensor] = deque()
        for name, stored, dtype in tensors:
            # Two at least, or the threads would idle between tensors that are large.
            while len(begun) > 1 and reader.num_bytes_ahead + stored.end - stored.start > _AHEAD_BYTES:
                yield reader.finish(begun.popleft())
            begun.append(reader.begin(name, stored, dtype))
        while begun:
            yield reader.finish(begun.popleft())


@dataclass(frozen=True)
class _BegunTensor:
    """A tensor that is being read; a piece's result is the event of its copy."""

    name: str
    tensor: torch.Tensor
    pieces: list[Future[torch.cuda.Event | None]]


class _Reader:
    """The threads, the buffers and the open files. Its user is one thread."""

    def __init__(self, device: torch.device, direct: bool) -> None:
        self._device = device
        self._direct = direct
        self._files: dict[Path, _File] = {}
        self._buffers: SimpleQueue[_Buffer] = SimpleQueue()
        for _ in range(_NUM_BUFFERS):
            self._buffers.put(_Buffer(device))
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "read-weights")
        self.num_bytes_ahead = 0

    def close(self) -> None:
        """End the threads and close the files."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        # Copies into tensors that were not taken: their memory must not be given to others before.
        for _ in range(_NUM_BUFFERS):
            self._buffers.get().wait()
        for file in self._files.values():
            file.close()

    def begin(self, name: str, stored: StoredTensor, dtype: torch.dtype) -> _BegunTensor:
        """Make the tensor and set the threads to work on it."""
        file = self._open(stored.path)
        tensor = torch.empty(stored.shape, dtype=dtype, device=self._device)
        target = tensor.flatten().view(torch.uint8)
        # The memory may be that of a freed tensor which work queued on the current stream still reads.
        free = torch.cuda.current_stream(self._device).record_event() if self._device.type == "cuda" else None
        # Cut at multiples of a piece in the file, so that no two pieces read the same block of the disk.
        inner = range(stored.start // PIECE_BYTES * PIECE_BYTES + PIECE_BYTES, stored.end, PIECE_BYTES)
        cuts = sorted({stored.start, *inner, stored.end})
        if stored.run is not None:
            pieces = self._begin_runs(file, stored, stored.run, target, free)
        else:
            pieces = [
                self._threads.submit(self._load, file, start, target[start - stored.start : end - stored.start], free)
                for start, end in pairwise(cuts)
            ]
        self.num_bytes_ahead += len(target)
        return _BegunTensor(name, tensor, pieces)

    def _begin_runs(
        self,
        file: _File,
        stored: StoredTensor,
        run: tuple[int, int],
        target: torch.Tensor,
        free: torch.cuda.Event | None,
    ) -> list[Future[torch.cuda.Event | None]]:
        """Set the threads to work on a part by columns: some rows' runs at a time, one after the other in a buffer."""
        run_bytes, stride = run
        rows_at_once = max(1, PIECE_BYTES // run_bytes)
        return [
            self._threads.submit(
                self._load_runs,
                file,
                range(stored.start + row * stride, stored.end, stride)[:rows_at_once],
                target[row * run_bytes : (row + rows_at_once) * run_bytes],
                free,
            )
            for row in range(0, stored.shape[0], rows_at_once)
        ]

    @torch.inference_mode()
    def _load_runs(
        self, file: _File, starts: range, target: torch.Tensor, free: torch.cuda.Event | None
    ) -> torch.cuda.Event | None:
        buffer = self._buffers.get()
        try:
            buffer.wait()
            file.read_runs(buffer.view, starts, len(target) // len(starts))
            return buffer.copy_to(target, slice(0, len(target)), free)
        finally:
            self._buffers.put(buffer)

    def finish(self, begun: _BegunTensor) -> tuple[str, torch.Tensor]:
        """Wait until the tensor's pieces are read, and make the current stream wait for their copies."""
        for piece in begun.pieces:
            copied = piece.result()
            if copied is not None:
                torch.cuda.current_stream(self._device).wait_event(copied)
        self.num_bytes_ahead -= begun.tensor.nbytes
        return begun.name, begun.tensor

    # Threads do not inherit the mode, and without it could not write to a tensor that was made in it.
    @torch.inference_mode()
    def _load(
        self, file: _File, start: int, target: torch.Tensor, free: torch.cuda.Event | None
    ) -> torch.cuda.Event | None:
        buffer = self._buffers.get()
        try:
            buffer.wait()
            return buffer.copy_to(target, file.read(buffer.view, start, start + len(target)), free)
        finally:
            self._buffers.put(buffer)

    def _open(self, path: Path) -> _File:
        if path not in self._files:
            self._files[path] = _File(path, self._direct)
        return self._files[path]


class _File:
    """An open file."""

    def __init__(self, path: Path, direct: bool) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
        # Each read then asks the disk for all of its bytes at once; read-ahead would read what another thread reads.
        # 4 threads on the disk of a 2-core virtual machine: 1.28 GB/s, 1.17 with read-ahead; one thread 0.6.
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def close(self) -> None:
        """Close it."""
        os.close(self._descriptor)

    def read(self, view: memoryview, start: int, end: int) -> slice:
        """Read the bytes from `start` up to `end`; returns where in `view` they are, as reads are of whole blocks."""
        first = start // _ALIGNMENT * _ALIGNMENT
        last = -(-end // _ALIGNMENT) * _ALIGNMENT
        position = first
        while position < end:
            try:
                count = os.preadv(self._descriptor, [view[position - first : last - first]], position)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self._path)) from error
            if count == 0:
                raise self._cut_short(position)
            position += count
        return slice(start - first, end - first)

    def read_runs(self, view: memoryview, starts: range, run_bytes: int) -> None:
        """Read the `run_bytes` bytes at each of `starts` into `view`, one run after the other."""
        for place, start in enumerate(starts):
            first = place * run_bytes
            done = 0
            while done < run_bytes:
                count = os.preadv(self._descriptor, [view[first + done : first + run_bytes]], start + done)
                if count == 0:
                    raise self._cut_short(start + done)
                done += count

    def _cut_short(self, position: int) -> ValueError:
        return ValueError(
            f"weight file {str(self._path)!r} is damaged: it was cut short to {position} bytes while it was read; "
            "download it again"
        )


class _Buffer:
    """Where a piece lies between file and device, and the stream of the copy."""

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None
        if device.type == "cuda":
            with torch.cuda.device(device):
                self._bytes = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
                self._stream = torch.cuda.Stream(device)
        else:
            self._bytes = torch.frombuffer(mmap.mmap(-1, PIECE_BYTES), dtype=torch.uint8)
        self.view = self._bytes.numpy().data

    def wait(self) -> None:
        """Wait until the last copy is done."""
        if self._copied is not None:
            self._copied.synchronize()

    def copy_to(self, target: torch.Tensor, source: slice, free: torch.cuda.Event | None) -> torch.cuda.Event | None:
        """Copy `source` of the buffer to `target` once `free` has happened; returns the copy's event on a GPU."""
        if self._stream is None or free is None:
            target.copy_(self._bytes[source])
            return None
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(free)
            target.copy_(self._bytes[source], non_blocking=True)
            self._copied = self._stream.record_event()
        return self._copied
