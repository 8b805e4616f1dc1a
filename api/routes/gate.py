"""`/api/v1/precheck`: may this user run this operation now? (contract.md §4, rows 19 and 20)."""

from datetime import datetime, timedelta
from decimal import Decimal
from typing import Annotated, Literal
from uuid import UUID, uuid4

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field, StrictInt

from api.errors import documented
from api.identity import ServiceRoute, service_scheme
from api.resources import LedgerDatabase
from ledger import gate, holds
from ledger.clock import utc_now
from schema.events import Credits, Name, Quantity, RequestId, UserId, Variant

router = APIRouter(
    prefix="/api/v1",
    tags=["gate"],
    route_class=ServiceRoute,
    dependencies=[Depends(service_scheme)],
)


HoldSeconds = Annotated[StrictInt, Field(ge=holds.MIN_SECONDS, le=holds.MAX_SECONDS)]


class PrecheckRequest(BaseModel):
    """An operation that is about to run, priced by its service or by `credits`."""

    model_config = ConfigDict(extra="forbid")

    org_id: UUID
    user_id: UserId
    service_type: Name | None = None
    variant: Variant | None = None
    quantity: Quantity = Decimal(1)
    credits: Credits | None = None
    request_id: RequestId | None = None
    hold: bool = True
    hold_ttl_seconds: HoldSeconds = holds.DEFAULT_SECONDS

    def operation(self) -> gate.Operation:
        """What the ledger is asked about."""
        return gate.Operation(self.service_type, self.variant, self.quantity, self.credits)


class PrecheckAnswer(BaseModel):
    """The operation may run, and unless it was asked as advice its credits are set aside.

    `credits` is what it will cost, `remaining_credits` what the user can spend before it,
    `held_credits` what is set aside for it until `expires_at`.
    """

    allowed: Literal[True] = True
    request_id: str
    credits: int
    remaining_credits: int
    hold: bool
    held_credits: int = 0
    expires_at: datetime | None = None


@router.post("/precheck", responses=documented(401, 402, 403, 404, 409, 413, 422, 503))
def precheck(body: PrecheckRequest, database: LedgerDatabase) -> PrecheckAnswer:
    """Price an operation and set its credits aside; 402 and 403 say why it may not run.

    Carry the `request_id` of the answer on to the usage event, which settles the hold. Asking
    again with the same request id answers the same hold. `hold: false` asks for advice only.
    """
    request_id = body.request_id or str(uuid4())
    if not body.hold:
        advice = gate.check(database, body.org_id, body.user_id, body.operation(), utc_now())
        return PrecheckAnswer(
            request_id=request_id,
            credits=advice.credits,
            remaining_credits=advice.remaining,
            hold=False,
        )
    lasts = timedelta(seconds=body.hold_ttl_seconds)
    placed = holds.place(
        database, body.org_id, body.user_id, body.operation(), request_id, lasts, utc_now()
    )
    return PrecheckAnswer(
        request_id=request_id,
        credits=placed.credits,
        remaining_credits=placed.available,
        hold=True,
        held_credits=placed.credits,
        expires_at=placed.expires_at,
    )


class ReleaseAnswer(BaseModel):
    """The hold is gone, and its credits are the user's to spend again."""

    released: Literal[True] = True
    request_id: str


@router.delete("/precheck/{request_id}", responses=documented(401, 404, 409, 422, 503))
def release(
    request_id: RequestId,
    org_id: UUID,
    database: LedgerDatabase,
) -> ReleaseAnswer:
    """Give a hold's credits back, because the operation failed; doing so twice is harmless."""
    holds.release(database, org_id, request_id, utc_now())
    return ReleaseAnswer(request_id=request_id)
