"""`metering resets`: what it prints, and what it refuses."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from typer.testing import CliRunner, Result

from ledger.database import Database, run
from ops.commands.resets import app
from schema.settings import Settings
from tests.integration.ops.replays.scene import organization, queried

ANCHOR = datetime(2028, 1, 30, 11, tzinfo=UTC)
"""31 January 2028, midnight in Auckland."""
ALLOCATIONS = "SELECT xmin::text, * FROM user_credit_allocations"


@pytest.fixture(autouse=True)
def _environment(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """What names the test's servers to a command."""
    monkeypatch.setenv("METERING_DATABASE_URL", settings.database_url.get_secret_value())
    monkeypatch.setenv("METERING_REDIS_URL", settings.redis_url.get_secret_value())


@pytest.fixture
def kiwi(database: Database) -> UUID:
    """An organization in Auckland with a monthly allocation since 31 January 2028."""
    return funded(database, "kiwi", ANCHOR, "Pacific/Auckland")


def funded(database: Database, name: str, anchor: datetime, timezone: str = "UTC") -> UUID:
    org_id = organization(database, name)
    with database.transaction() as connection:
        run(
            connection,
            "UPDATE organizations SET timezone = %(timezone)s WHERE id = %(org_id)s",
            timezone=timezone,
            org_id=org_id,
        )
        run(connection, "SELECT add_credits_to_pool(%(org_id)s, 1000)", org_id=org_id)
        run(
            connection,
            """
            SELECT fund_allocation(
                %(org_id)s, 'ada', 100, false, 'monthly', NULL, 'admin', NULL, %(anchor)s
            )
            """,
            org_id=org_id,
            anchor=anchor,
        )
    return org_id


def invoke(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments)


def document(*arguments: str) -> Any:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_a_preview_shows_what_would_end_when(database: Database, kiwi: UUID) -> None:
    before = queried(database, ALLOCATIONS)
    assert document("preview", "--at", "2028-03-01T00:00Z") == {
        "at": "2028-03-01T00:00:00+00:00",
        "refreshes": [],
        "resets": [
            {
                "org_id": str(kiwi),
                "organization": "kiwi",
                "user_id": "ada",
                "closed_periods": [
                    {"start": "2028-01-30T11:00:00+00:00", "end": "2028-02-28T11:00:00+00:00"}
                ],
                "used": 0,
                "drawn": 0,
                "short": 0,
                "begins_with": 100,
                "next_reset_date": "2028-03-30T11:00:00+00:00",
            }
        ],
        "failed": [],
    }
    assert queried(database, ALLOCATIONS) == before


def test_a_preview_for_people_has_tables(database: Database, kiwi: UUID) -> None:
    set_refresh(database, kiwi)
    shown = invoke("preview", "--at", "2028-05-01T00:00+12:00")
    assert shown.exit_code == 0, shown.stderr
    assert "Pool refreshes at 2028-05-01T00:00:00+12:00: 1" in shown.stdout
    assert "2028-02-28 11:00 and 2 more" in shown.stdout
    assert "kiwi" in shown.stdout
    assert "2028-01-30 11:00 to 2028-02-28 11:00 and 2 more" in shown.stdout
    assert "2028-05-30 12:00" in shown.stdout


def set_refresh(database: Database, org_id: UUID) -> None:
    with database.transaction() as connection:
        run(
            connection,
            """
            UPDATE organization_credit_pools
            SET monthly_refresh_amount = 7, refresh_anchor = %(anchor)s,
                next_refresh_date = '2028-02-28T11:00Z'
            WHERE org_id = %(org_id)s
            """,
            anchor=ANCHOR,
            org_id=org_id,
        )


def test_refreshes_are_previewed_with_their_dates(database: Database, kiwi: UUID) -> None:
    set_refresh(database, kiwi)
    assert document("preview", "--at", "2028-04-01T00:00Z")["refreshes"] == [
        {
            "org_id": str(kiwi),
            "organization": "kiwi",
            "credits": 14,
            "refresh_dates": ["2028-02-28T11:00:00+00:00", "2028-03-30T11:00:00+00:00"],
            "next_refresh_date": "2028-04-29T12:00:00+00:00",
        }
    ]


def test_a_preview_may_be_of_one_organization(database: Database, kiwi: UUID) -> None:
    funded(database, "acme", ANCHOR)
    at = ("--at", "2028-03-01T00:00Z")
    assert len(document("preview", *at)["resets"]) == 2
    for name in ("kiwi", str(kiwi)):
        (planned,) = document("preview", "--org", name, *at)["resets"]
        assert planned["organization"] == "kiwi"
    assert "acme" not in invoke("preview", "--org", "kiwi", *at).stdout


@pytest.mark.usefixtures("kiwi")
def test_a_table_shows_as_many_rows_as_asked_for(database: Database) -> None:
    funded(database, "acme", ANCHOR)
    shown = invoke("preview", "--at", "2028-03-01T00:00Z", "--limit", "1")
    assert "Resets at 2028-03-01T00:00:00+00:00: 2" in shown.stdout
    assert shown.stdout.count("ada") == 1


def test_a_preview_is_of_now_unless_it_says_when(database: Database) -> None:
    funded(database, "newcomers", datetime.now(UTC))
    funded(database, "acme", datetime.now(UTC) - timedelta(days=40))
    (planned,) = document("preview")["resets"]
    assert planned["organization"] == "acme"


def test_a_run_resets_what_is_due_once(database: Database) -> None:
    funded(database, "acme", datetime.now(UTC) - timedelta(days=40))
    assert document("run") == {
        "pools_refreshed": 0,
        "credits_refreshed": 0,
        "allocations_reset": 1,
        "periods_closed": 1,
        "credits_drawn": 0,
        "credits_returned": 0,
        "allocations_short": 0,
        "credits_short": 0,
        "organizations_failed": 0,
    }
    before = queried(database, ALLOCATIONS)
    again = invoke("run")
    assert again.exit_code == 0, again.stderr
    assert "allocations reset" in again.stdout
    assert queried(database, ALLOCATIONS) == before


def test_an_organization_that_cannot_be_reset_is_told(
    settings: Settings, database: Database
) -> None:
    owner = Database(settings.database_url.get_secret_value(), pool_size=1, role="")
    org_id = funded(database, "mars", datetime.now(UTC) - timedelta(days=40))
    with owner.transaction() as connection:
        run(connection, "ALTER TABLE organizations DISABLE TRIGGER timezone_exists")
        run(connection, "UPDATE organizations SET timezone = 'Mars/Base'")
    owner.close()
    (failure,) = document("preview")["failed"]
    assert failure == {"org_id": str(org_id), "error": "timezone: no time zone 'Mars/Base'"}
    previewed = invoke("preview")
    assert previewed.exit_code == 0
    assert f"cannot be reset: {org_id}: timezone: no time zone 'Mars/Base'" in previewed.stderr
    result = invoke("run")
    assert result.exit_code == 1
    assert "could not be reset" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("preview --at 2028-03-01T00:00:00", "--at takes an ISO 8601 time with offset"),
        ("preview --at yesterday", "not 'yesterday'"),
        ("preview --org nobody", "no organization with the id or name 'nobody'"),
    ],
)
def test_what_is_wrong_is_said(arguments: str, problem: str) -> None:
    result = invoke(*arguments.split())
    assert result.exit_code == 2
    assert problem in result.stderr
    as_json = invoke(*arguments.split(), "--json")
    assert as_json.exit_code == 2
    assert problem in json.loads(as_json.stderr)["detail"]["message"]


@pytest.mark.parametrize("command", [(), ("preview",), ("run",)])
def test_every_command_explains_itself(command: tuple[str, ...]) -> None:
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    assert "Usage: " in result.stdout
