"""Corrections: what a request was charged, changed afterwards by rows of their own.

An attribution is never rewritten: a correction points to the one it corrects, counts in the same
period, and moves the difference in credits. All of it happens under the locks of the pool, the
mutex of its organization, and of the allocation, which keeps gates out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from pydantic import BaseModel, ConfigDict
from sqlalchemy import Connection

from ledger.database import Database, run
from ledger.idempotency import Act, check_texts, once
from ledger.pools import check_credits
from schema.errors import Conflict, InsufficientCredits, InvalidRequest, NotFound

_LOCK_POOL: Final = """
    SELECT FROM organization_credit_pools WHERE org_id = %(org_id)b FOR NO KEY UPDATE
"""

# A request is charged under the lock of the pool, and stays charged: it needs none of its own.
_REQUEST: Final = """
    SELECT state, user_id
    FROM usage_requests
    WHERE org_id = %(org_id)b AND request_id = %(request_id)b::text
"""

_LOCK_ALLOCATION: Final = """
    SELECT FROM user_credit_allocations
    WHERE org_id = %(org_id)b AND user_id = %(user_id)b::text
    FOR NO KEY UPDATE
"""

# A direct call that settles a hold dates its attribution by itself, and the request by the hold.
_STANDING: Final = """
    SELECT
        min(u.id) FILTER (WHERE u.corrects IS NULL),
        sum(u.credits_used)::bigint,
        sum(u.overage_credits)::bigint,
        u.period_start,
        u.period_start <> a.last_reset_date,
        a.id,
        a.is_active,
        a.remaining_credits - a.held_credits,
        p.available_credits,
        p.overage_credits
    FROM usage_requests r
    JOIN credit_usage_attribution u
        ON u.org_id = r.org_id AND u.request_id = r.request_id
        AND u.occurred_at IN (r.occurred_at, r.settled_at)
    JOIN user_credit_allocations a ON a.id = u.allocation_id
    JOIN organization_credit_pools p ON p.org_id = u.org_id
    WHERE r.org_id = %(org_id)b AND r.request_id = %(request_id)b::text
    GROUP BY u.period_start, a.id, p.id
"""

_ATTRIBUTE: Final = """
    INSERT INTO credit_usage_attribution (
        org_id, user_id, allocation_id, period_start, credits_used, overage_credits, service_type,
        service_name, variant, key_source, request_id, request_metadata, source, occurred_at,
        created_at, corrects, actor, reason
    )
    SELECT
        org_id, user_id, allocation_id, period_start, %(credits)b, %(overage)b, service_type,
        service_name, variant, key_source, request_id, request_metadata, source, occurred_at,
        %(now)b, id, %(actor)b::text, %(reason)b::text
    FROM credit_usage_attribution
    WHERE id = %(original_id)b
"""

_MOVE: Final = """
    INSERT INTO credit_transactions (
        org_id, user_id, allocation_id, kind, credits, actor, reason, request_id, created_at
    )
    SELECT
        %(org_id)b,
        CASE WHEN kind <> 'overage' THEN %(user_id)b::text END,
        CASE WHEN kind <> 'overage' THEN %(allocation_id)b::uuid END,
        kind, credits, %(actor)b::text, %(reason)b::text, %(request_id)b::text, %(now)b
    FROM unnest(%(kinds)b::text[], %(credits)b::bigint[]) AS moved (kind, credits)
"""

_BALANCE: Final = """
    WITH allocation AS (
        UPDATE user_credit_allocations
        SET allocated_credits = allocated_credits + %(allocated)b,
            used_credits = used_credits + %(used)b - %(late)b
        WHERE id = %(allocation_id)b
    ),
    closed AS (
        UPDATE allocation_periods
        SET allocated_credits = allocated_credits + %(late)b,
            used_credits = used_credits + %(late)b
        WHERE allocation_id = %(allocation_id)b AND period_start = %(period_start)b
    )
    UPDATE organization_credit_pools
    SET total_credits = total_credits + %(overage)b,
        allocated_credits = allocated_credits + %(moved)b,
        used_credits = used_credits + %(used)b,
        overage_credits = overage_credits + %(overage)b
    WHERE org_id = %(org_id)b
"""

_CORRECTIONS: Final = """
    SELECT *
    FROM (
        SELECT
            u.id, u.org_id, u.request_id, u.user_id, u.service_type, u.corrects, u.credits_used,
            u.overage_credits,
            sum(u.credits_used) OVER (ORDER BY u.id)::bigint AS net_credits,
            u.period_start, u.occurred_at, u.actor, u.reason, u.created_at
        FROM usage_requests r
        JOIN credit_usage_attribution u
            ON u.org_id = r.org_id AND u.request_id = r.request_id
            AND u.occurred_at IN (r.occurred_at, r.settled_at)
        WHERE r.org_id = %(org_id)b AND r.request_id = %(request_id)b::text
    ) attributions
    WHERE corrects IS NOT NULL
    ORDER BY id
"""


class Correction(BaseModel):
    """One change of what a request is charged; all figures are credits."""

    model_config = ConfigDict(frozen=True)

    id: int
    org_id: UUID
    request_id: str
    user_id: str
    service_type: str
    corrects: int
    """Id of the attribution that it corrects."""
    credits_used: int
    """The difference; negative for credits given back."""
    overage_credits: int
    """How many of them were used on account and are no longer, as a negative figure."""
    net_credits: int
    """What the request is charged after it."""
    period_start: datetime
    occurred_at: datetime
    actor: str
    reason: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class _Standing:
    """What a request is charged, and what may pay for a difference; all under lock."""

    original_id: int
    net: int
    net_overage: int
    period_start: datetime
    is_closed: bool
    """Whether its period has ended."""
    allocation_id: UUID
    is_active: bool
    available: int
    """The user's credits that nothing uses or holds."""
    pool_available: int
    pool_overage: int
    """Credits on account that no bill has yet."""

    def overage_back(self, difference: int) -> int:
        """How many of the refunded credits were on account and can be taken off it."""
        return max(0, min(-difference, self.net_overage, self.pool_overage))

    def movements(self, difference: int) -> Iterator[tuple[str, int]]:
        """Kinds and credits of what moves to the allocation, with minus from it.

        Raises:
            InsufficientCredits: neither the pool nor the user can pay for the difference.
        """
        if difference > 0:
            if self.is_closed and difference <= self.pool_available:
                yield "correction", difference
            elif difference > self.available:
                raise self._too_little(difference)
            return
        back = self.overage_back(difference)
        if self.is_closed:
            # The period has ended: what is not used in it any more goes to the pool.
            yield "correction", difference
            return
        if back:
            yield "correction", -back
        if not self.is_active and back < -difference:
            yield "reclaim", difference + back

    def _too_little(self, difference: int) -> InsufficientCredits:
        remaining = max(self.available, self.pool_available) if self.is_closed else self.available
        return InsufficientCredits(
            f"Insufficient credits: {remaining} available, {difference} needed",
            required=difference,
            remaining=remaining,
        )


def refund(
    database: Database,
    org_id: UUID,
    request_id: str,
    credits: int | None = None,
    *,
    actor: str,
    reason: str,
    key: str | None = None,
    now: datetime,
) -> Correction:
    """Give back credits that a request was charged: so many, or all that still are.

    They return to the user in the running period, and to the pool from a closed one or a user who
    is switched off. Credits on account that are not billed come first and are not owed any more.
    Idempotent by `key`.

    Raises:
        InvalidRequest: credits that cannot be, no reason, or a key used for another act.
        NotFound: the organization has no such request.
        Conflict: the request is not charged, or no longer at so many credits.
    """
    if credits is not None:
        check_credits("credits", credits)
    _check_reason(reason)
    arguments = {"request_id": request_id, "credits": credits, "reason": reason}
    act = Act("corrections.refund", org_id, arguments, actor, key, now)

    def perform(connection: Connection) -> Correction:
        standing = _lock(connection, org_id, request_id)
        back = standing.net if credits is None else credits
        if back > standing.net or not back:
            raise Conflict(f"request {request_id} is charged at {standing.net} credits by now")
        return _correct(connection, act, request_id, reason, standing, -back)

    return once(database, act, Correction, perform)


def adjust(
    database: Database,
    org_id: UUID,
    request_id: str,
    to_credits: int,
    *,
    actor: str,
    reason: str,
    key: str | None = None,
    now: datetime,
) -> Correction:
    """Change what a request is charged in all, down like a refund, or up.

    More is paid from what the user has available, never on account; in a closed period from what
    the pool has available first. Idempotent by `key`.

    Raises:
        InvalidRequest: credits that cannot be, no reason, or a key used for another act.
        NotFound: the organization has no such request.
        Conflict: the request is not charged, or at these credits already.
        InsufficientCredits: neither user nor pool can pay for the difference.
    """
    check_credits("to_credits", to_credits, 0)
    _check_reason(reason)
    arguments = {"request_id": request_id, "to_credits": to_credits, "reason": reason}
    act = Act("corrections.adjust", org_id, arguments, actor, key, now)

    def perform(connection: Connection) -> Correction:
        standing = _lock(connection, org_id, request_id)
        if to_credits == standing.net:
            raise Conflict(f"request {request_id} is charged at {to_credits} credits already")
        return _correct(connection, act, request_id, reason, standing, to_credits - standing.net)

    return once(database, act, Correction, perform)


def corrections_of(database: Database, org_id: UUID, request_id: str) -> Sequence[Correction]:
    """The corrections of a request, the first one first; none of a request that has none."""
    check_texts(request_id=request_id)
    with database.snapshot() as connection:
        return _read(connection, org_id, request_id)


def _check_reason(reason: str) -> None:
    if not reason.strip():
        raise InvalidRequest("reason: a correction needs one", fields=["reason"])


def _lock(connection: Connection, org_id: UUID, request_id: str) -> _Standing:
    run(connection, _LOCK_POOL, org_id=org_id)
    request = run(connection, _REQUEST, org_id=org_id, request_id=request_id).one_or_none()
    if request is None:
        raise NotFound(f"no request {request_id} in organization {org_id}")
    if request.state != "charged":
        raise Conflict(f"request {request_id} is {request.state}: there is no charge to correct")
    run(connection, _LOCK_ALLOCATION, org_id=org_id, user_id=request.user_id)
    return _Standing(*run(connection, _STANDING, org_id=org_id, request_id=request_id).one())


def _correct(
    connection: Connection,
    act: Act,
    request_id: str,
    reason: str,
    standing: _Standing,
    difference: int,
) -> Correction:
    """Write the correction, what moves for it, and the balances after it."""
    overage = -standing.overage_back(difference)
    movements = list(standing.movements(difference))
    run(
        connection,
        _ATTRIBUTE,
        original_id=standing.original_id,
        credits=difference,
        overage=overage,
        actor=act.actor,
        reason=reason,
        now=act.now,
    )
    correction = _read(connection, act.org_id, request_id)[-1]
    _move(connection, correction, standing.allocation_id, movements)
    _balance(connection, correction, standing, sum(credits for _, credits in movements))
    return correction


def _move(
    connection: Connection,
    correction: Correction,
    allocation_id: UUID,
    movements: Sequence[tuple[str, int]],
) -> None:
    rows = list(movements)
    if correction.overage_credits:
        rows.insert(0, ("overage", correction.overage_credits))
    if rows:
        run(
            connection,
            _MOVE,
            org_id=correction.org_id,
            user_id=correction.user_id,
            allocation_id=allocation_id,
            request_id=correction.request_id,
            kinds=[kind for kind, _ in rows],
            credits=[credits for _, credits in rows],
            actor=correction.actor,
            reason=correction.reason,
            now=correction.created_at,
        )


def _balance(
    connection: Connection, correction: Correction, standing: _Standing, moved: int
) -> None:
    used = correction.credits_used
    late = used if standing.is_closed else 0
    run(
        connection,
        _BALANCE,
        org_id=correction.org_id,
        allocation_id=standing.allocation_id,
        period_start=standing.period_start,
        used=used,
        late=late,
        moved=moved,
        # What moved to an allocation is what it has now and what its closed periods have used.
        allocated=moved - late,
        overage=correction.overage_credits,
    )


def _read(connection: Connection, org_id: UUID, request_id: str) -> list[Correction]:
    rows = run(connection, _CORRECTIONS, org_id=org_id, request_id=request_id).mappings()
    return [Correction.model_validate(dict(row)) for row in rows]
