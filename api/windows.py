"""How requests are counted in Redis: strictly one by one, or in portions where it must be fast.

`MovingWindow` asks Redis about every request, and lets exactly the limit pass in any stretch of the
window's length. `LeasedWindow` takes hits from Redis in portions of a thousandth of the limit and
spends them in this process, so that one request in many pays a round trip: all processes together
never let more than the limit pass in one window of the clock, and hits that a process still holds
at its end are lost.
"""

import asyncio
import time
from dataclasses import dataclass, field
from math import ceil
from typing import Final, Protocol

from limits import RateLimitItem
from limits.aio.storage import RedisStorage
from limits.aio.strategies import MovingWindowRateLimiter

from api.breaker import Breaker

PORTIONS: Final = 1000
"""In how many portions a limit is leased."""
MOST_IDENTITIES: Final = 10_000
"""Whose leases a process keeps; beyond it the oldest goes, with its unspent hits."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a caller stands after a request was counted."""

    passed: bool
    limit: int
    remaining: int
    """Requests that would pass as well; in a leased window no more than that, perhaps fewer."""
    reset_at: float
    """When a request is free again, or the window ends, in Unix time."""

    def retry_after(self, now: float) -> int:
        """Seconds until a request is free again, at least 1."""
        return max(1, ceil(self.reset_at - now))


class Window(Protocol):
    """A count of requests by identity."""

    async def count(self, identity: str) -> Standing:
        """Count one request, if it may pass.

        Raises:
            Unavailable: Redis does not answer.
        """


class MovingWindow:
    """Exactly the limit in any stretch of the window's length, whichever process is asked."""

    def __init__(self, item: RateLimitItem, storage: RedisStorage, breaker: Breaker) -> None:
        self._item = item
        self._limiter = MovingWindowRateLimiter(storage)
        self._breaker = breaker

    async def count(self, identity: str) -> Standing:
        """Count one request, if it may pass.

        Raises:
            Unavailable: Redis does not answer.
        """
        return await self._breaker.ask(lambda: self._count(identity))

    async def _count(self, identity: str) -> Standing:
        passed = await self._limiter.hit(self._item, identity)
        stats = await self._limiter.get_window_stats(self._item, identity)
        remaining = stats.remaining if passed else 0
        return Standing(passed, self._item.amount, remaining, stats.reset_time)


@dataclass(slots=True)
class _Lease:
    """Hits of one identity in the current window of the clock."""

    held: int = 0
    """Taken from Redis, not spent yet."""
    left: int = 0
    """Not taken yet by any process, as far as this one knows."""
    is_new: bool = True
    renewal: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One request asks for all that wait."""

    @property
    def is_spent(self) -> bool:
        return not (self.held or self.left or self.is_new)


class LeasedWindow:
    """At most the limit in each window of the clock, at hardly any cost per request."""

    def __init__(self, item: RateLimitItem, storage: RedisStorage, breaker: Breaker) -> None:
        self._item = item
        self._storage = storage
        self._breaker = breaker
        self._seconds = item.get_expiry()
        self._portion = max(1, item.amount // PORTIONS)
        self._number = 0
        self._leases: dict[str, _Lease] = {}

    async def count(self, identity: str) -> Standing:
        """Count one request, if it may pass.

        Raises:
            Unavailable: Redis does not answer, and no hit is held.
        """
        number = int(time.time() // self._seconds)
        lease = self._lease(number, identity)
        if not lease.held and not lease.is_spent:
            async with lease.renewal:
                if not lease.held and not lease.is_spent:
                    await self._renew(lease, number, identity)
                return self._spend(lease, number)
        return self._spend(lease, number)

    def _lease(self, number: int, identity: str) -> _Lease:
        if number != self._number:
            self._number = number
            self._leases = {}
        lease = self._leases.get(identity)
        if lease is None:
            if len(self._leases) >= MOST_IDENTITIES:
                del self._leases[next(iter(self._leases))]
            lease = self._leases[identity] = _Lease()
        return lease

    async def _renew(self, lease: _Lease, number: int, identity: str) -> None:
        # Processes agree on the window by its number. It is kept for as long again as it lasts, so
        # that a clock which is late finds what was taken.
        key = self._item.key_for(number, identity)
        taken = await self._breaker.ask(
            lambda: self._storage.incr(key, 2 * self._seconds, amount=self._portion)
        )
        before = taken - self._portion
        lease.held = min(self._portion, max(0, self._item.amount - before))
        lease.left = max(0, self._item.amount - taken)
        lease.is_new = False

    def _spend(self, lease: _Lease, number: int) -> Standing:
        passed = lease.held > 0
        lease.held -= passed
        reset_at = float((number + 1) * self._seconds)
        return Standing(passed, self._item.amount, lease.held + lease.left, reset_at)
