"""How long the books of a large ledger take to reconcile (goal: a million charges in 10 s).

The ledger is made by SQL alone: 100 organizations of 100 users, a third of the charges in a period
that is closed. It is sound, since that is the case that counts: every row is read, none is named.
"""

import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import migrations
from ledger.database import Database, run
from ledger.reconcile import reconcile
from ops.servers import embedded_servers

GOAL_SECONDS: Final = 10.0

_ORGANIZATIONS: Final = """
    INSERT INTO organizations (id, name, display_name)
    SELECT md5('org' || n)::uuid, 'org-' || n, 'bench' FROM generate_series(0, 99) n
"""

_ALLOCATIONS: Final = """
    INSERT INTO user_credit_allocations (
        id, org_id, user_id, last_reset_date, next_reset_date, reset_anchor
    )
    SELECT
        md5('user' || n)::uuid, md5('org' || n %% 100)::uuid, 'user-' || n,
        date_trunc('day', now()), now() + interval '1 month', now() - interval '1 month'
    FROM generate_series(0, 9999) n
"""

_ATTRIBUTIONS: Final = """
    INSERT INTO credit_usage_attribution (
        org_id, user_id, allocation_id, credits_used, service_type, request_id, period_start,
        api_cost, markup_applied, request_metadata
    )
    SELECT
        md5('org' || n %% 100)::uuid, 'user-' || n %% 10000, md5('user' || n %% 10000)::uuid,
        1 + n %% 60, 'llm', 'req-' || md5(n::text)::uuid,
        date_trunc('day', now()) - CASE WHEN n %% 3 = 0 THEN interval '1 month' ELSE '0' END,
        0.0042, 0.0021, '{"operation": "summarize", "company_id": "c-4711", "cache_hit": false}'
    FROM generate_series(1, %(attributions)s) n
"""

_REQUESTS: Final = """
    INSERT INTO usage_requests (
        org_id, request_id, user_id, service_type, fingerprint, state, credits, occurred_at
    )
    SELECT
        org_id, request_id, user_id, service_type,
        usage_fingerprint(user_id, service_type, credits_used), 'charged', credits_used,
        occurred_at
    FROM credit_usage_attribution
"""

_CLOSED_PERIODS: Final = """
    INSERT INTO allocation_periods (
        allocation_id, period_start, period_end, allocated_credits, used_credits
    )
    SELECT a.id, u.period_start, a.last_reset_date, sum(u.credits_used), sum(u.credits_used)
    FROM user_credit_allocations a
    JOIN credit_usage_attribution u
        ON u.allocation_id = a.id AND u.period_start < a.last_reset_date
    GROUP BY a.id, u.period_start
"""

_FUND_ALLOCATIONS: Final = """
    UPDATE user_credit_allocations a
    SET used_credits = u.credits, allocated_credits = u.credits
    FROM (
        SELECT allocation_id, period_start, sum(credits_used) AS credits
        FROM credit_usage_attribution
        GROUP BY allocation_id, period_start
    ) u
    WHERE u.allocation_id = a.id AND u.period_start = a.last_reset_date
"""

_HAND_OUT: Final = """
    INSERT INTO credit_transactions (org_id, user_id, allocation_id, kind, credits)
    SELECT org_id, user_id, allocation_id, 'allocation', sum(credits_used)
    FROM credit_usage_attribution
    GROUP BY org_id, user_id, allocation_id
"""

_PURCHASE: Final = """
    INSERT INTO credit_transactions (org_id, kind, credits)
    SELECT org_id, 'purchase', sum(credits_used)
    FROM credit_usage_attribution
    GROUP BY org_id
"""

_POOLS: Final = """
    INSERT INTO organization_credit_pools (
        org_id, total_credits, allocated_credits, used_credits
    )
    SELECT org_id, credits, credits, credits
    FROM credit_transactions
    WHERE kind = 'purchase'
"""


@dataclass(frozen=True, slots=True)
class Figures:
    """What one reconciliation took."""

    charged: int
    seconds: float
    is_clean: bool


def measure_embedded(attributions: int) -> Figures:
    """Measure on an embedded server of its own."""
    with (
        tempfile.TemporaryDirectory(prefix="metering-bench-") as name,
        embedded_servers(Path(name)) as (postgres, _),
    ):
        postgres.ensure_database()
        migrations.upgrade(postgres.url)
        with closing(Database(postgres.url, pool_size=1, role="")) as owner:
            return measure(owner, attributions)


def measure(database: Database, attributions: int) -> Figures:
    """Fill an empty ledger with so many charges, and time one reconciliation of it.

    The database is to be opened by the owner of its tables, who may vacuum them.
    """
    build(database, attributions)
    started = time.perf_counter()
    report = reconcile(database)
    seconds = time.perf_counter() - started
    return Figures(report.figures["charged_requests"], seconds, report.is_clean)


def build(database: Database, attributions: int) -> None:
    """A sound ledger of so many charges, vacuumed as autovacuum would leave it."""
    with database.transaction() as connection:
        run(connection, "SET LOCAL statement_timeout = 0")
        for statement in (_ORGANIZATIONS, _ALLOCATIONS):
            run(connection, statement)
        run(connection, _ATTRIBUTIONS, attributions=attributions)
        for statement in (
            _REQUESTS,
            _CLOSED_PERIODS,
            _FUND_ALLOCATIONS,
            _HAND_OUT,
            _PURCHASE,
            _POOLS,
        ):
            run(connection, statement)
    with database.session() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT")
        run(connection, "SET statement_timeout = 0")
        run(connection, "VACUUM ANALYZE")
