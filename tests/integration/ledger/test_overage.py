"""Overage: credits on account, up to a limit, the same through events, SQL and the gate."""

import asyncio
import threading
from collections.abc import Iterator
from datetime import timedelta
from decimal import Decimal
from uuid import UUID

import pytest
from psycopg.errors import RaiseException

from ledger import holds
from ledger.asyncgate import AsyncGate
from ledger.database import Database
from ledger.debts import Settled, settle
from ledger.decisions import Outcome
from ledger.gate import Operation
from schema.errors import InsufficientCredits
from schema.plans import PlanName
from schema.settings import Settings
from tests.integration.ledger.world import NOW, World, event, open_world

LOOKUP = Operation(service_type="contact_lookup")
FIVE_MINUTES = timedelta(minutes=5)


@pytest.fixture
def world(database: Database, database_url: str) -> Iterator[World]:
    with open_world(database, database_url) as opened:
        yield opened


@pytest.fixture
def org(world: World) -> UUID:
    """Ada has 15 credits; her organization may use 30 more on account."""
    org_id = world.organization(plan=PlanName.PLATFORM, pool=20, allocations={"ada": 15})
    allow(world, org_id, 30)
    return org_id


def allow(world: World, org_id: UUID, limit: int) -> None:
    world.sql.execute(
        """
        UPDATE organization_credit_pools
        SET allow_overage = true, overage_limit = %s, overage_rate = 0.002
        WHERE org_id = %s
        """,
        (limit, org_id),
    )


def lent(world: World) -> list[tuple[str, int]]:
    return world.rows("credit_usage_attribution", "request_id", "overage_credits")


def is_sufficient(world: World, org_id: UUID, credits: int) -> bool:
    row = world.sql.execute(
        "SELECT has_sufficient_credits(%s, 'ada', %s) AS it", (org_id, credits)
    ).fetchone()
    assert row is not None
    return bool(row["it"])


def test_usage_beyond_the_allocation_is_marked_and_limited(world: World, org: UUID) -> None:
    outcome = world.apply(*(event(org, f"r-{n}") for n in range(6)))
    assert (outcome.charged, outcome.dead) == (4, {"insufficient_credits": 2})
    assert lent(world) == [("r-0", 0), ("r-1", 5), ("r-2", 10), ("r-3", 10)]
    assert world.allocations(org) == {"ada": (40, 40)}
    assert world.pool(org) == (45, 40, 40)
    assert world.row("organization_credit_pools")["overage_credits"] == 25
    assert world.rows("credit_transactions WHERE kind = 'overage'", "credits", "request_id") == [
        (5, "r-1"),
        (10, "r-2"),
        (10, "r-3"),
    ]


def test_direct_calls_follow_the_same_rule(world: World, org: UUID) -> None:
    for number in range(4):
        assert world.deduct(org, f"r-{number}")
    with pytest.raises(RaiseException, match="Insufficient credits: 0 available, 10 needed"):
        world.deduct(org, "r-4")
    assert lent(world) == [("r-0", 0), ("r-1", 5), ("r-2", 10), ("r-3", 10)]
    assert world.pool(org) == (45, 40, 40)


def test_without_a_live_subscription_there_is_none(world: World, org: UUID) -> None:
    world.sql.execute("UPDATE organization_subscriptions SET status = 'canceled'")
    assert world.apply(event(org, quantity=2)).dead == {"insufficient_credits": 1}
    assert not is_sufficient(world, org, 16)


def test_what_is_sufficient_can_be_deducted(world: World, org: UUID) -> None:
    assert is_sufficient(world, org, 45)
    assert not is_sufficient(world, org, 46)
    assert world.deduct(org, "all", credits=45)


def test_advice_counts_overage(org: UUID, settings: Settings) -> None:
    async def ask(quantity: int) -> int:
        operation = Operation(service_type="contact_lookup", quantity=Decimal(quantity))
        async with AsyncGate(settings) as gate:
            return (await gate.check(org, "ada", operation)).credits

    assert asyncio.run(ask(4)) == 40
    with pytest.raises(InsufficientCredits):
        asyncio.run(ask(5))


def test_holds_count_on_overage_and_leave_it_free_when_released(world: World, org: UUID) -> None:
    for number in range(4):
        holds.place(world.database, org, "ada", LOOKUP, f"h-{number}", FIVE_MINUTES, NOW)
    with pytest.raises(InsufficientCredits):
        holds.place(world.database, org, "ada", LOOKUP, "h-4", FIVE_MINUTES, NOW)
    assert world.row("user_credit_allocations")["held_credits"] == 15
    holds.release(world.database, org, "h-3", NOW)
    holds.place(world.database, org, "ada", LOOKUP, "h-5", FIVE_MINUTES, NOW)
    assert world.pool(org) == (20, 15, 0)


def test_an_event_without_hold_cannot_take_what_holds_count_on(world: World, org: UUID) -> None:
    for number in range(4):
        holds.place(world.database, org, "ada", LOOKUP, f"h-{number}", FIVE_MINUTES, NOW)
    assert world.apply(event(org, "bare")).dead == {"insufficient_credits": 1}
    assert world.apply(*(event(org, f"h-{n}") for n in range(4))) == Outcome(4, 0, 40)
    assert world.row("organization_credit_pools")["overage_credits"] == 25
    assert world.row("user_credit_allocations")["held_credits"] == 0


def test_concurrent_gates_stay_within_the_limit(org: UUID, database_url: str) -> None:
    database = Database(database_url, pool_size=16)
    allowed: list[str] = []
    barrier = threading.Barrier(16)

    def ask(number: int) -> None:
        barrier.wait()
        try:
            held = holds.place(database, org, "ada", LOOKUP, f"h-{number}", FIVE_MINUTES, NOW)
        except InsufficientCredits:
            return
        allowed.append(held.request_id)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    database.close()
    assert len(allowed) == 4


def test_debts_settle_on_account_once_overage_is_allowed(world: World) -> None:
    org_id = world.organization(plan=PlanName.PLATFORM, pool=20, allocations={"ada": 15})
    world.apply(event(org_id, "debt", quantity=3))
    assert settle(world.database, NOW) == Settled()
    allow(world, org_id, 30)
    assert settle(world.database, NOW) == Settled(debts=1, credits=30)
    assert lent(world) == [("debt", 15)]


def test_a_member_who_left_gets_none(world: World, org: UUID) -> None:
    world.sql.execute("UPDATE user_credit_allocations SET is_active = false")
    assert world.apply(event(org)).dead == {"no_allocation": 1}


def test_what_was_held_is_charged_after_the_member_left(world: World, org: UUID) -> None:
    holds.place(world.database, org, "ada", LOOKUP, "held", FIVE_MINUTES, NOW)
    holds.place(world.database, org, "ada", LOOKUP, "partly", FIVE_MINUTES, NOW)
    world.sql.execute("UPDATE user_credit_allocations SET is_active = false")
    assert world.apply(event(org, "held")).charged == 1
    assert world.apply(event(org, "partly")).dead == {"insufficient_credits": 1}
