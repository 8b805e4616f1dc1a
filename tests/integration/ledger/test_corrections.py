"""Corrections: charges given back or raised, in every period, and credits conserved throughout."""

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest

from ledger import allocations, billing, corrections, holds, pools, resets
from ledger.corrections import Correction
from ledger.database import Database
from ledger.gate import Operation
from schema.errors import Conflict, InsufficientCredits, InvalidRequest, NoAllocation, NotFound
from schema.periods import ResetPeriod
from schema.plans import PlanName
from tests.integration.ledger.books import assert_balanced
from tests.integration.ledger.race import race
from tests.integration.ledger.world import NOW, World, event, open_world

DAY = timedelta(days=1)
START = NOW - timedelta(hours=1)
TOMORROW = START + DAY
LATER = NOW + 2 * DAY
"""When corrections are made."""


@pytest.fixture
def world(database: Database, database_url: str) -> Iterator[World]:
    with open_world(database, database_url) as opened:
        yield opened
        assert_balanced(opened)


@pytest.fixture
def org_id(world: World) -> UUID:
    """Ada has 100 credits a day of the 1000 in the pool, and used 10 of them as r-1."""
    org_id = world.organization(plan=PlanName.PLATFORM, pool=1000, members={"ada": "member"})
    allocate(world, org_id, 100)
    world.apply(event(org_id, "r-1"))
    return org_id


def allocate(world: World, org_id: UUID, credits: int) -> None:
    allocations.allocate(
        world.database, org_id, "ada", credits, reset_period=ResetPeriod.DAILY, actor="root",
        now=START,
    )  # fmt: skip


def deactivate(world: World, org_id: UUID) -> None:
    allocations.deactivate(world.database, org_id, "ada", actor="root", now=NOW)


def close_period(world: World) -> None:
    """End the period in which all was used so far."""
    resets.reset_due(world.database, TOMORROW)
    assert len(world.rows("allocation_periods", "period_start")) == 1


def empty_pool(world: World, org_id: UUID) -> None:
    available = pools.get(world.database, org_id).available_credits
    pools.add(
        world.database, org_id, -available, kind=pools.Kind.ADJUSTMENT, actor="root", reason="out",
        now=NOW,
    )  # fmt: skip


def refund(
    world: World, org_id: UUID, credits: int | None = None, request_id: str = "r-1", **options: Any
) -> Correction:
    options = {"actor": "root", "reason": "a mistake"} | options
    return corrections.refund(world.database, org_id, request_id, credits, now=LATER, **options)


def adjust(
    world: World, org_id: UUID, to_credits: int, request_id: str = "r-1", **options: Any
) -> Correction:
    options = {"actor": "root", "reason": "a mistake"} | options
    return corrections.adjust(world.database, org_id, request_id, to_credits, now=LATER, **options)


def ada(world: World, org_id: UUID) -> tuple[int, int]:
    """Her allocated and used credits."""
    return world.allocations(org_id)["ada"]


def closed(world: World) -> tuple[int, int]:
    """Allocated and used credits of the only closed period."""
    row = world.row("allocation_periods")
    return row["allocated_credits"], row["used_credits"]


def moved(world: World) -> list[tuple[Any, ...]]:
    """What moved for corrections."""
    return world.rows(
        "credit_transactions WHERE actor = 'root' AND request_id IS NOT NULL",
        "kind", "credits", "user_id", "request_id", "reason", "created_at",
    )  # fmt: skip


def of_ada(kind: str, credits: int, request_id: str = "r-1") -> tuple[Any, ...]:
    return (kind, credits, "ada", request_id, "a mistake", LATER)


def of_pool(kind: str, credits: int, request_id: str = "r-1") -> tuple[Any, ...]:
    return (kind, credits, None, request_id, "a mistake", LATER)


# The row


def test_a_refund_is_a_row_of_its_own(world: World, org_id: UUID) -> None:
    metadata = {"company_id": "c-1"}
    world.apply(event(org_id, "r-2", quantity="3", api_cost="0.04", metadata=metadata))
    attributions = "SELECT * FROM credit_usage_attribution WHERE request_id = 'r-2' ORDER BY id"
    before, requests = world.sql.execute(attributions).fetchall(), world.contents()
    correction = refund(world, org_id, request_id="r-2")
    original, new = world.sql.execute(attributions).fetchall()
    assert before == [original]
    assert world.contents()["usage_requests"] == requests["usage_requests"]
    assert {name: new[name] for name in new if new[name] != original[name]} == {
        "id": correction.id,
        "credits_used": -30,
        "quantity": 1,
        "api_cost": 0,
        "markup_applied": 0,
        "total_cost": 0,
        "created_at": LATER,
        "corrects": original["id"],
        "actor": "root",
        "reason": "a mistake",
    }
    assert (correction.corrects, correction.net_credits) == (original["id"], 0)
    assert (correction.created_at, correction.occurred_at) == (LATER, NOW)


def test_the_corrections_of_a_request_are_listed_in_order(world: World, org_id: UUID) -> None:
    world.apply(event(org_id, "r-2"))
    refund(world, org_id, request_id="r-2")
    assert corrections.corrections_of(world.database, org_id, "r-1") == []
    made = [refund(world, org_id, 4), adjust(world, org_id, 15), refund(world, org_id)]
    assert [(one.credits_used, one.net_credits) for one in made] == [(-4, 6), (9, 15), (-15, 0)]
    assert corrections.corrections_of(world.database, org_id, "r-1") == made
    assert corrections.corrections_of(world.database, world.organization(), "r-1") == []


def test_a_direct_call_is_corrected(world: World, org_id: UUID) -> None:
    world.deduct(org_id, "sql-1", 20)
    assert refund(world, org_id, request_id="sql-1").credits_used == -20


def test_a_direct_call_that_settled_a_hold_is_corrected(world: World, org_id: UUID) -> None:
    lookup = Operation("contact_lookup")
    holds.place(world.database, org_id, "ada", lookup, "sql-1", timedelta(minutes=1), NOW)
    world.deduct(org_id, "sql-1", 20)
    assert refund(world, org_id, 5, request_id="sql-1").net_credits == 15
    assert adjust(world, org_id, 7, request_id="sql-1").credits_used == -8


# The running period


def test_a_refund_returns_to_the_user(world: World, org_id: UUID) -> None:
    refund(world, org_id, 4)
    assert (ada(world, org_id), world.pool(org_id)) == ((100, 6), (1000, 100, 6))
    refund(world, org_id)
    assert (ada(world, org_id), world.pool(org_id)) == ((100, 0), (1000, 100, 0))
    assert moved(world) == []


def test_a_raise_is_paid_by_the_user(world: World, org_id: UUID) -> None:
    lookup = Operation("contact_lookup")
    holds.place(world.database, org_id, "ada", lookup, "r-2", timedelta(minutes=1), NOW)
    before = world.contents()
    with pytest.raises(InsufficientCredits, match="80 available, 81 needed") as caught:
        adjust(world, org_id, 91, key="k-1")
    assert caught.value.details == {"required": 81, "remaining": 80}
    assert world.contents() == before
    assert adjust(world, org_id, 90).credits_used == 80
    assert (ada(world, org_id), world.pool(org_id)) == ((100, 90), (1000, 100, 90))
    assert moved(world) == []


def test_a_refund_of_a_user_who_is_off_goes_on_to_the_pool(world: World, org_id: UUID) -> None:
    deactivate(world, org_id)
    refund(world, org_id, 4)
    assert (ada(world, org_id), world.pool(org_id)) == ((6, 6), (1000, 6, 6))
    assert moved(world) == [of_ada("reclaim", -4)]
    with pytest.raises(InsufficientCredits, match="0 available"):
        adjust(world, org_id, 7)


# A closed period


def test_a_refund_of_a_closed_period_returns_to_the_pool(world: World, org_id: UUID) -> None:
    close_period(world)
    assert (closed(world), world.pool(org_id)) == ((100, 10), (1000, 110, 10))
    refund(world, org_id, 4)
    assert (closed(world), world.pool(org_id)) == ((96, 6), (1000, 106, 6))
    assert ada(world, org_id) == (100, 0)
    assert moved(world) == [of_ada("correction", -4)]


def test_a_refund_of_a_closed_period_after_switching_off(world: World, org_id: UUID) -> None:
    close_period(world)
    deactivate(world, org_id)
    refund(world, org_id)
    assert (closed(world), ada(world, org_id)) == ((90, 0), (0, 0))
    assert world.pool(org_id) == (1000, 0, 0)


def test_a_raise_of_a_closed_period_is_paid_by_the_pool(world: World, org_id: UUID) -> None:
    close_period(world)
    adjust(world, org_id, 900)  # all 890 that are available
    assert (closed(world), world.pool(org_id)) == ((990, 900), (1000, 1000, 900))
    assert ada(world, org_id) == (100, 0)
    assert moved(world) == [of_ada("correction", 890)]


def test_a_raise_of_a_closed_period_is_paid_by_the_user_else(world: World, org_id: UUID) -> None:
    close_period(world)
    empty_pool(world, org_id)
    adjust(world, org_id, 30)
    assert (closed(world), ada(world, org_id)) == ((120, 30), (80, 0))
    assert world.pool(org_id) == (110, 110, 30)
    assert moved(world) == []


def test_a_raise_of_a_closed_period_needs_one_who_pays(world: World, org_id: UUID) -> None:
    close_period(world)
    before = world.contents()
    with pytest.raises(InsufficientCredits, match="890 available, 891 needed"):
        adjust(world, org_id, 901)
    assert world.contents() == before


# Overage


@pytest.fixture
def lent(world: World, org_id: UUID) -> str:
    """A request of 150 credits, 60 of them on account."""
    overage: dict[str, Any] = {"limit": 500, "rate": Decimal("0.001")}
    pools.set_overage(world.database, org_id, allow=True, **overage)
    assert world.apply(event(org_id, "r-2", service_type="market_analysis")).charged == 1
    assert (ada(world, org_id), owed(world, org_id)) == ((160, 160), (60, 0))
    return "r-2"


def owed(world: World, org_id: UUID) -> tuple[int, int]:
    """Credits on account that are not billed, and that are."""
    pool = pools.get(world.database, org_id)
    return pool.overage_credits, pool.overage_billed_credits


def bill(world: World, org_id: UUID) -> None:
    with world.database.transaction() as connection:
        billing.lock_overage(connection, [org_id])
        billing.mark_billed(connection, [org_id])


def test_credits_on_account_are_given_back_first(world: World, org_id: UUID, lent: str) -> None:
    first = refund(world, org_id, 40, lent)
    assert (first.credits_used, first.overage_credits) == (-40, -40)
    assert (ada(world, org_id), owed(world, org_id)) == ((120, 120), (20, 0))
    second = refund(world, org_id, None, lent)
    assert (second.credits_used, second.overage_credits) == (-110, -20)
    assert (ada(world, org_id), owed(world, org_id)) == ((100, 10), (0, 0))
    assert world.pool(org_id) == (1000, 100, 10)
    assert moved(world) == sorted(
        [
            of_pool("overage", -40, lent),
            of_ada("correction", -40, lent),
            of_pool("overage", -20, lent),
            of_ada("correction", -20, lent),
        ],
        key=lambda row: row[:2],
    )


def test_overage_that_is_billed_stays_paid_for(world: World, org_id: UUID, lent: str) -> None:
    bill(world, org_id)
    assert refund(world, org_id, None, lent).overage_credits == 0
    assert (ada(world, org_id), owed(world, org_id)) == ((160, 10), (0, 60))
    assert moved(world) == []


def test_only_the_requests_own_overage_is_given_back(world: World, org_id: UUID, lent: str) -> None:
    assert refund(world, org_id).overage_credits == 0
    assert owed(world, org_id) == (60, 0)
    assert world.apply(event(org_id, "r-3", quantity="2")).charged == 1  # 10 of 20 on account
    assert refund(world, org_id, None, "r-3").overage_credits == -10
    assert owed(world, org_id) == (60, 0)
    assert refund(world, org_id, None, lent).overage_credits == -60


def test_a_raise_is_never_on_account(world: World, org_id: UUID, lent: str) -> None:
    with pytest.raises(InsufficientCredits, match="0 available"):
        adjust(world, org_id, 11)
    refund(world, org_id, 100, lent)
    raised = adjust(world, org_id, 90, lent)
    assert (raised.credits_used, raised.overage_credits) == (40, 0)
    assert owed(world, org_id) == (0, 0)


def test_overage_of_a_user_who_is_off(world: World, org_id: UUID, lent: str) -> None:
    deactivate(world, org_id)
    refund(world, org_id, 40, lent)
    assert (ada(world, org_id), owed(world, org_id)) == ((120, 120), (20, 0))
    refund(world, org_id, 50, lent)
    assert (ada(world, org_id), owed(world, org_id)) == ((70, 70), (0, 0))
    assert world.pool(org_id) == (1000, 70, 70)
    assert [row for row in moved(world) if row[0] == "reclaim"] == [of_ada("reclaim", -30, lent)]


def test_overage_of_a_closed_period(world: World, org_id: UUID, lent: str) -> None:
    close_period(world)
    assert (closed(world), world.pool(org_id)) == ((160, 160), (1060, 260, 160))
    refund(world, org_id, 100, lent)
    assert (closed(world), ada(world, org_id)) == ((60, 60), (100, 0))
    assert (world.pool(org_id), owed(world, org_id)) == ((1000, 160, 60), (0, 0))
    assert moved(world) == [of_ada("correction", -100, lent), of_pool("overage", -60, lent)]


# Refusals


def test_no_more_is_refunded_than_was_charged(world: World, org_id: UUID) -> None:
    refund(world, org_id, 4)
    with pytest.raises(Conflict, match="charged at 6"):
        refund(world, org_id, 7)
    refund(world, org_id, 6)
    before = world.contents()
    for credits in (1, None):
        with pytest.raises(Conflict, match="charged at 0"):
            refund(world, org_id, credits)
    assert world.contents() == before


def test_the_same_charge_is_no_correction(world: World, org_id: UUID) -> None:
    with pytest.raises(Conflict, match="10 credits already"):
        adjust(world, org_id, 10)
    adjust(world, org_id, 0)
    with pytest.raises(Conflict, match="0 credits already"):
        adjust(world, org_id, 0)


def lower(world: World, org_id: UUID, **options: Any) -> Correction:
    """What `refund` does, by `adjust`."""
    return adjust(world, org_id, 5, **options)


@pytest.mark.parametrize("act", [refund, lower])
def test_only_charges_are_corrected(
    world: World, org_id: UUID, act: Callable[..., Correction]
) -> None:
    lookup = Operation("contact_lookup")
    holds.place(world.database, org_id, "ada", lookup, "held", timedelta(minutes=1), NOW)
    world.apply(event(org_id, "dead", user_id="eve"))
    for request_id in ("held", "dead"):
        with pytest.raises(Conflict, match=f"{request_id} is {request_id}"):
            act(world, org_id, request_id=request_id)
    with pytest.raises(NotFound):
        act(world, org_id, request_id="nothing")
    for key in (None, "k-1"):
        with pytest.raises(NotFound):
            act(world, UUID(int=1), key=key)


@pytest.mark.parametrize(
    ("act", "field"),
    [
        (lambda world, org_id: refund(world, org_id, 0), "credits"),
        (lambda world, org_id: refund(world, org_id, -1), "credits"),
        (lambda world, org_id: refund(world, org_id, reason=" "), "reason"),
        (lambda world, org_id: refund(world, org_id, reason="\x00"), "reason"),
        (lambda world, org_id: refund(world, org_id, request_id="\x00"), "request_id"),
        (lambda world, org_id: refund(world, org_id, actor=""), "actor"),
        (lambda world, org_id: adjust(world, org_id, -1), "to_credits"),
        (lambda world, org_id: adjust(world, org_id, 2**53 + 1), "to_credits"),
        (lambda world, org_id: adjust(world, org_id, 5, reason=""), "reason"),
        (
            lambda world, org_id: corrections.corrections_of(world.database, org_id, "\x00"),
            "request_id",
        ),
    ],
)
def test_what_cannot_be_corrected_is_refused(
    world: World, org_id: UUID, act: Callable[[World, UUID], object], field: str
) -> None:
    before = world.contents()
    with pytest.raises(InvalidRequest, match=f"^{field}: "):
        act(world, org_id)
    assert world.contents() == before


# Idempotency


def test_a_correction_is_made_once_under_a_key(world: World, org_id: UUID) -> None:
    first = [refund(world, org_id, 4, key="k-1"), adjust(world, org_id, 9, key="k-2")]
    before = world.contents()
    assert [refund(world, org_id, 4, key="k-1"), adjust(world, org_id, 9, key="k-2")] == first
    others: list[Callable[[], Correction]] = [
        lambda: refund(world, org_id, 5, key="k-1"),
        lambda: refund(world, org_id, 4, key="k-1", reason="another"),
        lambda: adjust(world, org_id, 4, key="k-1"),
    ]
    for again in others:
        with pytest.raises(InvalidRequest, match="Idempotency-Key"):
            again()
    assert world.contents() == before


@pytest.mark.parametrize("keys", [1, 16])
def test_16_threads_correct_no_more_than_was_charged(
    world: World, org_id: UUID, database_url: str, keys: int
) -> None:
    """Under one key a refund is made once; under many as often as it fits."""

    def act(database: Database, number: int) -> Correction:
        key = f"k-{number % keys}"
        return corrections.refund(
            database, org_id, "r-1", 3, actor="root", reason="race", key=key, now=LATER
        )

    outcomes = race(database_url, act)
    made = {outcome.id for outcome in outcomes if isinstance(outcome, Correction)}
    refused = [outcome for outcome in outcomes if not isinstance(outcome, Correction)]
    assert len(made) == (1 if keys == 1 else 3)
    assert [type(error) for error in refused] == [Conflict] * (0 if keys == 1 else 13)
    assert ada(world, org_id) == (100, 10 - 3 * len(made))


def test_all_that_moves_credits_at_once_neither_deadlocks_nor_drifts(
    world: World, org_id: UUID, database_url: str
) -> None:
    """Every thread does every act, each beginning with another one."""
    world.apply(*(event(org_id, f"c-{number}", quantity="0.1") for number in range(8)))
    lookup = Operation("contact_lookup")

    def acts(database: Database, number: int) -> list[Callable[[], object]]:
        mine: dict[str, Any] = {"actor": "root", "key": f"k-{number}"}
        books: dict[str, Any] = {"actor": "root", "reason": "a mistake", "now": LATER}
        return [
            lambda: pools.add(database, org_id, 5, **mine, now=NOW),
            lambda: allocations.allocate(database, org_id, "ada", 3, actor="root", now=NOW),
            lambda: allocations.reclaim(database, org_id, "ada", 1, actor="root", now=NOW),
            lambda: corrections.refund(database, org_id, f"c-{number}", **books),
            lambda: corrections.adjust(database, org_id, f"c-{number}", 2 + number, **books),
            lambda: World(database, world.sql).apply(event(org_id, f"e-{number}", quantity="0.1")),
            lambda: holds.place(
                database, org_id, "ada", lookup, f"h-{number}", timedelta(minutes=1), NOW
            ),
            lambda: resets.reset_due(database, TOMORROW),
            lambda: deactivate(world, org_id) if number == 0 else None,
            lambda: allocations.return_unused(database, LATER),
        ]

    def work(database: Database, number: int) -> int:
        mine = acts(database, number)
        for act in (*mine[number:], *mine[:number]):
            with contextlib.suppress(InsufficientCredits, NoAllocation, Conflict):
                act()
        return number

    assert set(race(database_url, work, racers=8)) == set(range(8))
