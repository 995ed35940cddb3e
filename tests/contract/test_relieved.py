"""An API process that another one has taken the place of, and finishes what it has."""

from __future__ import annotations

import threading

from tests.contract.conftest import House, Live
from tests.contract.streams import Upload
from tests.service import until
from tinsmith.api.main import Server

WITHIN_S = 5.0


def test_what_a_relieved_process_still_does_ends_with_its_key(live: Live, house: House) -> None:
    """The one that is told of the revocation is the other. An upload stands for all that goes on with a key."""
    key, secret = house.store.tenants.create_key(house.tenant_id, "leaked")
    underway = live.server._services.underway
    with Upload(live.url, secret, "/create_session", 1000) as upload:
        upload.send(b"{")
        until(lambda: key.key_id in underway.key_ids(), WITHIN_S, lambda: "nobody was heard")
        relieve(live.server)
        live.thread.join(1.0)
        assert live.thread.is_alive()
        house.store.tenants.revoke_key(key.key_id)
        assert upload.is_closed(WITHIN_S)
        live.thread.join(WITHIN_S)
        assert not live.thread.is_alive()


def relieve(server: Server) -> None:
    """As SIGUSR1 does in a process of its own."""
    assert threading.current_thread() is threading.main_thread()
    server._is_relieved = True
    server.should_exit = True
