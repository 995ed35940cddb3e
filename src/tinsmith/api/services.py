"""What the routes work with, bundled once at start: settings, store, files, waiters, bells, served bases.

The store's calls block, so they don't run on the event loop: reads and CPU work go to a small pool, writes of the queue
to one thread, as the database takes one writer at a time anyway; a lone request's call is an exception (`together`).
Each tenant has a few places in either and waits for them by itself, so that the calls of one who makes a thousand at
once stand beside another's and not before them. What is made of large bodies goes to a lane of its own, one body of a
tenant's at a time.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias, TypeVar
from weakref import WeakValueDictionary

from litestar.di import NamedDependency
from litestar.params import SkipValidation

from tinsmith.api.backlog import Backlog
from tinsmith.api.connection import most_read_out
from tinsmith.api.disk_room import DiskRoom
from tinsmith.api.fetching import Fetcher
from tinsmith.api.figures import Watched
from tinsmith.api.once import Once
from tinsmith.api.pace import Pace
from tinsmith.api.pauses import Waiting, why_waiting
from tinsmith.api.pieces import Pieces
from tinsmith.api.places import CALLER, Places
from tinsmith.api.polls import Polls
from tinsmith.api.pressure import Pressure
from tinsmith.api.queue_room import QueueRoom, room_for_samples, room_for_training
from tinsmith.api.rates import Rate
from tinsmith.api.recent import Recent
from tinsmith.api.telling import Telling
from tinsmith.api.together import Together
from tinsmith.api.turned_away import TurnedAway
from tinsmith.api.underway import Underway
from tinsmith.api.waiters import Waiters
from tinsmith.config import Settings
from tinsmith.errors import CapacityError, CorruptError, UserError
from tinsmith.files.blobs import Blobs
from tinsmith.ipc.bell import Ringer
from tinsmith.ipc.heartbeat import Ear
from tinsmith.ipc.notes import note_of
from tinsmith.machine.clock import Clock
from tinsmith.observe.metrics import Counting
from tinsmith.signing import Signer
from tinsmith.store import Store
from tinsmith.store.rows import Enqueued, NewOp, OpRow, Principal
from tinsmith.types import BaseInfo, OpId, TenantId
from tinsmith.validate.picture_files import Bounds, Verified
from tinsmith.wire.images import Sight

T = TypeVar("T")
NUM_THREADS = 4
NUM_DIGESTING = 2
FEW = 4  # reads of a row that are carried out on the event loop together, each within some 50 us
TENANT_THREADS = 2  # of `NUM_THREADS`
TENANT_WRITES = 2  # one that is written, and one to go on with
LIGHT_BYTES = 128 << 10  # read within a few milliseconds
TENANT_IMPORTS, MAX_IMPORTS = 1, 16  # uploads of weights at one time
NUM_IMPORTING = 4  # of those that are looked at and written at one time, each of another tenant
MAX_TENANT_FILES = 32  # that are read out at one time, for results and for downloads


@dataclass(frozen=True, slots=True)
class ServedBase:
    """tokenizer_files: by file name; what a client may fetch to load the tokenizer."""

    info: BaseInfo
    tokenizer_files: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Services:
    """ready_bases: names of the bases that a worker has loaded; called in a thread. turns: held to digest a body.
    signer: of links and tokens.
    """

    settings: Settings
    store: Store
    blobs: Blobs
    bases: Mapping[str, ServedBase]
    waiters: Waiters
    ringers: Mapping[str, Sequence[Ringer]]
    ready_bases: Callable[[], AbstractSet[str]]
    signer: Signer
    pieces: Pieces = field(default_factory=partial(Pieces, None))
    pace: Pace = field(default_factory=Pace)
    polls: Polls = field(default_factory=Polls)
    traces: Once = field(default_factory=Once)
    work_places: Places = field(default_factory=partial(Places, TENANT_THREADS))
    write_places: Places = field(default_factory=partial(Places, TENANT_WRITES))
    results_out: Places = field(default_factory=lambda: Places(MAX_TENANT_FILES, most_read_out()))
    downloads_out: Places = field(default_factory=lambda: Places(MAX_TENANT_FILES, most_read_out()))
    imports_in: Places = field(default_factory=lambda: Places(TENANT_IMPORTS, MAX_IMPORTS))
    importing: ThreadPoolExecutor = field(default_factory=partial(ThreadPoolExecutor, NUM_IMPORTING, "api-import"))
    working: ThreadPoolExecutor = field(default_factory=partial(ThreadPoolExecutor, NUM_THREADS, "api-work"))
    digesting: ThreadPoolExecutor = field(default_factory=partial(ThreadPoolExecutor, NUM_DIGESTING, "api-digest"))
    turns: WeakValueDictionary[TenantId, asyncio.Lock] = field(default_factory=WeakValueDictionary)
    writing: ThreadPoolExecutor = field(default_factory=partial(ThreadPoolExecutor, 1, "api-write"))

    supervisor: Ear = field(default_factory=partial(Ear, None, math.inf))
    disk: DiskRoom = field(init=False)
    counting: Counting = field(default_factory=partial(Counting, (), "api", None))
    watched: Watched = field(init=False)
    to_ring: dict[str, list[OpRow | None]] = field(init=False, default_factory=dict)
    arriving: Together[NewOp, Enqueued] = field(init=False)
    recent: Recent = field(init=False, default_factory=Recent)
    clock: Clock = field(init=False, default_factory=Clock)
    underway: Underway = field(init=False, default_factory=Underway)
    turned_away: TurnedAway = field(init=False, default_factory=TurnedAway)
    pressure: Pressure = field(init=False)
    foreign_keys: Rate = field(init=False)
    sample_room: QueueRoom = field(init=False)
    training_room: QueueRoom = field(init=False)
    verified: Verified = field(init=False, default_factory=Verified)
    fetcher: Fetcher = field(init=False)
    reading: Together[tuple[TenantId, OpId], OpRow] = field(init=False)
    placing: Together[OpRow, Waiting] = field(init=False)
    telling: Telling = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "disk", DiskRoom(self.settings))
        object.__setattr__(self, "foreign_keys", Rate(self.settings.unknown_keys_per_minute))
        object.__setattr__(self, "fetcher", Fetcher(self.settings))
        object.__setattr__(self, "arriving", Together(self.writing, self._enqueue_all, self._enqueue_at_once))
        polls = partial(getattr, self.waiters, "num_waiting")
        watched = Watched(self.store, self.settings, self.counting, polls, self._disk_bytes, self.supervisor)
        object.__setattr__(self, "watched", watched)
        object.__setattr__(
            self, "pressure", Pressure(lambda: self.arriving.oldest_s, Backlog(self._count_ready, self._ended_since))
        )
        object.__setattr__(self, "sample_room", room_for_samples(self.settings, self.store.loads.samples))
        object.__setattr__(self, "training_room", room_for_training(self.settings, self.store.loads.training))
        object.__setattr__(self, "reading", Together(self.working, self.store.ops.get_all, self._get_at_once, FEW))
        object.__setattr__(self, "placing", Together(self.working, self._why_all, self.look_why_waiting, FEW))
        object.__setattr__(self, "telling", Telling(self.look_why_waiting))

    async def enqueue(self, new: NewOp) -> Enqueued:
        """Record a request, together with those that come at the same time; it is on disk when this returns.

        Raises:
            NotFoundError: its run or sampler is not the tenant's.
            GoneError: it came before, and its result has expired.
        """
        return await self.arriving.ask(new.tenant_id, new)

    async def op(self, tenant_id: TenantId, op_id: OpId) -> OpRow:
        """Raises: GoneError: no such op of this tenant, or its result has expired."""
        return await self.reading.ask(tenant_id, (tenant_id, op_id))

    async def why_waiting(self, op: OpRow) -> Waiting:
        """What an unfinished op waits for."""
        if self.pace.knows(op):
            return self.look_why_waiting(op)
        return await self.placing.ask(op.tenant_id, op)

    async def _count_ready(self) -> Mapping[TenantId, int]:
        return await self.work(self.store.loads.ready)

    async def _ended_since(self, since: float) -> Mapping[TenantId, int]:
        ended: Counter[TenantId] = Counter()
        for (_, tenant_id), num in (await self.work(self.store.places.ended_since, since)).items():
            ended[tenant_id] += num
        return ended

    def _disk_bytes(self) -> Mapping[str, int]:
        """By kind, as they were measured last."""
        return {} if self.disk.use is None else self.disk.use.bytes_by_kind

    def look_why_waiting(self, op: OpRow) -> Waiting:
        """The same, by a call that blocks."""
        is_ready = self.pace.is_ready(op.base_model, self.ready_bases)
        return why_waiting(self.store, self.pace, op, self.settings.session_timeout_s, is_ready=is_ready)

    def _why_all(self, ops: Sequence[OpRow]) -> Sequence[Waiting | Exception]:
        return [self.look_why_waiting(op) for op in ops]

    def _enqueue_all(self, news: Sequence[NewOp]) -> Sequence[Enqueued | Exception]:
        """One that the database can't take, for a reason that nobody foresaw, is not to cost the others theirs."""
        try:
            return self.store.ops.enqueue_all(news, time.time())
        except (CapacityError, CorruptError):
            raise
        except Exception as error:
            if len(news) == 1:
                return [error]
            return [self._enqueue_all([new])[0] for new in news]

    def _enqueue_at_once(self, new: NewOp) -> Enqueued:
        (enqueued,) = self.store.ops.enqueue_all([new], time.time(), may_wait=False)
        if isinstance(enqueued, UserError):
            raise enqueued
        return enqueued

    def _get_at_once(self, wanted: tuple[TenantId, OpId]) -> OpRow:
        return self.store.ops.get(*wanted)

    async def work(self, call: Callable[..., T], *args: Any) -> T:
        """Run a blocking read or a piece of computing."""
        return await _run(self.working, self.work_places, partial(call, *args))

    async def digest(self, principal: Principal, num_bytes: int, call: Callable[..., T], *args: Any) -> T:
        """Run what the tenant's body of up to `num_bytes` asks of the processor."""
        if num_bytes <= LIGHT_BYTES:
            return await self.work(call, *args)
        turn = self.turns.get(principal.tenant_id)
        if turn is None:
            turn = self.turns[principal.tenant_id] = asyncio.Lock()
        async with turn:
            return await asyncio.get_running_loop().run_in_executor(self.digesting, partial(call, *args))

    async def write(self, call: Callable[..., T], *args: Any, **options: Any) -> T:
        """Run a write to the store, after all of the same tenant that were asked for before it."""
        return await _run(self.writing, self.write_places, partial(call, *args, **options))

    def base(self, name: str) -> ServedBase:
        """Raises: UserError: it isn't served here; the message lists those that are."""
        if name not in self.bases:
            raise UserError(f"base model {name[:200]!r} is not served here; served: {', '.join(self.bases)}")
        return self.bases[name]

    @property
    def sees(self) -> bool:
        """Whether any base takes pictures."""
        return any(base.info.vision is not None for base in self.bases.values())

    def sight(self, info: BaseInfo) -> Sight:
        """How requests that are admitted here may show pictures to a base."""
        settings = self.settings
        bounds = Bounds(settings.max_picture_bytes, settings.max_picture_pixels)
        return Sight(info.name, info.vision, bounds, settings.max_pictures, self.verified)

    def ring(self, base_model: str, row: OpRow | None = None) -> None:
        """Hint to the base's workers that there's work: once, however many say so in this turn of the event loop, and
        after what is answered in it, so that a worker that wakes up takes no processor from the answer. row: what has
        come, if it is that alone."""
        if not self.to_ring:
            asyncio.get_running_loop().call_soon(self._ring_all)
        self.to_ring.setdefault(base_model, []).append(row)

    def _ring_all(self) -> None:
        for base_model, rows in self.to_ring.items():
            note = note_of(rows)
            for ringer in self.ringers.get(base_model, ()):
                ringer.ring(note)
        self.to_ring.clear()

    def close(self) -> None:
        for ringer in chain.from_iterable(self.ringers.values()):
            ringer.close()
        self.writing.shutdown(wait=True)
        self.digesting.shutdown(wait=True)
        self.importing.shutdown(wait=True)
        self.working.shutdown(wait=True)


async def _run(executor: ThreadPoolExecutor, places: Places, call: Callable[[], T]) -> T:
    loop, caller = asyncio.get_running_loop(), CALLER.get()
    if caller is None:
        return await loop.run_in_executor(executor, call)
    async with places.place(caller):
        return await loop.run_in_executor(executor, call)


ServicesDep: TypeAlias = NamedDependency[SkipValidation[Services]]
