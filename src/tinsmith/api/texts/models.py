"""The models that can be asked: the served bases, and checkpoints for sampling by their tinker:// path, the tenant's
own and published ones.

Requests need a sampler. Each key gets a session of the server's own, and in it a sampler for each model that the key
asks; both are made when they are first needed and again when they have ended.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from tinsmith import __version__
from tinsmith.api.sampling import new_sampler
from tinsmith.api.services import Services
from tinsmith.api.sharing import find_checkpoint
from tinsmith.errors import GoneError, NotFoundError, UserError
from tinsmith.store.rows import CheckpointRow, Principal
from tinsmith.types import BaseInfo, CheckpointKind, SamplerId, SessionId
from tinsmith.wire.paths import SCHEME
from tinsmith.wire.requests import CreateSamplingSession

MAX_SEATS = 10_000
DISPLAY_NAME = "OpenAI- and Anthropic-compatible requests"


class ModelMissing(NotFoundError):
    """No such model for this tenant."""

    field = "model"
    openai_code = "model_not_found"


@dataclass(frozen=True, slots=True)
class Model:
    """name: as the client calls it. blob: the weights of a checkpoint, None for a base alone.

    created_at: unix seconds, 0 for a base. is_own: it isn't another tenant's, published.
    """

    name: str
    info: BaseInfo
    path: str | None = None
    blob: str | None = None
    created_at: float = 0.0
    is_own: bool = True


def find_model(services: Services, principal: Principal, name: str) -> Model:
    """The model of that name, for this tenant.

    Raises:
        ModelMissing: not served, no such checkpoint, or another tenant's that isn't published.
        UserError: a checkpoint for training.
    """
    if name in services.bases:
        return Model(name, services.bases[name].info)
    found = _find_checkpoint(services, principal, name) if name.startswith(SCHEME) else None
    if found is None or found.spec.base_model not in services.bases:
        raise ModelMissing(
            f"the model {name[:200]!r} does not exist: name one of {', '.join(services.bases)}, or the tinker:// path "
            "of a checkpoint saved with save_weights_for_sampler"
        )
    if found.kind is not CheckpointKind.SAMPLER:
        raise UserError(f"{found.path} is no checkpoint to sample from: save one with save_weights_for_sampler")
    info, is_own = services.bases[found.spec.base_model].info, found.tenant_id == principal.tenant_id
    return Model(found.path, info, found.path, found.blob, found.created_at, is_own)


def _find_checkpoint(services: Services, principal: Principal, path: str) -> CheckpointRow | None:
    try:
        return find_checkpoint(services, principal, path)
    except NotFoundError:
        return None


@dataclass(slots=True)
class Seat:
    """Where one key's requests of one model go."""

    session_id: SessionId
    sampler_id: SamplerId
    seq_ids: Iterator[int] = field(default_factory=itertools.count)


@dataclass(slots=True)
class _Session:
    session_id: SessionId
    beaten_at: float
    numbers: Iterator[int] = field(default_factory=itertools.count)


class Seats:
    """All sessions and samplers that this process made. For the event loop's own thread."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._sessions: dict[tuple[str, str], _Session] = {}
        self._seats: OrderedDict[tuple[str, str, str, str | None], Seat] = OrderedDict()
        self._lock = asyncio.Lock()

    async def seat(self, principal: Principal, model: Model) -> Seat:
        """The sampler to use now; its session is alive."""
        async with self._lock:
            session = await self._session(principal)
            key = (principal.tenant_id, principal.key_id, model.name, model.blob)
            seat = self._seats.get(key)
            if seat is None or seat.session_id != session.session_id:
                seat = self._seats[key] = await self._new_seat(principal, session, model)
            self._seats.move_to_end(key)
            while len(self._seats) > MAX_SEATS:
                self._seats.popitem(last=False)
            return seat

    async def keep(self, principal: Principal) -> None:
        """The key's session is alive: somebody waits for one of its requests."""
        async with self._lock:
            await self._session(principal)

    async def _session(self, principal: Principal) -> _Session:
        sessions, now = self._services.store.sessions, time.time()
        key = (principal.tenant_id, principal.key_id)
        session = self._sessions.get(key)
        if session is not None and now - session.beaten_at < self._services.settings.session_timeout_s / 4:
            return session
        if session is not None:
            try:
                await self._services.write(sessions.beat, principal.tenant_id, session.session_id, now)
                session.beaten_at = now
                return session
            except GoneError:
                self._sessions.pop(key)
        if len(self._sessions) >= MAX_SEATS:
            self._sessions.clear()
        row = await self._services.write(
            sessions.create,
            principal.tenant_id,
            tags=("compatible",),
            sdk_version=f"tinsmith/{__version__}",
            display_name=DISPLAY_NAME,
            by=principal,
            most=self._services.settings.max_sessions,
        )
        session = self._sessions[key] = _Session(row.session_id, now)
        return session

    async def _new_seat(self, principal: Principal, session: _Session, model: Model) -> Seat:
        asked = CreateSamplingSession(
            session_id=session.session_id,
            sampling_session_seq_id=next(session.numbers),
            base_model=model.info.name,
            model_path=model.path,
        )
        new = await self._services.work(new_sampler, self._services, principal, asked)
        row = await self._services.write(self._services.store.samplers.create, new, time.time())
        return Seat(session.session_id, row.sampler_id)
