"""Whom a service token names, remembered for a moment so that not every request asks PostgreSQL."""

import asyncio
import time
from collections.abc import Callable
from contextvars import Context
from dataclasses import dataclass
from typing import Final

from anyio import to_thread

from api.callers import Service
from ledger import servicetokens
from ledger.clock import utc_now
from ledger.database import Database
from ledger.servicetokens import ServiceToken
from schema.errors import NotAuthenticated

REMEMBERED_SECONDS: Final = 5.0
"""How long a token that was revoked may still be good."""
MOST_REMEMBERED: Final = 10_000


@dataclass(frozen=True, slots=True)
class _Answer:
    """What PostgreSQL said of a token: whose it is, or that there is none."""

    token: ServiceToken | None
    good_until: float

    def service(self) -> Service | None:
        token = self.token
        if token is None or not token.is_valid(utc_now()):
            return None
        return Service(token.id, token.name, frozenset(token.scopes))


class ServiceTokens:
    """Tells services by their tokens.

    `monotonic` tells the seconds by which answers grow old.
    """

    def __init__(self, database: Database, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._monotonic = monotonic
        self._remembered: dict[bytes, _Answer] = {}
        self._asking: dict[bytes, asyncio.Task[_Answer]] = {}

    async def service_of(self, text: str) -> Service:
        """The service whose token this is.

        Raises:
            NotAuthenticated: the token is unknown, expired or revoked.
            LedgerUnavailable: PostgreSQL does not answer.
        """
        service = None
        if servicetokens.is_well_formed(text):  # else it costs no look at the database
            service = (await self._answer(servicetokens.hash_of(text))).service()
        if service is None:
            raise NotAuthenticated("The service token is not valid.")
        return service

    async def _answer(self, token_hash: bytes) -> _Answer:
        """What is remembered, or what PostgreSQL says to all who want to know at the same time."""
        known = self._remembered.get(token_hash)
        if known is not None and self._monotonic() < known.good_until:
            return known
        task = self._asking.get(token_hash)
        if task is None:
            task = asyncio.create_task(self._ask(token_hash), context=Context())
            self._asking[token_hash] = task
            task.add_done_callback(lambda done: self._asked(token_hash, done))
        await asyncio.wait([task])  # a request that is cancelled leaves the task to the others
        return task.result()

    async def _ask(self, token_hash: bytes) -> _Answer:
        # Counted from before the question: the answer may be as old as that.
        good_until = self._monotonic() + REMEMBERED_SECONDS
        token = await to_thread.run_sync(servicetokens.find, self._database, token_hash)
        return _Answer(token, good_until)

    def _asked(self, token_hash: bytes, task: asyncio.Task[_Answer]) -> None:
        del self._asking[token_hash]
        # Looked at here, in case nobody waits any more: asyncio would complain of it.
        if task.cancelled() or task.exception() is not None:
            return
        self._remembered.pop(token_hash, None)  # so that the first is the one learnt longest ago
        if len(self._remembered) >= MOST_REMEMBERED:
            del self._remembered[next(iter(self._remembered))]
        self._remembered[token_hash] = task.result()
