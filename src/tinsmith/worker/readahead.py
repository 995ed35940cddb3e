"""States in host memory on their way into the engine: read, checked and decoded beside the loop, ahead of their use.

Between the engine's memory and the disk. Where the engine's memory is the host's, a state stays here only until it is
taken, and the engine then holds those very arrays; where it isn't, states of runs that left come back from here.
What stays true: beside a single state that is larger, all of them together stay within `max_bytes`. Called from the
loop's thread alone.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import structlog

from tinsmith.errors import CorruptError, NotFoundError, TinsmithError, UserError
from tinsmith.files.blobs import Blobs
from tinsmith.files.checkpoint_file import read_state
from tinsmith.types import BlobKey, FloatArray, RunState

log = structlog.get_logger("tinsmith.worker")

NUM_READERS = 2
MAX_READING = 16  # files asked for and not read yet
WANTED_S = 2.0  # a state that nobody has asked for in this time may go


@dataclass(slots=True, eq=False)
class _Entry:
    num_bytes: int
    read: Future[RunState]
    wanted_at: float = field(default_factory=time.monotonic)


class ReadAhead:
    def __init__(
        self, blobs: Blobs, make_row: Callable[[int], FloatArray], max_bytes: int, wake: Callable[[], None]
    ) -> None:
        """`make_row` makes room for so many numbers; `wake` rouses the loop once a state is there."""
        self._blobs = blobs
        self._read = partial(read_state, make_row=make_row)
        self._max_bytes = max_bytes
        self._wake = wake
        self._pool = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="readahead")
        self._entries: OrderedDict[BlobKey, _Entry] = OrderedDict()
        self.num_bytes = 0

    @property
    def num_pending(self) -> int:
        return sum(not entry.read.done() for entry in self._entries.values())

    def want(self, key: BlobKey) -> bool:
        """Whether `take` will answer at once. If not, the file is read now, or later where there is no room."""
        entry = self._entries.get(key)
        if entry is not None:
            entry.wanted_at = time.monotonic()
            self._entries.move_to_end(key)
            return entry.read.done()
        if self.num_pending >= MAX_READING:
            return False
        try:
            num_bytes = self._blobs.size(key)
        except TinsmithError:
            return True  # `take` says what is wrong
        if self._make_room(num_bytes):
            read = self._pool.submit(self._blobs.load, key, self._read)
            self._add(key, _Entry(num_bytes, read))
            read.add_done_callback(lambda _: self._wake())
        return False

    def trouble(self, key: BlobKey) -> TinsmithError | None:
        """Why the file that was read, or isn't there, doesn't give a state; None if it does, or for lack of memory."""
        entry = self._entries.get(key)
        if entry is None:
            try:
                return None if self._blobs.exists(key) else NotFoundError(f"no stored file {key}")
            except UserError as no_name:
                return CorruptError(no_name.message)
        error = entry.read.exception() if entry.read.done() else None
        return error if isinstance(error, CorruptError | NotFoundError) else None

    def drop(self, key: BlobKey) -> None:
        """Let go of a state that nobody will take."""
        if key in self._entries:
            self._drop(key)

    def take(self, key: BlobKey) -> RunState:
        """The state, which is the caller's from now on; read now if it wasn't before.

        Raises:
            NotFoundError: no such file.
            CorruptError: its content isn't what was stored.
        """
        entry = self._entries.get(key)
        if entry is None:
            return self._blobs.load(key, self._read)
        self._drop(key)
        return entry.read.result()

    def keep(self, key: BlobKey, state: RunState) -> None:
        """A state that was written under this key may be taken again, while there is room."""
        num_bytes = sum(tensor.nbytes for tensor in state.tensors.values())
        if key not in self._entries and self._make_room(num_bytes):
            read: Future[RunState] = Future()
            read.set_result(state)
            self._add(key, _Entry(num_bytes, read, wanted_at=float("-inf")))

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._entries.clear()

    def _make_room(self, num_bytes: int) -> bool:
        """Let go of what nobody wants, the longest unused first."""
        unwanted = time.monotonic() - WANTED_S
        for key, entry in list(self._entries.items()):
            if self.num_bytes + num_bytes <= self._max_bytes:
                break
            if entry.wanted_at < unwanted and entry.read.done():
                self._drop(key)
        return not self._entries or self.num_bytes + num_bytes <= self._max_bytes

    def _add(self, key: BlobKey, entry: _Entry) -> None:
        self._entries[key] = entry
        self.num_bytes += entry.num_bytes

    def _drop(self, key: BlobKey) -> None:
        self.num_bytes -= self._entries.pop(key).num_bytes
