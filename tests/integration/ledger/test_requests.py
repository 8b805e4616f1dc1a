"""What the ledger says of one request, in each of its states."""

from collections.abc import Iterator
from datetime import timedelta
from uuid import UUID

import pytest

from ledger import corrections, holds, requests
from ledger.database import Database
from ledger.gate import Operation
from ledger.requests import Request
from schema.errors import NotFound
from tests.integration.ledger.world import NOW, World, event, open_world

MINUTE = timedelta(minutes=1)


@pytest.fixture
def world(database: Database, database_url: str) -> Iterator[World]:
    with open_world(database, database_url) as opened:
        yield opened


@pytest.fixture
def org_id(world: World) -> UUID:
    return world.organization(pool=1000, allocations={"ada": 100})


def hold(world: World, org_id: UUID) -> None:
    holds.place(world.database, org_id, "ada", Operation("contact_lookup"), "r-1", MINUTE, NOW)


def get(world: World, org_id: UUID) -> Request:
    return requests.get(world.database, org_id, "r-1")


def test_a_held_request(world: World, org_id: UUID) -> None:
    hold(world, org_id)
    assert get(world, org_id) == Request(
        request_id="r-1",
        org_id=org_id,
        user_id="ada",
        service_type="contact_lookup",
        state="held",
        credits=10,
        held_credits=10,
        hold_expires_at=NOW + MINUTE,
        reason=None,
        detail=None,
        occurred_at=NOW,
        created_at=NOW,
        settled_at=None,
        credits_used=None,
    )


def test_a_request_that_is_charged_after_its_hold(world: World, org_id: UUID) -> None:
    hold(world, org_id)
    world.apply(event(org_id, occurred_at=NOW - MINUTE), now=NOW + MINUTE)
    found = get(world, org_id)
    assert (found.state, found.credits, found.held_credits) == ("charged", 10, 10)
    assert (found.occurred_at, found.settled_at) == (NOW - MINUTE, NOW + MINUTE)
    assert found.credits_used == 10


def test_a_request_that_is_charged_in_sql(world: World, org_id: UUID) -> None:
    world.deduct(org_id, "r-1", 10)
    assert get(world, org_id).credits_used == 10


def test_a_corrected_request_tells_what_it_cost_and_costs(world: World, org_id: UUID) -> None:
    world.apply(event(org_id), event(org_id, "r-2"))
    corrections.refund(world.database, org_id, "r-1", 4, actor="root", reason="late", now=NOW)
    assert (get(world, org_id).credits, get(world, org_id).credits_used) == (10, 6)


def test_a_dead_request_tells_why(world: World, org_id: UUID) -> None:
    world.apply(event(org_id, service_type="market_analysis"))
    world.apply(event(org_id, user_id="bob"))  # a conflict, with a letter of its own
    found = get(world, org_id)
    assert (found.state, found.reason, found.user_id) == ("dead", "insufficient_credits", "ada")
    assert found.detail == "Insufficient credits: 100 available, 150 needed"
    assert (found.credits, found.credits_used) == (150, None)


def test_a_debt_that_was_paid_is_no_longer_explained(world: World, org_id: UUID) -> None:
    world.apply(event(org_id, service_type="market_analysis"))
    world.allocate(org_id, "ada", 100)
    world.deduct(org_id, "r-1", 150, service_type="market_analysis")
    found = get(world, org_id)
    assert (found.state, found.reason, found.detail, found.credits_used) == (
        "charged", None, None, 150,
    )  # fmt: skip


def test_a_released_and_an_expired_request(world: World, org_id: UUID) -> None:
    hold(world, org_id)
    holds.release(world.database, org_id, "r-1", NOW)
    assert (get(world, org_id).state, get(world, org_id).settled_at) == ("released", NOW)
    hold(world, org_id)
    holds.expire(world.database, NOW + MINUTE)
    assert get(world, org_id).state == "expired"


def test_a_request_is_that_of_its_organization(world: World, org_id: UUID) -> None:
    hold(world, org_id)
    with pytest.raises(NotFound, match="no request r-1"):
        get(world, world.organization())
    with pytest.raises(NotFound):
        requests.get(world.database, org_id, "r-2")
