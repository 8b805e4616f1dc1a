"""Members: seats, the last admin, and what becomes of the credits of those who leave."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

import psycopg
import pytest

from ledger import members
from ledger.database import Database
from ledger.members import Member
from ledger.pages import Window
from ledger.reconcile import reconcile
from schema.errors import Conflict, InvalidRequest, MemberExists, NoSeatLeft, NotFound
from tests.integration.ledger.race import await_lock, race
from tests.integration.ledger.world import NOW, World, open_world

NOWHERE = UUID(int=1)
MEMBERS = {"ada": "admin", "ben": "member"}


@pytest.fixture
def world(database: Database, database_url: str) -> Iterator[World]:
    with open_world(database, database_url) as opened:
        yield opened
        assert reconcile(database).is_clean


def add(world: World, org_id: UUID, user_id: str = "cem") -> Member:
    return members.add(world.database, org_id, user_id, actor="root", now=NOW)


def remove(world: World, org_id: UUID, user_id: str = "ben") -> Member:
    return members.remove(world.database, org_id, user_id, actor="root", now=NOW)


def users(world: World, org_id: UUID) -> list[str]:
    page = members.listed(world.database, org_id, Window(100))
    assert page.total == len(page.items)
    return [member.user_id for member in page.items]


def test_members_come_and_go(world: World) -> None:
    org_id = world.organization(members=MEMBERS)
    added = members.add(
        world.database,
        org_id,
        "cem",
        role="admin",
        email="cem@example.com",
        name="Cem",
        actor="root",
        now=NOW,
    )
    assert added == Member(
        user_id="cem", role="admin", email="cem@example.com", name="Cem", created_at=NOW
    )
    assert users(world, org_id) == ["ada", "ben", "cem"]
    assert remove(world, org_id, "cem") == added
    assert users(world, org_id) == ["ada", "ben"]


def test_a_member_of_one_organization_is_none_of_another(world: World) -> None:
    org_id, other = world.organization(members=MEMBERS), world.organization(members=MEMBERS)
    remove(world, org_id)
    assert users(world, other) == ["ada", "ben"]
    with pytest.raises(NotFound, match="does not belong"):
        remove(world, org_id)


def test_an_organization_that_there_is_not(world: World) -> None:
    for act in (add, remove, users):
        with pytest.raises(NotFound, match=str(NOWHERE)):
            act(world, NOWHERE)


def test_texts_that_cannot_be_stored_are_refused(world: World) -> None:
    org_id = world.organization(members=MEMBERS)
    for user_id in ("", "u" * 256, "nul\0", "half \ud800"):
        with pytest.raises(InvalidRequest, match="user_id"):
            add(world, org_id, user_id)
    with pytest.raises(InvalidRequest, match="email"):
        members.add(world.database, org_id, "cem", email="\0@x", actor="root", now=NOW)
    with pytest.raises(InvalidRequest, match="user_id"):
        remove(world, org_id, "nul\0")


def test_a_refused_member_takes_no_seat(world: World) -> None:
    org_id = world.organization(members=MEMBERS)
    world.sql.execute("UPDATE organizations SET max_seats = 2 WHERE id = %s", (org_id,))
    with pytest.raises(NoSeatLeft, match="2 seats"):
        add(world, org_id)
    with pytest.raises(MemberExists):
        add(world, org_id, "ben")
    assert users(world, org_id) == ["ada", "ben"]
    remove(world, org_id)
    add(world, org_id)
    assert users(world, org_id) == ["ada", "cem"]


def test_racing_members_take_exactly_the_seats_there_are(world: World, database_url: str) -> None:
    org_id = world.organization(members=MEMBERS)

    def join(database: Database, number: int) -> Member:
        return members.add(database, org_id, f"user-{number}", actor="root", now=NOW)

    outcomes = race(database_url, join)
    assert sum(isinstance(outcome, Member) for outcome in outcomes) == 8
    assert sum(isinstance(outcome, NoSeatLeft) for outcome in outcomes) == 8
    assert len(users(world, org_id)) == 10


def test_racing_admins_leave_one_of_them(world: World, database_url: str) -> None:
    org_id = world.organization(members={f"user-{number}": "admin" for number in range(8)})

    def leave(database: Database, number: int) -> Member:
        return members.remove(database, org_id, f"user-{number}", actor="root", now=NOW)

    outcomes = race(database_url, leave, 8)
    assert sum(isinstance(outcome, Member) for outcome in outcomes) == 7
    assert sum(isinstance(outcome, Conflict) for outcome in outcomes) == 1
    assert len(users(world, org_id)) == 1


def test_unused_credits_return_to_the_pool(world: World) -> None:
    org_id = world.organization(pool=1000, allocations={"ben": 400}, members=MEMBERS)
    world.deduct(org_id, "r-1", 30, user_id="ben")
    remove(world, org_id)
    assert world.pool(org_id) == (1000, 30, 30)
    where = "credit_transactions WHERE kind = 'reclaim'"
    columns = ("user_id", "credits", "actor", "reason")
    assert world.rows(where, *columns) == [("ben", -370, "root", "left the organization")]


def test_the_last_admin_keeps_seat_and_credits(world: World) -> None:
    org_id = world.organization(pool=1000, allocations={"ada": 400}, members=MEMBERS)
    before = world.contents()
    with pytest.raises(Conflict, match="last admin"):
        remove(world, org_id, "ada")
    assert world.contents() == before


def test_the_pool_is_locked_before_the_member(world: World, database_url: str) -> None:
    """As whoever moves credits to a member locks them."""
    org_id = world.organization(pool=1000, allocations={"ben": 400}, members=MEMBERS)
    with ThreadPoolExecutor(1) as threads:
        with psycopg.connect(database_url) as other:
            lock = "SELECT FROM organization_credit_pools WHERE org_id = %s FOR UPDATE"
            other.execute(lock, (org_id,))
            leaving = threads.submit(remove, world, org_id)
            await_lock(world)
            lock = "SELECT FROM organization_members WHERE org_id = %s FOR UPDATE NOWAIT"
            other.execute(lock, (org_id,))
        assert leaving.result(30).user_id == "ben"
