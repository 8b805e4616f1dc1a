"""What must hold of the books: invariants I1 to I7, as queries for rows that break them.

A sound ledger has none of them. A row names its organization, itself, what is recorded and what is
computed from the movements. Queries read `%(now)b`, and `%(org_id)b` to look at one organization
only: null means all, and the planner drops the condition.
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Check:
    """One statement about the whole ledger, and the query for rows that contradict it."""

    name: str
    invariant: str
    meaning: str
    sql: str


_CHARGED = Check(
    "requests.charged",
    "I1",
    "a charged request has an attribution of the same user and credits, and the other way round",
    """
    SELECT
        coalesce(r.org_id, a.org_id),
        format('request %%s of org %%s', coalesce(r.request_id, a.request_id),
            coalesce(r.org_id, a.org_id)),
        coalesce('charged ' || r.credits || ' to ' || r.user_id, 'no charged request'),
        coalesce('attributed ' || a.credits_used || ' to ' || a.user_id, 'no attribution')
    FROM (
        SELECT org_id, request_id, user_id, credits
        FROM usage_requests
        WHERE state = 'charged' AND (%(org_id)b::uuid IS NULL OR org_id = %(org_id)b)
    ) r
    FULL JOIN (
        SELECT org_id, request_id, user_id, credits_used
        FROM credit_usage_attribution
        WHERE corrects IS NULL AND (%(org_id)b::uuid IS NULL OR org_id = %(org_id)b)
    ) a ON a.org_id = r.org_id AND a.request_id = r.request_id
    WHERE (a.credits_used, a.user_id) IS DISTINCT FROM (r.credits, r.user_id)
    """,
)

# If the check above holds, a request that was charged twice shows in the counts alone. Only then it
# is worth the search.
_CHARGED_ONCE = Check(
    "requests.charged_once",
    "I1",
    "no request is charged twice",
    """
    SELECT
        org_id,
        format('request %%s of org %%s', request_id, org_id),
        count(*) || ' attributions',
        '1 attribution'
    FROM credit_usage_attribution
    WHERE corrects IS NULL AND (%(org_id)b::uuid IS NULL OR org_id = %(org_id)b)
        AND (
            SELECT count(*)
            FROM credit_usage_attribution
            WHERE corrects IS NULL AND (%(org_id)b::uuid IS NULL OR org_id = %(org_id)b)
        ) <> (
            SELECT count(*)
            FROM usage_requests
            WHERE state = 'charged' AND (%(org_id)b::uuid IS NULL OR org_id = %(org_id)b)
        )
    GROUP BY org_id, request_id
    HAVING count(*) > 1
    """,
)

_DEAD_KEPT = Check(
    "requests.dead",
    "I1",
    "every dead request has its open dead letter, and every open one its dead request",
    """
    SELECT
        coalesce(r.org_id, d.org_id),
        format('request %%s of org %%s', coalesce(r.request_id, d.request_id),
            coalesce(r.org_id, d.org_id)),
        coalesce(r.state, 'no dead request'),
        coalesce('dead letter ' || d.id, 'no open dead letter')
    FROM (
        SELECT *
        FROM usage_requests
        WHERE state = 'dead' AND (%(org_id)b::uuid IS NULL OR org_id = %(org_id)b)
    ) r
    FULL JOIN (
        SELECT *
        FROM dead_letters
        WHERE state = 'open' AND fingerprint IS NOT NULL AND reason <> 'request_id_conflict'
            AND (%(org_id)b::uuid IS NULL OR org_id = %(org_id)b)
    ) d ON d.org_id = r.org_id AND d.request_id = r.request_id AND d.fingerprint = r.fingerprint
    WHERE r.request_id IS NULL OR d.id IS NULL
    """,
)

_DISCARDED_KEPT = Check(
    "requests.discarded",
    "I1",
    "every discarded request has its discarded dead letter",
    """
    SELECT
        r.org_id,
        format('request %%s of org %%s', r.request_id, r.org_id),
        r.state,
        'no discarded dead letter'
    FROM usage_requests r
    WHERE r.state = 'discarded' AND (%(org_id)b::uuid IS NULL OR r.org_id = %(org_id)b)
        AND NOT EXISTS (
            SELECT FROM dead_letters d
            WHERE d.org_id = r.org_id AND d.request_id = r.request_id AND d.state = 'discarded'
        )
    """,
)

_LETTERS_CHARGED = Check(
    "letters.charged",
    "I1",
    "every charged dead letter has its charged request",
    """
    SELECT
        d.org_id,
        format('dead letter %%s, request %%s of org %%s', d.id, d.request_id, d.org_id),
        d.state,
        coalesce('request ' || r.state, 'no request')
    FROM dead_letters d
    LEFT JOIN usage_requests r ON r.org_id = d.org_id AND r.request_id = d.request_id
    WHERE d.state = 'charged' AND d.request_id IS NOT NULL
        AND (%(org_id)b::uuid IS NULL OR d.org_id = %(org_id)b)
        AND r.state IS DISTINCT FROM 'charged'
    """,
)

_ALLOCATION_USED = Check(
    "allocations.used",
    "I2",
    "an allocation's used credits are the sum of its attributions of the running period",
    """
    SELECT
        l.org_id,
        format('allocation of %%s in org %%s', l.user_id, l.org_id),
        l.used_credits::text,
        coalesce(a.credits, 0)::text
    FROM user_credit_allocations l
    LEFT JOIN (
        SELECT allocation_id, period_start, sum(credits_used) AS credits
        FROM credit_usage_attribution
        WHERE (%(org_id)b::uuid IS NULL OR org_id = %(org_id)b)
        GROUP BY allocation_id, period_start
    ) a ON a.allocation_id = l.id AND a.period_start = l.last_reset_date
    WHERE (%(org_id)b::uuid IS NULL OR l.org_id = %(org_id)b)
        AND l.used_credits <> coalesce(a.credits, 0)
    """,
)

_PERIOD_USED = Check(
    "periods.used",
    "I2",
    "a closed period's used credits are the sum of its attributions, and each belongs to a period",
    """
    SELECT
        l.org_id,
        format('period of %%s from %%s in org %%s', l.user_id,
            coalesce(p.period_start, a.period_start), l.org_id),
        coalesce(p.used_credits::text, 'no such period'),
        coalesce(a.credits, 0)::text
    FROM (
        SELECT p.allocation_id, p.period_start, p.used_credits
        FROM allocation_periods p
        JOIN user_credit_allocations l ON l.id = p.allocation_id
        WHERE (%(org_id)b::uuid IS NULL OR l.org_id = %(org_id)b)
    ) p
    FULL JOIN (
        SELECT u.allocation_id, u.period_start, sum(u.credits_used) AS credits
        FROM credit_usage_attribution u
        JOIN user_credit_allocations l ON l.id = u.allocation_id
        WHERE u.period_start <> l.last_reset_date
            AND (%(org_id)b::uuid IS NULL OR l.org_id = %(org_id)b)
        GROUP BY u.allocation_id, u.period_start
    ) a ON a.allocation_id = p.allocation_id AND a.period_start = p.period_start
    JOIN user_credit_allocations l ON l.id = coalesce(p.allocation_id, a.allocation_id)
    WHERE p.used_credits IS NULL OR p.used_credits <> coalesce(a.credits, 0)
    """,
)

_ALLOCATION_HELD = Check(
    "allocations.held",
    "I2",
    "an allocation's held credits are the sum of its open holds",
    """
    SELECT
        coalesce(l.org_id, h.org_id),
        format('allocation of %%s in org %%s', coalesce(l.user_id, h.user_id),
            coalesce(l.org_id, h.org_id)),
        coalesce(l.held_credits::text, 'no allocation'),
        coalesce(h.credits, 0)::text
    FROM (
        SELECT org_id, user_id, held_credits
        FROM user_credit_allocations
        WHERE (%(org_id)b::uuid IS NULL OR org_id = %(org_id)b)
    ) l
    FULL JOIN (
        SELECT org_id, user_id, sum(held_credits) AS credits
        FROM usage_requests
        WHERE state = 'held' AND (%(org_id)b::uuid IS NULL OR org_id = %(org_id)b)
        GROUP BY org_id, user_id
    ) h ON h.org_id = l.org_id AND h.user_id = l.user_id
    WHERE coalesce(l.held_credits, 0) <> coalesce(h.credits, 0)
    """,
)

_POOL_USED = Check(
    "pools.used",
    "I2",
    "a pool's used credits are the sum of all attributions of its organization",
    """
    SELECT
        coalesce(p.org_id, a.org_id),
        format('pool of org %%s', coalesce(p.org_id, a.org_id)),
        coalesce(p.used_credits::text, 'no pool'),
        coalesce(a.credits, 0)::text
    FROM (
        SELECT org_id, used_credits
        FROM organization_credit_pools
        WHERE (%(org_id)b::uuid IS NULL OR org_id = %(org_id)b)
    ) p
    FULL JOIN (
        SELECT org_id, sum(credits_used) AS credits
        FROM credit_usage_attribution
        WHERE (%(org_id)b::uuid IS NULL OR org_id = %(org_id)b)
        GROUP BY org_id
    ) a ON a.org_id = p.org_id
    WHERE p.used_credits IS NULL OR p.used_credits <> coalesce(a.credits, 0)
    """,
)

_CORRECTED = Check(
    "corrections.charge",
    "I2",
    "a correction points to an attribution of the same organization and request",
    """
    SELECT
        c.org_id,
        format('attribution %%s', c.id),
        format('correction of request %%s of org %%s', c.request_id, c.org_id),
        coalesce(
            format('corrects request %%s of org %%s', o.request_id, o.org_id),
            'corrects nothing'
        )
    FROM credit_usage_attribution c
    LEFT JOIN credit_usage_attribution o ON o.id = c.corrects
    WHERE c.corrects IS NOT NULL AND (%(org_id)b::uuid IS NULL OR c.org_id = %(org_id)b)
        AND (c.org_id, c.request_id) IS DISTINCT FROM (o.org_id, o.request_id)
    """,
)

_NET_CHARGE = Check(
    "corrections.net",
    "I2",
    "no more is given back of a request than it was charged",
    """
    SELECT
        a.org_id,
        format('request %%s of org %%s', a.request_id, a.org_id),
        format('%%s charged', coalesce(sum(a.credits_used) FILTER (WHERE a.corrects IS NULL), 0)),
        format('%%s after corrections', sum(a.credits_used))
    FROM credit_usage_attribution a
    JOIN (
        SELECT DISTINCT org_id, request_id
        FROM credit_usage_attribution
        WHERE corrects IS NOT NULL AND (%(org_id)b::uuid IS NULL OR org_id = %(org_id)b)
    ) c ON c.org_id = a.org_id AND c.request_id = a.request_id
    GROUP BY a.org_id, a.request_id
    HAVING sum(a.credits_used) < 0
    """,
)

_POOL_TOTAL = Check(
    "pools.total",
    "I3",
    "a pool's total credits are what was added, and its allocated credits what was handed out",
    """
    SELECT
        coalesce(p.org_id, t.org_id),
        format('pool of org %%s', coalesce(p.org_id, t.org_id)),
        coalesce(
            'total ' || p.total_credits || ', allocated ' || p.allocated_credits, 'no pool'
        ),
        format('total %%s, allocated %%s', coalesce(t.added, 0), coalesce(t.handed_out, 0))
    FROM (
        SELECT org_id, total_credits, allocated_credits
        FROM organization_credit_pools
        WHERE (%(org_id)b::uuid IS NULL OR org_id = %(org_id)b)
    ) p
    FULL JOIN (
        SELECT
            org_id,
            sum(credits) FILTER (WHERE allocation_id IS NULL) AS added,
            sum(credits) FILTER (WHERE allocation_id IS NOT NULL) AS handed_out
        FROM credit_transactions
        WHERE (%(org_id)b::uuid IS NULL OR org_id = %(org_id)b)
        GROUP BY org_id
    ) t ON t.org_id = p.org_id
    WHERE (p.total_credits, p.allocated_credits)
        IS DISTINCT FROM (coalesce(t.added, 0), coalesce(t.handed_out, 0))
    """,
)

_ALLOCATION_FUNDED = Check(
    "allocations.funded",
    "I3",
    "an allocation's credits, with those used in closed periods, are what was handed to it",
    """
    SELECT
        l.org_id,
        format('allocation of %%s in org %%s', l.user_id, l.org_id),
        format('%%s, %%s in closed periods', l.allocated_credits, coalesce(p.credits, 0)),
        format('%%s handed to it', coalesce(t.credits, 0))
    FROM user_credit_allocations l
    LEFT JOIN (
        SELECT allocation_id, sum(used_credits) AS credits
        FROM allocation_periods
        GROUP BY allocation_id
    ) p ON p.allocation_id = l.id
    LEFT JOIN (
        SELECT allocation_id, sum(credits) AS credits
        FROM credit_transactions
        WHERE (%(org_id)b::uuid IS NULL OR org_id = %(org_id)b)
        GROUP BY allocation_id
    ) t ON t.allocation_id = l.id
    WHERE (%(org_id)b::uuid IS NULL OR l.org_id = %(org_id)b)
        AND l.allocated_credits + coalesce(p.credits, 0) <> coalesce(t.credits, 0)
    """,
)

_POOL_OVERAGE = Check(
    "pools.overage",
    "I3",
    "a pool's overage, billed or not, is what was lent and what was used of it",
    """
    SELECT
        p.org_id,
        format('pool of org %%s', p.org_id),
        format('lent %%s, used %%s', p.credits, p.credits),
        format('lent %%s, used %%s', coalesce(t.credits, 0), coalesce(a.credits, 0))
    FROM (
        SELECT org_id, overage_credits + overage_billed_credits AS credits
        FROM organization_credit_pools
        WHERE (%(org_id)b::uuid IS NULL OR org_id = %(org_id)b)
    ) p
    LEFT JOIN (
        SELECT org_id, sum(credits) AS credits
        FROM credit_transactions
        WHERE kind = 'overage' AND (%(org_id)b::uuid IS NULL OR org_id = %(org_id)b)
        GROUP BY org_id
    ) t ON t.org_id = p.org_id
    LEFT JOIN (
        SELECT org_id, sum(overage_credits) AS credits
        FROM credit_usage_attribution
        WHERE (%(org_id)b::uuid IS NULL OR org_id = %(org_id)b)
        GROUP BY org_id
    ) a ON a.org_id = p.org_id
    WHERE (coalesce(t.credits, 0), coalesce(a.credits, 0)) <> (p.credits, p.credits)
    """,
)

_FINGERPRINT = Check(
    "requests.fingerprint",
    "I4",
    "a charged request carries the fingerprint by which its replay is recognized",
    """
    SELECT
        org_id,
        format('request %%s of org %%s', request_id, org_id),
        encode(fingerprint, 'hex'),
        encode(usage_fingerprint(user_id, service_type, credits), 'hex')
    FROM usage_requests
    WHERE state = 'charged' AND (%(org_id)b::uuid IS NULL OR org_id = %(org_id)b)
        AND fingerprint <> usage_fingerprint(user_id, service_type, credits)
    """,
)

_HOLDS_EXPIRE = Check(
    "holds.overdue",
    "I5",
    "holds whose time is over are given back within ten minutes",
    """
    SELECT
        org_id,
        format('request %%s of org %%s', request_id, org_id),
        format('%%s credits held', held_credits),
        format('due at %%s', hold_expires_at)
    FROM usage_requests
    WHERE state = 'held' AND hold_expires_at < %(now)b - interval '10 minutes'
        AND (%(org_id)b::uuid IS NULL OR org_id = %(org_id)b)
    """,
)

_PERIODS_JOIN = Check(
    "periods.contiguous",
    "I6",
    "an allocation's closed periods follow each other up to the running one",
    """
    SELECT
        org_id,
        format('period of %%s from %%s in org %%s', user_id, period_start, org_id),
        format('ends at %%s', period_end),
        format('the next one begins at %%s', next_start)
    FROM (
        SELECT
            l.org_id, l.user_id, p.period_start, p.period_end,
            lead(p.period_start, 1, l.last_reset_date) OVER (
                PARTITION BY p.allocation_id ORDER BY p.period_start
            ) AS next_start
        FROM allocation_periods p
        JOIN user_credit_allocations l ON l.id = p.allocation_id
        WHERE (%(org_id)b::uuid IS NULL OR l.org_id = %(org_id)b)
    ) periods
    WHERE period_end <> next_start
    """,
)

_RESETS_DONE = Check(
    "resets.overdue",
    "I6",
    "active allocations are reset within ten minutes of the time",
    """
    SELECT
        org_id,
        format('allocation of %%s in org %%s', user_id, org_id),
        format('reset at %%s', last_reset_date),
        format('due at %%s', next_reset_date)
    FROM user_credit_allocations
    WHERE is_active AND reset_period <> 'never'
        AND next_reset_date < %(now)b - interval '10 minutes'
        AND (%(org_id)b::uuid IS NULL OR org_id = %(org_id)b)
    """,
)

_ATTRIBUTION_OWNER = Check(
    "attributions.owner",
    "I7",
    "an attribution names the organization and user of its allocation",
    """
    SELECT
        m.org_id,
        format('attribution %%s', m.id),
        format('%%s in org %%s', m.user_id, m.org_id),
        format('%%s in org %%s', l.user_id, l.org_id)
    FROM credit_usage_attribution m
    JOIN user_credit_allocations l ON l.id = m.allocation_id
    WHERE (m.org_id, m.user_id) IS DISTINCT FROM (l.org_id, l.user_id)
        AND (%(org_id)b::uuid IS NULL OR m.org_id = %(org_id)b)
    """,
)

_TRANSACTION_OWNER = Check(
    "transactions.owner",
    "I7",
    "a movement of an allocation names its organization and user",
    """
    SELECT
        m.org_id,
        format('transaction %%s', m.id),
        format('%%s in org %%s', m.user_id, m.org_id),
        format('%%s in org %%s', l.user_id, l.org_id)
    FROM credit_transactions m
    JOIN user_credit_allocations l ON l.id = m.allocation_id
    WHERE (m.org_id, m.user_id) IS DISTINCT FROM (l.org_id, l.user_id)
        AND (%(org_id)b::uuid IS NULL OR m.org_id = %(org_id)b)
    """,
)

CHECKS: Final = (
    _CHARGED,
    _CHARGED_ONCE,
    _DEAD_KEPT,
    _DISCARDED_KEPT,
    _LETTERS_CHARGED,
    _ALLOCATION_USED,
    _PERIOD_USED,
    _ALLOCATION_HELD,
    _POOL_USED,
    _CORRECTED,
    _NET_CHARGE,
    _POOL_TOTAL,
    _ALLOCATION_FUNDED,
    _POOL_OVERAGE,
    _FINGERPRINT,
    _HOLDS_EXPIRE,
    _PERIODS_JOIN,
    _RESETS_DONE,
    _ATTRIBUTION_OWNER,
    _TRANSACTION_OWNER,
)

# Every organization is named before any is named twice, so that a large drift hides no small one.
