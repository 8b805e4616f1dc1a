"""Allocations: the credits of one user, moved from the pool of an organization and back.

Pool and allocation are locked in this order before anything is read, so that neither drains,
gates nor resets change the figures meanwhile.
"""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Final
from uuid import UUID

import structlog
from pydantic import BaseModel, ConfigDict
from sqlalchemy import Connection

from ledger import directory
from ledger.database import Database, run
from ledger.idempotency import Act, check_id, check_texts, once
from ledger.pages import EVERYTHING, Page, Window
from ledger.pools import check_credits, refusals_named
from schema.errors import InsufficientCredits, MeteringError, NoAllocation, NotFound
from schema.periods import ResetPeriod

RETURN_BATCH: Final = 1000
"""Most allocations that one transaction of `return_unused` locks."""

log = structlog.get_logger(__name__)

_ALLOCATIONS: Final = """
    SELECT
        a.id, a.org_id, a.user_id, m.email AS user_email, m.name AS user_name,
        a.allocated_credits, a.used_credits, a.remaining_credits, a.held_credits,
        a.allowance_credits, a.reset_period, a.last_reset_date, a.next_reset_date, a.is_active,
        a.created_at
    FROM user_credit_allocations a
    LEFT JOIN organization_members m ON m.org_id = a.org_id AND m.user_id = a.user_id
    WHERE a.org_id = %(org_id)b
        AND (%(user_id)b::text IS NULL OR a.user_id = %(user_id)b::text)
    ORDER BY a.user_id
    LIMIT %(limit)b::bigint OFFSET %(offset)b::bigint
"""

_NUMBER: Final = """
    SELECT count(*)
    FROM user_credit_allocations
    WHERE org_id = %(org_id)b AND (%(user_id)b::text IS NULL OR user_id = %(user_id)b::text)
"""

_EXISTS: Final = "SELECT EXISTS (SELECT FROM organizations WHERE id = %(org_id)b)"

_FUND: Final = """
    SELECT fund_allocation(
        %(org_id)b, %(user_id)b::text, %(credits)b, %(raise_allowance)b, %(reset_period)b::text,
        %(notes)b::text, %(actor)b::text, %(reason)b::text, %(now)b
    )
"""

_SET_ALLOWANCE: Final = """
    UPDATE user_credit_allocations
    SET allowance_credits = %(credits)b, allocated_by = %(actor)b::text
    WHERE org_id = %(org_id)b AND user_id = %(user_id)b::text AND is_active
"""

_LOCK_POOLS: Final = """
    SELECT FROM organization_credit_pools
    WHERE org_id = ANY(%(org_ids)b::uuid[])
    ORDER BY org_id
    FOR NO KEY UPDATE
"""

_LOCK_ALLOCATION: Final = """
    SELECT id, remaining_credits - held_credits
    FROM user_credit_allocations
    WHERE org_id = %(org_id)b AND user_id = %(user_id)b::text
    FOR NO KEY UPDATE
"""

_RETURN: Final = """
    WITH returned AS (
        UPDATE user_credit_allocations a
        SET allocated_credits = a.allocated_credits - back.credits
        FROM unnest(%(ids)b::uuid[], %(credits)b::bigint[]) AS back (id, credits)
        WHERE a.id = back.id
        RETURNING a.id, a.org_id, a.user_id, back.credits
    ),
    received AS (
        UPDATE organization_credit_pools p
        SET allocated_credits = p.allocated_credits - back.credits
        FROM (SELECT org_id, sum(credits) AS credits FROM returned GROUP BY org_id) back
        WHERE p.org_id = back.org_id
    )
    INSERT INTO credit_transactions (
        org_id, user_id, allocation_id, kind, credits, actor, reason, created_at
    )
    SELECT
        org_id, user_id, id, 'reclaim', -credits, %(actor)b::text, %(reason)b::text, %(now)b
    FROM returned
    ORDER BY org_id, user_id
"""

_DEACTIVATE: Final = "UPDATE user_credit_allocations SET is_active = false WHERE id = %(id)b"

_LEFT_OVER: Final = """
    SELECT id, org_id
    FROM user_credit_allocations
    WHERE NOT is_active AND remaining_credits > held_credits
    ORDER BY org_id, user_id
    LIMIT %(limit)b
"""

# Asked again under the lock: an allocation may have been switched on, or a request charged to it.
_LOCK_LEFT_OVER: Final = """
    SELECT id, remaining_credits - held_credits
    FROM user_credit_allocations
    WHERE id = ANY(%(ids)b::uuid[]) AND NOT is_active AND remaining_credits > held_credits
    ORDER BY org_id, user_id
    FOR NO KEY UPDATE
"""


class Allocation(BaseModel):
    """A user's allocation as contract.md §4 answers it; all figures are credits."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    id: UUID
    org_id: UUID
    user_id: str
    user_email: str | None
    user_name: str | None
    allocated_credits: int
    used_credits: int
    remaining_credits: int
    held_credits: int
    """Those of the remaining ones that are set aside for operations under way."""
    allowance_credits: int
    """What every reset restores."""
    reset_period: ResetPeriod
    last_reset_date: datetime
    next_reset_date: datetime | None
    is_active: bool
    created_at: datetime


def get(database: Database, org_id: UUID, user_id: str) -> Allocation:
    """The allocation of a user, switched off or not.

    Raises:
        NotFound: there is no such organization.
        NoAllocation: the user never had an allocation in it.
    """
    check_texts(user_id=user_id)
    with database.snapshot() as connection:
        return _read(connection, org_id, user_id)


def every(connection: Connection, org_id: UUID) -> list[Allocation]:
    """All allocations of an organization by user id, within a transaction of the caller."""
    return _select(connection, org_id)


def of_organization(database: Database, org_id: UUID) -> list[Allocation]:
    """All allocations of an organization, by user id.

    Raises:
        NotFound: there is no such organization.
    """
    with database.snapshot() as connection:
        found = _select(connection, org_id)
        if not found and not _exists(connection, org_id):
            raise NotFound(f"no organization {org_id}")
        return found


def page(
    database: Database, org_id: UUID, window: Window, *, user_id: str | None = None
) -> Page[Allocation]:
    """A part of the allocations of an organization, or of one user in it, by user id.

    Raises:
        NotFound: there is no such organization.
    """
    with database.snapshot() as connection:
        number: int = run(connection, _NUMBER, org_id=org_id, user_id=user_id).scalar_one()
        if not number and not _exists(connection, org_id):
            raise NotFound(f"no organization {org_id}")
        return Page(_select(connection, org_id, user_id, window), number)


def allocate(  # noqa: PLR0913 - what is moved, and for the books by whom, why and when
    database: Database,
    org_id: UUID,
    user_id: str,
    credits: int,
    *,
    reset_period: ResetPeriod | None = None,
    raise_allowance: bool = False,
    members_only: bool = False,
    notes: str | None = None,
    actor: str,
    reason: str | None = None,
    key: str | None = None,
    now: datetime,
) -> Allocation:
    """Move available credits of the pool to a user.

    A new allocation, or one that was switched off, recurs to these credits, monthly unless told.
    An existing one gets them for the running period, and with every reset if `raise_allowance`;
    another `reset_period` counts from the start of that period. Idempotent by `key`.

    Raises:
        InvalidRequest: credits or a user id that cannot be, or a key used for another act.
        NotFound: there is no such organization, or it has no pool.
        NotAMember: `members_only`, and the user does not belong to it when the credits move.
        InsufficientCredits: the pool has fewer available.
    """
    check_id("user_id", user_id)
    check_credits("credits", credits)
    arguments = {
        "user_id": user_id,
        "credits": credits,
        "reset_period": reset_period.value if reset_period else None,
        "raise_allowance": raise_allowance,
        "notes": notes,
        "reason": reason,
    }

    def perform(connection: Connection) -> Allocation:
        if members_only:
            run(connection, _LOCK_POOLS, org_ids=[org_id])
            directory.require_member(connection, org_id, user_id)
        with refusals_named():
            run(connection, _FUND, org_id=org_id, actor=actor, now=now, **arguments)
        return _read(connection, org_id, user_id)

    act = Act("allocations.allocate", org_id, arguments, actor, key, now)
    return once(database, act, Allocation, perform)


def set_allowance(
    database: Database,
    org_id: UUID,
    user_id: str,
    allowance_credits: int,
    *,
    actor: str,
    now: datetime,
) -> Allocation:
    """Set what the next resets restore; no credits move now. Idempotent.

    Raises:
        InvalidRequest: a negative or too large allowance.
        NotFound: there is no such organization.
        NoAllocation: the user has no active allocation in it.
    """
    check_credits("allowance_credits", allowance_credits, 0)
    check_id("actor", actor)
    check_texts(user_id=user_id)
    with database.transaction() as connection:
        changed = run(
            connection,
            _SET_ALLOWANCE,
            org_id=org_id,
            user_id=user_id,
            credits=allowance_credits,
            actor=actor,
        )
        if not changed.rowcount:
            raise _absent(connection, org_id, user_id)
        allocation = _read(connection, org_id, user_id)
    log.info(
        "allowance set",
        org_id=str(org_id),
        user_id=user_id,
        allowance_credits=allowance_credits,
        actor=actor,
        at=now.isoformat(),
    )
    return allocation


def reclaim(
    database: Database,
    org_id: UUID,
    user_id: str,
    credits: int | None = None,
    *,
    actor: str,
    reason: str | None = None,
    key: str | None = None,
    now: datetime,
) -> Allocation:
    """Return unused credits of a user to the pool: so many, or all that nothing holds.

    Idempotent by `key`; without credits, nothing moves if nothing is unused.

    Raises:
        InvalidRequest: credits that cannot be, or a key used for another act.
        NotFound: there is no such organization.
        NoAllocation: the user never had an allocation in it.
        InsufficientCredits: fewer are unused.
    """
    if credits is not None:
        check_credits("credits", credits)

    def perform(connection: Connection) -> Allocation:
        allocation_id, unused = _lock(connection, org_id, user_id)
        wanted = unused if credits is None else credits
        if wanted > unused:
            raise InsufficientCredits(
                f"Insufficient credits: {unused} unused, {wanted} to reclaim",
                required=wanted,
                remaining=unused,
                suggested_action="Reclaim less, or wait until open requests have ended.",
            )
        _give_back(connection, [(allocation_id, wanted)], actor, reason, now)
        return _read(connection, org_id, user_id)

    arguments = {"user_id": user_id, "credits": credits, "reason": reason}
    act = Act("allocations.reclaim", org_id, arguments, actor, key, now)
    return once(database, act, Allocation, perform)


def deactivate(
    database: Database,
    org_id: UUID,
    user_id: str,
    *,
    actor: str,
    reason: str | None = None,
    key: str | None = None,
    now: datetime,
) -> Allocation:
    """Switch an allocation off; what is unused returns to the pool, held credits stay held.

    Idempotent with or without `key`: one that is off stays off.

    Raises:
        InvalidRequest: a key used for another act.
        NotFound: there is no such organization.
        NoAllocation: the user never had an allocation in it.
    """

    def perform(connection: Connection) -> Allocation:
        switch_off(connection, org_id, user_id, actor=actor, reason=reason, now=now)
        return _read(connection, org_id, user_id)

    arguments = {"user_id": user_id, "reason": reason}
    act = Act("allocations.deactivate", org_id, arguments, actor, key, now)
    return once(database, act, Allocation, perform)


def switch_off(
    connection: Connection,
    org_id: UUID,
    user_id: str,
    *,
    actor: str,
    reason: str | None,
    now: datetime,
) -> None:
    """What `deactivate` does, as a part of a transaction of the caller."""
    allocation_id, unused = _lock(connection, org_id, user_id)
    _give_back(connection, [(allocation_id, unused)], actor, reason, now)
    run(connection, _DEACTIVATE, id=allocation_id)


def return_unused(database: Database, now: datetime) -> int:
    """Return what came free in allocations after they were switched off; how many there were.

    Their holds were released or expired, or charged at less. Safe to run at any time and twice at
    once.
    """
    total = 0
    found = True
    while found:
        with database.transaction() as connection:
            found, returned = _return_batch(connection, now)
        total += returned
    return total


def _return_batch(connection: Connection, now: datetime) -> tuple[bool, int]:
    """Whether there was anything to look at, and how many allocations gave something back."""
    rows = run(connection, _LEFT_OVER, limit=RETURN_BATCH).fetchall()
    if not rows:
        return False, 0
    run(connection, _LOCK_POOLS, org_ids=list({row.org_id for row in rows}))
    locked = run(connection, _LOCK_LEFT_OVER, ids=[row.id for row in rows]).fetchall()
    unused = [(allocation_id, credits) for allocation_id, credits in locked]
    _give_back(connection, unused, None, "deactivated", now)
    return True, len(unused)


def _lock(connection: Connection, org_id: UUID, user_id: str) -> tuple[UUID, int]:
    """Lock pool and allocation; the allocation's id and the credits that nothing uses or holds."""
    run(connection, _LOCK_POOLS, org_ids=[org_id])
    row = run(connection, _LOCK_ALLOCATION, org_id=org_id, user_id=user_id).one_or_none()
    if row is None:
        raise _absent(connection, org_id, user_id)
    allocation_id, unused = row
    return allocation_id, unused


def _give_back(
    connection: Connection,
    unused: Sequence[tuple[UUID, int]],
    actor: str | None,
    reason: str | None,
    now: datetime,
) -> None:
    moved = [(allocation_id, credits) for allocation_id, credits in unused if credits]
    if moved:
        run(
            connection,
            _RETURN,
            ids=[allocation_id for allocation_id, _ in moved],
            credits=[credits for _, credits in moved],
            actor=actor,
            reason=reason,
            now=now,
        )


def _read(connection: Connection, org_id: UUID, user_id: str) -> Allocation:
    found = _select(connection, org_id, user_id)
    if not found:
        raise _absent(connection, org_id, user_id)
    return found[0]


def _select(
    connection: Connection,
    org_id: UUID,
    user_id: str | None = None,
    window: Window = EVERYTHING,
) -> list[Allocation]:
    rows = run(
        connection, _ALLOCATIONS, org_id=org_id, user_id=user_id, **asdict(window)
    ).mappings()
    return [Allocation.model_validate(dict(row)) for row in rows]


def _exists(connection: Connection, org_id: UUID) -> bool:
    return bool(run(connection, _EXISTS, org_id=org_id).scalar_one())


def _absent(connection: Connection, org_id: UUID, user_id: str) -> MeteringError:
    if not _exists(connection, org_id):
        return NotFound(f"no organization {org_id}")
    return NoAllocation(f"No credit allocation found for user {user_id} in org {org_id}")
