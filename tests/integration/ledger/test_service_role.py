"""The role that all processes act as can add to the books, and cannot rewrite them."""

from collections.abc import Iterator

import pytest
from sqlalchemy.exc import ProgrammingError

from ledger.database import Database, run, sqlstate
from schema.errors import LedgerUnavailable
from tests.integration.ledger.world import World, event, open_world

BOOKS = ("credit_usage_attribution", "credit_transactions", "org_billing_history")
NO_PRIVILEGE = "42501"


@pytest.fixture
def world(database: Database, database_url: str) -> Iterator[World]:
    with open_world(database, database_url) as opened:
        org_id = opened.organization(pool=100, allocations={"ada": 50})
        opened.apply(event(org_id))
        yield opened


@pytest.mark.parametrize("table", BOOKS)
@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE {} SET org_id = org_id",
        "DELETE FROM {}",
        "TRUNCATE {}",
        "ALTER TABLE {} DISABLE TRIGGER ALL",
        "DROP TABLE {}",
    ],
)
def test_the_books_are_closed_to_it(world: World, table: str, statement: str) -> None:
    with pytest.raises(ProgrammingError) as refused, world.database.transaction() as connection:
        run(connection, statement.format(table))
    assert sqlstate(refused.value) == NO_PRIVILEGE


def test_every_connection_acts_as_it(world: World) -> None:
    with world.database.snapshot() as connection:
        assert run(connection, "SELECT current_user").scalar_one() == "metering_service"


def test_the_login_role_is_kept_on_request(database_url: str) -> None:
    database = Database(database_url, role="")
    with database.snapshot() as connection:
        assert run(connection, "SELECT current_user = session_user").scalar_one()
    database.close()


def test_a_server_without_it_is_not_migrated(database_url: str) -> None:
    database = Database(database_url, role="metering_nobody")
    with pytest.raises(LedgerUnavailable, match="metering_nobody"), database.snapshot():
        pass
    database.close()
