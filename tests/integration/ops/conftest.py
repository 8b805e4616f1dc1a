"""An organization, and a worker that drains."""

from collections.abc import Iterator
from uuid import UUID

import pytest

from ledger.database import Database
from schema.settings import Settings
from tests.integration.ops.replays.scene import draining, organization


@pytest.fixture
def worker(settings: Settings) -> Iterator[None]:
    with draining(settings):
        yield


@pytest.fixture
def acme(database: Database) -> UUID:
    return organization(database, ana=30_000, ben=10_000)
