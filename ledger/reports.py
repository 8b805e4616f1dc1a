"""What was used, by whom and for what, read from the ledger."""

from collections.abc import Mapping, Sequence
from typing import Any, Final
from uuid import UUID

from ledger.database import Database, run

_BALANCES: Final = """
    SELECT user_id, allocated_credits, used_credits, held_credits, remaining_credits
    FROM user_credit_allocations
    WHERE org_id = %(org_id)s
    ORDER BY user_id
"""

_BY_SERVICE: Final = """
    SELECT
        service_type,
        count(*) AS requests,
        sum(credits_used)::bigint AS credits,
        sum(api_cost) AS api_cost,
        sum(markup_applied) AS markup,
        sum(total_cost) AS total_cost
    FROM credit_usage_attribution
    WHERE org_id = %(org_id)s
    GROUP BY service_type
    ORDER BY credits DESC, service_type
"""

_DEAD_BY_REASON: Final = """
    SELECT
        reason,
        count(*) AS letters,
        count(DISTINCT user_id) AS users,
        min(detail) AS example
    FROM dead_letters
    WHERE state = 'open' AND (org_id = %(org_id)s OR org_id IS NULL)
    GROUP BY reason
    ORDER BY letters DESC, reason
"""

_OUTCOMES: Final = """
    SELECT request_id, state FROM usage_requests WHERE org_id = %(org_id)s
"""

Rows = Sequence[Mapping[str, Any]]


def balances(database: Database, org_id: UUID) -> Rows:
    """The allocations of an organization, in credits."""
    return _rows(database, _BALANCES, org_id)


def usage_by_service(database: Database, org_id: UUID) -> Rows:
    """Requests, credits and costs (USD) of each service, over all time."""
    return _rows(database, _BY_SERVICE, org_id)


def dead_letters_by_reason(database: Database, org_id: UUID) -> Rows:
    """Open dead letters of an organization, and those that name none, with an example each."""
    return _rows(database, _DEAD_BY_REASON, org_id)


def outcomes(database: Database, org_id: UUID) -> dict[str, str]:
    """The state of every request of an organization, by request id."""
    with database.snapshot() as connection:
        return dict(run(connection, _OUTCOMES, org_id=org_id).tuples().all())


def _rows(database: Database, sql: Any, org_id: UUID) -> Rows:  # noqa: ANN401 - literal SQL
    with database.snapshot() as connection:
        return [dict(row) for row in run(connection, sql, org_id=org_id).mappings()]
