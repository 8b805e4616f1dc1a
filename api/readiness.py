"""Whether the services that this process needs answer, found out quickly."""

import asyncio
from collections.abc import Callable
from typing import Final

import anyio
from anyio import CapacityLimiter, to_thread
from redis.exceptions import RedisError

from api.resources import PROBE_THREADS, Resources
from schema.errors import LedgerUnavailable

ANSWER_SECONDS: Final = 2.0


class Readiness:
    """Asks PostgreSQL and Redis side by side, on threads that requests do not use."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        self._threads = CapacityLimiter(PROBE_THREADS)

    async def away(self) -> list[str]:
        """Those of `postgresql` and `redis` that do not answer within `ANSWER_SECONDS`."""
        asked: dict[str, Callable[[], object]] = {
            "postgresql": self._ask_ledger,
            "redis": self._resources.queue.ping,
        }
        answered = await asyncio.gather(*(self._answers(ask) for ask in asked.values()))
        return [name for name, well in zip(asked, answered, strict=True) if not well]

    def _ask_ledger(self) -> None:
        with self._resources.database.session():
            pass  # the pool asks before it lends a connection

    async def _answers(self, ask: Callable[[], object]) -> bool:
        with anyio.move_on_after(ANSWER_SECONDS):
            try:
                await to_thread.run_sync(ask, abandon_on_cancel=True, limiter=self._threads)
            except (LedgerUnavailable, RedisError):
                return False
            return True
        return False
