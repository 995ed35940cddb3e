"""One client's connection: how long it may owe us something, how long a header may be, how many there may be.

On uvicorn's h11 protocol, which bounds an unfinished header by size and nothing by time. What stays true: a connection
without an answer under way is idle between two requests (`timeout_keep_alive`), or it owes a whole header or the rest
of a body, and is closed when that doesn't come in time. A client that takes nothing of what was written to it is closed
as well, at any moment. A poll that waits ends with its connection (`stay`). The body of a request under way is bounded
in `intake`, what may be written in `outgo`.
"""

from __future__ import annotations

import asyncio
import re
import resource
from collections.abc import Coroutine
from enum import Enum
from functools import lru_cache
from http import HTTPStatus
from typing import Any, Protocol

import h11
from uvicorn.protocols.http.flow_control import CLOSE_HEADER
from uvicorn.protocols.http.h11_impl import H11Protocol

from tinsmith.api.answers import Answered, Refused
from tinsmith.api.crowd import Crowd
from tinsmith.api.eager import begin
from tinsmith.api.errors import RETRY_AFTER_S, Problem, status_of
from tinsmith.api.hearing import Hearing
from tinsmith.api.marks import request_id_of, security_headers
from tinsmith.api.stay import STAY, Stay
from tinsmith.api.ticks import ticks_of
from tinsmith.api.wire import Wire
from tinsmith.errors import CapacityError, RequestTimeoutError, TinsmithError, UserError
from tinsmith.observe.metrics import OTHER
from tinsmith.observe.series import HTTP_REQUESTS, REFUSED
from tinsmith.types import TenantId
from tinsmith.wire.media import JSON, encode_json

HEADER_BYTES = 64 << 10
HEADER_END = re.compile(rb"\n\r?\n")  # as h11 sees it
READ_BYTES = 32 << 10  # at one time: a body in chunks of one byte takes h11 2 us a byte
HEADER_S = 15.0
REST_S = 30.0
UNREAD_S = 30.0
LOOKS = 6  # in that time
WRITE_BYTES = 32 << 10  # written ahead of the client, before writers wait for it
MAX_CONNECTIONS = 12_000
RESERVED_FILES = 128  # for the database, payloads, bells
MAX_READ_OUT = 256  # stored files that are read out at one time, beside the connections that they go to


BETWEEN = {h11.CLIENT: h11.IDLE, h11.SERVER: h11.IDLE}


class Lane(Protocol):
    """See `express.Express`."""

    def take(self, data: bytes, left_s: float = 0.0) -> Refused | Coroutine[Any, Any, Answered | None] | None: ...


class Owed(Enum):
    HEADER = "header"
    REST = "rest"  # of a body whose request has been answered already


class Connection(H11Protocol):
    """How many there may be, and whose, is the crowd's to say; others are turned away at once.

    What comes between two requests is offered to the express lane first, and h11 never sees what that takes.
    """

    def __init__(
        self, express: Lane, crowd: Crowd, *args: Any, beneath: asyncio.Transport | None = None, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._express, self._crowd, self._beneath = express, crowd, beneath
        self._express_task: asyncio.Task[None] | None = None
        self._ticks = ticks_of(self.loop)
        self._early = b""  # what came while the express lane had a request
        self._is_leaving = False  # the next answer is the last one
        self._has_been_parsed = False  # by h11, any of it
        self._lingers_until = 0.0
        self._hearing = Hearing()
        self._stay = Stay(self._cut, self._settle)
        self._owed: Owed | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._looking: asyncio.TimerHandle | None = None
        self._unread_bytes, self._num_idle_looks = 0, 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wire = Wire(transport, self._beneath, WRITE_BYTES)
        if hasattr(transport, "max_size"):
            transport.max_size = READ_BYTES
        if not self._crowd.come(self):
            self._refuse(CapacityError("the server has as many connections as it can hold: try again"), status=503)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._crowd.gone(self)
        self._stay.end()
        self._expect(None)
        if self._looking is not None:
            self._looking.cancel()
        super().connection_lost(exc)

    def _cut(self) -> None:
        self._wire.cut()

    def _settle(self, tenant_id: TenantId, is_poll: bool) -> None:
        """Raises: CapacityError: the tenant has as many as it may; the answer that says so is the last one here."""
        if not self._crowd.settle(self, tenant_id, is_poll=is_poll):
            self._is_leaving = True
            if self._is_in_cycle():
                self.shutdown()
            raise CapacityError(
                "connections are scarce, and no tenant has more of them than this one: let go of some, or try again"
            )

    def may_leave(self) -> bool:
        if self._wire.num_waiting():  # its client doesn't take what it is told
            return self._stay.tenant_id is None or self._is_leaving
        if self._stay.is_polling or self._hearing.is_unread:
            return True
        return not (self._is_at_work() or self._wire.num_unseen())

    def leave(self) -> None:
        """To make room: at once if it is idle, else with the answer to its polls, which comes now."""
        if self._wire.num_waiting():
            self._wire.cut()
        elif self._is_at_work():
            self._stay.release()
            self.shutdown()
        else:
            self._wire.hang_up()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._look_later()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._num_idle_looks = 0

    def data_received(self, data: bytes) -> None:
        if self._express_task is not None:
            self._early += data
            if len(self._early) > READ_BYTES:
                self.flow.pause_reading()
            return
        STAY.set(self._stay)  # what is begun from here on inherits it
        taken = (
            self._express.take(data, self._hearing.left_s(self.loop.time())) if self._is_between_requests() else None
        )
        if isinstance(taken, Refused):
            self._turn_away(taken)
            return
        if taken is None:
            self._has_been_parsed = True
            if self._is_header_too_long(data):
                self.send_400_response("")
                return
            super().data_received(data)
            if self._is_leaving:
                self.shutdown()
        else:
            self._unset_keepalive_if_required()
            self._express_task = begin(self._answer(data, taken), self.loop)
            if self._express_task is not None:
                self.tasks.add(self._express_task)
                self._express_task.add_done_callback(self.tasks.discard)
        self._watch()

    def _turn_away(self, refused: Refused) -> None:
        """One that came before its time has its place in the line already."""
        self._unset_keepalive_if_required()
        wait_s = refused.refusal.wait_s
        self.transport.write(refused.to_bytes(self._dated()))
        self._answered_until(wait_s)
        self._expect(None)
        unread_s = self._hearing.refused(refused.tenant_id, self._stay, wait_s, self.loop.time())
        if unread_s:
            self.flow.pause_reading()
            self.loop.call_later(unread_s, self._listen)

    def _is_header_too_long(self, data: bytes) -> bool:
        """h11 bounds a header by its size while it isn't whole; this bounds one that comes to be whole with `data`."""
        if self.conn.their_state is not h11.IDLE:
            return False
        head = self.conn.trailing_data[0] + data
        return len(head) > HEADER_BYTES and HEADER_END.search(head, 0, HEADER_BYTES) is None

    def _is_between_requests(self) -> bool:
        if self.transport.is_closing():
            return False
        return not self._has_been_parsed or (self.conn.states == BETWEEN and not self.conn.trailing_data[0])

    async def _answer(self, data: bytes, answering: Coroutine[Any, Any, Answered | None]) -> None:
        answered = await answering
        if answered is not None and self.flow.write_paused:
            await self.flow.drain()
        self._express_task = None
        early, self._early = self._early, b""
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if answered is None:
            self._has_been_parsed = True
            super().data_received(data)
            if self._is_leaving:
                self.shutdown()
        else:
            is_last = self._is_leaving or answered.closes
            self._send(answered, is_last=is_last)
            if is_last:
                self._wire.hang_up()
                return
        if early:
            self.data_received(early)
        else:
            self._watch()

    def linger(self, seconds: float) -> None:
        """The server ends, but a request that is on its way is answered still: the answer says that it is the last."""
        self._lingers_until = self.loop.time() + seconds
        self.loop.call_later(seconds, self.shutdown)
        self.shutdown()

    def _send(self, answered: Answered, *, is_last: bool) -> None:
        self.transport.write(answered.to_bytes(self._dated(), is_last=is_last))
        if is_last:
            self.server_state.total_requests += 1
        else:
            self._answered_until()

    def _dated(self) -> bytes:
        """Headers of every answer, which uvicorn makes anew each second."""
        return _lines(tuple(self.server_state.default_headers))

    def _answered_until(self, wait_s: float = 0.0) -> None:
        """The next request is awaited, for the usual time after the client was told to come."""
        self.server_state.total_requests += 1
        seconds = self.timeout_keep_alive + wait_s
        self.timeout_keep_alive_task = self._ticks.later(seconds, self.timeout_keep_alive_handler)  # type: ignore[assignment]
        self._look_later()

    def _listen(self) -> None:
        """Read again, after a refusal."""
        if not self.transport.is_closing():
            self._hearing.again(has_more=self._wire.num_unseen() > 0)
            self.flow.resume_reading()

    def shutdown(self) -> None:
        has_answered = not self._is_in_cycle()
        if self._express_task is not None or (has_answered and self.loop.time() < self._lingers_until):
            self._is_leaving = True
            return
        if not (has_answered or self.cycle.response_started):
            headers = [*self.cycle.scope["headers"], CLOSE_HEADER]  # uvicorn closes without saying so otherwise
            self.cycle.scope["headers"] = headers
        super().shutdown()
        if self.transport.is_closing():
            self._wire.hang_up()

    def eof_received(self) -> None:
        """A client that sends no more may still read why its half of a request is of no use."""
        is_cut = self.conn.their_state is h11.SEND_BODY or bool(self.conn.trailing_data[0])
        if is_cut and (self.cycle is None or not self.cycle.response_started):
            self._refuse(UserError("the connection was closed before the request was whole: send it again"))

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._wire.hang_up()
        self._watch()
        self._look_later()

    def send_400_response(self, msg: str) -> None:
        """What h11 can't read: no HTTP, or a header beyond `HEADER_BYTES`."""
        self._refuse(UserError(f"this is no HTTP/1.1 request, or its header is longer than {HEADER_BYTES} bytes"))

    def _watch(self) -> None:
        if self.transport.is_closing() or self._is_at_work():
            self._expect(None)
        elif self.conn.their_state is h11.SEND_BODY:
            self._expect(Owed.REST)
        else:
            self._expect(Owed.HEADER if self.timeout_keep_alive_task is None else None)

    def _is_at_work(self) -> bool:
        return self._express_task is not None or self._is_in_cycle()

    def _is_in_cycle(self) -> bool:
        """Whether a request that h11 read is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def _expect(self, owed: Owed | None) -> None:
        """What comes in bit by bit doesn't put the deadline off."""
        if owed is self._owed:
            return
        if self._deadline is not None:
            self._deadline.cancel()
        self._owed = owed
        within_s = HEADER_S if owed is Owed.HEADER else REST_S
        self._deadline = None if owed is None else self.loop.call_later(within_s, self._expire)

    def _look_later(self) -> None:
        """See from time to time whether the client takes what waits for it."""
        if self._looking is None and self._wire.num_waiting():
            self._unread_bytes, self._num_idle_looks = self._wire.num_unread(), 0
            self._looking = self.loop.call_later(UNREAD_S / LOOKS, self._look)

    def _look(self) -> None:
        """Writers stop while much waits, so with each byte that the client takes less does."""
        before, self._unread_bytes = self._unread_bytes, self._wire.num_unread()
        self._num_idle_looks = 0 if self._unread_bytes < before else self._num_idle_looks + 1
        self._looking = None
        if self._num_idle_looks >= LOOKS:
            self._wire.cut()
        elif self._wire.num_waiting():
            self._looking = self.loop.call_later(UNREAD_S / LOOKS, self._look)

    def _expire(self) -> None:
        has_begun = bool(self.conn.trailing_data[0])
        if self._owed is Owed.HEADER and has_begun:
            self._refuse(RequestTimeoutError(f"the request's header was not whole after {HEADER_S:g} s"))
        self._wire.hang_up()

    def _refuse(self, error: TinsmithError, status: int | None = None) -> None:
        """Answer outside of any request, and close."""
        body = encode_json(Problem(error.message, error.code, error.category))
        status = status or status_of(error)
        headers = [
            *self.server_state.default_headers,
            (b"content-type", JSON.encode()),
            (b"content-length", str(len(body)).encode()),
            (b"x-request-id", request_id_of(b"").encode()),
            *security_headers(is_tls=self.scheme == "https"),
            CLOSE_HEADER,
        ]
        if status == 503:
            headers.append((b"retry-after", str(RETRY_AFTER_S).encode()))
        events = (
            h11.Response(status_code=status, headers=headers, reason=HTTPStatus(status).phrase.encode()),
            h11.Data(data=body),
            h11.EndOfMessage(),
        )
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self.transport.is_closing():
            HTTP_REQUESTS.add(OTHER, str(status))
            REFUSED.add(error.code)
            for event in events:
                self.transport.write(self.conn.send(event) or b"")
            self._look_later()
        self._wire.hang_up()


@lru_cache(maxsize=1)
def _lines(headers: tuple[tuple[bytes, bytes], ...]) -> bytes:
    return b"".join([b"%b: %b\r\n" % header for header in headers])


def most_connections() -> int:
    """As many as the process's limit of open files leaves room for."""
    soft = _file_limit()
    return (
        MAX_CONNECTIONS if soft is None else max(1, min(MAX_CONNECTIONS, soft - RESERVED_FILES - 2 * most_read_out()))
    )


def most_read_out() -> int:
    """How many stored files may be open for results, and how many more for downloads."""
    soft = _file_limit()
    return MAX_READ_OUT if soft is None else max(1, min(MAX_READ_OUT, (soft - RESERVED_FILES) // 8))


def raise_file_limit() -> None:
    """A poll holds a connection, so the usual limit of 1024 files would be a limit of a thousand polls."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + RESERVED_FILES + 2 * MAX_READ_OUT
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _file_limit() -> int | None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft
