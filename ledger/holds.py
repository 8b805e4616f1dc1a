"""Holds: credits set aside for an operation before it runs (design decisions D4, D9).

A hold is one row of its request and a figure on its user's allocation. Every change of either
takes the lock of the allocation first, so that concurrent gates never spend one credit twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

from ledger.database import Database, run
from ledger.gate import Operation, refusal
from schema.errors import Conflict, InvalidRequest, NotFound
from schema.events import UNNAMED_SERVICE

MIN_SECONDS: Final = 1
MAX_SECONDS: Final = 24 * 60 * 60
DEFAULT_SECONDS: Final = 5 * 60
EXPIRY_BATCH: Final = 1000

PLACE: Final = """
    SELECT outcome, credits, available, expires_at
    FROM place_hold(
        %(org_id)b, %(user_id)b::text, %(service_type)b::text, %(variant)b::text, %(quantity)b,
        %(credits)b, %(request_id)b::text, %(lasts)b, %(now)b
    )
"""

RELEASE: Final = """
    SELECT release_hold(%(org_id)b, %(request_id)b::text, %(now)b, %(user_id)b::text)
"""

_DUE: Final = """
    SELECT org_id, request_id, user_id
    FROM usage_requests
    WHERE state = 'held' AND hold_expires_at <= %(now)b
    ORDER BY hold_expires_at
    LIMIT %(limit)b
"""

_LOCK_ALLOCATIONS: Final = """
    SELECT FROM user_credit_allocations a
    JOIN unnest(%(org_ids)b::uuid[], %(user_ids)b::text[]) AS wanted (org_id, user_id)
        ON a.org_id = wanted.org_id AND a.user_id = wanted.user_id
    ORDER BY a.org_id, a.user_id
    FOR NO KEY UPDATE OF a
"""

_EXPIRE: Final = """
    WITH expired AS (
        UPDATE usage_requests r
        SET state = 'expired', settled_at = %(now)b
        FROM unnest(%(org_ids)b::uuid[], %(request_ids)b::text[]) AS due (org_id, request_id)
        WHERE r.org_id = due.org_id AND r.request_id = due.request_id
            AND r.state = 'held' AND r.hold_expires_at <= %(now)b
        RETURNING r.org_id, r.user_id, r.held_credits
    ),
    returned AS (
        UPDATE user_credit_allocations a
        SET held_credits = a.held_credits - back.credits
        FROM (
            SELECT org_id, user_id, sum(held_credits) AS credits
            FROM expired
            GROUP BY org_id, user_id
        ) back
        WHERE a.org_id = back.org_id AND a.user_id = back.user_id
    )
    SELECT count(*) FROM expired
"""

_LISTED: Final = """
    SELECT org_id, request_id, user_id, service_type, state, held_credits, created_at,
        hold_expires_at
    FROM usage_requests
    WHERE state = %(state)b AND (%(org_id)b::uuid IS NULL OR org_id = %(org_id)b)
    ORDER BY hold_expires_at DESC
    LIMIT %(limit)b
"""


@dataclass(frozen=True, slots=True)
class Hold:
    """Credits set aside for one request until `expires_at`."""

    request_id: str
    credits: int
    available: int
    """What the user could have spent before it: remaining credits less those held by others."""
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class ListedHold:
    """A hold as operators see it; `credits` are or were set aside."""

    org_id: UUID
    request_id: str
    user_id: str
    service_type: str
    state: str
    credits: int
    placed_at: datetime
    expires_at: datetime


def place(
    database: Database,
    org_id: UUID,
    user_id: str,
    operation: Operation,
    request_id: str,
    lasts: timedelta,
    now: datetime,
) -> Hold:
    """Price an operation and set its credits aside, in one round trip.

    Idempotent by request id: the same hold again answers the first one. A released or expired hold
    is placed anew.

    Raises:
        InvalidRequest: no price, a price that contradicts the credits, or a bad time to live.
        NotFound: there is no such organization.
        Forbidden: it is suspended or closed.
        NotAMember: the user does not belong to it.
        NoAllocation: the user has no active allocation in it.
        InsufficientCredits: the allocation is too small, by `required` and `remaining`.
        RequestIdConflict: the request id stands for something else, or has ended already.
    """
    parameters = placing(org_id, user_id, operation, request_id, lasts, now)
    with database.transaction() as connection:
        row = run(connection, PLACE, **parameters).one()
    return placed(row, org_id, user_id, request_id)


def placing(
    org_id: UUID,
    user_id: str,
    operation: Operation,
    request_id: str,
    lasts: timedelta,
    now: datetime,
) -> dict[str, object]:
    """The parameters of `PLACE`.

    Raises:
        InvalidRequest: a time to live that cannot be.
    """
    if not MIN_SECONDS <= lasts.total_seconds() <= MAX_SECONDS:
        raise InvalidRequest(
            f"hold_ttl_seconds: must be from {MIN_SECONDS} to {MAX_SECONDS}",
            fields=["hold_ttl_seconds"],
        )
    return {
        "org_id": org_id,
        "user_id": user_id,
        "service_type": operation.service_type or UNNAMED_SERVICE,
        "variant": operation.variant,
        "quantity": operation.quantity,
        "credits": operation.credits,
        "request_id": request_id,
        "lasts": lasts,
        "now": now,
    }


def placed(row: Sequence[Any], org_id: UUID, user_id: str, request_id: str) -> Hold:
    """What came of `PLACE`, or the error that says why nothing did."""
    outcome, credits, available, expires_at = row
    if outcome == "held":
        return Hold(request_id, credits, available, expires_at)
    raise refusal(
        outcome,
        org_id=org_id,
        user_id=user_id,
        request_id=request_id,
        credits=credits or 0,
        available=available or 0,
    )


def release(
    database: Database,
    org_id: UUID,
    request_id: str,
    now: datetime,
    user_id: str | None = None,
) -> None:
    """Give a hold's credits back; one that is released or expired already stays so.

    With a `user_id`, requests of other users are as good as none.

    Raises:
        NotFound: the organization has no such request.
        Conflict: the request was charged or buried, so there is nothing to give back.
    """
    with database.transaction() as connection:
        state = run(
            connection, RELEASE, org_id=org_id, request_id=request_id, now=now, user_id=user_id
        ).scalar_one()
    check_released(state, org_id, request_id)


def check_released(state: str | None, org_id: UUID, request_id: str) -> None:
    """Pass if `RELEASE` left no hold; see `release` for what is raised."""
    if state is None:
        raise NotFound(f"no request {request_id} in organization {org_id}")
    if state not in ("released", "expired"):
        raise Conflict(f"request {request_id} is {state}: there is no hold to release")


def expire(database: Database, now: datetime) -> int:
    """Give the credits of all overdue holds back, in batches; returns how many holds there were."""
    total = 0
    while expired := _expire_batch(database, now):
        total += expired
    return total


def _expire_batch(database: Database, now: datetime) -> int:
    with database.transaction() as connection:
        due = run(connection, _DUE, now=now, limit=EXPIRY_BATCH).fetchall()
        if not due:
            return 0
        org_ids, request_ids, user_ids = (list(column) for column in zip(*due, strict=True))
        run(connection, _LOCK_ALLOCATIONS, org_ids=org_ids, user_ids=user_ids)
        expired: int = run(
            connection, _EXPIRE, org_ids=org_ids, request_ids=request_ids, now=now
        ).scalar_one()
        return expired


def open_holds(
    database: Database, org_id: UUID | None = None, limit: int = 100
) -> Sequence[ListedHold]:
    """Credits that are set aside now, those that last longest first."""
    return _listed(database, "held", org_id, limit)


def suspects(
    database: Database, org_id: UUID | None = None, limit: int = 100
) -> Sequence[ListedHold]:
    """Suspected lost operations: holds that ran out without an event, the latest first."""
    return _listed(database, "expired", org_id, limit)


def _listed(
    database: Database, state: str, org_id: UUID | None, limit: int
) -> Sequence[ListedHold]:
    with database.snapshot() as connection:
        rows = run(connection, _LISTED, state=state, org_id=org_id, limit=limit)
        return [ListedHold(*row) for row in rows.fetchall()]
