"""People: the users of all organizations, with where they belong."""

from dataclasses import dataclass
from typing import Final

from ledger.database import Database, run

_PEOPLE: Final = """
    WITH listed AS (
        SELECT user_id, max(name) AS name, max(email) AS email
        FROM organization_members
        WHERE %(user_id)b::text IS NULL OR user_id = %(user_id)b::text
        GROUP BY user_id
        ORDER BY user_id COLLATE "C"
        LIMIT %(limit)b
    )
    SELECT listed.user_id, listed.name, listed.email, of_one.organizations, of_one.roles
    FROM listed
    CROSS JOIN LATERAL (
        SELECT array_agg(organization) AS organizations, array_agg(role) AS roles
        FROM (
            SELECT o.display_name AS organization, m.role
            FROM organization_members m
            JOIN organizations o ON o.id = m.org_id
            WHERE m.user_id = listed.user_id
            ORDER BY o.display_name COLLATE "C", o.id
            LIMIT %(most_organizations)b
        ) first
    ) of_one
    ORDER BY listed.user_id COLLATE "C"
"""

MOST_ORGANIZATIONS: Final = 20
"""How many organizations of one person are listed."""


@dataclass(frozen=True, slots=True)
class Membership:
    """An organization by its display name, and a person's role in it, `member` or `admin`."""

    organization: str
    role: str


@dataclass(frozen=True, slots=True)
class Person:
    """A user who belongs to some organization, with the first `MOST_ORGANIZATIONS` by name."""

    user_id: str
    name: str | None
    email: str | None
    memberships: tuple[Membership, ...]


def listed(database: Database, *, user_id: str | None = None, limit: int) -> list[Person]:
    """Users who belong to an organization, or the one with this id, ordered by user id.

    Raises:
        LedgerUnavailable: PostgreSQL does not answer.
    """
    with database.snapshot() as connection:
        rows = run(
            connection,
            _PEOPLE,
            user_id=user_id,
            limit=limit,
            most_organizations=MOST_ORGANIZATIONS,
        ).all()
    return [
        Person(user_id, name, email, tuple(map(Membership, organizations, roles)))
        for user_id, name, email, organizations, roles in rows
    ]
