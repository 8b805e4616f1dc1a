"""Apply a batch of usage events in one transaction (design decisions D4 to D6).

A batch costs the same few statements whatever its size: read the price book, lock the pools and
allocations, look up the request ids, copy the new rows in, add up the balances. Locks are
always taken pool first, then allocations, each in key order, so that drains, direct SQL calls and
top-ups wait for each other instead of deadlocking.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Final
from uuid import UUID

from psycopg.types.json import Jsonb
from pydantic_core import to_json
from sqlalchemy import Connection

from ledger import deadletters, prices
from ledger.database import copy, run
from ledger.decisions import (
    Balance,
    Charge,
    Death,
    Entry,
    Key,
    Outcome,
    Reported,
    Seen,
    Verdicts,
    decide,
    read,
)
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

_ORGANIZATIONS: Final = """
    SELECT o.id, s.subscription_plan
    FROM organizations o
    LEFT JOIN organization_subscriptions s
        ON s.org_id = o.id AND s.status IN ('active', 'trialing', 'past_due', 'paused')
    WHERE o.id = ANY(%(org_ids)b)
"""

_LOCK_ALLOCATIONS: Final = """
    SELECT a.org_id, a.user_id, a.id, a.remaining_credits - a.held_credits, a.is_active
    FROM user_credit_allocations a
    JOIN unnest(%(org_ids)b::uuid[], %(user_ids)b::text[]) AS wanted (org_id, user_id)
        ON a.org_id = wanted.org_id AND a.user_id = wanted.user_id
    ORDER BY a.org_id, a.user_id
    FOR NO KEY UPDATE OF a
"""

_KNOWN_REQUESTS: Final = """
    SELECT
        r.org_id, r.request_id,
        r.fingerprint, r.state, r.user_id, r.service_type,
        CASE WHEN r.state = 'held' THEN r.held_credits ELSE 0 END
    FROM usage_requests r
    JOIN unnest(%(org_ids)b::uuid[], %(request_ids)b::text[]) AS wanted (org_id, request_id)
        ON r.org_id = wanted.org_id AND r.request_id = wanted.request_id
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
        org_id, user_id, allocation_id, credits_used, service_type, service_name, variant,
        quantity, api_cost, markup_applied, key_source, request_id, request_metadata, source,
        created_at, occurred_at
    )
    FROM STDIN (FORMAT BINARY)
"""
_ATTRIBUTION_TYPES: Final = (
    "uuid", "varchar", "uuid", "int8", "varchar", "varchar", "varchar",
    "numeric", "numeric", "numeric", "text", "varchar", "jsonb", "text",
    "timestamptz", "timestamptz",
)  # fmt: skip

_SETTLE_HOLDS: Final = """
    UPDATE usage_requests r
    SET state = 'charged',
        credits = settled.credits,
        fingerprint = settled.fingerprint,
        occurred_at = settled.occurred_at,
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
            held_credits = a.held_credits - spent.unheld
        FROM unnest(
            %(allocation_ids)b::uuid[], %(user_credits)b::bigint[], %(unheld)b::bigint[]
        ) AS spent (id, credits, unheld)
        WHERE a.id = spent.id
    )
    UPDATE organization_credit_pools p
    SET used_credits = p.used_credits + spent.credits
    FROM unnest(%(org_ids)b::uuid[], %(org_credits)b::bigint[]) AS spent (org_id, credits)
    WHERE p.org_id = spent.org_id
"""

_DIE: Final = """
    INSERT INTO usage_requests (
        org_id, request_id, user_id, service_type, fingerprint, state, credits, reason,
        occurred_at, created_at, settled_at
    )
    SELECT
        org_id, request_id, user_id, service_type, fingerprint, 'dead', credits, reason,
        occurred_at, %(now)b, %(now)b
    FROM unnest(
        %(org_id)b::uuid[], %(request_id)b::text[], %(user_id)b::text[], %(service_type)b::text[],
        %(fingerprint)b::bytea[], %(credits)b::bigint[], %(reason)b::text[],
        %(occurred_at)b::timestamptz[]
    ) AS dead (
        org_id, request_id, user_id, service_type, fingerprint, credits, reason, occurred_at
    )
    ON CONFLICT (org_id, request_id) DO UPDATE
    SET state = excluded.state,
        fingerprint = excluded.fingerprint,
        credits = excluded.credits,
        reason = excluded.reason,
        occurred_at = excluded.occurred_at,
        settled_at = excluded.settled_at
    WHERE usage_requests.state IN ('held', 'released', 'expired')
"""


def apply_batch(connection: Connection, entries: Sequence[Entry], now: datetime) -> Outcome:
    """Charge or dead-letter every entry, once each, in one transaction.

    An entry that was dealt with before, in this batch or ever, changes nothing. The result equals
    calling `deduct_credits()` for each event in order.

    Args:
        connection: a connection without an open transaction; this function commits.
        entries: the events, in the order in which they were sent.
        now: the time of the decision, and of the rows written.

    Raises:
        sqlalchemy.exc.DBAPIError: PostgreSQL refused; nothing was written.
    """
    with connection.begin():
        reports, deaths = read(entries, prices.book(connection))
        verdicts = Verdicts(deaths=deaths)
        if reports:
            organizations = _lock_organizations(connection, reports)
            balances = _lock_allocations(connection, reports)
            seen = _known_requests(connection, reports)
            decide(
                reports,
                seen=seen,
                organizations=organizations,
                balances=balances,
                now=now,
                verdicts=verdicts,
            )
            _write_charges(connection, verdicts.charges, now)
            _write_balances(connection, balances.values())
        _write_deaths(connection, verdicts.deaths, now)
    return verdicts.counts()


def _lock_organizations(
    connection: Connection, reports: Sequence[Reported]
) -> dict[int, PlanName | None]:
    org_ids = list({report.event.org_id.int: report.event.org_id for report in reports}.values())
    run(connection, _LOCK_POOLS, org_ids=org_ids)
    rows = run(connection, _ORGANIZATIONS, org_ids=org_ids).fetchall()
    return {org_id.int: PlanName(plan) if plan else None for org_id, plan in rows}


def _lock_allocations(connection: Connection, reports: Sequence[Reported]) -> dict[Key, Balance]:
    events = {report.user_key: report.event for report in reports}.values()
    rows = run(
        connection,
        _LOCK_ALLOCATIONS,
        org_ids=[event.org_id for event in events],
        user_ids=[event.user_id for event in events],
    )
    return {
        (org_id.int, user_id): Balance(org_id, allocation_id, available, is_active)
        for org_id, user_id, allocation_id, available, is_active in rows.fetchall()
    }


def _known_requests(connection: Connection, reports: Sequence[Reported]) -> dict[Key, Seen]:
    events = {report.request_key: report.event for report in reports}.values()
    rows = run(
        connection,
        _KNOWN_REQUESTS,
        org_ids=[event.org_id for event in events],
        request_ids=[event.request_id for event in events],
    )
    return {
        (org_id.int, request_id): Seen(*known) for org_id, request_id, *known in rows.fetchall()
    }


def _write_charges(connection: Connection, charges: Sequence[Charge], now: datetime) -> None:
    if charges:
        _settle_holds(connection, [charge.report for charge in charges if charge.settles], now)
        requests = (_request_row(charge.report, now) for charge in charges if not charge.settles)
        copy(connection, _CHARGED_REQUESTS, _REQUEST_TYPES, requests)
        attributions = (_attribution_row(charge, now) for charge in charges)
        copy(connection, _ATTRIBUTIONS, _ATTRIBUTION_TYPES, attributions)


def _settle_holds(connection: Connection, reports: Sequence[Reported], now: datetime) -> None:
    if reports:
        run(
            connection,
            _SETTLE_HOLDS,
            now=now,
            org_ids=[report.event.org_id for report in reports],
            request_ids=[report.event.request_id for report in reports],
            credits=[report.credits for report in reports],
            fingerprints=[report.fingerprint for report in reports],
            occurred_at=[report.event.occurred_at for report in reports],
        )


def _write_balances(connection: Connection, balances: Iterable[Balance]) -> None:
    touched = [balance for balance in balances if balance.spent or balance.unheld]
    if not touched:
        return
    by_organization: Counter[UUID] = Counter()
    for balance in touched:
        by_organization[balance.org_id] += balance.spent
    run(
        connection,
        _SPEND,
        allocation_ids=[balance.allocation_id for balance in touched],
        user_credits=[balance.spent for balance in touched],
        unheld=[balance.unheld for balance in touched],
        org_ids=list(by_organization),
        org_credits=list(by_organization.values()),
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
        charge.credits,
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


def _write_deaths(connection: Connection, deaths: Sequence[Death], now: datetime) -> None:
    if not deaths:
        return
    dead = [(d.report, d.reason) for d in deaths if d.report is not None and d.takes_request_id]
    if dead:
        run(
            connection,
            _DIE,
            now=now,
            org_id=[report.event.org_id for report, _ in dead],
            request_id=[report.event.request_id for report, _ in dead],
            user_id=[report.event.user_id for report, _ in dead],
            service_type=[report.event.service_type for report, _ in dead],
            fingerprint=[report.fingerprint for report, _ in dead],
            credits=[report.credits for report, _ in dead],
            reason=[reason.value for _, reason in dead],
            occurred_at=[report.event.occurred_at for report, _ in dead],
        )
    deadletters.bury(connection, deaths, now)
