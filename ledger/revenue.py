"""Revenue: what all organizations together pay, and what each has and uses.

MRR is what subscriptions bring in during an average month, ARR twelve times that. Counted are those
that are `active` or `past_due`, until they end. Not counted are trials and paused ones, which are
not billed now, and test organizations, which never are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Final
from uuid import UUID

from pydantic import BaseModel, ConfigDict
from sqlalchemy import Connection

from ledger.billing import BillingCycle, Status, monthly_revenue
from ledger.database import Database, run
from schema.money import Usd
from schema.periods import MONTHS_PER_YEAR
from schema.plans import PlanName

_ORGANIZATIONS: Final = """
    SELECT
        o.id AS org_id, o.name AS org_name, o.is_test, s.subscription_plan, s.monthly_price,
        s.status AS subscription_status,
        coalesce(p.total_credits, 0) AS total_credits,
        coalesce(p.used_credits, 0) AS used_credits,
        coalesce(m.member_count, 0) AS member_count,
        coalesce(p.lifetime_spent_amount, 0) AS lifetime_spent
    FROM organizations o
    LEFT JOIN organization_subscriptions s
        ON s.org_id = o.id AND s.status IN ('active', 'trialing', 'past_due', 'paused')
    LEFT JOIN organization_credit_pools p ON p.org_id = o.id
    LEFT JOIN (
        SELECT org_id, count(*) AS member_count FROM organization_members GROUP BY org_id
    ) m ON m.org_id = o.id
    ORDER BY o.name
"""

_PAYING: Final = """
    SELECT s.subscription_plan, s.monthly_price, s.billing_cycle, s.cycle_days, count(*)
    FROM organization_subscriptions s
    JOIN organizations o ON o.id = s.org_id AND NOT o.is_test
    WHERE s.status IN ('active', 'past_due')
    GROUP BY s.subscription_plan, s.monthly_price, s.billing_cycle, s.cycle_days
"""


class _View(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class OrganizationFigures(_View):
    """An organization as the system admin sees it in a list."""

    org_id: UUID
    org_name: str
    is_test: bool
    """Whether it is never billed."""
    subscription_plan: PlanName | None
    """Of the live subscription; null without one."""
    monthly_price: Usd | None
    """In USD."""
    subscription_status: Status | None
    total_credits: int
    used_credits: int
    member_count: int
    lifetime_spent: Usd
    """What it paid for credits, in USD."""


class RevenueMetrics(_View):
    """Recurring revenue, in USD."""

    total_mrr: Usd
    """A month."""
    total_arr: Usd
    """A year."""
    active_subscriptions: int
    """Those that are counted in it."""


class PlanShare(_View):
    """What the subscriptions of one plan bring in."""

    plan: PlanName
    count: int
    mrr: Usd
    """USD a month."""


class SystemOverview(_View):
    """All organizations by name, test ones included, and the revenue from those that pay."""

    organizations: list[OrganizationFigures]
    revenue_metrics: RevenueMetrics
    subscription_distribution: list[PlanShare]
    """Plans with subscriptions that are counted, by name."""


@dataclass(frozen=True, slots=True)
class _Terms:
    """Terms that so many subscriptions have."""

    plan: PlanName
    mrr: Decimal
    count: int


def overview(database: Database) -> SystemOverview:
    """All organizations and their revenue at one moment."""
    with database.snapshot() as connection:
        organizations = [
            OrganizationFigures.model_validate(dict(row))
            for row in run(connection, _ORGANIZATIONS).mappings()
        ]
        paying = _paying(connection)
    total = _mrr(paying)
    return SystemOverview(
        organizations=organizations,
        revenue_metrics=RevenueMetrics(
            total_mrr=total,
            total_arr=total * MONTHS_PER_YEAR,
            active_subscriptions=sum(terms.count for terms in paying),
        ),
        subscription_distribution=_distribution(paying),
    )


def _paying(connection: Connection) -> list[_Terms]:
    return [
        _Terms(PlanName(plan), monthly_revenue(price, BillingCycle(cycle), days), count)
        for plan, price, cycle, days, count in run(connection, _PAYING)
    ]


def _distribution(paying: Sequence[_Terms]) -> list[PlanShare]:
    shares = []
    for plan in sorted({terms.plan for terms in paying}):
        of_plan = [terms for terms in paying if terms.plan is plan]
        count = sum(terms.count for terms in of_plan)
        shares.append(PlanShare(plan=plan, count=count, mrr=_mrr(of_plan)))
    return shares


def _mrr(paying: Sequence[_Terms]) -> Decimal:
    return sum((terms.mrr * terms.count for terms in paying), Decimal(0))
