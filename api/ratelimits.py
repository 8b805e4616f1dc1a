"""Rate limits: how many requests an identity may send in a minute, and what answers say about it.

A request is counted once its caller is known and before anything else is decided, so a 403, 404
or 422 counts too; preflights and strangers do not. Reads and writes of the org-billing API and
requests of operators are counted strictly; the gate and the ingest of usage in portions, so that a
check costs microseconds (`api.windows` tells how). `X-RateLimit-Reset` is Unix time in whole
seconds, as GitHub has it: when one more request is free, or, of the gate and the ingest, when the
window ends.

While Redis is away, writes of the org-billing API and the ingest of usage are refused, and all
others go on uncounted and without the headers; `metering_rate_limit_unchecked_total` counts them.
"""

import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from math import ceil
from typing import Final

from limits import RateLimitItemPerMinute
from limits.aio.storage import RedisStorage
from redis.asyncio import ConnectionPool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.breaker import CONNECTIONS, SLICE_SECONDS, SLICES, Breaker
from api.callers import Caller
from api.paths import ORG_BILLING, PRECHECK, USAGE_EVENTS, is_at
from api.windows import LeasedWindow, MovingWindow, Standing, Window
from schema.errors import ConfigurationError, RateLimitExceeded, Unavailable
from schema.settings import Settings

KEY_PREFIX: Final = "metering:limits"
_READS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_DEDUCT: Final = re.compile(rf"{ORG_BILLING}/credits/[^/]+/deduct")
_STANDING: Final = "rate_limit"
"""Where a request keeps how its caller stands, in its state."""


class Policy(StrEnum):
    """What is counted together."""

    READ = "read"
    WRITE = "write"
    GATE = "gate"
    INGEST = "ingest"
    OPS = "ops"


_REFUSED_UNCOUNTED: Final = frozenset({Policy.WRITE, Policy.INGEST})


def policy_of(method: str, path: str) -> Policy:
    """How a request below `/api/` is counted."""
    if is_at(path, PRECHECK):
        return Policy.GATE
    if is_at(path, USAGE_EVENTS) or (method == "POST" and _DEDUCT.fullmatch(path)):
        return Policy.INGEST
    if is_at(path, ORG_BILLING):
        return Policy.READ if method in _READS else Policy.WRITE
    return Policy.OPS


@dataclass(frozen=True, slots=True)
class RateLimits:
    """The counts of this process; they are open while the app is."""

    windows: Mapping[Policy, Window]
    unchecked: dict[Policy, int]
    """Requests that went on uncounted since the process began."""

    async def count(self, policy: Policy, caller: Caller) -> Standing | None:
        """Count a request; None if it goes on uncounted.

        Raises:
            Unavailable: Redis does not answer, and the request is not one to go on uncounted.
        """
        try:
            return await self.windows[policy].count(caller.identity)
        except Unavailable:
            if policy in _REFUSED_UNCOUNTED:
                raise
            self.unchecked[policy] += 1
            return None


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[RateLimits]:
    """The counts that these settings ask for; Redis is connected to by the first request.

    Raises:
        ConfigurationError: the address of Redis is not set.
    """
    url = settings.redis_url.get_secret_value()
    if not url:
        raise ConfigurationError("no queue: set METERING_REDIS_URL, or start one: 'metering up'")
    # The breaker counts the time, across all that a question takes; these are a second line.
    seconds = 2 * SLICES * SLICE_SECONDS
    pool: ConnectionPool = ConnectionPool.from_url(
        url,
        protocol=2,
        max_connections=CONNECTIONS,
        socket_timeout=seconds,
        socket_connect_timeout=seconds,
    )
    storage = RedisStorage(
        "async+redis://",  # where it is, the pool says
        implementation="redispy",
        key_prefix=KEY_PREFIX,
        connection_pool=pool,  # type: ignore[arg-type] # passed on, whatever its type
    )
    try:
        yield RateLimits(_windows(settings, storage), dict.fromkeys(Policy, 0))
    finally:
        await pool.aclose()


def _windows(settings: Settings, storage: RedisStorage) -> Mapping[Policy, Window]:
    breaker = Breaker()

    def strict(policy: Policy, limit: int) -> Window:
        return MovingWindow(RateLimitItemPerMinute(limit, 1, policy), storage, breaker)

    def leased(policy: Policy, limit: int) -> Window:
        return LeasedWindow(RateLimitItemPerMinute(limit, 1, policy), storage, breaker)

    return {
        Policy.READ: strict(Policy.READ, settings.read_limit_per_minute),
        Policy.WRITE: strict(Policy.WRITE, settings.write_limit_per_minute),
        Policy.GATE: leased(Policy.GATE, settings.gate_limit_per_minute),
        Policy.INGEST: leased(Policy.INGEST, settings.ingest_limit_per_minute),
        Policy.OPS: strict(Policy.OPS, settings.ops_limit_per_minute),
    }


class RateLimit:
    """Middleware that counts the requests of callers who are known."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an exchange on that is within its caller's limit.

        Raises:
            RateLimitExceeded: the caller has sent as many as they may; `retry_after` is in seconds.
            Unavailable: Redis does not answer, and the request is not one to go on uncounted.
        """
        if scope["type"] == "http" and (caller := scope["state"].get("caller")) is not None:
            limits: RateLimits = scope["app"].state.rate_limits
            policy = policy_of(scope["method"], scope["path"])
            standing = await limits.count(policy, caller)
            scope["state"][_STANDING] = standing
            if standing is not None and not standing.passed:
                raise RateLimitExceeded(
                    f"No more than {standing.limit} requests a minute.",
                    retry_after=standing.retry_after(time.time()),
                )
        await self._app(scope, receive, send)


class RateLimitHeaders:
    """Middleware that has every answer to a counted request, errors among them, tell the limit."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an exchange on, and add to its answer where the caller stands."""

        async def send_with_standing(message: Message) -> None:
            if message["type"] == "http.response.start":
                standing: Standing | None = scope["state"].get(_STANDING)
                if standing is not None:
                    message["headers"] = [*message["headers"], *_headers(standing)]
            await send(message)

        await self._app(scope, receive, send_with_standing)


def _headers(standing: Standing) -> list[tuple[bytes, bytes]]:
    return [
        (b"x-ratelimit-limit", b"%d" % standing.limit),
        (b"x-ratelimit-remaining", b"%d" % standing.remaining),
        (b"x-ratelimit-reset", b"%d" % ceil(standing.reset_at)),
    ]
