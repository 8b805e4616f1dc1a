"""Pools: credits put in once, by kind; refreshes and overage switched on and off."""

import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import psycopg
import pytest
from sqlalchemy.exc import DBAPIError

from ledger import idempotency, pools
from ledger.database import Database
from ledger.idempotency import Act
from ledger.pools import Kind, Pool
from schema.errors import (
    Conflict,
    InsufficientCredits,
    InvalidRequest,
    NotFound,
)
from schema.plans import PlanName
from tests.integration.ledger.books import assert_balanced
from tests.integration.ledger.race import await_lock, race
from tests.integration.ledger.world import NOW, World, open_world

NOWHERE = UUID(int=1)
BOOKED = ("kind", "credits", "amount", "actor", "reason", "created_at")


@pytest.fixture
def world(database: Database, database_url: str) -> Iterator[World]:
    with open_world(database, database_url) as opened:
        yield opened
        assert_balanced(opened)


@pytest.fixture
def org_id(world: World) -> UUID:
    return world.organization()


def add(
    world: World, org_id: UUID, credits: int = 100, actor: str = "root", **options: Any
) -> Pool:
    return pools.add(world.database, org_id, credits, actor=actor, now=NOW, **options)


def test_a_grant_makes_the_pool(world: World, org_id: UUID) -> None:
    pool = add(world, org_id, reason="welcome")
    assert pool == pools.get(world.database, org_id)
    assert (pool.total_credits, pool.available_credits) == (100, 100)
    assert pool.lifetime_purchased_credits == 100
    assert pool.lifetime_spent_amount == Decimal(0)
    assert world.rows("credit_transactions", *BOOKED) == [("grant", 100, 0, "root", "welcome", NOW)]


def test_a_purchase_and_its_refund_are_billed(world: World, org_id: UUID) -> None:
    add(world, org_id, kind=Kind.PURCHASE, amount=Decimal("9.50"))
    pool = add(world, org_id, 10, kind=Kind.REFUND, amount=Decimal("1.5"), reason="a mistake")
    assert (pool.total_credits, pool.lifetime_spent_amount) == (110, Decimal("8.00"))
    history = world.rows("org_billing_history", "event_type", "amount", "paid_at")
    assert history == [
        ("credit_purchase", Decimal("9.50"), NOW),
        ("credit_refund", Decimal("1.50"), NOW),
    ]


def test_an_adjustment_takes_what_is_available_and_no_more(world: World, org_id: UUID) -> None:
    add(world, org_id, 100)
    world.allocate(org_id, "ada", 40)
    adjust: dict[str, Any] = {"kind": Kind.ADJUSTMENT, "reason": "expired"}
    with pytest.raises(InsufficientCredits, match="60 available, 61 needed") as caught:
        add(world, org_id, -61, **adjust)
    assert (caught.value.details["required"], caught.value.details["remaining"]) == (61, 60)
    assert add(world, org_id, -60, **adjust).available_credits == 0
    assert add(world, org_id, 5, **adjust).available_credits == 5


@pytest.mark.parametrize(
    ("credits", "options", "field"),
    [
        (0, {}, "credits"),
        (-1, {}, "credits"),
        (2**53 + 1, {}, "credits"),
        (1, {"amount": Decimal(1)}, "amount"),
        (1, {"kind": Kind.PURCHASE}, "amount"),
        (-1, {"kind": Kind.PURCHASE, "amount": Decimal(1)}, "credits"),
        (1, {"kind": Kind.PURCHASE, "amount": Decimal("0.001")}, "amount"),
        (1, {"kind": Kind.PURCHASE, "amount": Decimal(-1)}, "amount"),
        (1, {"kind": Kind.PURCHASE, "amount": Decimal("NaN")}, "amount"),
        (1, {"kind": Kind.PURCHASE, "amount": Decimal(10**12)}, "amount"),
        (-1, {"kind": Kind.REFUND}, "credits"),
        (0, {"kind": Kind.ADJUSTMENT, "reason": "none"}, "credits"),
        (-(2**53) - 1, {"kind": Kind.ADJUSTMENT, "reason": "all"}, "credits"),
        (1, {"kind": Kind.ADJUSTMENT, "reason": "paid", "amount": Decimal(1)}, "amount"),
        (1, {"kind": Kind.ADJUSTMENT}, "reason"),
        (1, {"kind": Kind.ADJUSTMENT, "reason": " "}, "reason"),
        (1, {"reason": "a\x00b"}, "reason"),
        (1, {"actor": ""}, "actor"),
        (1, {"actor": "a" * 256}, "actor"),
        (1, {"key": ""}, "Idempotency-Key"),
        (1, {"key": "k" * 256}, "Idempotency-Key"),
        (1, {"key": "k\x00"}, "Idempotency-Key"),
    ],
)
def test_what_cannot_be_added_is_refused(
    world: World, org_id: UUID, credits: int, options: dict[str, Any], field: str
) -> None:
    before = world.contents()
    with pytest.raises(InvalidRequest, match=f"^{field}: ") as caught:
        add(world, org_id, credits, **options)
    assert caught.value.details["fields"] == [field]
    assert world.contents() == before


def test_a_pool_holds_so_many_credits_in_total(world: World, org_id: UUID) -> None:
    add(world, org_id, 2**53)
    with pytest.raises(InvalidRequest, match="in total"):
        add(world, org_id, 1)
    assert world.pool(org_id) == (2**53, 0, 0)


def test_money_beyond_the_books_is_refused(world: World, org_id: UUID) -> None:
    most: dict[str, Any] = {"kind": Kind.PURCHASE, "amount": pools.MAX_AMOUNT}
    add(world, org_id, 1, **most)
    with pytest.raises(InvalidRequest, match="overflow"):
        add(world, org_id, 1, **most)


def test_other_failures_of_the_database_are_not_the_callers(world: World) -> None:
    with (
        pytest.raises(DBAPIError, match="division by zero"),
        world.database.transaction() as connection,
        pools.refusals_named(),
    ):
        connection.exec_driver_sql("SELECT 1 / 0")


@pytest.mark.parametrize(
    "act",
    [
        pools.get,
        lambda database, org_id: pools.add(database, org_id, 1, actor="root", now=NOW),
        lambda database, org_id: pools.add(database, org_id, 1, actor="root", key="k", now=NOW),
        lambda database, org_id: pools.set_refresh(database, org_id, 1, now=NOW),
        lambda database, org_id: pools.set_overage(
            database, org_id, allow=False, limit=0, rate=Decimal(0)
        ),
    ],
)
def test_an_unknown_organization_is_not_found(
    world: World, act: Callable[[Database, UUID], Pool]
) -> None:
    with pytest.raises(NotFound):
        act(world.database, NOWHERE)


def test_an_organization_without_pool_has_none(world: World, org_id: UUID) -> None:
    with pytest.raises(NotFound, match="no credit pool"):
        pools.get(world.database, org_id)


# Idempotency keys


def test_the_same_key_and_act_answers_the_first_result(world: World, org_id: UUID) -> None:
    paid: dict[str, Any] = {"kind": Kind.PURCHASE, "amount": Decimal("2.5"), "key": "k-1"}
    first = add(world, org_id, **paid)
    add(world, org_id, 1)
    before = world.contents()
    assert add(world, org_id, **paid) == first
    assert add(world, org_id, **paid | {"amount": Decimal("2.50"), "actor": "other"}) == first
    assert world.contents() == before
    assert world.pool(org_id) == (101, 0, 0)


def test_the_same_key_for_something_else_is_refused(world: World, org_id: UUID) -> None:
    add(world, org_id, key="k-1")
    for credits, reason in ((101, None), (100, "another")):
        with pytest.raises(InvalidRequest, match="Idempotency-Key: k-1"):
            add(world, org_id, credits, reason=reason, key="k-1")
    assert world.pool(org_id) == (100, 0, 0)


def test_the_same_arguments_of_another_act_are_something_else(world: World, org_id: UUID) -> None:
    add(world, org_id, key="k-1")
    arguments = {"credits": 100, "kind": "grant", "amount": "0.00", "reason": None}

    def once(name: str) -> Pool:
        act = Act(name, org_id, arguments, "root", "k-1", NOW)
        return idempotency.once(
            world.database, act, Pool, lambda _: pytest.fail("the act was performed")
        )

    assert once("pools.add").total_credits == 100
    with pytest.raises(InvalidRequest, match="Idempotency-Key"):
        once("pools.take")


def test_keys_are_an_organizations_own(world: World, org_id: UUID) -> None:
    other = world.organization()
    add(world, org_id, 1, key="k" * 255)
    assert add(world, other, 2, key="k" * 255).total_credits == 2


def test_a_failed_act_leaves_no_key(world: World, org_id: UUID) -> None:
    take: dict[str, Any] = {"kind": Kind.ADJUSTMENT, "reason": "back", "key": "k-1"}
    with pytest.raises(InsufficientCredits):
        add(world, org_id, -5, **take)
    assert world.rows("idempotency_keys", "key") == []
    add(world, org_id, 5)
    assert add(world, org_id, -5, **take).total_credits == 0


def test_16_threads_with_one_key_move_credits_once(
    world: World, org_id: UUID, database_url: str
) -> None:
    def act(database: Database, _: int) -> Pool:
        return pools.add(database, org_id, 7, actor="root", key="k-1", now=NOW)

    outcomes = race(database_url, act)
    assert outcomes == [pools.get(world.database, org_id)] * 16
    assert world.rows("credit_transactions", "kind", "credits") == [("grant", 7)]


def test_of_two_acts_with_one_key_at_once_one_is_refused(
    world: World, org_id: UUID, database_url: str
) -> None:
    def act(database: Database, number: int) -> Pool:
        return pools.add(database, org_id, number + 1, actor="root", key="k-1", now=NOW)

    outcomes = race(database_url, act, racers=2)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["InvalidRequest", "Pool"]
    assert len(world.rows("credit_transactions", "id")) == 1


def test_a_call_that_waited_for_a_failed_one_does_the_act(
    world: World, org_id: UUID, database_url: str
) -> None:
    outcomes: list[Pool] = []
    second = threading.Thread(target=lambda: outcomes.append(add(world, org_id, 5, key="k-1")))
    with psycopg.connect(database_url) as first:
        first.execute(
            """
            INSERT INTO idempotency_keys (org_id, key, act, arguments)
            VALUES (%s, 'k-1', 'pools.add', '{}')
            """,
            (org_id,),
        )
        second.start()
        await_lock(world)
        first.rollback()
    second.join(30)
    assert outcomes == [pools.get(world.database, org_id)]
    assert world.pool(org_id) == (5, 0, 0)


# Refresh


def test_a_refresh_comes_a_calendar_month_later_in_local_time(world: World, org_id: UUID) -> None:
    world.sql.execute("UPDATE organizations SET timezone = 'Europe/Berlin'")
    end_of_january = datetime(2026, 1, 31, 22, 30, tzinfo=UTC)
    pool = pools.set_refresh(world.database, org_id, 500, now=end_of_january)
    assert (pool.monthly_refresh_amount, pool.total_credits) == (500, 0)
    assert pool.next_refresh_date == datetime(2026, 2, 28, 22, 30, tzinfo=UTC)
    assert world.row("organization_credit_pools")["refresh_anchor"] == end_of_january


def test_a_pool_that_is_refreshed_keeps_its_dates(world: World, org_id: UUID) -> None:
    first = pools.set_refresh(world.database, org_id, 500, now=NOW)
    later = NOW.replace(day=20)
    again = pools.set_refresh(world.database, org_id, 600, now=later)
    assert again == first.model_copy(update={"monthly_refresh_amount": 600})
    assert world.row("organization_credit_pools")["refresh_anchor"] == NOW


def test_no_amount_stops_the_refresh_until_it_is_set_anew(world: World, org_id: UUID) -> None:
    pools.set_refresh(world.database, org_id, 500, now=NOW)
    stopped = pools.set_refresh(world.database, org_id, 0, now=NOW)
    assert (stopped.monthly_refresh_amount, stopped.next_refresh_date) == (0, None)
    assert world.row("organization_credit_pools")["refresh_anchor"] is None
    later = NOW.replace(day=20)
    pool = pools.set_refresh(world.database, org_id, 500, now=later)
    assert pool.next_refresh_date == later.replace(month=4)


@pytest.mark.parametrize("amount", [-1, 2**53 + 1])
def test_a_refresh_out_of_range_is_refused(world: World, org_id: UUID, amount: int) -> None:
    with pytest.raises(InvalidRequest, match="monthly_refresh_amount"):
        pools.set_refresh(world.database, org_id, amount, now=NOW)


# Overage


def test_overage_is_allowed_to_who_can_be_billed(world: World) -> None:
    org_id = world.organization(plan=PlanName.PLATFORM)
    rate = Decimal("0.001250")
    pool = pools.set_overage(world.database, org_id, allow=True, limit=300, rate=rate)
    assert (pool.allow_overage, pool.overage_limit, pool.overage_rate) == (True, 300, rate)
    pool = pools.set_overage(world.database, org_id, allow=False, limit=0, rate=rate)
    assert (pool.allow_overage, pool.overage_limit) == (False, 0)


def test_overage_needs_a_live_subscription(world: World, org_id: UUID) -> None:
    world.subscribe(org_id, PlanName.PLATFORM, status="canceled")
    before = world.contents()
    with pytest.raises(Conflict, match="no live subscription"):
        pools.set_overage(world.database, org_id, allow=True, limit=1, rate=Decimal(1))
    assert world.contents() == before
    pool = pools.set_overage(world.database, org_id, allow=False, limit=1, rate=Decimal(1))
    assert not pool.allow_overage


@pytest.mark.parametrize(
    ("limit", "rate", "field"),
    [
        (-1, Decimal(1), "overage_limit"),
        (2**53 + 1, Decimal(1), "overage_limit"),
        (1, Decimal(-1), "overage_rate"),
        (1, Decimal("0.0000001"), "overage_rate"),
        (1, Decimal(10**6), "overage_rate"),
        (1, Decimal("Infinity"), "overage_rate"),
    ],
)
def test_overage_out_of_range_is_refused(
    world: World, org_id: UUID, limit: int, rate: Decimal, field: str
) -> None:
    with pytest.raises(InvalidRequest, match=field):
        pools.set_overage(world.database, org_id, allow=False, limit=limit, rate=rate)
