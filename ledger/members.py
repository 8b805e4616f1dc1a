"""Members: who belongs to an organization, as long as it has seats."""

from contextlib import suppress
from datetime import datetime
from typing import Final, Literal
from uuid import UUID

import structlog
from pydantic import BaseModel, ConfigDict
from sqlalchemy import Connection

from ledger import allocations, pages
from ledger.database import Database, run
from ledger.idempotency import check_id, check_texts
from ledger.organizations import check_exists
from ledger.pages import Page, Window
from schema.errors import Conflict, MemberExists, NoAllocation, NoSeatLeft, NotFound

MemberRole = Literal["member", "admin"]

log = structlog.get_logger(__name__)

_MEMBERS: Final = """
    SELECT user_id, role, email, name, created_at
    FROM organization_members
    WHERE org_id = %(org_id)b
"""

# The mutex of the seats and of the last admin; foreign keys to the organization are not held up.
_LOCK_SEATS: Final = """
    SELECT max_seats FROM organizations WHERE id = %(org_id)b FOR NO KEY UPDATE
"""

_ADD: Final = """
    INSERT INTO organization_members (org_id, user_id, role, email, name, created_at)
    VALUES (
        %(org_id)b, %(user_id)b::text, %(role)b::text, %(email)b::text, %(name)b::text, %(now)b
    )
    ON CONFLICT (org_id, user_id) DO NOTHING
    RETURNING user_id, role, email, name, created_at
"""

_TAKEN_SEATS: Final = "SELECT count(*) FROM organization_members WHERE org_id = %(org_id)b"

_REMOVE: Final = """
    DELETE FROM organization_members
    WHERE org_id = %(org_id)b AND user_id = %(user_id)b::text
    RETURNING user_id, role, email, name, created_at
"""

_HAS_ADMIN: Final = """
    SELECT EXISTS (
        SELECT FROM organization_members WHERE org_id = %(org_id)b AND role = 'admin'
    )
"""


class Member(BaseModel):
    """A user who belongs to an organization."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    user_id: str
    """The Keycloak subject."""
    role: MemberRole
    email: str | None
    name: str | None
    created_at: datetime
    """Since when they belong to it."""


def listed(database: Database, org_id: UUID, window: Window) -> Page[Member]:
    """The members of an organization, by user id.

    Raises:
        NotFound: there is no such organization.
    """
    with database.snapshot() as connection:
        check_exists(connection, org_id)
        return pages.read(connection, Member, _MEMBERS, "user_id", window, org_id=org_id)


def add(
    database: Database,
    org_id: UUID,
    user_id: str,
    *,
    role: MemberRole = "member",
    email: str | None = None,
    name: str | None = None,
    actor: str,
    now: datetime,
) -> Member:
    """Give a user a seat; concurrent calls never take more seats than there are.

    Raises:
        InvalidRequest: a text that cannot be stored.
        NotFound: there is no such organization.
        MemberExists: the user belongs to it already, in whatever role.
        NoSeatLeft: all of `max_seats` are taken.
    """
    check_id("user_id", user_id)
    check_id("actor", actor)
    check_texts(email=email, name=name)
    with database.transaction() as connection:
        seats = _lock_seats(connection, org_id)
        row = run(
            connection,
            _ADD,
            org_id=org_id,
            user_id=user_id,
            role=role,
            email=email,
            name=name,
            now=now,
        )
        added = row.mappings().one_or_none()
        if added is None:
            raise MemberExists(f"user {user_id} belongs to organization {org_id} already")
        if run(connection, _TAKEN_SEATS, org_id=org_id).scalar_one() > seats:
            raise NoSeatLeft(f"organization {org_id} has {seats} seats, all taken")
    log.info("member added", org_id=str(org_id), user_id=user_id, role=role, actor=actor)
    return Member.model_validate(dict(added))


def remove(database: Database, org_id: UUID, user_id: str, *, actor: str, now: datetime) -> Member:
    """Take a user out of an organization; the member they were.

    Their allocation is switched off: unused credits return to the pool, held ones stay held.

    Raises:
        NotFound: there is no such organization, or the user does not belong to it.
        Conflict: they are its last admin.
    """
    check_id("actor", actor)
    check_texts(user_id=user_id)
    with database.transaction() as connection:
        _lock_seats(connection, org_id)
        # Whoever moves credits to a member locks pool and allocation first, and then the member.
        with suppress(NoAllocation):  # who never had credits has none to give back
            allocations.switch_off(
                connection, org_id, user_id, actor=actor, reason="left the organization", now=now
            )
        removed = run(connection, _REMOVE, org_id=org_id, user_id=user_id).mappings().one_or_none()
        if removed is None:
            raise NotFound(f"user {user_id} does not belong to organization {org_id}")
        member = Member.model_validate(dict(removed))
        if member.role == "admin" and not run(connection, _HAS_ADMIN, org_id=org_id).scalar_one():
            raise Conflict(
                f"user {user_id} is the last admin of organization {org_id}",
                suggested_action="Add another admin first.",
            )
    log.info("member removed", org_id=str(org_id), user_id=user_id, actor=actor)
    return member


def _lock_seats(connection: Connection, org_id: UUID) -> int:
    seats: int | None = run(connection, _LOCK_SEATS, org_id=org_id).scalar_one_or_none()
    if seats is None:
        raise NotFound(f"no organization {org_id}")
    return seats
