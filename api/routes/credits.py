"""`/credits`: pools, allocations and direct charges (contract.md §4, rows 6 to 10)."""

from datetime import datetime
from decimal import Decimal
from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, ConfigDict, Field, StrictInt
from starlette.responses import Response

from api.access import CurrentCaller, CurrentUser, Grant, GuardedRoute, allows, require_role
from api.errors import documented
from api.idempotency import IdempotencyKey
from api.models import CreditPool, Note
from api.paging import PAGED, AskedWindow, answer
from api.resources import CurrentSettings, LedgerDatabase
from ledger import allocations, deductions, directory, pools
from ledger.allocations import Allocation
from ledger.clock import utc_now
from ledger.deductions import Deduction
from ledger.directory import Role
from ledger.pools import MAX_AMOUNT, MAX_CREDITS, Kind, Pool
from schema.errors import Forbidden, InvalidRequest
from schema.events import (
    UNNAMED_SERVICE,
    ApiCost,
    Credits,
    Metadata,
    Moment,
    Name,
    Quantity,
    RequestId,
    ServiceName,
    UsageEvent,
    UserId,
    Variant,
)
from schema.periods import ResetPeriod
from schema.plans import KeySource
from schema.settings import CreditPurchases

router = APIRouter(prefix="/api/v1/org-billing/credits", tags=["credits"], route_class=GuardedRoute)

CreditAmount = Annotated[int, Field(ge=1, le=MAX_CREDITS)]
PurchaseAmount = Annotated[Decimal, Field(ge=0, le=MAX_AMOUNT, decimal_places=2)]


@router.get(
    "/{org_id}",
    response_model=CreditPool,
    responses=documented(401, 403, 404, 422, 429, 503),
    **allows(Grant.MEMBER),
)
def pool(org_id: UUID, database: LedgerDatabase) -> Pool:
    """The pool of an organization; 404 until credits are added to it for the first time."""
    return pools.get(database, org_id)


async def _may_purchase(user: CurrentUser, settings: CurrentSettings) -> None:
    if settings.credit_purchases is CreditPurchases.SYSTEM and not user.is_system_admin:
        raise Forbidden("Only a system admin adds credits to pools here.")


class Added(BaseModel):
    """Credits are in the pool; both figures are those of the pool then."""

    success: Literal[True] = True
    message: str
    total_credits: int
    available_credits: int


@router.post(
    "/{org_id}/add",
    dependencies=[Depends(_may_purchase)],
    responses=documented(401, 403, 404, 422, 429, 503),
    **allows(Grant.ADMIN),
)
def add(
    org_id: UUID,
    credits: Annotated[CreditAmount, Query(examples=[10_000])],
    user: CurrentUser,
    database: LedgerDatabase,
    purchase_amount: Annotated[
        PurchaseAmount, Query(description="USD paid for them; 0 for a grant.")
    ] = Decimal(0),
    key: IdempotencyKey = None,
) -> Added:
    """Put credits into the pool, making it if there is none."""
    now_in_it = pools.add(
        database,
        org_id,
        credits,
        kind=Kind.PURCHASE if purchase_amount else Kind.GRANT,
        amount=purchase_amount,
        actor=user.actor,
        key=key,
        now=utc_now(),
    )
    return Added(
        message=f"Added {credits} credits.",
        total_credits=now_in_it.total_credits,
        available_credits=now_in_it.available_credits,
    )


class AllocationRequest(BaseModel):
    """Credits to move from the pool to a user."""

    model_config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        json_schema_extra={
            "examples": [
                {"user_id": "ada", "allocated_credits": 1000, "reset_period": "monthly"},
            ]
        },
    )

    user_id: UserId
    allocated_credits: Annotated[StrictInt, Field(ge=1, le=MAX_CREDITS)]
    """Come on top of what the user has."""
    reset_period: ResetPeriod | None = None
    """Monthly for a new allocation; an existing one keeps its own unless given."""
    notes: Note | None = None


@router.post(
    "/{org_id}/allocate",
    responses=documented(401, 402, 403, 404, 413, 422, 429, 503),
    **allows(Grant.ADMIN),
)
def allocate(
    org_id: UUID,
    body: AllocationRequest,
    user: CurrentUser,
    database: LedgerDatabase,
    key: IdempotencyKey = None,
) -> Allocation:
    """Move available credits of the pool to a member; 402 says what the pool has."""
    return allocations.allocate(
        database,
        org_id,
        body.user_id,
        body.allocated_credits,
        reset_period=body.reset_period,
        notes=body.notes,
        members_only=True,
        actor=user.actor,
        key=key,
        now=utc_now(),
    )


@router.get(
    "/{org_id}/allocations",
    responses=documented(401, 403, 404, 422, 429, 503) | PAGED,
    **allows(Grant.MEMBER),
)
def list_allocations(
    org_id: UUID,
    user: CurrentUser,
    database: LedgerDatabase,
    window: AskedWindow,
    response: Response,
) -> list[Allocation]:
    """The allocations of an organization by user id; a member who is no admin sees their own."""
    sees_all = user.is_system_admin or directory.role_of(database, org_id, user.id) is Role.ADMIN
    only = None if sees_all else user.id
    return answer(allocations.page(database, org_id, window, user_id=only), response)


# An id may hold slashes, so it takes the rest of the path.
@router.get(
    "/{org_id}/allocations/{user_id:path}",
    responses=documented(401, 403, 404, 422, 429, 503),
    **allows(Grant.MEMBER),
)
def allocation(
    org_id: UUID, user_id: UserId, user: CurrentUser, database: LedgerDatabase
) -> Allocation:
    """The allocation of one user; a member who is no admin may ask for their own."""
    if user_id != user.id:
        require_role(database, user, org_id, Role.ADMIN)
    return allocations.get(database, org_id, user_id)


class DeductionRequest(BaseModel):
    """An operation that has succeeded, priced by its service or by `credits`."""

    model_config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        json_schema_extra={
            "examples": [
                {
                    "user_id": "ada",
                    "service_type": "company_enrichment",
                    "variant": "full",
                    "request_id": "enrich-20260315-0001",
                    "metadata": {"company_id": "c-4711"},
                },
                {"user_id": "ada", "credits": 25, "request_id": "report-20260315-0002"},
            ]
        },
    )

    user_id: UserId
    request_id: RequestId
    service_type: Name | None = None
    variant: Variant | None = None
    quantity: Quantity = Decimal(1)
    credits: Credits | None = None
    service_name: ServiceName | None = None
    metadata: Metadata = Field(default_factory=dict)
    """Up to 8 KiB of JSON; secrets are removed."""
    occurred_at: Moment | None = None
    """When it succeeded; now unless given."""
    api_cost: ApiCost | None = None
    """Upstream cost in USD."""
    key_source: KeySource = KeySource.MANAGED
    source: Name = "api"

    def event(self, org_id: UUID, now: datetime) -> UsageEvent:
        """The same as an event of the pipeline.

        Raises:
            InvalidRequest: it names neither a service nor credits.
        """
        if self.service_type is None and self.credits is None:
            raise InvalidRequest(
                "service_type: give a service or credits", fields=["service_type", "credits"]
            )
        fields = dict(self) | {
            "org_id": org_id,
            "service_type": self.service_type or UNNAMED_SERVICE,
            "occurred_at": self.occurred_at or now,
        }
        return UsageEvent.of(**fields)


@router.post(
    "/{org_id}/deduct",
    responses=documented(401, 402, 403, 404, 409, 413, 422, 429, 503),
    **allows(Grant.DEDUCT),
)
def deduct(
    org_id: UUID,
    body: DeductionRequest,
    caller: CurrentCaller,
    database: LedgerDatabase,
    key: IdempotencyKey = None,
) -> Deduction:
    """Charge one request of a member at once. A repetition answers `duplicate` and charges nothing.

    An event of the same request that comes through the queue counts as the same request, and a
    hold of it is settled. What is refused here leaves no dead letter.
    """
    now = utc_now()
    return deductions.deduct(
        database,
        body.event(org_id, now),
        is_dated=body.occurred_at is not None,
        actor=caller.actor,
        key=key,
        now=now,
    )
