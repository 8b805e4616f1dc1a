"""Allocations: credits moved to a user and back, switched off, and never moved twice."""

import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest

from ledger import allocations, holds
from ledger.allocations import Allocation
from ledger.database import Database
from ledger.gate import Operation
from ledger.pages import Window
from ledger.pools import MAX_CREDITS
from schema.errors import (
    InsufficientCredits,
    InvalidRequest,
    NoAllocation,
    NotAMember,
    NotFound,
)
from schema.periods import ResetPeriod
from tests.integration.ledger.books import assert_balanced
from tests.integration.ledger.race import await_lock, race
from tests.integration.ledger.world import NOW, World, event, open_world

NOWHERE = UUID(int=1)
MINUTE = timedelta(minutes=1)
LOOKUP = Operation("contact_lookup")
MOVED = ("user_id", "kind", "credits", "actor", "reason", "created_at")


@pytest.fixture
def world(database: Database, database_url: str) -> Iterator[World]:
    with open_world(database, database_url) as opened:
        yield opened
        assert_balanced(opened)


@pytest.fixture
def org_id(world: World) -> UUID:
    return world.organization(pool=1000, members={"ada": "member"})


def allocate(
    world: World, org_id: UUID, credits: int = 100, user_id: str = "ada", **options: Any
) -> Allocation:
    return allocations.allocate(
        world.database, org_id, user_id, credits, actor="root", now=NOW, **options
    )


def reclaim(world: World, org_id: UUID, credits: int | None = None, **options: Any) -> Allocation:
    return allocations.reclaim(
        world.database, org_id, "ada", credits, actor="root", now=NOW, **options
    )


def deactivate(world: World, org_id: UUID, **options: Any) -> Allocation:
    return allocations.deactivate(world.database, org_id, "ada", actor="root", now=NOW, **options)


def hold(world: World, org_id: UUID, request_id: str = "r-1") -> None:
    """Set 10 credits of ada's aside."""
    holds.place(world.database, org_id, "ada", LOOKUP, request_id, MINUTE, NOW)


def moved(world: World, kind: str) -> list[tuple[Any, ...]]:
    return world.rows(f"credit_transactions WHERE kind = '{kind}'", *MOVED)


# Reading


def test_an_allocation_names_its_user(world: World, org_id: UUID) -> None:
    world.sql.execute(
        """
        UPDATE organization_members SET email = 'ada@example.org', name = 'Ada'
        WHERE org_id = %s AND user_id = 'ada'
        """,
        (org_id,),
    )
    allocate(world, org_id)
    allocate(world, org_id, 5, "bob")
    ada = allocations.get(world.database, org_id, "ada")
    bob = allocations.get(world.database, org_id, "bob")
    assert (ada.user_email, ada.user_name) == ("ada@example.org", "Ada")
    assert (bob.user_email, bob.user_name) == (None, None)
    assert allocations.of_organization(world.database, org_id) == [ada, bob]


def test_an_organization_sees_its_own_allocations(world: World, org_id: UUID) -> None:
    world.organization(pool=10, allocations={"ada": 10})
    assert allocations.of_organization(world.database, org_id) == []


@pytest.mark.parametrize(
    "act",
    [
        lambda database, org_id: allocations.get(database, org_id, "eve"),
        lambda database, org_id: allocations.reclaim(
            database, org_id, "eve", actor="root", now=NOW
        ),
        lambda database, org_id: allocations.deactivate(
            database, org_id, "eve", actor="root", now=NOW
        ),
        lambda database, org_id: allocations.set_allowance(
            database, org_id, "eve", 1, actor="root", now=NOW
        ),
    ],
)
def test_strangers_have_no_allocation(
    world: World, org_id: UUID, act: Callable[[Database, UUID], Allocation]
) -> None:
    with pytest.raises(NoAllocation, match="user eve in org"):
        act(world.database, org_id)
    with pytest.raises(NotFound, match="no organization"):
        act(world.database, NOWHERE)


def test_unknown_organizations_have_no_allocations(world: World) -> None:
    with pytest.raises(NotFound):
        allocations.of_organization(world.database, NOWHERE)
    for key in (None, "k-1"):
        with pytest.raises(NotFound):
            allocate(world, NOWHERE, key=key)


# Allocating


def test_a_new_allocation_recurs_monthly_to_what_it_got(world: World, org_id: UUID) -> None:
    allocation = allocate(world, org_id, notes="trial", reason="a start")
    assert allocation == allocations.get(world.database, org_id, "ada")
    assert (allocation.allocated_credits, allocation.allowance_credits) == (100, 100)
    assert (allocation.reset_period, allocation.is_active) == (ResetPeriod.MONTHLY, True)
    assert allocation.last_reset_date == NOW
    assert allocation.next_reset_date == NOW.replace(month=4)
    assert world.rows("user_credit_allocations", "allocated_by", "notes") == [("root", "trial")]
    assert moved(world, "allocation") == [("ada", "allocation", 100, "root", "a start", NOW)]
    assert world.pool(org_id) == (1000, 100, 0)


def test_more_credits_are_for_the_period_or_for_good(world: World, org_id: UUID) -> None:
    allocate(world, org_id)
    once = allocate(world, org_id, 20)
    assert (once.allocated_credits, once.allowance_credits) == (120, 100)
    for_good = allocate(world, org_id, 30, raise_allowance=True)
    assert (for_good.allocated_credits, for_good.allowance_credits) == (150, 130)


def test_another_rhythm_begins_with_the_running_period(world: World, org_id: UUID) -> None:
    allocate(world, org_id)
    daily = allocate(world, org_id, 1, reset_period=ResetPeriod.DAILY)
    assert daily.next_reset_date == NOW + timedelta(days=1)
    never = allocate(world, org_id, 1, reset_period=ResetPeriod.NEVER)
    assert never.next_reset_date is None


def test_a_pool_gives_what_it_has(world: World, org_id: UUID) -> None:
    allocate(world, org_id, 900)
    before = world.contents()
    with pytest.raises(InsufficientCredits, match="100 available, 101 needed") as caught:
        allocate(world, org_id, 101, key="k-1")
    details = caught.value.details
    assert (details["required"], details["remaining"]) == (101, 100)
    assert world.contents() == before


def test_without_a_pool_there_is_nothing_to_allocate(world: World) -> None:
    with pytest.raises(NotFound, match="No credit pool"):
        allocate(world, world.organization())


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"credits": 0}, "credits"),
        ({"credits": -5}, "credits"),
        ({"credits": MAX_CREDITS + 1}, "credits"),
        ({"user_id": ""}, "user_id"),
        ({"user_id": "u" * 256}, "user_id"),
        ({"user_id": "u\x00"}, "user_id"),
        ({"notes": "\ud800"}, "notes"),
    ],
)
def test_what_cannot_be_allocated_is_refused(
    world: World, org_id: UUID, options: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest, match=f"^{field}: "):
        allocate(world, org_id, **options)
    assert world.pool(org_id) == (1000, 0, 0)


def test_no_user_id_holds_a_nul(world: World, org_id: UUID) -> None:
    with pytest.raises(InvalidRequest, match="user_id"):
        allocations.get(world.database, org_id, "u\x00")
    with pytest.raises(InvalidRequest, match="user_id"):
        allocations.set_allowance(world.database, org_id, "u\x00", 1, actor="root", now=NOW)


# Allowance


def test_an_allowance_moves_nothing(world: World, org_id: UUID) -> None:
    before = allocate(world, org_id)
    after = allocations.set_allowance(world.database, org_id, "ada", 0, actor="eve", now=NOW)
    assert after == before.model_copy(update={"allowance_credits": 0})
    assert world.rows("user_credit_allocations", "allocated_by") == [("eve",)]
    assert world.pool(org_id) == (1000, 100, 0)


@pytest.mark.parametrize("credits", [-1, MAX_CREDITS + 1])
def test_an_allowance_out_of_range_is_refused(world: World, org_id: UUID, credits: int) -> None:
    allocate(world, org_id)
    with pytest.raises(InvalidRequest, match="allowance_credits"):
        allocations.set_allowance(world.database, org_id, "ada", credits, actor="root", now=NOW)


def test_an_allocation_that_is_off_recurs_to_nothing(world: World, org_id: UUID) -> None:
    allocate(world, org_id)
    deactivate(world, org_id)
    with pytest.raises(NoAllocation):
        allocations.set_allowance(world.database, org_id, "ada", 5, actor="root", now=NOW)


# Reclaiming


def test_unused_credits_return_to_the_pool(world: World, org_id: UUID) -> None:
    allocate(world, org_id)
    world.apply(event(org_id, "used"))
    hold(world, org_id)
    some = reclaim(world, org_id, 30, reason="spared")
    assert (some.allocated_credits, some.remaining_credits, some.held_credits) == (70, 60, 10)
    assert moved(world, "reclaim") == [("ada", "reclaim", -30, "root", "spared", NOW)]
    rest = reclaim(world, org_id)
    assert (rest.remaining_credits, rest.held_credits, rest.is_active) == (10, 10, True)
    assert rest.allowance_credits == 100
    assert world.pool(org_id) == (1000, 20, 10)


def test_held_credits_cannot_be_reclaimed(world: World, org_id: UUID) -> None:
    allocate(world, org_id)
    hold(world, org_id)
    before = world.contents()
    with pytest.raises(InsufficientCredits, match="90 unused") as caught:
        reclaim(world, org_id, 91, key="k-1")
    details = caught.value.details
    assert (details["required"], details["remaining"]) == (91, 90)
    assert world.contents() == before


def test_reclaiming_all_of_nothing_moves_nothing(world: World, org_id: UUID) -> None:
    allocate(world, org_id)
    empty = reclaim(world, org_id)
    before = world.contents()
    assert reclaim(world, org_id) == empty
    assert world.contents() == before


@pytest.mark.parametrize("credits", [0, -1])
def test_only_credits_are_reclaimed(world: World, org_id: UUID, credits: int) -> None:
    allocate(world, org_id)
    with pytest.raises(InvalidRequest, match="credits"):
        reclaim(world, org_id, credits)


# Switching off


def test_switching_off_returns_all_but_held_credits(world: World, org_id: UUID) -> None:
    allocate(world, org_id)
    hold(world, org_id)
    off = deactivate(world, org_id, reason="left")
    assert (off.is_active, off.remaining_credits, off.held_credits) == (False, 10, 10)
    assert moved(world, "reclaim") == [("ada", "reclaim", -90, "root", "left", NOW)]
    assert world.apply(event(org_id, "r-1")).charged == 1
    assert world.apply(event(org_id, "r-2")).dead == {"no_allocation": 1}
    assert world.pool(org_id) == (1000, 10, 10)


def test_what_is_off_stays_off(world: World, org_id: UUID) -> None:
    allocate(world, org_id)
    off = deactivate(world, org_id)
    assert deactivate(world, org_id) == off
    assert len(moved(world, "reclaim")) == 1


def test_an_allocation_is_switched_on_again_by_credits(world: World, org_id: UUID) -> None:
    allocate(world, org_id)
    deactivate(world, org_id)
    on = allocate(world, org_id, 40)
    assert (on.is_active, on.allocated_credits, on.allowance_credits) == (True, 40, 40)


def test_credits_that_come_free_later_return_by_themselves(world: World, org_id: UUID) -> None:
    allocate(world, org_id)
    allocate(world, org_id, 50, "bob")
    other = world.organization(pool=10, members={"ada": "member"})
    allocate(world, other, 10)
    for org in (org_id, other):
        hold(world, org)
        deactivate(world, org)
    assert allocations.return_unused(world.database, NOW) == 0
    holds.release(world.database, org_id, "r-1", NOW)
    later = NOW + MINUTE
    assert allocations.return_unused(world.database, later) == 1
    assert moved(world, "reclaim")[0] == ("ada", "reclaim", -90, "root", None, NOW)
    assert ("ada", "reclaim", -10, None, "deactivated", later) in moved(world, "reclaim")
    assert world.pool(org_id) == (1000, 50, 0)
    assert world.pool(other) == (10, 10, 0)
    assert holds.expire(world.database, later) == 1
    assert allocations.return_unused(world.database, later) == 1
    assert allocations.return_unused(world.database, later) == 0
    assert world.pool(other) == (10, 0, 0)


def test_more_allocations_than_one_batch_return_credits(
    world: World, org_id: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocations, "RETURN_BATCH", 2)
    users = [f"u{number}" for number in range(5)]
    for user in users:
        allocate(world, org_id, 10, user)
    world.sql.execute("UPDATE user_credit_allocations SET is_active = false")
    assert allocations.return_unused(world.database, NOW) == 5
    assert world.pool(org_id) == (1000, 0, 0)


def test_what_is_switched_on_meanwhile_keeps_its_credits(
    world: World, org_id: UUID, database_url: str
) -> None:
    allocate(world, org_id)
    hold(world, org_id)
    deactivate(world, org_id)
    holds.release(world.database, org_id, "r-1", NOW)
    returned: list[int] = []
    second = threading.Thread(
        target=lambda: returned.append(allocations.return_unused(world.database, NOW))
    )
    with psycopg.connect(database_url) as first:
        first.execute("SELECT allocate_credits_to_user(%s, 'ada', 5)", (org_id,))
        second.start()
        await_lock(world)
    second.join(30)
    assert returned == [0]
    assert world.allocations(org_id) == {"ada": (15, 0)}


# Idempotency keys


def test_every_act_is_done_once_under_a_key(world: World, org_id: UUID) -> None:
    acts: list[Callable[[], Allocation]] = [
        lambda: allocate(world, org_id, reset_period=ResetPeriod.WEEKLY, key="k-1"),
        lambda: reclaim(world, org_id, 40, key="k-2"),
        lambda: deactivate(world, org_id, key="k-3"),
    ]
    first = [act() for act in acts]
    allocate(world, org_id, 7)
    before = world.contents()
    assert [act() for act in acts] == first
    assert world.contents() == before


def test_a_key_belongs_to_one_act(world: World, org_id: UUID) -> None:
    allocate(world, org_id, key="k-1")
    others: list[Callable[[], Allocation]] = [
        lambda: allocate(world, org_id, user_id="bob", key="k-1"),
        lambda: allocate(world, org_id, raise_allowance=True, key="k-1"),
        lambda: allocate(world, org_id, reset_period=ResetPeriod.DAILY, key="k-1"),
        lambda: reclaim(world, org_id, 100, key="k-1"),
        lambda: deactivate(world, org_id, key="k-1"),
    ]
    before = world.contents()
    for act in others:
        with pytest.raises(InvalidRequest, match="Idempotency-Key"):
            act()
    assert world.contents() == before


@pytest.mark.parametrize("act", ["allocate", "reclaim"])
def test_16_threads_with_one_key_move_credits_once(
    world: World, org_id: UUID, database_url: str, act: str
) -> None:
    allocate(world, org_id)
    outcomes = race(database_url, lambda database, _: _move(database, org_id, act, "k-1"))
    assert outcomes == [allocations.get(world.database, org_id, "ada")] * 16
    expected = 160 if act == "allocate" else 40
    assert world.pool(org_id) == (1000, expected, 0)


def test_16_threads_cannot_reclaim_more_than_there_is(
    world: World, org_id: UUID, database_url: str
) -> None:
    allocate(world, org_id, 200)
    outcomes = race(database_url, lambda database, n: _move(database, org_id, "reclaim", f"k-{n}"))
    refused = [outcome for outcome in outcomes if isinstance(outcome, InsufficientCredits)]
    assert len(refused) == 13
    assert world.pool(org_id) == (1000, 20, 0)


def _move(database: Database, org_id: UUID, act: str, key: str) -> Allocation:
    """Move 60 credits to ada or back."""
    move = allocations.allocate if act == "allocate" else allocations.reclaim
    return move(database, org_id, "ada", 60, actor="root", key=key, now=NOW)


def test_only_members_are_allocated_to_where_that_is_asked_for(world: World, org_id: UUID) -> None:
    world.leave(org_id, "ada")
    with pytest.raises(NotAMember):
        allocate(world, org_id, members_only=True)
    assert world.allocations(org_id) == {}
    with pytest.raises(NotFound, match=f"no organization {NOWHERE}"):
        allocate(world, NOWHERE, members_only=True)

    world.join(org_id, "ada")
    assert allocate(world, org_id, members_only=True).allocated_credits == 100


def test_who_is_removed_meanwhile_is_not_allocated_to(
    world: World, org_id: UUID, database_url: str
) -> None:
    """The allocation waits for the removal, and then finds no member."""
    outcomes: list[type[Exception]] = []

    def act() -> None:
        try:
            allocate(world, org_id, members_only=True)
        except NotAMember as error:
            outcomes.append(type(error))

    with psycopg.connect(database_url) as other:
        other.execute("DELETE FROM organization_members WHERE org_id = %s", (org_id,))
        thread = threading.Thread(target=act)
        thread.start()
        await_lock(world)
    thread.join(30)
    assert outcomes == [NotAMember]


def test_allocations_come_by_pages(world: World, org_id: UUID) -> None:
    for user_id in ("cyd", "ada", "bob"):
        allocate(world, org_id, 10, user_id)

    def page(offset: int = 0, user_id: str | None = None) -> tuple[list[str], int]:
        found = allocations.page(world.database, org_id, Window(2, offset), user_id=user_id)
        return [allocation.user_id for allocation in found.items], found.total

    assert page() == (["ada", "bob"], 3)
    assert page(2) == (["cyd"], 3)
    assert page(3) == ([], 3)
    assert page(user_id="bob") == (["bob"], 1)
    assert page(user_id="dan") == ([], 0)
    with pytest.raises(NotFound):
        allocations.page(world.database, NOWHERE, Window(1))
