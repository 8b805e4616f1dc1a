"""`metering reconcile`: what it prints, and how it exits."""

import json
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import psycopg
import pytest
from typer.testing import CliRunner, Result

from ledger.apply import apply_batch
from ledger.checks import CHECKS
from ledger.database import Database
from ledger.decisions import Entry
from ops.cli import app
from schema.events import UsageEvent
from schema.settings import Settings
from tests.integration.ops.replays.scene import organization


@pytest.fixture(autouse=True)
def _environment(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """What names the test's servers to a command, and room for whole lines."""
    monkeypatch.setenv("METERING_DATABASE_URL", settings.database_url.get_secret_value())
    monkeypatch.setenv("METERING_REDIS_URL", settings.redis_url.get_secret_value())
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def used(database: Database, acme: UUID) -> UUID:
    """Ana has used 50 of her 30,000 credits."""
    event = UsageEvent.of(
        request_id="r-1",
        org_id=str(acme),
        user_id="ana",
        service_type="company_enrichment",
        occurred_at=datetime.now(UTC),
    )
    with database.session() as connection:
        apply_batch(connection, [Entry(event.to_json())], datetime.now(UTC))
    return acme


@pytest.fixture
def spoiled(database_url: str, used: UUID) -> UUID:
    """Ana's allocation says that one credit more was used."""
    with psycopg.connect(database_url) as connection:
        connection.execute(
            "UPDATE user_credit_allocations SET used_credits = used_credits + 1 "
            "WHERE user_id = 'ana'"
        )
    return used


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["reconcile", *arguments])


def document(*arguments: str, exit_code: int = 0) -> Any:
    result = invoke(*arguments, "--json")
    assert result.exit_code == exit_code, result.stderr
    return json.loads(result.stdout)


def test_a_sound_ledger_is_clean(used: UUID) -> None:
    found = document()
    assert found["clean"] is True
    assert [check["name"] for check in found["checks"]] == [check.name for check in CHECKS]
    assert all(check["clean"] and check["rows_off"] == 0 for check in found["checks"])
    assert (found["organizations"], found["drifts"]) == ([], [])
    assert found["figures"]["credits_charged"] == 50
    shown = invoke("--org", str(used))
    assert shown.exit_code == 0, shown.stderr
    assert "50 credits charged" in shown.stdout
    assert "drift" not in shown.stdout


def test_drift_is_named_by_organization(spoiled: UUID) -> None:
    found = document(exit_code=1)
    assert found["clean"] is False
    assert [check["name"] for check in found["checks"] if not check["clean"]] == [
        "allocations.used"
    ]
    assert found["organizations"] == [
        {"org_id": str(spoiled), "checks": 1, "rows": {"allocations.used": 1}}
    ]
    (drift,) = found["drifts"]
    assert drift == {
        "check": "allocations.used",
        "org_id": str(spoiled),
        "subject": f"allocation of ana in org {spoiled}",
        "recorded": "51",
        "computed": "50",
    }
    shown = invoke()
    assert shown.exit_code == 1
    assert "1 of 1 organizations are off" in shown.stdout


def test_one_organization_can_be_looked_at(database: Database, spoiled: UUID) -> None:
    organization(database, "sound", eve=10)
    assert document("--org", "sound")["figures"]["organizations"] == 1
    assert document("--org", "acme", exit_code=1)["drifts"][0]["org_id"] == str(spoiled)


def test_a_balance_is_explained(used: UUID) -> None:
    found = document("--explain", "acme", "ana")
    assert found["exact"] is True
    assert (found["org_id"], found["user_id"]) == (str(used), "ana")
    assert (found["computed"], found["recorded"]) == (29_950, 29_950)
    assert (found["periods"], found["opening"]) == ([], 0)
    assert [(line["kind"], line["remaining"]) for line in found["lines"]] == [
        ("allocation", 30_000),
        ("usage", 29_950),
    ]
    shown = invoke("--explain", str(used), "ana")
    assert shown.exit_code == 0, shown.stderr
    assert "r-1, company_enrichment" in shown.stdout
    assert "29,950 computed, 29,950 recorded" in shown.stdout


def test_closed_periods_are_shown(database_url: str, used: UUID) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute(
            """
            INSERT INTO allocation_periods (allocation_id, period_start, period_end)
            SELECT id, last_reset_date - interval '1 month', last_reset_date
            FROM user_credit_allocations
            WHERE org_id = %s AND user_id = 'ana'
            """,
            (used,),
        )
    (period,) = document("--explain", "acme", "ana")["periods"]
    assert (period["funded"], period["remaining"]) == (0, 0)
    assert "Closed periods" in invoke("--explain", "acme", "ana").stdout


def test_a_balance_that_is_off_exits_with_1(spoiled: UUID) -> None:
    found = document("--explain", str(spoiled), "ana", exit_code=1)
    assert found["exact"] is False
    assert (found["computed"], found["recorded"]) == (29_950, 29_949)
    assert "drift" in invoke("--explain", str(spoiled), "ana").stdout


def test_older_usage_is_summed_up(database: Database, used: UUID) -> None:
    second = UsageEvent.of(
        request_id="r-2",
        org_id=str(used),
        user_id="ana",
        service_type="contact_lookup",
        occurred_at=datetime.now(UTC),
    )
    with database.session() as connection:
        apply_batch(connection, [Entry(second.to_json())], datetime.now(UTC))
    lines = document("--explain", "acme", "ana", "--limit", "1")["lines"]
    assert [line["kind"] for line in lines] == ["allocation", "earlier_usage", "usage"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--org", "nowhere"), "no organization with the id or name 'nowhere'"),
        (("--explain", "nowhere", "ana"), "no organization with the id or name 'nowhere'"),
        (("--explain", "acme", "eve"), "No credit allocation found for user eve"),
    ],
)
def test_what_does_not_exist_is_said(acme: UUID, arguments: tuple[str, ...], problem: str) -> None:
    assert acme
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert problem in result.stderr
