"""`POST /api/v1/precheck`: may this user run this operation now? (contract.md §4, row 19)."""

from datetime import datetime
from decimal import Decimal
from typing import Annotated, Final, Literal
from uuid import UUID, uuid4

from fastapi import APIRouter, Depends
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt

from api.errors import documented
from api.identity import ServiceRoute, service_scheme
from api.resources import LedgerDatabase
from ledger import gate
from ledger.clock import utc_now
from schema.events import MAX_CREDITS, MAX_QUANTITY, REQUEST_ID_PATTERN

MAX_HOLD_SECONDS: Final = 86_400
_NO_NUL: Final = r"\A[^\x00]*\z"

router = APIRouter(
    prefix="/api/v1",
    tags=["gate"],
    route_class=ServiceRoute,
    dependencies=[Depends(service_scheme)],
)


def _not_boolean(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


class PrecheckRequest(BaseModel):
    """An operation that is about to run, priced by its service or by `credits`."""

    model_config = ConfigDict(extra="forbid")

    org_id: UUID
    user_id: Annotated[str, Field(min_length=1, max_length=255, pattern=_NO_NUL)]
    service_type: Annotated[str, Field(min_length=1, max_length=100, pattern=_NO_NUL)] | None = None
    variant: Annotated[str, Field(max_length=100, pattern=_NO_NUL)] | None = None
    quantity: Annotated[
        Decimal,
        Field(gt=0, le=MAX_QUANTITY, max_digits=38, allow_inf_nan=False),
        BeforeValidator(_not_boolean),
    ] = Decimal(1)
    credits: Annotated[StrictInt, Field(ge=1, le=MAX_CREDITS)] | None = None
    request_id: Annotated[str, Field(pattern=REQUEST_ID_PATTERN)] | None = None
    hold: bool = True
    hold_ttl_seconds: Annotated[StrictInt, Field(ge=1, le=MAX_HOLD_SECONDS)] | None = None

    def operation(self) -> gate.Operation:
        """What the ledger is asked about."""
        return gate.Operation(self.service_type, self.variant, self.quantity, self.credits)


class PrecheckAnswer(BaseModel):
    """The operation may run. It is advice: `hold` is false, and no credits are set aside for it.

    `credits` is what it will cost, `remaining_credits` what the user can spend before it.
    """

    allowed: Literal[True] = True
    request_id: str
    credits: int
    remaining_credits: int
    hold: Literal[False] = False
    held_credits: Literal[0] = 0
    expires_at: datetime | None = None


@router.post("/precheck", responses=documented(401, 402, 403, 404, 413, 422, 503))
def precheck(body: PrecheckRequest, database: LedgerDatabase) -> PrecheckAnswer:
    """Price an operation and say whether the user's credits cover it; 402 and 403 say why not.

    Carry the `request_id` of the answer on to the usage event. Asking again changes nothing.
    """
    advice = gate.check(database, body.org_id, body.user_id, body.operation(), utc_now())
    return PrecheckAnswer(
        request_id=body.request_id or str(uuid4()),
        credits=advice.credits,
        remaining_credits=advice.remaining,
    )
