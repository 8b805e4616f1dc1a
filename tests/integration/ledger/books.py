"""The sums that every act of the ledger must leave true, by SQL over all organizations."""

from typing import Final

from tests.integration.ledger.world import World

SUMS: Final = {
    "total, allocated, used and overage credits of pools": """
        SELECT
            p.org_id,
            p.total_credits <> coalesce(t.pool, 0) AS total_is_off,
            p.allocated_credits <> coalesce(t.users, 0) AS allocated_is_off,
            p.used_credits <> coalesce(u.credits, 0) AS used_is_off,
            p.overage_credits + p.overage_billed_credits
                <> coalesce(t.overage, 0) AS overage_is_off,
            coalesce(t.overage, 0) <> coalesce(u.overage, 0) AS attributed_overage_is_off
        FROM organization_credit_pools p
        LEFT JOIN (
            SELECT
                org_id,
                sum(credits) FILTER (WHERE allocation_id IS NULL) AS pool,
                sum(credits) FILTER (WHERE allocation_id IS NOT NULL) AS users,
                sum(credits) FILTER (WHERE kind = 'overage') AS overage
            FROM credit_transactions
            GROUP BY org_id
        ) t ON t.org_id = p.org_id
        LEFT JOIN (
            SELECT org_id, sum(credits_used) AS credits, sum(overage_credits) AS overage
            FROM credit_usage_attribution
            GROUP BY org_id
        ) u ON u.org_id = p.org_id
    """,
    "allocated, used and held credits of allocations": """
        SELECT
            a.org_id, a.user_id,
            a.allocated_credits + (
                SELECT coalesce(sum(c.used_credits), 0)
                FROM allocation_periods c
                WHERE c.allocation_id = a.id
            ) <> (
                SELECT coalesce(sum(t.credits), 0)
                FROM credit_transactions t
                WHERE t.allocation_id = a.id
            ) AS allocated_is_off,
            a.used_credits <> (
                SELECT coalesce(sum(u.credits_used), 0)
                FROM credit_usage_attribution u
                WHERE u.allocation_id = a.id AND u.period_start = a.last_reset_date
            ) AS used_is_off,
            a.held_credits <> (
                SELECT coalesce(sum(r.held_credits), 0)
                FROM usage_requests r
                WHERE r.org_id = a.org_id AND r.user_id = a.user_id AND r.state = 'held'
            ) AS held_is_off
        FROM user_credit_allocations a
    """,
    "used credits of closed periods": """
        SELECT
            c.allocation_id, c.period_start,
            c.used_credits <> (
                SELECT coalesce(sum(u.credits_used), 0)
                FROM credit_usage_attribution u
                WHERE u.allocation_id = c.allocation_id AND u.period_start = c.period_start
            ) AS used_is_off
        FROM allocation_periods c
    """,
}


def assert_balanced(world: World) -> None:
    """Fail with the rows whose recorded figures are not what the movements add up to."""
    off = [
        (subject, row)
        for subject, query in SUMS.items()
        for row in world.sql.execute(query.encode())
        if any(value is True for value in row.values())
    ]
    assert off == []
