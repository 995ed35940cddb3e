"""The bound on unknown keys: for each address, in bounded memory, and not for keys that were good lately."""

from __future__ import annotations

import asyncio

import pytest

from tinsmith.api import auth, guesses
from tinsmith.api.auth import KeyCache
from tinsmith.api.guesses import Guesses, address_of
from tinsmith.errors import AuthError, GuessingError
from tinsmith.scopes import Scope
from tinsmith.store.rows import Principal
from tinsmith.types import TenantId


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Keys:
    """A cache whose only good keys begin with "good"; `num_looks` are questions to the store."""

    def __init__(self, per_minute: int = 6) -> None:
        self.clock, self.num_looks = Clock(), 0
        self.guesses = Guesses(per_minute, self.clock)
        self.cache = KeyCache(self._look, self.guesses)

    async def _look(self, secret: str) -> Principal | None:
        self.num_looks += 1
        await asyncio.sleep(0)
        return Principal(TenantId("t"), "t", "k" + secret, Scope.FULL) if secret.startswith("good") else None

    async def ask(self, secret: str, address: str = "1.2.3.4") -> str:
        try:
            await self.cache.principal(secret, address)
        except GuessingError:
            return "wait"
        except AuthError:
            return "wrong"
        return "good"


def test_after_a_bound_unknown_keys_are_not_looked_up() -> None:
    async def main() -> None:
        keys = Keys()
        assert await keys.ask("good") == "good"
        assert [await keys.ask(f"bad{n}") for n in range(8)] == ["wrong"] * 6 + ["wait"] * 2
        assert keys.num_looks == 7
        assert await keys.ask("bad", "1.2.3.5") == "wrong"
        keys.cache.forget("kgood")
        assert await keys.ask("good") == "good"
        keys.clock.now += 10
        assert [await keys.ask(f"late{n}") for n in range(2)] == ["wrong", "wait"]
        keys.clock.now += 60
        assert await keys.ask("good, and new here") == "good"

    asyncio.run(main())


def test_good_keys_use_nothing_up() -> None:
    async def main() -> None:
        keys = Keys()
        assert [await keys.ask(f"good{n}") for n in range(50)] == ["good"] * 50
        assert len(keys.guesses) == 0

    asyncio.run(main())


def test_many_at_once_are_bounded_too() -> None:
    async def main() -> None:
        keys = Keys()
        answers = await asyncio.gather(*(keys.ask(f"bad{n}") for n in range(100)))
        assert sorted(answers) == ["wait"] * 94 + ["wrong"] * 6
        assert keys.num_looks == 6

    asyncio.run(main())


def test_a_token_is_no_guess() -> None:
    """It is signed: nobody can try one out, and clients whose tokens ended together must hear of it at once."""

    async def main() -> None:
        keys = Keys()
        assert [await keys.ask(f"eyJ{n}") for n in range(20)] == ["wrong"] * 20

    asyncio.run(main())


def test_the_memory_of_addresses_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guesses, "MAX_ADDRESSES", 100)
    bounded = Guesses(2, Clock())
    for number in range(1000):
        bounded.count(f"10.0.{number >> 8}.{number & 255}")
    assert len(bounded) == 100
    bounded.count("10.0.3.231")
    assert bounded.wait_s("10.0.3.231") == 30
    assert bounded.wait_s("10.0.0.1") == 0


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
        ("testclient", "testclient"),
    ],
)
def test_what_counts_as_one_address(host: str, address: str) -> None:
    assert address_of(host) == address


def test_a_revocation_while_a_key_is_looked_up_is_not_missed() -> None:
    """The answer of before it must not be remembered, nor let this request in."""

    async def main() -> None:
        good, asked = True, asyncio.Event()
        go_on = asyncio.Event()

        async def look(secret: str) -> Principal | None:
            found = Principal(TenantId("t"), "t", "k", Scope.FULL) if good else None
            asked.set()
            await go_on.wait()
            return found

        cache = KeyCache(look)
        asking = asyncio.create_task(cache.principal("good"))
        await asked.wait()
        good = False
        cache.forget("k")
        go_on.set()
        with pytest.raises(AuthError):
            await asking
        assert cache.known("good") is None

    asyncio.run(main())


def test_a_key_in_use_is_looked_up_before_it_lapses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of requests would wait for it each second otherwise; one that was revoked meanwhile lapses."""

    async def main() -> None:
        keys = Keys()
        await keys.cache.principal("good")
        assert keys.cache.known("good") is not None
        assert keys.num_looks == 1, "it has its time"
        monkeypatch.setattr(auth, "RENEW_S", auth.TTL_S)  # so that any time is the time before it lapses
        assert [keys.cache.known("good") is not None for _ in range(3)] == [True] * 3
        while keys.cache._renewing:
            await asyncio.sleep(0)
        assert keys.num_looks == 2, "one look for all who ask meanwhile"
        keys.cache._authenticate = nobody
        assert keys.cache.known("good") is not None, "as of a moment ago"
        while keys.cache._renewing:
            await asyncio.sleep(0)
        assert keys.cache.known("good") is None

    async def nobody(secret: str) -> Principal | None:
        return None

    asyncio.run(main())
