"""`metering prices`: what it prints, and what it refuses."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from typer.testing import CliRunner, Result

from ledger.apply import apply_batch
from ledger.database import Database
from ledger.decisions import Entry
from ops.cli import app
from schema.events import UsageEvent
from schema.prices import INITIAL_PRICES
from schema.settings import Settings
from tests.integration.ops.replays.scene import queried


@pytest.fixture(autouse=True)
def _environment(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """What names the test's servers to a command."""
    monkeypatch.setenv("METERING_DATABASE_URL", settings.database_url.get_secret_value())
    monkeypatch.setenv("METERING_REDIS_URL", settings.redis_url.get_secret_value())


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["prices", *arguments])


def document(*arguments: str) -> Any:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def versions(database: Database) -> int:
    ((count,),) = queried(database, "SELECT count(*) FROM service_prices")
    return int(count)


def test_the_book_is_listed() -> None:
    listed = document("list")
    assert len(listed) == len(INITIAL_PRICES)
    assert listed[0] == {
        "service_type": "company_enrichment",
        "variant": "standard",
        "credits": "50",
        "unit": "request",
        "effective_from": "2000-01-01T00:00:00+00:00",
        "in_force": True,
    }
    result = invoke("list")
    assert result.exit_code == 0, result.stderr
    assert "0.02" in result.stdout


def test_a_price_that_is_set_is_listed_as_to_come(database: Database) -> None:
    start = (datetime.now(UTC) + timedelta(days=2)).replace(microsecond=0)
    added = document("set", "contact_lookup", "--credits", "12.50", "--from", start.isoformat())
    assert added == {
        "service_type": "contact_lookup",
        "variant": None,
        "credits": "12.5",
        "unit": "request",
        "effective_from": start.isoformat(),
        "in_force": False,
    }
    assert added in document("list")
    in_force = document("list", "--at", start.isoformat())
    assert [p for p in in_force if p["service_type"] == "contact_lookup"] == [
        added | {"in_force": True}
    ]
    assert "to come" in invoke("list").stdout
    assert versions(database) == len(INITIAL_PRICES) + 1
    again = invoke("set", "contact_lookup", "--credits", "13", "--from", start.isoformat())
    assert again.exit_code == 2
    assert "contact_lookup has a price from" in again.stderr


def test_a_price_counts_at_once_unless_it_says_when() -> None:
    result = invoke("set", "teleport", "--variant", "far", "--credits", "7", "--unit", "trip")
    assert result.exit_code == 0, result.stderr
    assert "set teleport/far: 7 credits per trip from " in result.stdout
    last = document("list")[-1]
    assert (last["service_type"], last["in_force"]) == ("teleport", True)


def test_a_preview_shows_the_difference(database: Database, acme: UUID) -> None:
    used = UsageEvent.of(
        request_id="r-1",
        org_id=str(acme),
        user_id="ana",
        service_type="llm",
        variant="gpt-4-turbo",
        quantity="1.5",
        occurred_at=datetime.now(UTC),
    )
    with database.session() as connection:
        apply_batch(connection, [Entry(used.to_json())], datetime.now(UTC))
    changes = ("--change", "llm/gpt-4-turbo=40", "--change", "contact_lookup=9")
    found = document("preview", *changes, "--days", "1")
    figures = {"requests": 1, "repriced": 1, "charged": 45, "changed": 60, "difference": 15}
    assert found["services"] == [{"service_type": "llm", **figures}]
    assert found["total"] == figures
    since, until = (datetime.fromisoformat(found[name]) for name in ("since", "until"))
    assert until - since == timedelta(days=1)
    shown = invoke("preview", *changes)
    assert shown.exit_code == 0, shown.stderr
    assert "difference" in shown.stdout
    assert "total" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("list --at 2026-03-15T12:00:00", "--at takes an ISO 8601 time with offset"),
        ("list --at yesterday", "not 'yesterday'"),
        ("set llm --credits many", "credits: "),
        ("set llm --credits 0", "credits: "),
        ("set llm --credits 1 --from 2030-01-01", "--from takes an ISO 8601 time with offset"),
        ("set llm --credits 1 --from 2020-01-01T00:00:00Z", "is in the past"),
        ("set lllm --credits 1", "unit: lllm is not in the price book yet"),
        ("preview --change llm", "--change takes SERVICE[/VARIANT]=CREDITS, not 'llm'"),
        ("preview --change llm/=5", "variant: "),
        ("preview --change =5", "service_type: "),
        ("preview --change lllm=5", "lllm is not in the price book"),
    ],
)
def test_what_is_wrong_is_said(database: Database, arguments: str, problem: str) -> None:
    result = invoke(*arguments.split())
    assert result.exit_code == 2
    assert problem in result.stderr
    as_json = invoke(*arguments.split(), "--json")
    assert as_json.exit_code == 2
    assert problem in json.loads(as_json.stderr)["detail"]["message"]
    assert versions(database) == len(INITIAL_PRICES)


@pytest.mark.parametrize("command", [(), ("list",), ("set",), ("preview",)])
def test_every_command_explains_itself(command: tuple[str, ...]) -> None:
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    assert "Usage: " in result.stdout
