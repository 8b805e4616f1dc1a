"""Charges: the rows and balances that decisions need locked, and what they write.

Locks are always taken pool first, then allocations, each in key order, so that drains, direct SQL
calls and top-ups wait for each other instead of deadlocking.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Final
from uuid import UUID

from psycopg.types.json import Jsonb
from pydantic_core import to_json
from sqlalchemy import Connection

from ledger.database import copy, run
from ledger.decisions import Balance, Charge, ClosedPeriod, Key, Pool, Reported
from schema.plans import PlanName

_NOTHING: Final = Decimal(0)

# The pool row is the mutex of its organization: direct `deduct_credits()` calls take it as well,
# so that no request id can appear between looking it up and writing it.
_LOCK_POOLS: Final = """
    SELECT FROM organization_credit_pools
    WHERE org_id = ANY(%(org_ids)b)
    ORDER BY org_id
    FOR NO KEY UPDATE
"""

# Read after the locks were won, or the figures would be those of before the wait.
_ORGANIZATIONS: Final = """
    SELECT
        o.id, s.subscription_plan, coalesce(p.available_credits, 0),
        CASE WHEN p.allow_overage AND s.id IS NOT NULL THEN overage_room(o.id) END
    FROM organizations o
    LEFT JOIN organization_credit_pools p ON p.org_id = o.id
    LEFT JOIN organization_subscriptions s
        ON s.org_id = o.id AND s.status IN ('active', 'trialing', 'past_due', 'paused')
    WHERE o.id = ANY(%(org_ids)b)
"""

_LOCK_ALLOCATIONS: Final = """
    SELECT
        a.org_id, a.user_id, a.id, a.remaining_credits - a.held_credits, a.is_active,
        a.last_reset_date
    FROM user_credit_allocations a
    JOIN unnest(%(org_ids)b::uuid[], %(user_ids)b::text[]) AS wanted (org_id, user_id)
        ON a.org_id = wanted.org_id AND a.user_id = wanted.user_id
    ORDER BY a.org_id, a.user_id
    FOR NO KEY UPDATE OF a
"""

_CLOSED_PERIODS: Final = """
    SELECT allocation_id, period_start, period_end
    FROM allocation_periods
    WHERE allocation_id = ANY(%(allocation_ids)b::uuid[]) AND period_end > %(since)b
"""

# Both tables take new rows only: COPY costs half of what INSERT does.
_CHARGED_REQUESTS: Final = """
    COPY usage_requests (
        org_id, request_id, user_id, service_type, fingerprint, state, credits, occurred_at,
        created_at, settled_at
    )
    FROM STDIN (FORMAT BINARY)
"""
_REQUEST_TYPES: Final = (
    "uuid", "varchar", "varchar", "varchar", "bytea", "text", "int8", "timestamptz",
    "timestamptz", "timestamptz",
)  # fmt: skip

_ATTRIBUTIONS: Final = """
    COPY credit_usage_attribution (
        org_id, user_id, allocation_id, period_start, credits_used, overage_credits,
        service_type, service_name, variant, quantity, api_cost, markup_applied, key_source,
        request_id, request_metadata, source, created_at, occurred_at
    )
    FROM STDIN (FORMAT BINARY)
"""
_ATTRIBUTION_TYPES: Final = (
    "uuid", "varchar", "uuid", "timestamptz", "int8", "int8",
    "varchar", "varchar", "varchar", "numeric", "numeric", "numeric", "text",
    "varchar", "jsonb", "text", "timestamptz", "timestamptz",
)  # fmt: skip

_SETTLE: Final = """
    UPDATE usage_requests r
    SET state = 'charged',
        credits = settled.credits,
        fingerprint = settled.fingerprint,
        occurred_at = settled.occurred_at,
        reason = NULL,
        settled_at = %(now)b
    FROM unnest(
        %(org_ids)b::uuid[], %(request_ids)b::text[], %(credits)b::bigint[],
        %(fingerprints)b::bytea[], %(occurred_at)b::timestamptz[]
    ) AS settled (org_id, request_id, credits, fingerprint, occurred_at)
    WHERE r.org_id = settled.org_id AND r.request_id = settled.request_id
"""

_SPEND: Final = """
    WITH spent AS (
        UPDATE user_credit_allocations a
        SET used_credits = a.used_credits + spent.credits,
            held_credits = a.held_credits - spent.unheld,
            allocated_credits = a.allocated_credits + spent.funded
        FROM unnest(
            %(allocation_ids)b::uuid[], %(user_credits)b::bigint[], %(unheld)b::bigint[],
            %(funded)b::bigint[]
        ) AS spent (id, credits, unheld, funded)
        WHERE a.id = spent.id
    )
    UPDATE organization_credit_pools p
    SET used_credits = p.used_credits + spent.credits,
        allocated_credits = p.allocated_credits + spent.funded + spent.lent,
        total_credits = p.total_credits + spent.lent,
        overage_credits = p.overage_credits + spent.lent
    FROM unnest(
        %(org_ids)b::uuid[], %(org_credits)b::bigint[], %(org_funded)b::bigint[],
        %(org_lent)b::bigint[]
    ) AS spent (org_id, credits, funded, lent)
    WHERE p.org_id = spent.org_id
"""

_SPEND_LATE: Final = """
    UPDATE allocation_periods p
    SET used_credits = p.used_credits + late.credits,
        allocated_credits = p.allocated_credits + late.credits
    FROM unnest(
        %(allocation_ids)b::uuid[], %(starts)b::timestamptz[], %(credits)b::bigint[]
    ) AS late (allocation_id, period_start, credits)
    WHERE p.allocation_id = late.allocation_id AND p.period_start = late.period_start
"""

_MOVEMENTS: Final = """
    INSERT INTO credit_transactions (
        org_id, user_id, allocation_id, kind, credits, reason, request_id, created_at
    )
    SELECT *, %(now)b
    FROM unnest(
        %(org_ids)b::uuid[], %(user_ids)b::text[], %(allocation_ids)b::uuid[], %(kinds)b::text[],
        %(credits)b::bigint[], %(reasons)b::text[], %(request_ids)b::text[]
    )
"""


def lock_organizations(connection: Connection, reports: Sequence[Reported]) -> dict[int, Pool]:
    """Lock the pools of these events, and read what they can give; by organization id number."""
    org_ids = list({report.event.org_id.int: report.event.org_id for report in reports}.values())
    run(connection, _LOCK_POOLS, org_ids=org_ids)
    rows = run(connection, _ORGANIZATIONS, org_ids=org_ids).fetchall()
    return {
        org_id.int: Pool(org_id, PlanName(plan) if plan else None, available, room)
        for org_id, plan, available, room in rows
    }


def lock_allocations(connection: Connection, reports: Sequence[Reported]) -> dict[Key, Balance]:
    """Lock the allocations of these events' users, and read what they can spend."""
    events = {report.user_key: report.event for report in reports}.values()
    rows = run(
        connection,
        _LOCK_ALLOCATIONS,
        org_ids=[event.org_id for event in events],
        user_ids=[event.user_id for event in events],
    )
    balances = {
        (org_id.int, user_id): Balance(org_id, *figures)
        for org_id, user_id, *figures in rows.fetchall()
    }
    _add_closed_periods(connection, reports, balances)
    return balances


def _add_closed_periods(
    connection: Connection, reports: Sequence[Reported], balances: dict[Key, Balance]
) -> None:
    late: dict[UUID, Balance] = {}
    moments: list[datetime] = []
    for report in reports:
        balance = balances.get(report.user_key)
        if balance is not None and report.event.occurred_at < balance.period_start:
            late[balance.allocation_id] = balance
            moments.append(report.event.occurred_at)
    if not late:
        return
    closed: defaultdict[UUID, list[ClosedPeriod]] = defaultdict(list)
    rows = run(connection, _CLOSED_PERIODS, allocation_ids=list(late), since=min(moments))
    for allocation_id, start, end in rows.fetchall():
        closed[allocation_id].append(ClosedPeriod(start, end))
    for allocation_id, periods in closed.items():
        late[allocation_id].closed = periods


def write(connection: Connection, charges: Sequence[Charge], now: datetime) -> None:
    """Write the requests, attributions and movements of charges."""
    if charges:
        _settle(connection, [charge.report for charge in charges if charge.settles], now)
        requests = (_request_row(charge.report, now) for charge in charges if not charge.settles)
        copy(connection, _CHARGED_REQUESTS, _REQUEST_TYPES, requests)
        attributions = (_attribution_row(charge, now) for charge in charges)
        copy(connection, _ATTRIBUTIONS, _ATTRIBUTION_TYPES, attributions)
        _spend_late(connection, [charge for charge in charges if charge.is_late])
        unusual = [charge for charge in charges if charge.overage or charge.is_funded]
        _write_movements(connection, unusual, now)


def _settle(connection: Connection, reports: Sequence[Reported], now: datetime) -> None:
    if reports:
        run(
            connection,
            _SETTLE,
            now=now,
            org_ids=[report.event.org_id for report in reports],
            request_ids=[report.event.request_id for report in reports],
            credits=[report.credits for report in reports],
            fingerprints=[report.fingerprint for report in reports],
            occurred_at=[report.event.occurred_at for report in reports],
        )


def _spend_late(connection: Connection, charges: Sequence[Charge]) -> None:
    spent: Counter[tuple[UUID, datetime]] = Counter()
    for charge in charges:
        spent[charge.allocation_id, charge.period_start] += charge.credits
    if spent:
        run(
            connection,
            _SPEND_LATE,
            allocation_ids=[allocation_id for allocation_id, _ in spent],
            starts=[start for _, start in spent],
            credits=list(spent.values()),
        )


def _write_movements(connection: Connection, charges: Sequence[Charge], now: datetime) -> None:
    rows = [row for charge in charges for row in _movements_of(charge)]
    if rows:
        names = (
            "org_ids", "user_ids", "allocation_ids", "kinds", "credits", "reasons", "request_ids",
        )  # fmt: skip
        columns = (list(column) for column in zip(*rows, strict=True))
        run(connection, _MOVEMENTS, now=now, **dict(zip(names, columns, strict=True)))


def _movements_of(charge: Charge) -> Iterable[tuple[object, ...]]:
    event = charge.report.event
    org_id, request_id = event.org_id, event.request_id
    user = (event.user_id, charge.allocation_id)
    if charge.is_funded:
        yield org_id, *user, "late_usage", charge.credits, "usage of a closed period", request_id
    if charge.overage:
        yield org_id, None, None, "overage", charge.overage, "overage", request_id
        yield org_id, *user, "allocation", charge.overage, "overage", request_id


def write_balances(
    connection: Connection, pools: Iterable[Pool], balances: Iterable[Balance]
) -> None:
    """Add what a batch did to the allocations and pools, each row once."""
    touched = [balance for balance in balances if balance.is_touched]
    pools = list(pools)
    funded = {pool.org_id: pool.funded for pool in pools if pool.funded}
    if not touched and not funded:
        return
    used: Counter[UUID] = Counter(funded)
    for balance in touched:
        used[balance.org_id] += balance.spent + balance.given
    lent = {pool.org_id: pool.lent for pool in pools}
    run(
        connection,
        _SPEND,
        allocation_ids=[balance.allocation_id for balance in touched],
        user_credits=[balance.spent for balance in touched],
        unheld=[balance.unheld for balance in touched],
        funded=[balance.lent - balance.given for balance in touched],
        org_ids=list(used),
        org_credits=list(used.values()),
        org_funded=[funded.get(org_id, 0) for org_id in used],
        org_lent=[lent[org_id] for org_id in used],
    )


def _request_row(report: Reported, now: datetime) -> tuple[object, ...]:
    event = report.event
    return (
        event.org_id,
        event.request_id,
        event.user_id,
        event.service_type,
        report.fingerprint,
        "charged",
        report.credits,
        event.occurred_at,
        now,
        now,
    )


def _attribution_row(charge: Charge, now: datetime) -> tuple[object, ...]:
    event = charge.report.event
    return (
        event.org_id,
        event.user_id,
        charge.allocation_id,
        charge.period_start,
        charge.credits,
        charge.overage,
        event.service_type,
        event.service_name,
        event.variant,
        event.quantity,
        event.api_cost or _NOTHING,
        charge.markup,
        event.key_source.value,
        event.request_id,
        Jsonb(event.metadata, to_json),
        event.source,
        now,
        event.occurred_at,
    )
