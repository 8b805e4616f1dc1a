"""What routes work with: settings, ledger, queue and identities. Open while the app is."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Final, cast

from fastapi import Depends
from redis import Redis
from starlette.requests import Request

from api.devissuer import DevIssuer
from api.keys import keys_of
from api.servicetokens import ServiceTokens
from api.sessions import Sessions
from ledger.asyncgate import AsyncGate
from ledger.database import Database
from producers import UsageProducer
from schema.settings import Settings
from worker import stream

REQUEST_THREADS: Final = 20
"""How many ledger calls run at a time, each on a connection of its own; the gate has others."""
PROBE_THREADS: Final = 4
"""Threads beyond those, with connections, so that a busy process still answers `/readyz`."""
CONNECTION_SECONDS: Final = 3.0
"""How long a request waits for one of the connections."""


@dataclass(frozen=True, slots=True)
class Resources:
    """The open resources of one app."""

    settings: Settings
    database: Database
    gate: AsyncGate
    queue: Redis
    """Redis, for the figures of the usage streams."""
    producer: UsageProducer
    """Puts usage events on their streams."""
    sessions: Sessions
    service_tokens: ServiceTokens
    dev_issuer: DevIssuer | None
    """Who lets anybody in, where the settings want it so."""


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[Resources]:
    """Connect lazily to PostgreSQL and Redis, and let both go at the end.

    Raises:
        ConfigurationError: an address is not set, or the key of the development issuer cannot be
            used. A server that does not answer is found out later, by the requests that need it.
    """
    dev_issuer = DevIssuer.of(settings) if settings.dev_issuer else None
    with stream.connect(settings) as queue, UsageProducer(settings) as producer:
        database = Database.of(
            settings,
            application_name="metering api",
            pool_size=REQUEST_THREADS + PROBE_THREADS,
            pool_timeout_seconds=CONNECTION_SECONDS,
            statement_timeout_seconds=settings.api_statement_timeout_seconds,
        )
        sessions = Sessions(
            dev_issuer.keys if dev_issuer else keys_of(settings),
            issuer=dev_issuer.name if dev_issuer else settings.oidc_issuer,
            audience=settings.oidc_audience,
            leeway_seconds=settings.oidc_leeway_seconds,
        )
        gate = AsyncGate(settings)
        try:
            async with gate:
                yield Resources(
                    settings,
                    database,
                    gate,
                    queue,
                    producer,
                    sessions,
                    ServiceTokens(database),
                    dev_issuer,
                )
        finally:
            database.close()


def resources_of(request: Request) -> Resources:
    """The resources of the app that serves this request."""
    return cast("Resources", request.app.state.resources)


async def _database_of(request: Request) -> Database:
    return resources_of(request).database


async def _settings_of(request: Request) -> Settings:
    return resources_of(request).settings


async def _queue_of(request: Request) -> Redis:
    return resources_of(request).queue


async def _producer_of(request: Request) -> UsageProducer:
    return resources_of(request).producer


LedgerDatabase = Annotated[Database, Depends(_database_of)]
"""A route's parameter: the database for its ledger call."""
CurrentSettings = Annotated[Settings, Depends(_settings_of)]
"""A route's parameter: the settings of the app."""
UsageQueue = Annotated[Redis, Depends(_queue_of)]
"""A route's parameter: Redis, to look at the usage streams."""
CurrentProducer = Annotated[UsageProducer, Depends(_producer_of)]
"""A route's parameter: what puts usage events on their streams."""
