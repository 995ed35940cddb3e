"""Writes files beside the loop: one thread, finished jobs come back to the loop's own thread.

A pass never waits for a disk. What a job returns is handed to its `then` by `drain`, called by the loop, so that all
bookkeeping stays in one thread. A job that raises hands its exception to `then` in place of a value.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Writer:
    def __init__(self, wake: Callable[[], None]) -> None:
        """`wake` is called from the writing thread after each job, to rouse the loop."""
        self._wake = wake
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")
        self._done: queue.SimpleQueue[tuple[Future[Any], Callable[[Any], None]]] = queue.SimpleQueue()
        self.num_pending = 0

    def submit(self, job: Callable[[], Any], then: Callable[[Any], None]) -> None:
        self.num_pending += 1

        def hand_back(future: Future[Any]) -> None:
            self._done.put((future, then))
            self._wake()

        self._pool.submit(job).add_done_callback(hand_back)

    def flush(self) -> None:
        """Wait for all that was submitted and run its `then`; jobs that those submit are waited for as well."""
        while self.num_pending:
            self._finish(*self._done.get())

    def drain(self) -> bool:
        """Run the `then` of each finished job. True if there was any."""
        worked = False
        while True:
            try:
                self._finish(*self._done.get_nowait())
            except queue.Empty:
                return worked
            worked = True

    def close(self) -> None:
        self._pool.shutdown(wait=True)

    def _finish(self, future: Future[Any], then: Callable[[Any], None]) -> None:
        self.num_pending -= 1
        error = future.exception()
        then(error if error is not None else future.result())
