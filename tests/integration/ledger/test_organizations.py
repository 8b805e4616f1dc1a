"""Test organizations: everything or nothing, and never billed."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import ValidationError

from ledger.database import Database
from ledger.organizations import (
    CreatedOrganization,
    TestOrganization,
    create_test_organization,
)
from ledger.reconcile import reconcile
from schema.errors import InvalidRequest, OrganizationExists
from tests.integration.ledger.race import race
from tests.integration.ledger.world import World, open_world


@pytest.fixture
def world(database: Database, database_url: str) -> Iterator[World]:
    with open_world(database, database_url) as opened:
        yield opened


def document(**changes: Any) -> TestOrganization:
    usual = {
        "org_name": "acme",
        "display_name": "Acme",
        "subscription_plan": "hybrid",
        "initial_credits": 1000,
        "test_users": [
            {"email": "ana@acme.example", "allocated_credits": 600, "role": "admin"},
            {"email": "ben@acme.example", "allocated_credits": 0, "user_id": "kc-17"},
        ],
    }
    return TestOrganization.model_validate(usual | changes)


def test_it_is_made_whole(world: World) -> None:
    created = create_test_organization(world.database, document(), actor="tester")
    assert created.available_credits == 400
    assert world.pool(created.org_id) == (1000, 600, 0)
    assert world.allocations(created.org_id) == {"ana@acme.example": (600, 0)}
    members = world.rows("organization_members", "user_id", "role", "email")
    assert members == [
        ("ana@acme.example", "admin", "ana@acme.example"),
        ("kc-17", "member", "ben@acme.example"),
    ]
    assert world.rows("organizations", "name", "is_test") == [("acme", True)]
    subscription = world.row("organization_subscriptions")
    assert (subscription["subscription_plan"], subscription["monthly_price"]) == ("hybrid", 99)
    assert world.rows("org_billing_history", "id") == []
    assert reconcile(world.database).is_clean


def test_a_name_is_taken_once(world: World) -> None:
    create_test_organization(world.database, document(), actor="tester")
    before = world.contents()
    with pytest.raises(OrganizationExists, match="acme"):
        create_test_organization(world.database, document(), actor="tester")
    assert world.contents() == before


def test_a_key_makes_one_organization(world: World) -> None:
    made = create_test_organization(world.database, document(), actor="tester", key="k-1")
    before = world.contents()
    again = create_test_organization(world.database, document(), actor="other", key="k-1")
    assert again == made
    with pytest.raises(InvalidRequest, match="another request"):
        create_test_organization(
            world.database, document(org_name="umbra"), actor="tester", key="k-1"
        )
    with pytest.raises(OrganizationExists, match="acme"):
        create_test_organization(world.database, document(), actor="tester", key="k-2")
    for key in ("", "k" * 256, "half \ud800"):
        with pytest.raises(InvalidRequest, match="Idempotency-Key"):
            create_test_organization(world.database, document(), actor="tester", key=key)
    assert world.contents() == before


def test_racing_calls_under_one_key_make_one_organization(world: World, database_url: str) -> None:
    def make(database: Database, _: int) -> CreatedOrganization:
        return create_test_organization(database, document(), actor="tester", key="k-1")

    outcomes = race(database_url, make)
    assert len(outcomes) == 16
    assert len({str(outcome) for outcome in outcomes}) == 1
    assert isinstance(outcomes[0], CreatedOrganization)
    assert world.pool(outcomes[0].org_id) == (1000, 600, 0)


def test_a_key_that_was_cleared_away_makes_no_organization_twice(world: World) -> None:
    create_test_organization(world.database, document(), actor="tester", key="k-1")
    world.sql.execute("DELETE FROM idempotency_keys")
    before = world.contents()
    with pytest.raises(OrganizationExists):
        create_test_organization(world.database, document(), actor="tester", key="k-1")
    assert world.contents() == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"initial_credits": 599}, "allocated 600 credits"),
        ({"initial_credits": -1}, "initial_credits"),
        ({"subscription_plan": "gold"}, "subscription_plan"),
        ({"org_name": " "}, "org_name"),
        ({"colour": "red"}, "colour"),
        ({"test_users": [{"email": "a@x.example"}, {"email": "a@x.example"}]}, "twice"),
    ],
)
def test_a_bad_document_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        document(**changes)


def test_its_periods_are_counted_from_the_anchor_in_its_zone(world: World) -> None:
    anchored = document(timezone="Pacific/Auckland", anchor="2028-01-31T00:00+13:00")
    create_test_organization(world.database, anchored, actor="tester")
    row = world.row("user_credit_allocations")
    assert row["last_reset_date"] == datetime(2028, 1, 30, 11, tzinfo=UTC)
    assert row["next_reset_date"] == datetime(2028, 2, 28, 11, tzinfo=UTC)
    subscription = world.row("organization_subscriptions")
    assert subscription["current_period_end"] == row["next_reset_date"]


def test_a_zone_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValidationError, match="no time zone 'Mars/Olympus'"):
        document(timezone="Mars/Olympus")
