"""What people see of their billing on one page: a user's organizations, or one organization.

Each is read in one snapshot, with as many statements however much there is. Usage counts by when
it occurred; corrections change the credits, and are no requests.
"""

from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from pydantic import BaseModel, ConfigDict
from sqlalchemy import Connection

from ledger import allocations, pools, subscriptions
from ledger.allocations import Allocation
from ledger.billing import Status, Subscription
from ledger.database import Database, run
from ledger.members import MemberRole
from ledger.pools import Pool
from schema.errors import NotFound
from schema.money import Usd
from schema.plans import PlanName

USAGE_SPAN: Final = timedelta(days=30)

_OF_USER: Final = """
    SELECT
        o.id AS org_id, o.name AS org_name, m.role, s.subscription_plan, s.monthly_price,
        coalesce(a.allocated_credits, 0) AS allocated_credits,
        coalesce(a.used_credits, 0) AS used_credits,
        coalesce(a.remaining_credits, 0) AS remaining_credits
    FROM organization_members m
    JOIN organizations o ON o.id = m.org_id
    LEFT JOIN organization_subscriptions s
        ON s.org_id = m.org_id AND s.status IN ('active', 'trialing', 'past_due', 'paused')
    LEFT JOIN user_credit_allocations a ON a.org_id = m.org_id AND a.user_id = m.user_id
    WHERE m.user_id = %(user_id)b::text
    ORDER BY o.name
"""

_USAGE_OF_USER: Final = """
    SELECT
        coalesce(sum(u.credits_used), 0)::bigint AS total_credits_used,
        count(DISTINCT u.org_id) AS org_count,
        count(*) FILTER (WHERE u.corrects IS NULL) AS request_count
    FROM credit_usage_attribution u
    WHERE u.org_id = ANY(%(org_ids)b::uuid[])
        AND u.user_id = %(user_id)b::text
        AND u.occurred_at >= %(since)b
"""

_ORGANIZATION: Final = """
    SELECT id, name, display_name, max_seats, status
    FROM organizations
    WHERE id = %(org_id)b
"""

# By user first: to count distinct users, PostgreSQL would sort every single row.
_USAGE_OF_ORGANIZATION: Final = """
    SELECT
        coalesce(sum(credits), 0)::bigint AS total_credits_used,
        count(*) AS active_users,
        coalesce(sum(requests), 0)::bigint AS total_requests
    FROM (
        SELECT
            sum(credits_used) AS credits,
            count(*) FILTER (WHERE corrects IS NULL) AS requests
        FROM credit_usage_attribution
        WHERE org_id = %(org_id)b AND occurred_at >= %(since)b
        GROUP BY user_id
    ) AS of_user
"""


class _View(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class UserOrganization(_View):
    """An organization of a user, and the user's credits in it."""

    org_id: UUID
    org_name: str
    role: MemberRole
    subscription_plan: PlanName | None
    """Of the live subscription; null without one."""
    monthly_price: Usd | None
    """In USD."""
    allocated_credits: int
    used_credits: int
    remaining_credits: int
    """Allocated and not used; open holds are still among them."""


class UserUsage(_View):
    """What a user used within 30 days, in organizations they belong to."""

    total_credits_used: int
    org_count: int
    """In how many of them they used anything."""
    request_count: int


class UserOverview(_View):
    """The organizations of a user, by name."""

    organizations: list[UserOrganization]
    total_usage_last_30_days: UserUsage


class OrganizationProfile(_View):
    """Who an organization is."""

    id: UUID
    name: str
    display_name: str
    max_seats: int
    status: str


class SubscriptionSummary(_View):
    """The live subscription or, failing that, the one canceled last."""

    plan: PlanName
    monthly_price: Usd
    """In USD."""
    status: Status
    current_period_end: datetime

    @classmethod
    def of(cls, subscription: Subscription) -> "SubscriptionSummary":
        """The summary of a subscription."""
        return cls(
            plan=subscription.subscription_plan,
            monthly_price=subscription.monthly_price,
            status=subscription.status,
            current_period_end=subscription.current_period_end,
        )


class OrganizationUsage(_View):
    """What an organization used within 30 days."""

    total_credits_used: int
    active_users: int
    """Those who used anything."""
    total_requests: int


class OrganizationOverview(_View):
    """An organization with its subscription, its pool and all its allocations, by user id."""

    organization: OrganizationProfile
    subscription: SubscriptionSummary | None
    """Null if it never had one."""
    credit_pool: Pool | None
    user_allocations: list[Allocation]
    usage_stats_30_days: OrganizationUsage


def of_user(database: Database, user_id: str, now: datetime) -> UserOverview:
    """The organizations that a user belongs to, and the user's usage in them."""
    with database.snapshot() as connection:
        organizations = [
            UserOrganization.model_validate(dict(row))
            for row in run(connection, _OF_USER, user_id=user_id).mappings()
        ]
        usage = run(
            connection,
            _USAGE_OF_USER,
            org_ids=[organization.org_id for organization in organizations],
            user_id=user_id,
            since=now - USAGE_SPAN,
        )
        return UserOverview(
            organizations=organizations,
            total_usage_last_30_days=UserUsage.model_validate(dict(usage.mappings().one())),
        )


def of_organization(database: Database, org_id: UUID, now: datetime) -> OrganizationOverview:
    """An organization's billing on one page.

    Raises:
        NotFound: there is no such organization.
    """
    with database.snapshot() as connection:
        profile = run(connection, _ORGANIZATION, org_id=org_id).mappings().one_or_none()
        if profile is None:
            raise NotFound(f"no organization {org_id}")
        subscription = subscriptions.find(connection, org_id)
        return OrganizationOverview(
            organization=OrganizationProfile.model_validate(dict(profile)),
            subscription=subscription and SubscriptionSummary.of(subscription),
            credit_pool=pools.find(connection, org_id),
            user_allocations=allocations.every(connection, org_id),
            usage_stats_30_days=_usage_of_organization(connection, org_id, now),
        )


def _usage_of_organization(
    connection: Connection, org_id: UUID, now: datetime
) -> OrganizationUsage:
    usage = run(connection, _USAGE_OF_ORGANIZATION, org_id=org_id, since=now - USAGE_SPAN)
    return OrganizationUsage.model_validate(dict(usage.mappings().one()))
