"""What routes work with: the settings, the ledger's database, the queue. Open while the app is."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Final, cast

from fastapi import Depends
from redis import Redis
from starlette.requests import Request

from ledger.database import Database
from schema.settings import Settings
from worker import stream

REQUEST_THREADS: Final = 20
"""How many ledger calls run at a time, each on a connection of its own."""
PROBE_THREADS: Final = 4
"""Threads beyond those, with connections, so that a busy process still answers `/readyz`."""


@dataclass(frozen=True, slots=True)
class Resources:
    """The open resources of one app."""

    settings: Settings
    database: Database
    queue: Redis


@contextmanager
def opened(settings: Settings) -> Iterator[Resources]:
    """Connect lazily to PostgreSQL and Redis, and let both go at the end.

    Raises:
        ConfigurationError: an address is not set. One that does not answer is found out later.
    """
    pool_size = REQUEST_THREADS + PROBE_THREADS
    with stream.connect(settings) as queue:
        database = Database.of(settings, pool_size=pool_size, application_name="metering api")
        try:
            yield Resources(settings, database, queue)
        finally:
            database.close()


def resources_of(request: Request) -> Resources:
    """The resources of the app that serves this request."""
    return cast("Resources", request.app.state.resources)


async def _database_of(request: Request) -> Database:
    return resources_of(request).database


LedgerDatabase = Annotated[Database, Depends(_database_of)]
"""A route's parameter: the database for its ledger call."""
