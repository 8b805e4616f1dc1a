"""The gate's own connections: how long a question waits when PostgreSQL is away or busy."""

import asyncio
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Final
from uuid import UUID

import psycopg
import pytest
from pydantic import SecretStr

from ledger.asyncgate import WAIT_SECONDS, AsyncGate
from ledger.database import Database
from ledger.gate import Operation
from ops.servers import LOOPBACK, free_port
from schema.errors import LedgerUnavailable
from schema.settings import Settings
from tests.integration.ledger.world import NOW, World, open_world

LOOKUP: Final = Operation("contact_lookup")
MINUTE: Final = timedelta(minutes=1)


@pytest.fixture
def world(database: Database, database_url: str) -> Iterator[World]:
    with open_world(database, database_url) as opened:
        yield opened


@pytest.fixture
def org_id(world: World) -> UUID:
    return world.organization(pool=100, allocations={"ada": 100})


def seconds_refused(settings: Settings, org_id: UUID) -> float:
    """How long a hold takes to be told that PostgreSQL does not answer."""

    async def place() -> None:
        async with AsyncGate(settings) as gate:
            await gate.place(org_id, "ada", LOOKUP, "r-1", MINUTE, NOW)

    started = time.monotonic()
    with pytest.raises(LedgerUnavailable):
        asyncio.run(place())
    return time.monotonic() - started


def test_who_finds_no_connection_waits_for_one_once(settings: Settings, org_id: UUID) -> None:
    nowhere = SecretStr(f"postgresql://postgres@{LOOPBACK}:{free_port()}/metering")
    away = settings.model_copy(update={"database_url": nowhere})
    assert seconds_refused(away, org_id) < 2 * WAIT_SECONDS


def test_a_statement_that_took_too_long_is_not_sent_again(
    settings: Settings, org_id: UUID, world: World, database_url: str
) -> None:
    hurried = settings.model_copy(update={"api_statement_timeout_seconds": 2.0})
    with psycopg.connect(database_url) as holder:
        holder.execute("SELECT FROM user_credit_allocations FOR UPDATE")
        assert seconds_refused(hurried, org_id) < 4
    assert world.rows("usage_requests", "state") == []
