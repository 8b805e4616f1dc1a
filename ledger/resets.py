"""Resets: pools refreshed and allocations filled up again once their dates have passed (D7, D8).

A reset closes the period that ran, and every one that was missed since, and makes of what is left
a full allowance: the pool gives what is wanting, as far as it can, and takes back what is too
much. Which periods end, and what moves, is decided by pure functions; a preview and a run differ
only in whether the rows are locked and the decisions written.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final
from uuid import UUID

import structlog
from sqlalchemy import Connection

from ledger.database import Database, run
from ledger.resetplans import (
    Allocation,
    PlannedRefresh,
    PlannedReset,
    Pool,
    plan_refreshes,
    plan_resets,
)
from schema.errors import InvalidRequest
from schema.periods import zone_of

BATCH: Final = 500
"""Most pools or allocations that one transaction locks."""
MAX_PERIODS: Final = 2000
"""A transaction that has closed so many periods takes no further allocation."""

log = structlog.get_logger(__name__)

Key = tuple[UUID, str]
"""Organization and user id, in the order in which allocations are locked."""

_NOWHERE: Final[Key] = (UUID(int=0), "")
"""Before every allocation."""

_DUE_POOLS: Final = """
    SELECT org_id
    FROM organization_credit_pools
    WHERE next_refresh_date <= %(now)b
        AND org_id > %(after)b
        AND (%(org_id)b::uuid IS NULL OR org_id = %(org_id)b)
    ORDER BY org_id
    LIMIT %(limit)b
"""

_POOLS: Final = """
    SELECT
        p.org_id, o.name, o.timezone, p.available_credits, p.monthly_refresh_amount,
        p.next_refresh_date, coalesce(p.refresh_anchor, p.next_refresh_date)
    FROM organization_credit_pools p
    JOIN organizations o ON o.id = p.org_id
    WHERE p.org_id = ANY(%(org_ids)b::uuid[])
    ORDER BY p.org_id
"""

_LOCK_POOLS: Final = f"""
    {_POOLS}
    FOR NO KEY UPDATE OF p
"""

_DUE_ALLOCATIONS: Final = """
    SELECT org_id, user_id
    FROM user_credit_allocations
    WHERE is_active AND reset_period <> 'never' AND next_reset_date <= %(now)b
        AND (org_id, user_id) > (%(after_org_id)b, %(after_user_id)b::text)
        AND (%(org_id)b::uuid IS NULL OR org_id = %(org_id)b)
    ORDER BY org_id, user_id
    LIMIT %(limit)b
"""

# Whether one is still due is asked again under its lock: another run may have reset it meanwhile.
_ALLOCATIONS: Final = """
    SELECT
        a.id, a.org_id, a.user_id, a.allocated_credits, a.used_credits, a.held_credits,
        a.allowance_credits, a.reset_period, a.reset_anchor, a.last_reset_date, a.next_reset_date,
        EXISTS (
            SELECT FROM allocation_periods c
            WHERE c.allocation_id = a.id AND c.period_start >= a.last_reset_date
        )
    FROM user_credit_allocations a
    JOIN unnest(%(org_ids)b::uuid[], %(user_ids)b::text[]) AS wanted (org_id, user_id)
        ON a.org_id = wanted.org_id AND a.user_id = wanted.user_id
    WHERE a.is_active AND a.reset_period <> 'never' AND a.next_reset_date <= %(now)b
    ORDER BY a.org_id, a.user_id
"""

_LOCK_ALLOCATIONS: Final = f"""
    {_ALLOCATIONS}
    FOR NO KEY UPDATE OF a
"""

_REFRESH: Final = """
    UPDATE organization_credit_pools p
    SET total_credits = p.total_credits + due.credits,
        refresh_anchor = due.anchor,
        last_refresh_date = due.last_date,
        next_refresh_date = due.next_date
    FROM unnest(
        %(org_ids)b::uuid[], %(credits)b::bigint[], %(anchors)b::timestamptz[],
        %(last_dates)b::timestamptz[], %(next_dates)b::timestamptz[]
    ) AS due (org_id, credits, anchor, last_date, next_date)
    WHERE p.org_id = due.org_id
"""

_REFRESH_MOVEMENTS: Final = """
    INSERT INTO credit_transactions (org_id, kind, credits, reason, created_at)
    SELECT org_id, 'refresh', credits, reason, %(now)b
    FROM unnest(%(org_ids)b::uuid[], %(credits)b::bigint[], %(reasons)b::text[])
        AS due (org_id, credits, reason)
"""

# The primary key is the fence: a period that is closed already fails the whole transaction.
_CLOSE: Final = """
    INSERT INTO allocation_periods (
        allocation_id, period_start, period_end, allocated_credits, used_credits, drawn_credits,
        short_credits, created_at
    )
    SELECT *, %(now)b
    FROM unnest(
        %(allocation_ids)b::uuid[], %(starts)b::timestamptz[], %(ends)b::timestamptz[],
        %(allocated)b::bigint[], %(used)b::bigint[], %(drawn)b::bigint[], %(short)b::bigint[]
    )
"""

_RESET: Final = """
    WITH drawn AS (
        UPDATE organization_credit_pools p
        SET allocated_credits = p.allocated_credits + drawn.credits
        FROM unnest(%(drawing_org_ids)b::uuid[], %(drawn)b::bigint[]) AS drawn (org_id, credits)
        WHERE p.org_id = drawn.org_id
    )
    UPDATE user_credit_allocations a
    SET allocated_credits = begun.credits,
        used_credits = 0,
        last_reset_date = begun.start,
        next_reset_date = begun.next_date
    FROM unnest(
        %(allocation_ids)b::uuid[], %(credits)b::bigint[], %(starts)b::timestamptz[],
        %(next_dates)b::timestamptz[]
    ) AS begun (allocation_id, credits, start, next_date)
    WHERE a.id = begun.allocation_id
"""

_RESET_MOVEMENTS: Final = """
    INSERT INTO credit_transactions (
        org_id, user_id, allocation_id, kind, credits, reason, created_at
    )
    SELECT org_id, user_id, allocation_id, 'reset', credits, reason, %(now)b
    FROM unnest(
        %(org_ids)b::uuid[], %(user_ids)b::text[], %(allocation_ids)b::uuid[],
        %(credits)b::bigint[], %(reasons)b::text[]
    ) AS moved (org_id, user_id, allocation_id, credits, reason)
"""

_OVERDUE: Final = """
    SELECT allocations.number, pools.number, least(allocations.since, pools.since)
    FROM
        (
            SELECT count(*) AS number, min(next_reset_date) AS since
            FROM user_credit_allocations
            WHERE is_active AND reset_period <> 'never' AND next_reset_date <= %(now)b
        ) allocations,
        (
            SELECT count(*) AS number, min(next_refresh_date) AS since
            FROM organization_credit_pools
            WHERE next_refresh_date <= %(now)b
        ) pools
"""

_NEXT_DUE: Final = """
    SELECT least(
        (
            SELECT min(next_reset_date)
            FROM user_credit_allocations
            WHERE is_active AND reset_period <> 'never' AND next_reset_date > %(now)b
        ),
        (
            SELECT min(next_refresh_date)
            FROM organization_credit_pools
            WHERE next_refresh_date > %(now)b
        )
    )
"""


@dataclass(frozen=True, slots=True)
class Preview:
    """What a run would do, in its order; `failed` are organizations it must leave, and why."""

    refreshes: Sequence[PlannedRefresh]
    resets: Sequence[PlannedReset]
    failed: dict[UUID, str] = field(default_factory=dict)

    def as_document(self, at: datetime) -> dict[str, Any]:
        """The preview of a run at this time, for programs."""
        return {
            "at": at.isoformat(),
            "refreshes": [plan.as_document() for plan in self.refreshes],
            "resets": [plan.as_document() for plan in self.resets],
            "failed": [
                {"org_id": str(org_id), "error": problem} for org_id, problem in self.failed.items()
            ],
        }


@dataclass(slots=True)
class ResetReport:
    """What a run did."""

    pools_refreshed: int = 0
    credits_refreshed: int = 0
    allocations_reset: int = 0
    periods_closed: int = 0
    credits_drawn: int = 0
    """Credits that allocations took from their pools."""
    credits_returned: int = 0
    """Credits beyond the allowance that went back to the pools."""
    allocations_short: int = 0
    """Allocations that their pools could not fill up."""
    credits_short: int = 0
    organizations_failed: int = 0
    """Organizations in which something is due that cannot be done; the log says why."""

    def count_refreshes(self, plans: Iterable[PlannedRefresh]) -> None:
        """Count refreshes in."""
        for plan in plans:
            self.pools_refreshed += 1
            self.credits_refreshed += plan.total

    def count_resets(self, plans: Iterable[PlannedReset]) -> None:
        """Count resets in."""
        for plan in plans:
            self.allocations_reset += 1
            self.periods_closed += len(plan.boundaries)
            self.credits_drawn += max(0, plan.drawn)
            self.credits_returned += max(0, -plan.drawn)
            self.allocations_short += plan.short > 0
            self.credits_short += plan.short


@dataclass(frozen=True, slots=True)
class Overdue:
    """What waits for a run, and for how long."""

    allocations: int
    pools: int
    since: datetime | None


def reset_due(
    database: Database,
    now: datetime,
    batch: int = BATCH,
    tell: Callable[[ResetReport], object] | None = None,
) -> ResetReport:
    """Refresh every pool whose date has passed, then reset every active allocation whose has.

    Missed months and periods are caught up one by one. Each is dealt with once, whoever else is at
    it; a run with nothing due changes nothing. What cannot be computed, as for a time zone that is
    not known here, is logged, counted and left as it is; other organizations are not affected.
    Every batch is a transaction of its own; `tell` hears of each.

    Raises:
        LedgerUnavailable: PostgreSQL does not answer; finished batches stay.
    """
    report = ResetReport()
    failed: dict[UUID, str] = {}
    org_id: UUID | None = _NOWHERE[0]
    while org_id is not None:
        with database.transaction() as connection:
            refreshes, org_id = _refresh_batch(connection, org_id, now, batch, failed)
        report.count_refreshes(refreshes)
    key: Key | None = _NOWHERE
    while key is not None:
        with database.transaction() as connection:
            resets, key = _reset_batch(connection, key, now, batch, failed)
        report.count_resets(resets)
        if tell is not None:
            tell(report)
    for failed_id, problem in failed.items():
        log.error("organization cannot be reset", org_id=str(failed_id), error=problem)
    report.organizations_failed = len(failed)
    return report


def preview(database: Database, at: datetime, org_id: UUID | None = None) -> Preview:
    """What a run at this time would do as things stand, in all organizations or in one.

    Reads one snapshot and writes nothing.
    """
    failed: dict[UUID, str] = {}
    with database.snapshot() as connection:
        due_pools = _due_pools(connection, at, org_id=org_id)
        keys = _due_allocations(connection, at, org_id=org_id)
        org_ids = {*due_pools, *(key_org_id for key_org_id, _ in keys)}
        pools = _pools(connection, _POOLS, org_ids, failed)
        allocations = _allocations(connection, _ALLOCATIONS, keys, at)
    refreshes = list(plan_refreshes(pools.values(), at, failed))
    return Preview(refreshes, list(plan_resets(allocations, pools, at, failed)), failed)


def overdue(database: Database, now: datetime) -> Overdue:
    """How many allocations and pools are due, and since when the oldest of them is."""
    with database.snapshot() as connection:
        return Overdue(*run(connection, _OVERDUE, now=now).one())


def next_due(database: Database, now: datetime) -> datetime | None:
    """When the next allocation or pool will be due; None if none will.

    Raises:
        LedgerUnavailable: PostgreSQL does not answer.
    """
    with database.snapshot() as connection:
        found: datetime | None = run(connection, _NEXT_DUE, now=now).scalar_one()
        return found


def _refresh_batch(
    connection: Connection, after: UUID, now: datetime, batch: int, failed: dict[UUID, str]
) -> tuple[list[PlannedRefresh], UUID | None]:
    """Refresh some pools; returns after which to go on, None if there are no more."""
    due = _due_pools(connection, now, after, batch)
    if not due:
        return [], None
    pools = _pools(connection, _LOCK_POOLS, due, failed)
    plans = list(plan_refreshes(pools.values(), now, failed))
    if plans:
        _write_refreshes(connection, plans, now)
    return plans, due[-1] if len(due) == batch else None


def _reset_batch(
    connection: Connection, after: Key, now: datetime, batch: int, failed: dict[UUID, str]
) -> tuple[list[PlannedReset], Key | None]:
    """Reset some allocations; returns after which to go on, None if there are no more."""
    keys = _due_allocations(connection, now, after, batch)
    if not keys:
        return [], None
    pools = _pools(connection, _LOCK_POOLS, {org_id for org_id, _ in keys}, failed)
    allocations = _allocations(connection, _LOCK_ALLOCATIONS, keys, now)
    plans: list[PlannedReset] = []
    periods = 0
    more = keys[-1] if len(keys) == batch else None
    for plan in plan_resets(allocations, pools, now, failed):
        plans.append(plan)
        periods += len(plan.boundaries)
        if periods >= MAX_PERIODS:
            more = (plan.org_id, plan.user_id)
            break
    if plans:
        _write_resets(connection, plans, now)
    return plans, more


def _due_pools(
    connection: Connection,
    now: datetime,
    after: UUID = _NOWHERE[0],
    limit: int | None = None,
    org_id: UUID | None = None,
) -> list[UUID]:
    rows = run(connection, _DUE_POOLS, now=now, after=after, limit=limit, org_id=org_id)
    return list(rows.scalars())


def _due_allocations(
    connection: Connection,
    now: datetime,
    after: Key = _NOWHERE,
    limit: int | None = None,
    org_id: UUID | None = None,
) -> list[Key]:
    rows = run(
        connection,
        _DUE_ALLOCATIONS,
        now=now,
        after_org_id=after[0],
        after_user_id=after[1],
        limit=limit,
        org_id=org_id,
    )
    return [(found_org_id, user_id) for found_org_id, user_id in rows.fetchall()]


def _pools(
    connection: Connection, sql: str, org_ids: Iterable[UUID], failed: dict[UUID, str]
) -> dict[UUID, Pool]:
    """The pools of these organizations; without those whose time zone is not known here."""
    pools = {}
    for org_id, name, timezone, *figures in run(connection, sql, org_ids=list(org_ids)):
        try:
            pools[org_id] = Pool(org_id, name, zone_of(timezone), *figures)
        except InvalidRequest as error:
            failed.setdefault(org_id, error.message)
    return pools


def _allocations(
    connection: Connection, sql: str, keys: Sequence[Key], now: datetime
) -> list[Allocation]:
    rows = run(
        connection,
        sql,
        org_ids=[org_id for org_id, _ in keys],
        user_ids=[user_id for _, user_id in keys],
        now=now,
    )
    return [Allocation(*row) for row in rows.fetchall()]


def _write_refreshes(
    connection: Connection, plans: Sequence[PlannedRefresh], now: datetime
) -> None:
    run(
        connection,
        _REFRESH,
        org_ids=[plan.org_id for plan in plans],
        credits=[plan.total for plan in plans],
        anchors=[plan.anchor for plan in plans],
        last_dates=[plan.dates[-1] for plan in plans],
        next_dates=[plan.next_date for plan in plans],
    )
    added = [(plan, reason) for plan in plans if plan.credits for reason in plan.reasons]
    run(
        connection,
        _REFRESH_MOVEMENTS,
        org_ids=[plan.org_id for plan, _ in added],
        credits=[plan.credits for plan, _ in added],
        reasons=[reason for _, reason in added],
        now=now,
    )


def _write_resets(connection: Connection, plans: Sequence[PlannedReset], now: datetime) -> None:
    _close(connection, plans, now)
    drawn: Counter[UUID] = Counter()
    for plan in plans:
        drawn[plan.org_id] += plan.drawn
    run(
        connection,
        _RESET,
        drawing_org_ids=list(drawn),
        drawn=list(drawn.values()),
        allocation_ids=[plan.allocation_id for plan in plans],
        credits=[plan.begins_with for plan in plans],
        starts=[plan.boundaries[-1] for plan in plans],
        next_dates=[plan.next_date for plan in plans],
    )
    moved = [plan for plan in plans if plan.drawn]
    run(
        connection,
        _RESET_MOVEMENTS,
        org_ids=[plan.org_id for plan in moved],
        user_ids=[plan.user_id for plan in moved],
        allocation_ids=[plan.allocation_id for plan in moved],
        credits=[plan.drawn for plan in moved],
        reasons=[plan.reason for plan in moved],
        now=now,
    )


def _close(connection: Connection, plans: Sequence[PlannedReset], now: datetime) -> None:
    names = ("allocation_ids", "starts", "ends", "allocated", "used", "drawn", "short")
    columns = zip(*(row for plan in plans for row in plan.closed()), strict=True)
    run(
        connection,
        _CLOSE,
        now=now,
        **{name: list(column) for name, column in zip(names, columns, strict=True)},
    )
