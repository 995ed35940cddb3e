"""Reads and decodes what the next pass may take, while this one computes.

Only payloads that lie in files: reading a smaller one, which comes with the claim, takes less than the hand-over. What
waits is looked at and nothing is claimed, so what goes into the next pass is still decided when it begins, and a run
that is lost until then loses nothing here. What isn't ready by then is decoded by the loop as if there were no thread.
What stays true: beside a single request that is larger, what is decoded here stays within the work of one pass, and
comes from at most `MAX_BYTES`. Called from the loop's thread alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from tinsmith.errors import TinsmithError
from tinsmith.store.rows import OpRow
from tinsmith.types import OpId, TrainItem
from tinsmith.worker.decode import Payloads

MAX_BYTES = 64 * 2**20  # of payloads


class DecodeAhead:
    def __init__(self, payloads: Payloads) -> None:
        """payloads: for this alone, since it reads in a thread of its own."""
        self._payloads = payloads
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="decode")
        self._asked: dict[OpId, Future[TrainItem | None]] = {}

    def want(self, waiting: Iterable[OpRow], max_work: int) -> None:
        """Begin with the first of these that make one pass; what was read for others is forgotten."""
        asked: dict[OpId, Future[TrainItem | None]] = {}
        work = num_bytes = 0
        for op in waiting:
            if not op.kind.is_pass:
                continue
            work += op.cost_tokens
            num_bytes += op.payload_bytes
            if asked and (work > max_work or num_bytes > MAX_BYTES):
                break
            if op.payload_blob is not None:
                old = op.id in self._asked
                asked[op.id] = self._asked.pop(op.id) if old else self._pool.submit(self._decode, op)
        for unwanted in self._asked.values():
            unwanted.cancel()
        self._asked = asked

    def take(self, op: OpRow) -> TrainItem | None:
        """What was decoded of a claimed op; None if it wasn't begun, or can't be read."""
        future = self._asked.pop(op.id, None)
        return None if future is None or future.cancel() else future.result()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._asked.clear()

    def _decode(self, op: OpRow) -> TrainItem | None:
        try:
            return self._payloads.train_item(op)
        except (TinsmithError, OSError, MemoryError):
            return None  # the loop tries again, and says what is wrong
