"""Who is there: organizations by id or name, and the users who may spend their credits."""

from dataclasses import dataclass
from enum import IntEnum
from typing import Final
from uuid import UUID

from sqlalchemy import Connection

from ledger.database import Database, run
from schema.errors import NotAMember, NotFound

_BY_ID_OR_NAME: Final = """
    SELECT id
    FROM organizations
    WHERE id = %(id)b OR name = %(name)b
    ORDER BY id IS DISTINCT FROM %(id)b
    LIMIT 1
"""

_NEWEST_TEST: Final = """
    SELECT id, name
    FROM organizations
    WHERE is_test
    ORDER BY created_at DESC, id
    LIMIT 1
"""

_ALLOCATIONS: Final = """
    SELECT user_id, allocated_credits
    FROM user_credit_allocations
    WHERE org_id = %(org_id)b AND is_active
    ORDER BY user_id COLLATE "C"
"""


_ROLE: Final = """
    SELECT role
    FROM organization_members
    WHERE org_id = %(org_id)b AND user_id = %(user_id)b::text
"""

# Who removes a member meanwhile waits for this transaction, or has ended before it.
_LOCK_MEMBER: Final = """
    SELECT true
    FROM organization_members
    WHERE org_id = %(org_id)b AND user_id = %(user_id)b::text
    FOR KEY SHARE
"""

_EXISTS: Final = "SELECT true FROM organizations WHERE id = %(org_id)b"


_HAS_ORGANIZATION: Final = """
    SELECT EXISTS (SELECT FROM organization_members WHERE user_id = %(user_id)b::text)
"""


class Role(IntEnum):
    """What a member may do in an organization; a higher role includes the lower."""

    MEMBER = 1
    ADMIN = 2


@dataclass(frozen=True, slots=True)
class Organization:
    """An organization and its unique name."""

    id: UUID
    name: str


@dataclass(frozen=True, slots=True)
class Allocation:
    """A user who may spend, and the credits allocated to them, used or not."""

    user_id: str
    allocated_credits: int


def find_organization(database: Database, id_or_name: str) -> UUID:
    """The id of the organization with this id or, failing that, this unique name.

    Raises:
        NotFound: there is none.
        LedgerUnavailable: PostgreSQL does not answer.
    """
    with database.snapshot() as connection:
        row = run(connection, _BY_ID_OR_NAME, id=_uuid(id_or_name), name=id_or_name).one_or_none()
    if row is None:
        raise NotFound(f"no organization with the id or name {id_or_name!r}")
    found: UUID = row[0]
    return found


def _uuid(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None


def newest_test_organization(database: Database) -> Organization | None:
    """The test organization that was created last, or None if there is none.

    Raises:
        LedgerUnavailable: PostgreSQL does not answer.
    """
    with database.snapshot() as connection:
        row = run(connection, _NEWEST_TEST).one_or_none()
    return Organization(*row) if row else None


def allocations_of(database: Database, org_id: UUID) -> list[Allocation]:
    """The active allocations of an organization, ordered by user id.

    Raises:
        LedgerUnavailable: PostgreSQL does not answer.
    """
    with database.snapshot() as connection:
        return [Allocation(*row) for row in run(connection, _ALLOCATIONS, org_id=org_id)]


def role_of(database: Database, org_id: UUID, user_id: str) -> Role | None:
    """The role of a user in an organization; None if they do not belong to it, or there is none.

    Raises:
        LedgerUnavailable: PostgreSQL does not answer.
    """
    with database.snapshot() as connection:
        role: str | None = run(
            connection, _ROLE, org_id=org_id, user_id=user_id
        ).scalar_one_or_none()
    return None if role is None else Role[role.upper()]


def has_organization(database: Database, user_id: str) -> bool:
    """Whether a user belongs to any organization.

    Raises:
        LedgerUnavailable: PostgreSQL does not answer.
    """
    with database.snapshot() as connection:
        return bool(run(connection, _HAS_ORGANIZATION, user_id=user_id).scalar_one())


def require_member(connection: Connection, org_id: UUID, user_id: str) -> None:
    """Keep the membership of a user as it is until the caller's transaction ends.

    Pool and allocation are to be locked before it, as everywhere.

    Raises:
        NotFound: there is no such organization.
        NotAMember: the user does not belong to it.
    """
    who = {"org_id": org_id, "user_id": user_id}
    if run(connection, _LOCK_MEMBER, **who).one_or_none() is not None:
        return
    if run(connection, _EXISTS, org_id=org_id).one_or_none() is None:
        raise NotFound(f"no organization {org_id}")
    raise NotAMember(f"User {user_id} is not a member of organization {org_id}.")
