"""Proof that the books are right: invariants I1 to I3, checked in one snapshot (design.md).

Each check is a query that returns the rows which break it; a sound ledger returns none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from ledger.clock import utc_now
from ledger.database import Database, run


@dataclass(frozen=True, slots=True)
class Check:
    """One statement about the whole ledger, and the query for rows that contradict it."""

    name: str
    invariant: str
    meaning: str
    sql: str


@dataclass(frozen=True, slots=True)
class Drift:
    """One row that is off: what is recorded, and what the movements add up to."""

    check: str
    subject: str
    recorded: str
    computed: str


@dataclass(frozen=True, slots=True)
class Report:
    """The result of a reconciliation; `taken_at` is the moment of the snapshot."""

    taken_at: datetime
    checks: Sequence[Check]
    drifts: Sequence[Drift]
    figures: dict[str, int]

    @property
    def is_clean(self) -> bool:
        """Whether no row is off."""
        return not self.drifts


MAX_DRIFTS_PER_CHECK: Final = 100

_CHARGED_ONCE = Check(
    "requests.charged",
    "I1",
    "every charged request has exactly one attribution, of the same credits",
    """
    SELECT
        format('request %%s of org %%s', coalesce(r.request_id, a.request_id),
            coalesce(r.org_id, a.org_id)),
        coalesce(r.state || ' ' || r.credits, 'no request'),
        coalesce(a.number || ' attributions, ' || a.credits || ' credits', 'no attribution')
    FROM (SELECT * FROM usage_requests WHERE state = 'charged') r
    FULL JOIN (
        SELECT org_id, request_id, count(*) AS number, sum(credits_used) AS credits
        FROM credit_usage_attribution
        GROUP BY org_id, request_id
    ) a ON a.org_id = r.org_id AND a.request_id = r.request_id
    WHERE a.number IS DISTINCT FROM 1 OR a.credits IS DISTINCT FROM r.credits
    """,
)

_DEAD_KEPT = Check(
    "requests.dead",
    "I1",
    "every dead request has its open dead letter, and every open one its dead request",
    """
    SELECT
        format('request %%s of org %%s', coalesce(r.request_id, d.request_id),
            coalesce(r.org_id, d.org_id)),
        coalesce(r.state, 'no dead request'),
        coalesce('dead letter ' || d.id, 'no open dead letter')
    FROM (SELECT * FROM usage_requests WHERE state = 'dead') r
    FULL JOIN (
        SELECT * FROM dead_letters
        WHERE state = 'open' AND fingerprint IS NOT NULL AND reason <> 'request_id_conflict'
    ) d ON d.org_id = r.org_id AND d.request_id = r.request_id AND d.fingerprint = r.fingerprint
    WHERE r.request_id IS NULL OR d.id IS NULL
    """,
)

_ALLOCATION_USED = Check(
    "allocations.used",
    "I2",
    "an allocation's used credits are the sum of its attributions",
    """
    SELECT
        format('allocation of %%s in org %%s', l.user_id, l.org_id),
        l.used_credits::text,
        coalesce(a.credits, 0)::text
    FROM user_credit_allocations l
    LEFT JOIN (
        SELECT allocation_id, sum(credits_used) AS credits
        FROM credit_usage_attribution
        GROUP BY allocation_id
    ) a ON a.allocation_id = l.id
    WHERE l.used_credits <> coalesce(a.credits, 0)
    """,
)

_ALLOCATION_HELD = Check(
    "allocations.held",
    "I2",
    "an allocation's held credits are the sum of its open holds",
    """
    SELECT
        format('allocation of %%s in org %%s', l.user_id, l.org_id),
        l.held_credits::text,
        coalesce(h.credits, 0)::text
    FROM user_credit_allocations l
    LEFT JOIN (
        SELECT org_id, user_id, sum(held_credits) AS credits
        FROM usage_requests
        WHERE state = 'held'
        GROUP BY org_id, user_id
    ) h ON h.org_id = l.org_id AND h.user_id = l.user_id
    WHERE l.held_credits <> coalesce(h.credits, 0)
    """,
)

_ATTRIBUTION_OWNER = Check(
    "attributions.owner",
    "I2",
    "an attribution names the organization and user of its allocation",
    """
    SELECT
        format('attribution %%s', a.id),
        a.user_id || ' in ' || a.org_id,
        l.user_id || ' in ' || l.org_id
    FROM credit_usage_attribution a
    JOIN user_credit_allocations l ON l.id = a.allocation_id
    WHERE (a.org_id, a.user_id) IS DISTINCT FROM (l.org_id, l.user_id::varchar)
    """,
)

_POOL_USED = Check(
    "pools.used",
    "I2",
    "a pool's used credits are the sum of all attributions of its organization",
    """
    SELECT format('pool of org %%s', p.org_id), p.used_credits::text, coalesce(a.credits, 0)::text
    FROM organization_credit_pools p
    LEFT JOIN (
        SELECT org_id, sum(credits_used) AS credits FROM credit_usage_attribution GROUP BY org_id
    ) a ON a.org_id = p.org_id
    WHERE p.used_credits <> coalesce(a.credits, 0)
    """,
)

_POOL_TOTAL = Check(
    "pools.total",
    "I3",
    "a pool's total credits are what was added, and its allocated credits what was handed out",
    """
    SELECT
        format('pool of org %%s', p.org_id),
        format('total %%s, allocated %%s', p.total_credits, p.allocated_credits),
        format('total %%s, allocated %%s', coalesce(t.added, 0), coalesce(t.handed_out, 0))
    FROM organization_credit_pools p
    LEFT JOIN (
        SELECT
            org_id,
            sum(credits) FILTER (WHERE kind <> 'allocation') AS added,
            sum(credits) FILTER (WHERE kind = 'allocation') AS handed_out
        FROM credit_transactions
        GROUP BY org_id
    ) t ON t.org_id = p.org_id
    WHERE (p.total_credits, p.allocated_credits)
        <> (coalesce(t.added, 0), coalesce(t.handed_out, 0))
    """,
)

_ALLOCATION_FUNDED = Check(
    "allocations.funded",
    "I3",
    "an allocation's credits are what was handed to it",
    """
    SELECT
        format('allocation of %%s in org %%s', l.user_id, l.org_id),
        l.allocated_credits::text,
        coalesce(t.credits, 0)::text
    FROM user_credit_allocations l
    LEFT JOIN (
        SELECT allocation_id, sum(credits) AS credits
        FROM credit_transactions
        WHERE kind = 'allocation'
        GROUP BY allocation_id
    ) t ON t.allocation_id = l.id
    WHERE l.allocated_credits <> coalesce(t.credits, 0)
    """,
)

CHECKS: Final = (
    _CHARGED_ONCE,
    _DEAD_KEPT,
    _ALLOCATION_USED,
    _ALLOCATION_HELD,
    _ATTRIBUTION_OWNER,
    _POOL_USED,
    _POOL_TOTAL,
    _ALLOCATION_FUNDED,
)

_FIGURES: Final = """
    SELECT
        (SELECT count(*) FROM organizations) AS organizations,
        (SELECT count(*) FROM usage_requests WHERE state = 'charged') AS charged_requests,
        (SELECT count(*) FROM usage_requests WHERE state = 'dead') AS dead_requests,
        (SELECT count(*) FROM dead_letters WHERE state = 'open') AS open_dead_letters,
        (SELECT coalesce(sum(credits_used), 0) FROM credit_usage_attribution)::bigint
            AS credits_charged
"""


def reconcile(database: Database) -> Report:
    """Recompute every balance from the movements, in one snapshot, and name the rows that differ.

    Reads only; safe to run under load. At most `MAX_DRIFTS_PER_CHECK` rows are named per check.
    """
    with database.snapshot() as connection:
        taken_at = utc_now()
        figures = dict(run(connection, _FIGURES).mappings().one())
        drifts = [
            Drift(check.name, *_texts(row))
            for check in CHECKS
            for row in run(connection, f"{check.sql} LIMIT {MAX_DRIFTS_PER_CHECK}").fetchall()
        ]
    return Report(taken_at, CHECKS, drifts, figures)


def _texts(row: Sequence[Any]) -> tuple[str, str, str]:
    subject, recorded, computed = row
    return str(subject), str(recorded), str(computed)
