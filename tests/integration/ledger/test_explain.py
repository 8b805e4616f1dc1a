"""Explanations: every movement of a balance is named once, and the lines add up to it."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from uuid import UUID, uuid4

import pytest

from ledger import allocations, corrections, holds, pools
from ledger.database import Database
from ledger.explain import MAX_LIMIT, Explanation, Line, Period, explain
from ledger.gate import Operation
from ledger.resets import reset_due
from schema.errors import InvalidRequest, MeteringError, NoAllocation, NotFound
from schema.plans import PlanName
from tests.integration.ledger.world import World, event, open_world

LOOKUP = Operation("contact_lookup")
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
APRIL = datetime(2026, 4, 1, 9, tzinfo=UTC)
MAY = datetime(2026, 5, 1, 9, tzinfo=UTC)
JUNE = datetime(2026, 6, 1, 9, tzinfo=UTC)
JULY = datetime(2026, 7, 1, 9, tzinfo=UTC)


@pytest.fixture
def world(database: Database, database_url: str) -> Iterator[World]:
    with open_world(database, database_url) as opened:
        yield opened


@pytest.fixture
def org_id(world: World) -> UUID:
    """A pool of 1000 credits, since April; ada has 100 of them monthly."""
    org_id = world.organization(plan=PlanName.PLATFORM)
    pools.add(world.database, org_id, 1000, actor="root", now=APRIL)
    allocate(world, org_id, 100, APRIL)
    return org_id


def allocate(world: World, org_id: UUID, credits: int, now: datetime, user_id: str = "ada") -> None:
    world.join(org_id, user_id)
    allocations.allocate(
        world.database, org_id, user_id, credits, actor="root", reason="granted", now=now
    )


def use(
    world: World, org_id: UUID, request_id: str, at: datetime, now: datetime | None = None
) -> None:
    """A contact lookup of 10 credits, applied an hour later unless it is said when."""
    used = event(org_id, request_id, occurred_at=at.isoformat())
    assert world.apply(used, now=now or at + HOUR).charged == 1


def told(explanation: Explanation) -> list[tuple[str, int, int]]:
    """Kind, credits and what remains of each line."""
    return [(line.kind, line.credits, line.remaining) for line in explanation.lines]


def assert_adds_up(explanation: Explanation) -> None:
    remaining = explanation.opening
    for line in explanation.lines:
        remaining += line.credits
        assert line.remaining == remaining
    assert remaining == explanation.computed
    assert explanation.is_exact


def test_every_movement_of_the_running_period_has_its_line(world: World, org_id: UUID) -> None:
    use(world, org_id, "r-1", APRIL + DAY)
    reset_due(world.database, MAY)
    allocate(world, org_id, 30, MAY + DAY)
    use(world, org_id, "r-2", MAY + 2 * DAY)
    use(world, org_id, "late", APRIL + 28 * DAY, now=MAY + 3 * DAY)
    holds.place(world.database, org_id, "ada", LOOKUP, "r-3", DAY, MAY + 4 * DAY)
    corrections.refund(
        world.database, org_id, "r-2", 4, actor="eve", reason="half done", now=MAY + 5 * DAY
    )
    corrections.refund(
        world.database, org_id, "r-1", 3, actor="eve", reason="late word", now=MAY + 6 * DAY
    )
    allocations.reclaim(world.database, org_id, "ada", 20, actor="root", now=MAY + 7 * DAY)

    found = explain(world.database, org_id, "ada")
    assert found.periods == [Period(APRIL, MAY, 100 + 10 - 3, 10 + 10 - 3, 10, 0)]
    assert (found.period_start, found.opening) == (MAY, 100)
    assert told(found) == [
        ("allocation", 30, 130),
        ("usage", -10, 120),
        ("late_usage", 10, 130),
        ("usage_of_closed_period", -10, 120),
        ("hold", 0, 120),
        ("usage_correction", 4, 124),
        ("usage_correction", 3, 127),
        ("correction", -3, 124),
        ("reclaim", -20, 104),
    ]
    assert found.lines[0] == Line(
        MAY + DAY, "allocation", 30, 0, 1, None, None, "root", "granted", 130
    )
    assert found.lines[1] == Line(
        MAY + 2 * DAY + HOUR, "usage", -10, 0, 1, "r-2", "contact_lookup", None, None, 120
    )
    assert found.lines[4] == Line(
        MAY + 4 * DAY, "hold", 0, 10, 1, "r-3", "contact_lookup", None, None, 120
    )
    assert (found.lines[5].actor, found.lines[5].reason) == ("eve", "half done")
    assert (found.computed, found.held_computed) == (104, 10)
    assert_adds_up(found)


def test_the_first_period_is_told_from_nothing(world: World, org_id: UUID) -> None:
    use(world, org_id, "r-1", APRIL + DAY)
    found = explain(world.database, org_id, "ada")
    assert (found.periods, found.opening, found.period_start) == ([], 0, APRIL)
    assert told(found) == [("allocation", 100, 100), ("usage", -10, 90)]
    assert_adds_up(found)


def test_closed_periods_have_a_line_each(world: World) -> None:
    org_id = world.organization()
    pools.add(world.database, org_id, 105, actor="root", now=APRIL)
    allocate(world, org_id, 100, APRIL)
    for number in range(3):
        use(world, org_id, f"r-{number}", APRIL + DAY)
    reset_due(world.database, MAY)
    use(world, org_id, "r-9", MAY + DAY)
    reset_due(world.database, JULY)
    found = explain(world.database, org_id, "ada")
    assert found.periods == [
        Period(APRIL, MAY, funded=100, used=30, drawn=5, short=25),
        Period(MAY, JUNE, funded=75, used=10, drawn=0, short=35),
        Period(JUNE, JULY, funded=65, used=0, drawn=0, short=0),
    ]
    assert [period.remaining for period in found.periods] == [75, 65, 65]
    assert (found.opening, list(found.lines)) == (65, [])
    assert_adds_up(found)


def test_a_reset_that_gives_back_is_part_of_its_period(world: World, org_id: UUID) -> None:
    allocate(world, org_id, 50, APRIL + DAY)
    reset_due(world.database, MAY)
    found = explain(world.database, org_id, "ada")
    assert found.periods == [Period(APRIL, MAY, funded=150, used=0, drawn=-50, short=0)]
    assert list(found.lines) == []
    assert_adds_up(found)


def test_late_usage_is_paid_from_what_remains_if_the_pool_is_empty(world: World) -> None:
    org_id = world.organization()
    pools.add(world.database, org_id, 100, actor="root", now=APRIL)
    allocate(world, org_id, 100, APRIL)
    reset_due(world.database, MAY)
    use(world, org_id, "late", MAY - DAY, now=MAY + DAY)
    found = explain(world.database, org_id, "ada")
    assert found.periods == [Period(APRIL, MAY, funded=110, used=10, drawn=0, short=0)]
    assert told(found) == [("usage_of_closed_period", -10, 90)]
    assert_adds_up(found)


def test_overage_comes_in_before_it_is_used(world: World, org_id: UUID) -> None:
    pools.set_overage(world.database, org_id, allow=True, limit=50, rate=Decimal("0.002"))
    allocate(world, org_id, 4, APRIL, "bob")
    used = event(org_id, "r-1", user_id="bob", occurred_at=(APRIL + DAY).isoformat())
    world.apply(used, now=APRIL + DAY)
    found = explain(world.database, org_id, "bob")
    assert told(found) == [("allocation", 4, 4), ("allocation", 6, 10), ("usage", -10, 0)]
    assert [line.request_id for line in found.lines] == [None, "r-1", "r-1"]
    assert_adds_up(found)


def test_what_a_deactivation_takes_has_its_line(world: World, org_id: UUID) -> None:
    allocations.deactivate(world.database, org_id, "ada", actor="root", now=APRIL + DAY)
    found = explain(world.database, org_id, "ada")
    assert told(found) == [("allocation", 100, 100), ("reclaim", -100, 0)]
    assert_adds_up(found)


def test_older_usage_is_summed_up(world: World, org_id: UUID) -> None:
    for number in range(4):
        use(world, org_id, f"r-{number}", APRIL + number * DAY)
    allocate(world, org_id, 5, APRIL + 3 * DAY)
    holds.place(world.database, org_id, "ada", LOOKUP, "old", DAY, APRIL + DAY)
    use(world, org_id, "r-4", APRIL + 4 * DAY)
    found = explain(world.database, org_id, "ada", limit=2)
    assert told(found) == [
        ("allocation", 100, 100),
        ("earlier_usage", -30, 70),
        ("allocation", 5, 75),
        ("usage", -10, 65),
        ("usage", -10, 55),
    ]
    summed = found.lines[1]
    assert (summed.at, summed.movements, summed.held) == (APRIL + 2 * DAY + HOUR, 4, 10)
    assert summed.request_id is None
    assert_adds_up(found)
    assert len(explain(world.database, org_id, "ada", limit=6).lines) == 8


def test_what_was_dated_beside_the_reset_is_named(world: World, org_id: UUID) -> None:
    """Its clock was read after that of the reset, which had to wait for its locks."""
    allocate(world, org_id, 30, MAY + HOUR)
    reset_due(world.database, MAY)
    found = explain(world.database, org_id, "ada")
    assert found.periods == [Period(APRIL, MAY, funded=130, used=0, drawn=-30, short=0)]
    assert told(found) == [("at_reset", -30, 70), ("allocation", 30, 100)]
    assert found.lines[0].at == MAY
    assert_adds_up(found)


def test_only_the_users_own_movements_count(world: World, org_id: UUID) -> None:
    other = world.organization()
    pools.add(world.database, other, 500, actor="root", now=APRIL)
    allocate(world, other, 500, APRIL)
    holds.place(world.database, other, "ada", LOOKUP, "r-1", DAY, APRIL + DAY)
    allocate(world, org_id, 70, APRIL, "bob")
    holds.place(world.database, org_id, "bob", LOOKUP, "r-1", DAY, APRIL + DAY)
    found = explain(world.database, org_id, "ada")
    assert told(found) == [("allocation", 100, 100)]
    assert_adds_up(found)


@pytest.mark.parametrize(
    ("column", "computed", "recorded"),
    [("allocated_credits", (100, 0), (101, 0)), ("held_credits", (100, 0), (100, 1))],
)
def test_a_balance_that_was_tampered_with_is_not_exact(
    world: World, org_id: UUID, column: str, computed: tuple[int, int], recorded: tuple[int, int]
) -> None:
    world.sql.execute(f"UPDATE user_credit_allocations SET {column} = {column} + 1".encode())
    found = explain(world.database, org_id, "ada")
    assert not found.is_exact
    assert (found.computed, found.held_computed) == computed
    assert (found.recorded, found.held_recorded) == recorded


def test_what_does_not_exist_is_not_explained(world: World, org_id: UUID) -> None:
    refused: list[tuple[UUID, str, int, type[MeteringError]]] = [
        (uuid4(), "ada", 1, NotFound),
        (org_id, "nobody", 1, NoAllocation),
        (org_id, "ada", 0, InvalidRequest),
        (org_id, "ada", MAX_LIMIT + 1, InvalidRequest),
    ]
    for asked_org_id, user_id, limit, error in refused:
        with pytest.raises(error):
            explain(world.database, asked_org_id, user_id, limit)
