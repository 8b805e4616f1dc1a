"""`/subscriptions`: which plan an organization is on (contract.md §4, rows 1 to 5)."""

from decimal import Decimal
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Query
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, WithJsonSchema
from starlette.responses import Response

from api.access import CurrentUser, Grant, GuardedRoute, allows, require_role
from api.errors import documented
from api.idempotency import IdempotencyKey
from api.paging import PAGED, AskedWindow, answer
from api.resources import LedgerDatabase
from ledger import subscriptions
from ledger.billing import BillingCycle, Status, Subscription
from ledger.clock import utc_now
from ledger.directory import Role
from schema.errors import Forbidden
from schema.events import not_boolean
from schema.money import Usd
from schema.plans import PLANS, PlanName

router = APIRouter(
    prefix="/api/v1/org-billing/subscriptions", tags=["subscriptions"], route_class=GuardedRoute
)

Price = Annotated[
    Decimal,
    Field(ge=0, le=subscriptions.MAX_MONTHLY_PRICE, decimal_places=2, allow_inf_nan=False),
    BeforeValidator(not_boolean),
    WithJsonSchema(
        {
            "type": "number",
            "minimum": 0,
            "maximum": float(subscriptions.MAX_MONTHLY_PRICE),
            "multipleOf": 0.01,
        }
    ),
]
TrialDays = Annotated[StrictInt, Field(ge=0, le=subscriptions.MAX_TRIAL_DAYS)]


class SubscriptionRequest(BaseModel):
    """The terms of a new subscription."""

    model_config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        json_schema_extra={
            "examples": [
                {
                    "org_id": "5f0c6d1e-8a3b-4c57-9f0e-2d7b1a6c4e90",
                    "subscription_plan": "platform",
                    "billing_cycle": "monthly",
                    "trial_days": 14,
                }
            ]
        },
    )

    org_id: UUID
    subscription_plan: PlanName
    monthly_price: Price | None = None
    """In USD, to the cent. Only a system admin sets another than the plan's."""
    billing_cycle: BillingCycle = BillingCycle.MONTHLY
    """`yearly` is twelve monthly prices in advance."""
    trial_days: TrialDays | None = None
    """How long nothing is billed, in days of the organization's time zone; 0 is no trial."""


class PlanChanged(BaseModel):
    """The plan before and after; prices are USD a month, and the new one is billed next."""

    success: Literal[True] = True
    message: str
    old_plan: PlanName
    new_plan: PlanName
    old_price: Usd
    new_price: Usd


@router.post(
    "",
    responses=documented(401, 403, 404, 409, 413, 422, 429, 503),
    **allows(Grant.ADMIN),
)
def subscribe(
    body: SubscriptionRequest,
    user: CurrentUser,
    database: LedgerDatabase,
    key: IdempotencyKey = None,
) -> Subscription:
    """Subscribe an organization; its first period is billed at once, or after the trial.

    409 `subscription_exists` if it has a live subscription.
    """
    require_role(database, user, body.org_id, Role.ADMIN)
    list_price = PLANS[body.subscription_plan].monthly_price
    if body.monthly_price not in (None, list_price) and not user.is_system_admin:
        raise Forbidden(f"A price other than the plan's ${list_price} needs a system admin.")
    return subscriptions.create(
        database,
        body.org_id,
        body.subscription_plan,
        monthly_price=body.monthly_price,
        billing_cycle=body.billing_cycle,
        trial_days=body.trial_days or None,
        actor=user.actor,
        key=key,
        now=utc_now(),
    )


@router.get(
    "",
    responses=documented(401, 403, 422, 429, 503) | PAGED,
    **allows(Grant.USER),
)
def list_subscriptions(
    user: CurrentUser,
    window: AskedWindow,
    database: LedgerDatabase,
    response: Response,
    status: Status | None = None,
    plan: PlanName | None = None,
) -> list[Subscription]:
    """The subscriptions of the user's organizations, or for a system admin of all, by name.

    One for each organization: the live one or, failing that, the one canceled last. `status` and
    `plan` leave out others.
    """
    of_user = None if user.is_system_admin else user.id
    return answer(
        subscriptions.listed(database, of_user, window, status=status, plan=plan), response
    )


@router.get(
    "/{org_id}",
    responses=documented(401, 403, 404, 422, 429, 503),
    **allows(Grant.MEMBER),
)
def read_subscription(org_id: UUID, database: LedgerDatabase) -> Subscription:
    """The live subscription or, failing that, the one canceled last; 404 if there never was one."""
    return subscriptions.get(database, org_id)


@router.put(
    "/{org_id}/upgrade",
    responses=documented(401, 403, 404, 409, 422, 429, 503),
    **allows(Grant.ADMIN),
)
def change_plan(
    org_id: UUID, new_plan: PlanName, user: CurrentUser, database: LedgerDatabase
) -> PlanChanged:
    """Move to another plan at its price, up or down, at once.

    Nothing is prorated: the next invoice is at the new price. 409 on the same plan.
    """
    change = subscriptions.change_plan(database, org_id, new_plan, actor=user.actor, now=utc_now())
    return PlanChanged(
        message=f"The plan is {change.new_plan} now; the next invoice is at ${change.new_price}"
        " a month.",
        old_plan=change.old_plan,
        new_plan=change.new_plan,
        old_price=change.old_price,
        new_price=change.new_price,
    )


_AT_PERIOD_END: Any = Query(
    description="Whether it runs on until the end of the period that is paid for."
)


@router.delete(
    "/{org_id}",
    responses=documented(401, 403, 404, 422, 429, 503),
    **allows(Grant.ADMIN),
)
def cancel(
    org_id: UUID,
    user: CurrentUser,
    database: LedgerDatabase,
    at_period_end: Annotated[bool, _AT_PERIOD_END] = True,
) -> Subscription:
    """End the subscription: with its period, as `cancel_at_period_end` then says, or at once.

    Nothing is paid back. 404 if none is live.
    """
    return subscriptions.cancel(
        database, org_id, at_period_end=at_period_end, actor=user.actor, now=utc_now()
    )
