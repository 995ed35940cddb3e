"""The express lane: the requests that a training loop is made of, answered without the framework in between.

Sending a pass or a step and asking for a result are nearly all that a busy server is asked, and the framework's part of
each costs more than ours. What stays true: whoever comes this way gets the answer that the routes give, to the byte
(the request's id and the date aside), under the same bounds; whatever isn't plain goes the long way, untouched: a key
that was not seen good within the hour, a body of another kind or size, a custom loss, pictures, a result in a file.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from math import ceil
from typing import Any, TypeAlias

import structlog
import zstandard

from tinsmith.api.access import NEEDS
from tinsmith.api.admission import Draft, Promise, admit, attempt, refuse_when_full
from tinsmith.api.answers import Answer, Answered, Refusal, Refused
from tinsmith.api.auth import KeyCache
from tinsmith.api.body import inflate
from tinsmith.api.errors import Problem, fault, lack_of, refusal
from tinsmith.api.futures import come_to, damaged_result, failure_of, try_again
from tinsmith.api.gaps import MAX_AHEAD
from tinsmith.api.intake import Budget
from tinsmith.api.marks import bind_op, log_request, request_id_of, security_headers
from tinsmith.api.places import CALLER
from tinsmith.api.plain_http import PlainRequest, read_plain
from tinsmith.api.pressure import FILLING, TOO_MUCH
from tinsmith.api.services import Services
from tinsmith.api.training import draft_on, fill_optim_step, fill_training
from tinsmith.api.waits import MAX_WAIT_S
from tinsmith.errors import CapacityError, CorruptError, TinsmithError
from tinsmith.observe import tracing
from tinsmith.observe.series import HTTP_REQUESTS, REFUSED
from tinsmith.store.checksums import whole_result
from tinsmith.store.rows import OpRow, Principal, RunRow
from tinsmith.types import OpId, OpKind, OpState, RunId, TenantId
from tinsmith.validate.picture_files import may_hold_pictures
from tinsmith.validate.requests import CUSTOM
from tinsmith.wire.bounds import read_address
from tinsmith.wire.media import JSON, WireError, decode_json, encode_json
from tinsmith.wire.named_pictures import may_name_pictures
from tinsmith.wire.requests import RetrieveFuture, RunAddress
from tinsmith.wire.results import failure_result

SAMPLE_ID = b"req-"  # begins the id of a sequence that a provenance span names
MAX_INFLATED_BYTES = 64 << 10  # digested on the event loop, in a fraction of a millisecond
MAX_RUNS = 16_384
TOO_MANY = 429
TOO_MANY_TEXT = str(TOO_MANY)


Handler: TypeAlias = Callable[[Principal, PlainRequest], Awaitable[Answer | None]]


class Express:
    """For the event loop's own thread.

    Args:
        keys: those that were seen good, shared with the routes.
        budget: of bodies held at one time, shared with the routes.
    """

    def __init__(self, services: Services, keys: KeyCache, budget: Budget) -> None:
        self._services = services
        self._keys = keys
        self._budget = budget
        self._handlers: dict[bytes, Handler] = {
            b"/api/v1/retrieve_future": self._retrieve,
            b"/api/v1/forward_backward": self._forward_backward,
            b"/api/v1/optim_step": self._optim_step,
        }
        headers = security_headers(is_tls=services.settings.has_tls)
        self._security = b"".join(b"%s: %s\r\n" % header for header in headers)
        self._needs = {path: NEEDS[path.decode().rpartition("/")[2]] for path in self._handlers}
        self._filling = {path.encode(): path for path in FILLING}
        self._paths = frozenset(self._handlers.keys() | self._filling.keys())
        self._runs: dict[tuple[TenantId, RunId], RunRow] = {}
        self._refusals = [self._refusal(wait_s) for wait_s in range(MAX_WAIT_S + 1)]

    def take(self, data: bytes, left_s: float = 0.0) -> Refused | Coroutine[Any, Any, Answered | None] | None:
        """What answers the request that `data` is, or its refusal while too much is asked for; None if it is none for
        this lane. It comes to None where that shows later, and nothing has happened then. left_s: of what its
        connection was told to wait."""
        request = read_plain(data, self._paths)
        if request is None:
            return None
        secret = _secret_of(request)
        principal = self._keys.known(secret)
        if principal is None:
            is_ours = request.path in self._handlers and self._keys.was_good(secret)
            return self._answered_later(request, secret) if is_ours else None
        if request.path in self._filling and self._services.pressure.refuses(principal.tenant_id):
            return self._refused(request, principal, left_s)
        if request.path not in self._handlers or not principal.scope.allows(self._needs[request.path]):
            return None
        return self._answered(request, principal)

    def _refused(self, request: PlainRequest, principal: Principal, left_s: float) -> Refused:
        """Decided by the request's head alone; all of the answer but its id and the date is made beforehand."""
        path = self._filling[request.path]
        HTTP_REQUESTS.add(path, TOO_MANY_TEXT)
        REFUSED.add(CapacityError.code)
        self._services.turned_away.note(principal.tenant_id, path, TOO_MANY)
        wait_s = ceil(left_s) if left_s > 0 else self._services.pressure.wait_s()
        request_id = request_id_of(request.headers.get(b"x-request-id", b""))
        return Refused(self._refusals[wait_s], request_id, principal.tenant_id)

    def _refusal(self, wait_s: int) -> Refusal:
        problem = Problem(detail=TOO_MUCH, code=CapacityError.code, category=CapacityError.category)
        answer = Answer(TOO_MANY, encode_json(problem), headers={"retry-after": str(wait_s)})
        return Refusal.of(answer, self._security, wait_s)

    async def _answered_later(self, request: PlainRequest, secret: str) -> Answered | None:
        """Thousands may come at once after a pause: their key is looked up once, and none of them goes the long way."""
        principal = await self._keys.again(secret)
        if principal is None or not principal.scope.allows(self._needs[request.path]):
            return None
        return await self._answered(request, principal)

    async def _answered(self, request: PlainRequest, principal: Principal) -> Answered | None:
        request_id = request_id_of(request.headers.get(b"x-request-id", b""))
        path = request.path.decode()
        started = time.monotonic()
        CALLER.set(principal.tenant_id)
        traced = tracing.request("POST", path, request.headers.get(b"traceparent", b""), request_id)
        marks = {"request_id": request_id, "tenant": principal.tenant_name, "tenant_id": principal.tenant_id}
        structlog.contextvars.bind_contextvars(**marks)  # ends with the context, which is this request's own
        with traced as asked:
            try:
                self._services.underway.begin(principal.key_id, principal.tenant_id, path)
                if path in FILLING:
                    with self._services.pressure.under_way(principal.tenant_id):
                        answer = await self._handlers[request.path](principal, request)
                else:
                    answer = await self._handlers[request.path](principal, request)
            except TinsmithError as error:
                status, headers, problem = refusal(path, error)
                answer = Answer(status, encode_json(problem), headers=headers)
            except Exception as error:  # the HTTP edge
                answer = _failed(path, request_id, error)
            if answer is None:
                if asked is not None:
                    asked.handed_on()
                return None
            self._services.turned_away.note(principal.tenant_id, path, answer.status)
            log_request("POST", path, answer.status, time.monotonic() - started, principal, path, asked)
        return Answered(answer, request_id, self._security)

    async def _retrieve(self, principal: Principal, request: PlainRequest) -> Answer | None:
        if not request.headers.get(b"content-type", b"").startswith(b"application/json"):
            return None
        try:
            asked = decode_json(request.body, RetrieveFuture)
        except WireError:
            return None
        op = await come_to(self._services, principal.tenant_id, OpId(asked.request_id))
        bind_op(op)
        if not op.state.is_final:
            return Answer(408, await try_again(self._services, op))
        if op.state is not OpState.DONE:
            return Answer(200, failure_result(failure_of(op)))
        if op.result_blob is not None:
            return None
        try:
            return Answer(200, whole_result(op) or b"", op.result_media or JSON)
        except CorruptError as error:
            return Answer(200, damaged_result(error))

    async def _forward_backward(self, principal: Principal, request: PlainRequest) -> Answer | None:
        with _Held(self._budget, principal.tenant_id) as held:
            body = self._body(request, held)
            address = None if body is None else read_address(body)
            if body is None or address is None or self._may_need_files(body):
                return None
            where = RunAddress(*address)
            run = await self._run(principal, where)
            await refuse_when_full(self._services, principal.tenant_id, run.run_id, where.seq_id)
            draft = draft_on(run, OpKind.FORWARD_BACKWARD, where)
            fill = partial(fill_training, self._services, principal, body, held.take)
            return await self._admit(principal, attempt(draft, fill))

    def _may_need_files(self, body: bytes) -> bool:
        """Whether what it asks for may have to be looked up, or takes long to look at."""
        names_samples = self._services.settings.router_replay and SAMPLE_ID in body
        names_pictures = self._services.fetcher.is_on and may_name_pictures(body)
        return names_samples or names_pictures or CUSTOM.encode() in body or may_hold_pictures(body)

    async def _optim_step(self, principal: Principal, request: PlainRequest) -> Answer | None:
        with _Held(self._budget, principal.tenant_id) as held:
            body = self._body(request, held)
            if body is None:
                return None
            try:
                where = decode_json(body, RunAddress)
            except WireError:
                return None
            draft = draft_on(await self._run(principal, where), OpKind.OPTIM_STEP, where)
            return await self._admit(principal, attempt(draft, partial(fill_optim_step, body)))

    async def _admit(self, principal: Principal, draft: Draft) -> Answer:
        row: OpRow = await admit(self._services, principal, draft)
        return Answer(200, encode_json(Promise(request_id=row.id, model_id=row.run_id)))

    def _body(self, request: PlainRequest, held: _Held) -> bytes | None:
        """The body, inflated if it came as zstd that says how large it is; None if that is another's task."""
        encoding, most = request.headers.get(b"content-encoding", b"identity"), MAX_INFLATED_BYTES
        if len(request.body) > self._services.settings.max_body_bytes:
            return None
        held.take(len(request.body))
        if encoding == b"identity":
            return request.body
        if encoding != b"zstd":
            return None
        try:
            stated = zstandard.frame_content_size(request.body)
        except zstandard.ZstdError:
            return None
        if not 0 <= stated <= min(most, self._services.settings.max_body_bytes):
            return None
        return inflate(request.body, most, held.take)

    async def _run(self, principal: Principal, where: RunAddress) -> RunRow:
        """The run as it once was: its base and kind never change, and its head only grows.

        Raises:
            NotFoundError: no such run of this tenant.
        """
        key = principal.tenant_id, RunId(where.model_id)
        run = self._runs.get(key)
        if run is None or where.seq_id > run.head_seq + MAX_AHEAD:
            run = await self._services.work(self._services.store.runs.get, *key)
            self._runs[key] = run
            if len(self._runs) > MAX_RUNS:
                del self._runs[next(iter(self._runs))]
        return run


class _Held:
    """What one request holds of the budget, until its block ends."""

    def __init__(self, budget: Budget, tenant_id: TenantId) -> None:
        self._budget, self._tenant_id = budget, tenant_id
        self._num_bytes = 0

    def __enter__(self) -> _Held:
        return self

    def __exit__(self, *_: object) -> None:
        self._budget.give_back(self._tenant_id, self._num_bytes)

    def take(self, num_bytes: int) -> None:
        """Raises: CapacityError: there is no room now."""
        self._budget.take(self._tenant_id, num_bytes, self._num_bytes)
        self._num_bytes += num_bytes


def _failed(path: str, request_id: str, error: Exception) -> Answer:
    lack = lack_of(error)
    if lack is None:
        return Answer(500, encode_json(fault(path, request_id, error)))
    status, headers, problem = refusal(path, lack)
    return Answer(status, encode_json(problem), headers=headers)


def _secret_of(request: PlainRequest) -> str:
    """The key or token, as the routes find it; empty if there's none."""
    secret = request.headers.get(b"x-api-key", b"").decode("latin-1")
    if secret:
        return secret
    scheme, _, token = request.headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""
