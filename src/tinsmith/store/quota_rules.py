"""Quotas: how much a tenant, or one of its keys, may have and use. Pure: what is used comes in, a verdict goes out.

Knows no rows and no clock. What stays true:

* Whoever is over a quota waits: a verdict holds a request back, it never fails one.
* A quota of a day or a month is exceeded by one request at most: one may begin while something of it is left, with what
  all requests under way may cost counted as used. Every other quota is kept, but for a request that is larger than it
  was set meanwhile: that one runs alone.
* Within a run nothing passes a request that is held back.
* A run is open while its session lives, and while it is trained after that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TypeAlias

from tinsmith.config import Settings
from tinsmith.store.usage_rows import UsageKind
from tinsmith.types import OpKind

MILLION = 1_000_000
REOPENED_S = 60.0  # a run whose session has ended is open for so long after a request of it was begun
SAVED_PARTS = {OpKind.SAVE: 3, OpKind.SAVE_SAMPLER: 1, OpKind.SAVE_EXTERNAL: 1}  # weights, and two moments


class Quota(StrEnum):
    """What can be bounded."""

    REQUESTS = "requests"
    QUEUED_TOKENS = "queued_tokens"
    RUNS = "runs"
    ADAPTER_BYTES = "adapter_bytes"
    STORAGE_BYTES = "storage_bytes"
    TOKENS_PER_DAY = "tokens_per_day"
    USD_PER_MONTH = "usd_per_month"


OF_A_PERIOD = (Quota.TOKENS_PER_DAY, Quota.USD_PER_MONTH)
OF_RUNS = (Quota.RUNS, Quota.ADAPTER_BYTES)
OF_COMPUTING = (Quota.REQUESTS, Quota.QUEUED_TOKENS, Quota.TOKENS_PER_DAY)  # of which nearly every request takes part

Limits: TypeAlias = Mapping[Quota, float]

MEANINGS: Mapping[Quota, str] = {
    Quota.REQUESTS: "requests that are computed at one time",
    Quota.QUEUED_TOKENS: "tokens of the requests that are computed at one time",
    Quota.RUNS: "runs that are open",
    Quota.ADAPTER_BYTES: "bytes of the weights of these runs' adapters",
    Quota.STORAGE_BYTES: "bytes of the checkpoints that are kept",
    Quota.TOKENS_PER_DAY: "tokens trained, read and sampled from 00:00 to 24:00 UTC",
    Quota.USD_PER_MONTH: "money for the tokens of a calendar month in UTC, in US dollars",
}


@dataclass(frozen=True, slots=True)
class Prices:
    """US dollars for a million tokens of each kind; 0: free."""

    training: float = 0.0
    prefill: float = 0.0
    prefill_cached: float = 0.0
    sample: float = 0.0

    @classmethod
    def of_settings(cls, settings: Settings) -> Prices:
        """As they are set."""
        return cls(
            settings.price_training, settings.price_prefill, settings.price_prefill_cached, settings.price_sample
        )

    def of(self, quantities: Mapping[UsageKind, int]) -> float:
        """What these tokens cost, in US dollars."""
        return sum(count * self._of_kind(kind) for kind, count in quantities.items()) / MILLION

    def most(self, kind: OpKind, num_tokens: int) -> float:
        """What a request of so many tokens may cost, in US dollars."""
        price = self.training if kind.is_pass else max(self.prefill, self.prefill_cached, self.sample)
        return num_tokens * price / MILLION

    def _of_kind(self, kind: UsageKind) -> float:
        return {
            UsageKind.TRAINING: self.training,
            UsageKind.PREFILL: self.prefill,
            UsageKind.PREFILL_CACHED: self.prefill_cached,
            UsageKind.SAMPLE: self.sample,
        }.get(kind, 0.0)


FREE = Prices()


@dataclass(frozen=True, slots=True)
class Asked:
    """What one request takes while it is computed, or will have taken for good."""

    requests: int = 1
    tokens: int = 0
    usd: float = 0.0
    runs: int = 0
    adapter_bytes: int = 0
    storage_bytes: int = 0

    def of(self, quota: Quota) -> float:
        """Its part in one quota."""
        match quota:
            case Quota.REQUESTS:
                return self.requests
            case Quota.QUEUED_TOKENS | Quota.TOKENS_PER_DAY:
                return self.tokens
            case Quota.RUNS:
                return self.runs
            case Quota.ADAPTER_BYTES:
                return self.adapter_bytes
            case Quota.STORAGE_BYTES:
                return self.storage_bytes
            case Quota.USD_PER_MONTH:
                return self.usd


def asked(kind: OpKind, num_tokens: int, adapter_bytes: int, prices: Prices, *, takes_run: bool | None = None) -> Asked:
    """What a request of this kind takes. adapter_bytes: of the adapter of its run. takes_run: it opens its run; None:
    as a CREATE does, and no other."""
    is_new = kind is OpKind.CREATE if takes_run is None else takes_run
    return Asked(
        tokens=num_tokens,
        usd=prices.most(kind, num_tokens),
        runs=int(is_new),
        adapter_bytes=adapter_bytes if is_new else 0,
        storage_bytes=adapter_bytes * SAVED_PARTS.get(kind, 0),
    )


@dataclass(frozen=True, slots=True)
class Hold:
    """Why a request waits. owner: "tenant" or "key". is_lasting: no request that is under way changes it by its end.
    lacking: how much has to be given back before it begins. frees_at: when so much will have been by itself, if that is
    known (unix seconds)."""

    quota: Quota
    limit: float
    used: float
    owner: str = "tenant"
    is_lasting: bool = False
    lacking: float = 0.0
    frees_at: float | None = None


@dataclass(slots=True)
class Gate:
    """What one tenant or key may still begin.

    Args:
        used: what is used of a quota by what has ended: tokens of the day, money of the month, runs, checkpoints. It
            is asked of the quotas that a request takes part of, and no others.
        under_way: by what is computed now, and by what was let through.
    """

    limits: Limits
    used: Callable[[Quota], float] = lambda _: 0.0
    under_way: dict[Quota, float] = field(default_factory=dict)
    owner: str = "tenant"
    is_full: bool = False  # a request waits for tokens to be given back: smaller ones that came later don't pass it

    def hold(self, ask: Asked) -> Hold | None:
        """Why it can't begin now; None: it can."""
        for quota, limit in self.limits.items():
            more, busy = ask.of(quota), self.under_way.get(quota, 0.0)
            if more <= 0:
                continue
            used = self.used(quota)
            if quota in OF_A_PERIOD:
                is_over = used + busy >= limit
            else:
                is_over = used + busy + more > limit and (used + busy > 0 or limit <= 0)
            is_over = is_over or (quota is Quota.QUEUED_TOKENS and self.is_full)
            if is_over:
                self.is_full = self.is_full or quota is Quota.QUEUED_TOKENS
                lacking = min(used + busy + more - limit, used + busy)
                return Hold(quota, limit, used + busy, self.owner, is_lasting=used >= limit, lacking=lacking)
        return None

    def begin(self, ask: Asked) -> None:
        """It is under way from now on."""
        for quota in self.limits:
            self.under_way[quota] = self.under_way.get(quota, 0.0) + ask.of(quota)


def tokens_of(quantities: Mapping[UsageKind, int]) -> int:
    """Those of all kinds together."""
    return sum(count for kind, count in quantities.items() if kind is not UsageKind.CHECKPOINT)


def never_fits(limits: Limits, ask: Asked) -> tuple[Quota, float] | None:
    """The quota, and its value, that a request is larger than; None: it fits in time. A quota of 0 only pauses."""
    for quota, limit in limits.items():
        if 0 < limit < ask.of(quota):
            return quota, limit
    return None


def day_of(now: float) -> str:
    """The day in UTC, as the tallies name it."""
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d")


def month_of(now: float) -> str:
    """The month in UTC, as the tallies name it."""
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m")


def freed_at(quota: Quota, now: float) -> datetime | None:
    """When a quota of a period begins anew; None for the others."""
    today = datetime.fromtimestamp(now, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if quota is Quota.TOKENS_PER_DAY:
        return today + timedelta(days=1)
    if quota is Quota.USD_PER_MONTH:
        return (today.replace(day=1) + timedelta(days=32)).replace(day=1)
    return None


def told(hold: Hold, now: float, session_timeout_s: float, seconds_left: float | None = None) -> str:
    """A hold in words, with how long it lasts. seconds_left: until the request's turn comes at the present pace."""
    whose, quota = hold.owner, f"quota {hold.quota}"
    if hold.limit <= 0:
        return (
            f"the {quota} of this {whose} is 0, which pauses all that takes part of it; goes on when an administrator "
            "raises it"
        )
    soon = "" if seconds_left is None else f", in about {duration(seconds_left)}"
    match hold.quota:
        case Quota.REQUESTS:
            return (
                f"{hold.used:,.0f} requests of this {whose} are computed, of {hold.limit:,.0f} at one time ({quota}); "
                f"goes on when some of them end{soon}"
            )
        case Quota.QUEUED_TOKENS:
            return (
                f"{hold.used:,.0f} tokens of this {whose} are computed, of {hold.limit:,.0f} at one time ({quota}); "
                f"goes on when some of them end{soon}"
            )
        case Quota.RUNS:
            return (
                f"{hold.used:,.0f} runs of this {whose} are open, of {hold.limit:,.0f} ({quota}); goes on when a "
                f"session with runs ends, by itself {duration(session_timeout_s)} after its client has gone, or "
                f"{duration(REOPENED_S)} after the last request of a run whose session had ended"
            )
        case Quota.ADAPTER_BYTES:
            return (
                f"adapters of open runs of this {whose} take {hold.used:,.0f} bytes, of {hold.limit:,.0f} ({quota}); "
                f"goes on when a session with runs ends, by itself {duration(session_timeout_s)} after its client has "
                f"gone, or {duration(REOPENED_S)} after the last request of a run whose session had ended"
            )
        case Quota.STORAGE_BYTES:
            alone = (
                "; nothing that would make room expires by itself"
                if hold.frees_at is None
                else f", or by itself in {duration(hold.frees_at - now)}, when enough of them has expired"
            )
            return (
                f"checkpoints of this {whose} take {hold.used:,.0f} bytes, of {hold.limit:,.0f} ({quota}); goes on "
                f"when {hold.lacking:,.0f} bytes of them are deleted{alone}"
            )
        case Quota.TOKENS_PER_DAY:
            what = f"{hold.used:,.0f} tokens of today used, of {hold.limit:,.0f}"
        case Quota.USD_PER_MONTH:
            what = f"{hold.used:,.2f} USD of this month used, of {hold.limit:,.2f}"
    until = freed_at(hold.quota, now)
    if until is None:
        raise ValueError(f"{hold.quota} has no period")
    at = "00:00 UTC" if hold.quota is Quota.TOKENS_PER_DAY else f"{until:%Y-%m-%d} 00:00 UTC"
    return f"{what} ({quota} of this {whose}); goes on at {at}, in {duration(until.timestamp() - now)}"


def duration(seconds: float) -> str:
    """ "3 h 12 min", "40 s": two units at most, never less than a second."""
    left = max(1, round(seconds))
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if left >= size:
            rest = left % size // part
            return f"{left // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{left} s"
