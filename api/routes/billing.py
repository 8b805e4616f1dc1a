"""`/billing`: what users, organizations and operators see (contract.md §4, rows 12-14, 18)."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query
from starlette.responses import Response

from api.access import CurrentUser, Grant, GuardedRoute, allows
from api.errors import documented
from api.models import CreditPool
from api.paging import PAGED, AskedWindow, answer
from api.resources import LedgerDatabase
from ledger import history, overviews, revenue
from ledger.billing import BillingEvent
from ledger.clock import utc_now
from ledger.history import HistoryEntry
from ledger.overviews import OrganizationOverview, UserOverview
from ledger.revenue import SystemOverview
from schema.events import Moment

router = APIRouter(prefix="/api/v1/org-billing/billing", tags=["billing"], route_class=GuardedRoute)


class UserBilling(UserOverview):
    """A user with their organizations, by name, and their usage in them."""

    user_id: str
    user_email: str | None
    """As the session tells it."""


class OrganizationBilling(OrganizationOverview):
    """An organization with its subscription, its pool and all its allocations, by user id."""

    credit_pool: CreditPool | None


@router.get(
    "/user",
    responses=documented(401, 403, 422, 429, 503),
    **allows(Grant.USER),
)
def of_user(user: CurrentUser, database: LedgerDatabase) -> UserBilling:
    """The user's organizations, what they may spend in each, and what they used in 30 days."""
    overview = overviews.of_user(database, user.id, utc_now())
    return UserBilling(user_id=user.id, user_email=user.email, **dict(overview))


@router.get(
    "/system",
    responses=documented(401, 403, 422, 429, 503),
    **allows(Grant.SYSTEM_ADMIN),
)
def of_system(database: LedgerDatabase) -> SystemOverview:
    """All organizations by name, and the recurring revenue.

    Revenue counts subscriptions that are active or past due, a custom cycle as what it brings in
    an average month. Trials and paused subscriptions do not count, and test organizations never.
    """
    return revenue.overview(database)


@router.get(
    "/org/{org_id}",
    response_model=OrganizationBilling,
    responses=documented(401, 403, 404, 422, 429, 503),
    **allows(Grant.ADMIN),
)
def of_organization(org_id: UUID, database: LedgerDatabase) -> OrganizationOverview:
    """An organization's subscription, pool, allocations and usage in 30 days."""
    return overviews.of_organization(database, org_id, utc_now())


@router.get(
    "/{org_id}/history",
    responses=documented(401, 403, 404, 422, 429, 503) | PAGED,
    **allows(Grant.ADMIN),
)
def read_history(
    org_id: UUID,
    window: AskedWindow,
    database: LedgerDatabase,
    response: Response,
    event_type: BillingEvent | None = None,
    since: Annotated[
        Moment | None, Query(alias="from", description="Written then or later.")
    ] = None,
    until: Annotated[Moment | None, Query(alias="to", description="Written before that.")] = None,
) -> list[HistoryEntry]:
    """The billing history of an organization, the newest first."""
    page = history.listed(database, org_id, window, event_type=event_type, since=since, until=until)
    return answer(page, response)
