"""How a balance came about: every closed period, then every movement since, line by line.

A user's remaining credits are all that was ever handed to the allocation, less all that was ever
attributed to it: a reset moves nothing but what it draws, and usage of a closed period is either
funded by a movement of its own or paid from what remains. So the lines add up to the same figure
whatever happened, in which order, and to whichever period it belongs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Connection

from ledger.database import Database, run
from schema.errors import InvalidRequest, NoAllocation, NotFound

DEFAULT_LIMIT: Final = 100
MAX_LIMIT: Final = 10_000

_ALLOCATION: Final = """
    SELECT o.id AS org_id, a.id, a.remaining_credits, a.held_credits, a.last_reset_date
    FROM organizations o
    LEFT JOIN user_credit_allocations a ON a.org_id = o.id AND a.user_id = %(user_id)b::text
    WHERE o.id = %(org_id)b
"""

_PERIODS: Final = """
    SELECT
        period_start, period_end, allocated_credits, used_credits, drawn_credits, short_credits,
        created_at
    FROM allocation_periods
    WHERE allocation_id = %(allocation_id)b
    ORDER BY period_start
"""

_COMPUTED: Final = """
    SELECT
        (
            SELECT coalesce(sum(credits), 0)
            FROM credit_transactions
            WHERE org_id = %(org_id)b AND allocation_id = %(allocation_id)b
        )::bigint - (
            SELECT coalesce(sum(credits_used), 0)
            FROM credit_usage_attribution
            WHERE org_id = %(org_id)b AND allocation_id = %(allocation_id)b
        )::bigint AS remaining,
        (
            SELECT coalesce(sum(held_credits), 0)
            FROM usage_requests
            WHERE org_id = %(org_id)b AND user_id = %(user_id)b::text AND state = 'held'
        )::bigint AS held
"""

# What belongs to one moment is read in this order: what came in, what went out, what is set aside.
_MOVEMENTS: Final = """
    WITH movements AS (
        SELECT
            created_at AS at, id, kind, credits, 0 AS held, request_id, NULL AS service_type,
            actor, reason
        FROM credit_transactions
        WHERE org_id = %(org_id)b AND allocation_id = %(allocation_id)b
            AND (%(closed_at)b::timestamptz IS NULL OR created_at > %(closed_at)b)
        UNION ALL
        SELECT
            created_at, id,
            CASE
                WHEN corrects IS NOT NULL THEN 'usage_correction'
                WHEN period_start <> %(period_start)b THEN 'usage_of_closed_period'
                ELSE 'usage'
            END,
            -credits_used, 0, request_id, service_type, actor, reason
        FROM credit_usage_attribution
        WHERE org_id = %(org_id)b AND allocation_id = %(allocation_id)b
            AND (
                %(closed_at)b::timestamptz IS NULL
                OR created_at > %(closed_at)b
                OR period_start = %(period_start)b
            )
        UNION ALL
        SELECT
            created_at, 0, 'hold', 0, held_credits, request_id, service_type, NULL, NULL
        FROM usage_requests
        WHERE org_id = %(org_id)b AND user_id = %(user_id)b::text AND state = 'held'
    ),
    ordered AS (
        SELECT *, CASE WHEN credits > 0 THEN 1 WHEN credits < 0 THEN 2 ELSE 3 END AS turn
        FROM movements
    ),
    aged AS (
        SELECT
            *,
            row_number() OVER (
                PARTITION BY request_id IS NULL
                ORDER BY at DESC, turn DESC, id DESC, kind DESC, request_id DESC
            ) AS age
        FROM ordered
    )
    SELECT
        at, turn, id, kind, credits, held, 1 AS movements, request_id, service_type, actor, reason
    FROM aged
    WHERE request_id IS NULL OR age <= %(limit)b
    UNION ALL
    SELECT
        max(at), 0, 0, 'earlier_usage', sum(credits)::bigint, sum(held)::bigint, count(*), NULL,
        NULL, NULL, NULL
    FROM aged
    WHERE request_id IS NOT NULL AND age > %(limit)b
    HAVING count(*) > 0
    ORDER BY at, turn, id, kind, request_id
"""


@dataclass(frozen=True, slots=True)
class Period:
    """A closed period; all figures are credits."""

    start: datetime
    end: datetime
    funded: int
    """What it had: left over from before, drawn by the last reset, and moved to it since."""
    used: int
    drawn: int
    """What the reset at its end took from the pool; negative if it gave some back."""
    short: int
    """What the pool could not give."""

    @property
    def remaining(self) -> int:
        """What the next period began with."""
        return self.funded - self.used + self.drawn


@dataclass(frozen=True, slots=True)
class Line:
    """A movement of the running period, or several in one; figures are credits.

    `kind` is that of a transaction (`allocation`, `reset`, `reclaim`, `late_usage`, `correction`),
    or one of `usage`, `usage_of_closed_period`, `usage_correction` and `hold`. Older ones of a
    request are summed up as `earlier_usage`. `at_reset` is what was written while the reset ran.
    """

    at: datetime
    kind: str
    credits: int
    """What remains more, or less, because of it."""
    held: int
    """What it sets aside of what remains."""
    movements: int
    request_id: str | None
    service_type: str | None
    actor: str | None
    reason: str | None
    remaining: int
    """The user's credits after it, held ones included."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """A balance, from the first period to now; all figures are credits."""

    org_id: UUID
    user_id: str
    periods: Sequence[Period]
    period_start: datetime
    """When the running period began."""
    opening: int
    """What it began with."""
    lines: Sequence[Line]
    computed: int
    """Remaining credits by all movements there ever were."""
    recorded: int
    """Remaining credits as the allocation says."""
    held_computed: int
    held_recorded: int

    @property
    def is_exact(self) -> bool:
        """Whether the allocation says what the movements add up to."""
        return (self.computed, self.held_computed) == (self.recorded, self.held_recorded)


def explain(
    database: Database, org_id: UUID, user_id: str, limit: int = DEFAULT_LIMIT
) -> Explanation:
    """Add a user's balance up from its movements, in one snapshot.

    Args:
        database: the ledger.
        org_id: the organization.
        user_id: its user.
        limit: how many movements of requests get a line each, the latest ones; 1 to `MAX_LIMIT`.

    Raises:
        InvalidRequest: a limit out of range.
        NotFound: there is no such organization.
        NoAllocation: the user never had an allocation in it.
        LedgerUnavailable: PostgreSQL does not answer.
    """
    if not 1 <= limit <= MAX_LIMIT:
        raise InvalidRequest(f"limit: must be from 1 to {MAX_LIMIT}", fields=["limit"])
    with database.snapshot() as connection:
        allocation = _allocation(connection, org_id, user_id)
        keys = {"org_id": org_id, "user_id": user_id, "allocation_id": allocation.id}
        periods, closed_at = _periods(connection, allocation.id)
        computed = run(connection, _COMPUTED, **keys).one()
        movements = run(
            connection,
            _MOVEMENTS,
            period_start=allocation.last_reset_date,
            closed_at=closed_at,
            limit=limit,
            **keys,
        ).fetchall()
    opening = periods[-1].remaining if periods else 0
    return Explanation(
        org_id,
        user_id,
        periods,
        allocation.last_reset_date,
        opening,
        list(_lines(movements, opening, computed.remaining, closed_at)),
        computed.remaining,
        allocation.remaining_credits,
        computed.held,
        allocation.held_credits,
    )


def _allocation(connection: Connection, org_id: UUID, user_id: str) -> Any:  # noqa: ANN401 - a row
    row = run(connection, _ALLOCATION, org_id=org_id, user_id=user_id).one_or_none()
    if row is None:
        raise NotFound(f"no organization {org_id}")
    if row.id is None:
        raise NoAllocation(f"No credit allocation found for user {user_id} in org {org_id}")
    return row


def _periods(
    connection: Connection, allocation_id: UUID
) -> tuple[Sequence[Period], datetime | None]:
    """The closed periods, and when the last one was closed."""
    rows = run(connection, _PERIODS, allocation_id=allocation_id).fetchall()
    closed_at = rows[-1].created_at if rows else None
    return [Period(*figures) for *figures, _ in rows], closed_at


def _lines(
    movements: Sequence[Any], opening: int, computed: int, closed_at: datetime | None
) -> Iterator[Line]:
    remaining = opening
    # Acts that ran beside the reset may be dated on the wrong side of it.
    misdated = computed - opening - sum(row.credits for row in movements)
    if misdated and closed_at is not None:
        remaining += misdated
        yield Line(closed_at, "at_reset", misdated, 0, 1, None, None, None, None, remaining)
    for row in movements:
        remaining += row.credits
        yield Line(
            row.at,
            row.kind,
            row.credits,
            row.held,
            row.movements,
            row.request_id,
            row.service_type,
            row.actor,
            row.reason,
            remaining,
        )
