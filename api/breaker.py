"""Redis for questions that are not worth a wait: asked quickly, and left alone while away."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

import structlog
from redis.exceptions import RedisError

from schema.errors import Unavailable

log = structlog.get_logger(__name__)

SLICE_SECONDS: Final = 0.1
SLICES: Final = 2
RETRY_SECONDS: Final = 1.0
"""How long Redis is left alone after it did not answer; then one request tries it again."""
CONNECTIONS: Final = 32
"""How many questions are under way at a time; others wait their turn."""

Answer = TypeVar("Answer")
Question = Callable[[], Coroutine[Any, Any, Answer]]


class Breaker:
    """Stands between requests and a Redis that may be away, so that an outage costs them no time.

    The first requests of an outage wait for `SLICES * SLICE_SECONDS`, and one in every
    `RETRY_SECONDS` after them; the others are told at once. An outage is logged once.
    """

    def __init__(self) -> None:
        self._turns = asyncio.Semaphore(CONNECTIONS)
        self._away_since: float | None = None
        self._retry_at = 0.0

    async def ask(self, question: Question[Answer]) -> Answer:
        """The answer of Redis.

        Raises:
            Unavailable: it does not answer in time, or cannot do what it is asked.
        """
        async with self._turns:
            self._refuse_while_away()
            try:
                answer = await _in_time(question())
            except (RedisError, OSError, TimeoutError) as error:
                self._note_outage(error)
                raise Unavailable(f"no count of requests from Redis: {error!r}") from error
            self._note_recovery()
            return answer

    def _refuse_while_away(self) -> None:
        if self._away_since is None:
            return
        now = time.monotonic()
        if now < self._retry_at:
            raise Unavailable("no count of requests from Redis: it did not answer a moment ago")
        self._retry_at = now + RETRY_SECONDS

    def _note_outage(self, error: Exception) -> None:
        now = time.monotonic()
        self._retry_at = now + RETRY_SECONDS
        if self._away_since is None:
            self._away_since = now
            log.warning(
                "requests cannot be counted: Redis does not answer", error=repr(error)[:500]
            )

    def _note_recovery(self) -> None:
        if self._away_since is not None:
            seconds = round(time.monotonic() - self._away_since, 1)
            self._away_since = None
            log.info("requests are counted again: Redis answers", away_seconds=seconds)


async def _in_time(answer: Coroutine[Any, Any, Answer]) -> Answer:
    """Wait for an answer in slices.

    While other work keeps the event loop, a timer runs out as well; the answer that meanwhile lies
    ready is then taken in the next slice, where a single timer would have called Redis silent.
    """
    task = asyncio.ensure_future(answer)
    try:
        for _ in range(SLICES):
            await asyncio.wait((task,), timeout=SLICE_SECONDS)
            if task.done():
                return task.result()
        raise TimeoutError(f"no answer within {SLICES * SLICE_SECONDS} s")
    finally:
        task.cancel()
