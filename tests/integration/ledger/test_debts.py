"""Debts settle by themselves when credits come, oldest first and once."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from uuid import UUID

import pytest

from ledger import debts, holds
from ledger.apply import apply_batch
from ledger.database import Database
from ledger.debts import Settled, settle
from ledger.gate import Operation
from schema.events import UsageEvent
from tests.integration.ledger.world import NOW, World, entry, event, open_world


@pytest.fixture
def world(database: Database, database_url: str) -> Iterator[World]:
    with open_world(database, database_url) as opened:
        yield opened


@pytest.fixture
def org(world: World) -> UUID:
    """An organization whose user Ada has 25 credits, and 1,000 in the pool."""
    return world.organization(pool=1025, allocations={"ada": 25})


def states(world: World) -> dict[str, str]:
    return dict(world.rows("usage_requests", "request_id", "state"))


def test_a_debt_settles_when_its_user_is_topped_up(world: World, org: UUID) -> None:
    world.apply(*(event(org, f"r-{n}") for n in range(4)))
    assert states(world) == {"r-0": "charged", "r-1": "charged", "r-2": "dead", "r-3": "dead"}
    world.allocate(org, "ada", 10)
    assert settle(world.database, NOW) == Settled(debts=1, credits=10)
    assert states(world)["r-2"] == "charged"
    assert world.allocations(org) == {"ada": (35, 30)}
    assert world.rows("dead_letters", "request_id", "state", "resolved_at") == [
        ("r-2", "charged", NOW),
        ("r-3", "open", None),
    ]
    assert world.pool(org) == (1025, 35, 30)


def test_a_settled_debt_is_attributed_as_its_event_says(world: World, org: UUID) -> None:
    earlier = NOW - timedelta(days=2)
    late = event(org, "late", quantity=3, occurred_at=earlier, metadata={"company_id": "c-9"})
    world.apply(late)
    world.allocate(org, "ada", 100)
    settle(world.database, NOW + timedelta(days=60))
    row = world.row("credit_usage_attribution")
    assert (row["request_id"], row["credits_used"], row["quantity"]) == ("late", 30, 3)
    assert (row["occurred_at"], row["request_metadata"]) == (earlier, {"company_id": "c-9"})
    request = world.row("usage_requests")
    assert (request["state"], request["reason"]) == ("charged", None)


def test_a_user_without_allocation_pays_once_there_is_one(world: World, org: UUID) -> None:
    world.apply(event(org, user_id="new"))
    assert settle(world.database, NOW) == Settled()
    world.allocate(org, "new", 50)
    assert settle(world.database, NOW) == Settled(debts=1, credits=10)
    assert world.allocations(org)["new"] == (50, 10)


def test_the_oldest_comes_first_and_a_large_one_does_not_block(world: World, org: UUID) -> None:
    world.apply(
        event(org, "large", service_type="market_analysis"),
        event(org, "first", service_type="contact_lookup", quantity=3),
        event(org, "second", quantity=3),
        event(org, "small", service_type="property_search"),
    )
    world.allocate(org, "ada", 10)  # 35 - 3 = 32 left
    assert settle(world.database, NOW) == Settled(debts=1, credits=30)
    assert states(world) == {
        "large": "dead",
        "first": "charged",
        "second": "dead",
        "small": "charged",
    }


def test_settling_again_changes_nothing(world: World, org: UUID) -> None:
    world.apply(*(event(org, f"r-{n}") for n in range(3)))
    world.allocate(org, "ada", 100)
    settle(world.database, NOW)
    before = world.contents()
    assert settle(world.database, NOW) == Settled()
    world.apply(*(event(org, f"r-{n}") for n in range(3)))
    assert world.contents() == before


def test_held_credits_settle_nothing(world: World, org: UUID) -> None:
    world.apply(*(event(org, f"r-{n}") for n in range(3)))
    world.allocate(org, "ada", 5)
    five_minutes = timedelta(minutes=5)
    lookup = Operation(service_type="contact_lookup")
    holds.place(world.database, org, "ada", lookup, "held", five_minutes, NOW)
    assert settle(world.database, NOW) == Settled()
    holds.release(world.database, org, "held", NOW)
    assert settle(world.database, NOW) == Settled(debts=1, credits=10)


def test_other_dead_letters_are_no_debts(world: World, org: UUID) -> None:
    world.apply(
        event(org, "too-old", occurred_at=NOW - timedelta(days=36)),
        event(org, "unpriced", service_type="unheard_of"),
    )
    world.allocate(org, "ada", 500)
    assert settle(world.database, NOW) == Settled()


def test_one_organization_alone_can_be_settled(world: World, org: UUID) -> None:
    other = world.organization(pool=100, allocations={"ada": 1})
    world.apply(event(org, quantity=5), event(other, quantity=5))
    for org_id in (org, other):
        world.allocate(org_id, "ada", 60)
    assert settle(world.database, NOW, other) == Settled(debts=1, credits=50)
    assert world.allocations(org)["ada"] == (85, 0)


def test_many_debts_settle_over_several_transactions(
    world: World, org: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(debts, "PORTION", 7)
    world.apply(*(event(org, f"r-{n}") for n in range(40)))
    world.allocate(org, "ada", 400)
    assert settle(world.database, NOW) == Settled(debts=38, credits=380)


def test_a_direct_call_and_settling_charge_a_debt_once(world: World, org: UUID) -> None:
    world.apply(event(org, "direct", quantity=4), event(org, "other", quantity=4))
    world.allocate(org, "ada", 100)
    assert world.deduct(org, "direct", credits=40)
    assert settle(world.database, NOW) == Settled(debts=1, credits=40)
    assert world.allocations(org) == {"ada": (125, 80)}


def drain(database: Database, events: Sequence[UsageEvent]) -> None:
    with database.session() as connection:
        for one in events:
            apply_batch(connection, [entry(one)], NOW)


def top_up(database: Database, database_url: str, org_id: UUID) -> None:
    with open_world(database, database_url) as own:
        for _ in range(20):
            own.allocate(org_id, "ada", 40)


def test_debts_are_settled_once_while_drains_and_top_ups_go_on(
    world: World, org: UUID, database_url: str
) -> None:
    world.apply(*(event(org, f"r-{n}") for n in range(60)))
    work: list[Callable[[], object]] = [
        lambda: [settle(world.database, NOW) for _ in range(10)],
        lambda: [settle(world.database, NOW) for _ in range(10)],
        lambda: drain(world.database, [event(org, f"new-{n}") for n in range(20)]),
        lambda: top_up(world.database, database_url, org),
    ]
    with ThreadPoolExecutor(len(work)) as threads:
        for done in [threads.submit(item) for item in work]:
            done.result(timeout=100)
    settle(world.database, NOW)
    assert set(states(world).values()) == {"charged"}
    assert world.allocations(org) == {"ada": (825, 800)}
    assert world.pool(org)[2] == 800
