"""A client that comes before its time isn't read for the rest of it; nobody else waits with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tinsmith.api.hearing import DEAF_S, PATIENCE, Hearing
from tinsmith.api.stay import STAY, Stay
from tinsmith.api.underway import Underway
from tinsmith.types import TenantId

ONE, OTHER = TenantId("one"), TenantId("other")
WAIT_S = 4


@pytest.fixture
def stay() -> Stay:
    return Stay(lambda: None, lambda tenant_id, is_poll: None)


def test_who_waits_as_it_was_told_is_always_read(stay: Stay) -> None:
    hearing = Hearing()
    for now in (10.0, 10.0 + WAIT_S, 10.0 + 2 * WAIT_S - 0.05):
        assert hearing.left_s(now) == 0.0
        assert hearing.refused(ONE, stay, WAIT_S, now) == 0.0
        assert hearing.left_s(now + 1.0) == pytest.approx(PATIENCE * WAIT_S - 1.0)


def test_who_comes_too_early_is_unread_for_the_rest_and_longer_while_it_goes_on(stay: Stay) -> None:
    hearing = Hearing()
    hearing.refused(ONE, stay, WAIT_S, 10.0)
    assert hearing.refused(ONE, stay, WAIT_S, 11.0) == pytest.approx(PATIENCE * WAIT_S - 1.0)
    assert hearing.is_unread
    hearing.again(has_more=True)
    assert not hearing.is_unread
    assert hearing.refused(ONE, stay, WAIT_S, 14.0) == PATIENCE * WAIT_S, "at once, as it has not waited"
    hearing.again(has_more=False)
    assert hearing.refused(ONE, stay, WAIT_S, 30.0) == 0.0, "it waits now"


def test_it_is_unread_for_a_moment_at_least(stay: Stay) -> None:
    hearing = Hearing()
    hearing.refused(ONE, stay, WAIT_S, 10.0)
    assert hearing.refused(ONE, stay, WAIT_S, 10.0 + PATIENCE * WAIT_S - 0.1) == DEAF_S


def test_on_a_proxy_s_connection_nobody_waits_long_with_another(stay: Stay) -> None:
    hearing = Hearing()
    hearing.refused(ONE, stay, WAIT_S, 10.0)
    assert hearing.refused(OTHER, stay, WAIT_S, 10.1) == DEAF_S
    hearing.again(has_more=True)
    assert hearing.refused(ONE, stay, WAIT_S, 20.0) == 0.0
    assert hearing.refused(ONE, stay, WAIT_S, 20.1) == DEAF_S


@pytest.mark.parametrize(
    ("tenant_id", "path", "is_mixed"),
    [
        (ONE, "/api/v1/optim_step", False),
        (ONE, "/api/v1/retrieve_future", True),
        (OTHER, "/api/v1/optim_step", True),
    ],
)
def test_what_a_connection_has_brought(stay: Stay, tenant_id: TenantId, path: str, is_mixed: bool) -> None:
    hearing, underway = Hearing(), Underway()
    with answering(stay):
        underway.begin("key", tenant_id, path)
    hearing.refused(ONE, stay, WAIT_S, 10.0)
    assert hearing.refused(ONE, stay, WAIT_S, 10.1) == (DEAF_S if is_mixed else pytest.approx(3.5))


@contextmanager
def answering(stay: Stay) -> Iterator[None]:
    token = STAY.set(stay)
    try:
        yield
    finally:
        STAY.reset(token)
