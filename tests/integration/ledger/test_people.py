"""Who is there: people and the organizations they belong to."""

from collections.abc import Iterator

import pytest

from ledger import people
from ledger.database import Database
from ledger.people import MOST_ORGANIZATIONS, Membership, Person
from tests.integration.ledger.world import World, open_world


@pytest.fixture
def world(database: Database, database_url: str) -> Iterator[World]:
    with open_world(database, database_url) as opened:
        yield opened


def named(world: World, name: str, members: dict[str, str]) -> None:
    org_id = world.organization(members=members)
    world.sql.execute("UPDATE organizations SET display_name = %s WHERE id = %s", (name, org_id))


def test_people_come_with_their_organizations(world: World) -> None:
    named(world, "Zeta", {"bob": "admin", "Ada": "member"})
    named(world, "Alpha", {"bob": "member"})
    world.sql.execute(
        "UPDATE organization_members SET name = 'Bob', email = 'b@x' WHERE role = 'admin'"
    )
    ada = Person("Ada", None, None, (Membership("Zeta", "member"),))
    bob = Person("bob", "Bob", "b@x", (Membership("Alpha", "member"), Membership("Zeta", "admin")))
    assert people.listed(world.database, limit=10) == [ada, bob]
    assert people.listed(world.database, limit=1) == [ada]
    assert people.listed(world.database, user_id="bob", limit=10) == [bob]
    assert people.listed(world.database, user_id="eve", limit=10) == []


def test_of_very_many_organizations_the_first_are_listed(world: World) -> None:
    for number in range(MOST_ORGANIZATIONS + 1):
        named(world, f"org {number:02}", {"ada": "member"})
    (ada,) = people.listed(world.database, limit=1)
    assert [m.organization for m in ada.memberships] == [
        f"org {number:02}" for number in range(MOST_ORGANIZATIONS)
    ]
