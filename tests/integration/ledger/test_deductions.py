"""Deductions: charged at once or refused, and once with whatever the queue brings of the same."""

import threading
from collections.abc import Iterator
from datetime import timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import psycopg
import pytest

from ledger import allocations, corrections, deductions, holds, pools, prices
from ledger.database import Database
from ledger.deductions import Deduction, DeductionOutcome
from ledger.gate import Operation
from ledger.prices import NewPrice
from ledger.reconcile import reconcile
from schema.errors import (
    InsufficientCredits,
    InvalidRequest,
    MeteringError,
    NoAllocation,
    NotAMember,
    NotFound,
    RequestIdConflict,
)
from schema.events import UNNAMED_SERVICE
from schema.plans import PlanName
from tests.integration.ledger.books import assert_balanced
from tests.integration.ledger.race import await_lock, race
from tests.integration.ledger.world import NOW, World, entry, event, open_world

NOWHERE = UUID(int=1)
LOOKUP = Operation("contact_lookup")
HOUR = timedelta(hours=1)


@pytest.fixture
def world(database: Database, database_url: str) -> Iterator[World]:
    with open_world(database, database_url) as opened:
        yield opened
        assert reconcile(database, now=NOW).drifts == []
        assert_balanced(opened)


@pytest.fixture
def org_id(world: World) -> UUID:
    return world.organization(
        plan=PlanName.PLATFORM,
        pool=1000,
        allocations={"ada": 100, "gone": 100},
        members={"ada": "member", "bob": "member"},
    )


def deduct(world: World, org_id: UUID, request_id: str = "r-1", **fields: Any) -> Deduction:
    """A contact lookup (10 credits) of ada, unless fields say otherwise."""
    options: dict[str, Any] = {"actor": "service:tests", "now": NOW}
    options |= {name: fields.pop(name) for name in ("is_dated", "key", "now") if name in fields}
    return deductions.deduct(world.database, event(org_id, request_id, **fields), **options)


def hold(world: World, org_id: UUID, operation: Operation = LOOKUP) -> None:
    holds.place(world.database, org_id, "ada", operation, "r-1", HOUR, NOW)


def state(world: World, request_id: str = "r-1") -> tuple[Any, ...]:
    (found,) = world.rows(f"usage_requests WHERE request_id = '{request_id}'", "state", "credits")
    return found


def figures(world: World, org_id: UUID) -> tuple[int, int]:
    """Used and held credits of ada."""
    where = f"user_credit_allocations WHERE org_id = '{org_id}' AND user_id = 'ada'"
    ((used, held),) = world.rows(where, "used_credits", "held_credits")
    return used, held


def test_a_request_is_charged_with_all_that_is_told_of_it(world: World, org_id: UUID) -> None:
    done = deduct(
        world,
        org_id,
        service_type="llm",
        variant="claude-sonnet",
        quantity="1.5",
        service_name="LoopNet Summaries",
        api_cost="0.04",
        metadata={"company_id": "c-1", "api_key": "s3cret"},
        source="api",
    )
    assert done == Deduction(
        outcome=DeductionOutcome.CHARGED,
        request_id="r-1",
        credits_used=23,
        remaining_credits=77,
    )
    row = world.row("credit_usage_attribution")
    assert (row["service_name"], row["variant"], row["quantity"], row["source"]) == (
        "LoopNet Summaries", "claude-sonnet", Decimal("1.5"), "api",
    )  # fmt: skip
    assert (row["api_cost"], row["markup_applied"]) == (Decimal("0.04"), Decimal("0.02"))
    assert row["request_metadata"] == {"company_id": "c-1"}
    assert (row["occurred_at"], row["created_at"]) == (NOW, NOW)
    assert world.pool(org_id) == (1000, 200, 23)


def test_a_repetition_changes_nothing_and_answers_the_first_charge(
    world: World, org_id: UUID
) -> None:
    deduct(world, org_id)
    before = world.contents()
    again = deduct(world, org_id)
    assert (again.outcome, again.credits_used, again.remaining_credits) == ("duplicate", 10, 90)
    assert world.contents() == before


def test_a_repetition_answers_what_was_charged_before_corrections(
    world: World, org_id: UUID
) -> None:
    deduct(world, org_id)
    corrections.refund(world.database, org_id, "r-1", actor="root", reason="faulty", now=NOW)
    again = deduct(world, org_id)
    assert (again.outcome, again.credits_used, again.remaining_credits) == ("duplicate", 10, 100)


@pytest.mark.parametrize(
    "other",
    [
        {"user_id": "bob"},
        {"service_type": "valuation"},
        {"service_type": "x", "credits": 9},
    ],
)
def test_a_request_id_of_another_request_is_refused(
    world: World, org_id: UUID, other: dict[str, Any]
) -> None:
    deduct(world, org_id)
    before = world.contents()
    with pytest.raises(RequestIdConflict):
        deduct(world, org_id, **other)
    assert world.contents() == before


def test_a_request_id_that_a_gate_is_giving_to_somebody_else_is_refused(
    world: World, database_url: str
) -> None:
    org_id = world.organization(pool=1000, allocations={"ada": 100, "bob": 100})
    refusals: list[MeteringError] = []

    def charge_ada() -> None:
        try:
            deduct(world, org_id)
        except MeteringError as error:
            refusals.append(error)

    placed = "SELECT place_hold(%s, 'bob', 'contact_lookup', NULL, 1, NULL, 'r-1', %s, %s)"
    racer = threading.Thread(target=charge_ada)
    with psycopg.connect(database_url) as gate:
        gate.execute(placed, (org_id, HOUR, NOW))
        racer.start()
        await_lock(world)
    racer.join(30)
    assert [type(error) for error in refusals] == [RequestIdConflict]
    assert (state(world), figures(world, org_id)) == (("held", 10), (0, 0))


def test_an_event_of_the_same_request_comes_after_it(world: World, org_id: UUID) -> None:
    deduct(world, org_id)
    assert world.apply(event(org_id)).duplicates == 1
    assert figures(world, org_id) == (10, 0)


def test_an_event_of_the_same_request_comes_before_it(world: World, org_id: UUID) -> None:
    assert world.apply(event(org_id)).charged == 1
    assert deduct(world, org_id).outcome == "duplicate"
    assert figures(world, org_id) == (10, 0)


def test_a_call_in_sql_is_the_same_request_too(world: World, org_id: UUID) -> None:
    world.deduct(org_id, "r-1")
    assert deduct(world, org_id).outcome == "duplicate"
    deduct(world, org_id, "r-2")
    assert world.deduct(org_id, "r-2")
    assert figures(world, org_id) == (20, 0)


def test_deductions_and_events_race_and_one_charges(
    world: World, org_id: UUID, database_url: str
) -> None:
    def act(database: Database, number: int) -> str:
        if number % 2:
            mine = World(database, world.sql)
            return "charged" if mine.apply(entry(event(org_id))).charged else "duplicate"
        done = deductions.deduct(database, event(org_id), actor="service:tests", now=NOW)
        return done.outcome.value

    outcomes = race(database_url, act)
    assert sorted(map(str, outcomes)) == ["charged"] + ["duplicate"] * 15
    assert figures(world, org_id) == (10, 0)


def test_a_hold_is_settled_at_the_price_of_the_operation(world: World, org_id: UUID) -> None:
    hold(world, org_id, Operation("bulk_export", quantity=Decimal(10)))
    assert figures(world, org_id) == (0, 50)
    done = deduct(world, org_id, service_type="bulk_export", quantity=4)
    assert (done.credits_used, done.remaining_credits) == (20, 80)
    assert figures(world, org_id) == (20, 0)
    assert state(world) == ("charged", 20)


def test_a_hold_of_credits_alone_is_settled_by_credits_alone(world: World, org_id: UUID) -> None:
    hold(world, org_id, Operation(credits=30))
    deduct(world, org_id, service_type=UNNAMED_SERVICE, credits=25)
    assert figures(world, org_id) == (25, 0)


def test_a_hold_pays_for_its_own_request_only(world: World, org_id: UUID) -> None:
    hold(world, org_id, Operation("bulk_export", quantity=Decimal(19)))
    with pytest.raises(InsufficientCredits) as refused:
        deduct(world, org_id, "r-2")
    assert refused.value.details == {"required": 10, "remaining": 5}
    assert deduct(world, org_id, service_type="bulk_export", quantity=20).remaining_credits == 0


def test_what_is_refused_leaves_nothing_behind(world: World, org_id: UUID) -> None:
    hold(world, org_id, Operation("bulk_export", quantity=Decimal(5)))
    before = world.contents()
    with pytest.raises(InsufficientCredits) as refused:
        deduct(world, org_id, service_type="bulk_export", quantity=21)
    assert refused.value.details == {"required": 105, "remaining": 100}
    assert world.contents() == before


def test_who_has_no_allocation_is_told_so(world: World, org_id: UUID) -> None:
    with pytest.raises(NoAllocation, match="No credit allocation found for user bob"):
        deduct(world, org_id, user_id="bob")
    assert world.rows("dead_letters", "id") == []


def test_who_is_switched_off_has_no_allocation(world: World, org_id: UUID) -> None:
    allocations.deactivate(world.database, org_id, "ada", actor="root", now=NOW)
    with pytest.raises(NoAllocation):
        deduct(world, org_id)


def test_who_is_no_member_is_refused_whatever_they_have(world: World, org_id: UUID) -> None:
    world.leave(org_id, "gone")
    with pytest.raises(NotAMember):
        deduct(world, org_id, user_id="gone")
    with pytest.raises(NotAMember):
        deduct(world, org_id, user_id="nobody")


def test_what_the_gate_has_granted_is_charged_after_the_member_left(
    world: World, org_id: UUID
) -> None:
    hold(world, org_id)
    world.sql.execute("DELETE FROM organization_members")
    assert deduct(world, org_id).outcome == "charged"
    assert deduct(world, org_id).outcome == "duplicate"


def test_an_unknown_organization_is_not_found(world: World) -> None:
    with pytest.raises(NotFound, match=f"no organization {NOWHERE}"):
        deduct(world, NOWHERE)
    with pytest.raises(NotFound):
        deduct(world, NOWHERE, key="k")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"service_type": "unheard_of"}, ["service_type", "credits"]),
        ({"credits": 11}, ["credits"]),
        ({"occurred_at": NOW - timedelta(days=36)}, ["occurred_at"]),
        ({"occurred_at": NOW + timedelta(minutes=6)}, ["occurred_at"]),
    ],
)
def test_what_can_never_be_charged_names_the_field(
    world: World, org_id: UUID, fields: dict[str, Any], named: list[str]
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        deduct(world, org_id, **fields)
    assert refused.value.details["fields"] == named
    assert world.rows("usage_requests", "request_id") == []


def test_a_charge_that_javascript_could_not_read_is_refused(world: World, org_id: UUID) -> None:
    new = NewPrice.of(service_type="dear", credits=1_000_000, unit="piece")
    prices.set_price(world.database, new, NOW)
    with pytest.raises(InvalidRequest, match="quantity: 1000000000000000000 credits"):
        deduct(world, org_id, service_type="dear", quantity="1e12")


def test_a_debt_is_charged_once_it_is_covered(world: World, org_id: UUID) -> None:
    world.apply(event(org_id, service_type="market_analysis"))
    with pytest.raises(InsufficientCredits) as refused:
        deduct(world, org_id, service_type="market_analysis")
    assert refused.value.details == {"required": 150, "remaining": 100}
    assert state(world) == ("dead", 150)

    world.allocate(org_id, "ada", 100)
    done = deduct(world, org_id, service_type="market_analysis")
    assert (done.outcome, done.credits_used, done.remaining_credits) == ("charged", 150, 50)
    assert world.rows("dead_letters", "state", "resolved_at") == [("charged", NOW)]
    assert world.apply(event(org_id, service_type="market_analysis")).duplicates == 1


def test_a_debt_is_the_same_request_only_with_the_same_credits(world: World, org_id: UUID) -> None:
    world.apply(event(org_id, service_type="market_analysis"))
    with pytest.raises(RequestIdConflict):
        deduct(world, org_id, service_type="valuation")


def test_a_request_that_died_of_something_else_stays_dead(world: World, org_id: UUID) -> None:
    world.apply(event(org_id, service_type="unheard_of"))
    with pytest.raises(RequestIdConflict, match="request r-1 is dead: unknown_service"):
        deduct(world, org_id, service_type="unheard_of")


def test_a_price_change_makes_no_other_request_of_a_repetition(world: World, org_id: UUID) -> None:
    deduct(world, org_id, is_dated=False)
    later = NOW + HOUR
    prices.set_price(world.database, NewPrice.of(service_type="contact_lookup", credits=20), later)
    much_later = later + HOUR

    again = deduct(world, org_id, is_dated=False, occurred_at=much_later, now=much_later)
    assert (again.outcome, again.credits_used) == ("duplicate", 10)
    with pytest.raises(RequestIdConflict):
        deduct(world, org_id, occurred_at=much_later, now=much_later)
    new = deduct(world, org_id, "r-2", is_dated=False, occurred_at=much_later, now=much_later)
    assert new.credits_used == 20


def test_a_debt_without_a_date_is_charged_as_it_was_priced(world: World, org_id: UUID) -> None:
    world.apply(event(org_id, service_type="market_analysis"))
    world.allocate(org_id, "ada", 100)
    later = NOW + HOUR
    new = NewPrice.of(service_type="market_analysis", credits=160)
    prices.set_price(world.database, new, later)
    done = deduct(
        world, org_id, service_type="market_analysis", is_dated=False, occurred_at=later, now=later
    )
    assert (done.outcome, done.credits_used) == ("charged", 150)


def test_overage_is_lent_as_to_an_event(world: World, org_id: UUID) -> None:
    pools.set_overage(world.database, org_id, allow=True, limit=60, rate=Decimal("0.002"))
    done = deduct(world, org_id, service_type="market_analysis")
    assert (done.credits_used, done.remaining_credits) == (150, 0)
    assert world.row("credit_usage_attribution")["overage_credits"] == 50
    with pytest.raises(InsufficientCredits):
        deduct(world, org_id, "r-2", service_type="contact_lookup", quantity=2)


def test_one_key_is_one_deduction(world: World, org_id: UUID) -> None:
    first = deduct(world, org_id, key="k")
    before = world.contents()
    assert deduct(world, org_id, key="k") == first
    assert world.contents() == before
    with pytest.raises(InvalidRequest, match="Idempotency-Key"):
        deduct(world, org_id, "r-2", key="k")


def test_a_key_does_not_tell_when_an_undated_deduction_is_sent(world: World, org_id: UUID) -> None:
    first = deduct(world, org_id, key="k", is_dated=False)
    later = NOW + HOUR
    again = deduct(world, org_id, key="k", is_dated=False, occurred_at=later, now=later)
    assert again == first
