"""`/api/v1/precheck`: may this user run this operation now? (contract.md §4, rows 19 and 20)."""

from datetime import datetime, timedelta
from decimal import Decimal
from typing import Annotated, Final, Literal
from uuid import UUID

from anyio import to_thread
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, StrictInt
from starlette.requests import Request

from api import jsonbodies
from api.access import Grant, GuardedRoute, QuickRoute, allows
from api.callers import Caller, User, caller_of
from api.errors import documented
from api.ids import new_id
from api.resources import resources_of
from ledger import directory, holds
from ledger.asyncgate import AsyncGate
from ledger.clock import utc_now
from ledger.gate import Operation
from schema.errors import Forbidden, MeteringError, NoOrganization, NotAMember, NotFound
from schema.events import Credits, Name, Quantity, RequestId, UserId, Variant

router = APIRouter(prefix="/api/v1", tags=["gate"], route_class=GuardedRoute)
quick_router = APIRouter(prefix="/api/v1", tags=["gate"], route_class=QuickRoute)

HoldSeconds = Annotated[StrictInt, Field(ge=holds.MIN_SECONDS, le=holds.MAX_SECONDS)]


class PrecheckRequest(BaseModel):
    """An operation that is about to run, priced by its service or by `credits`."""

    model_config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        json_schema_extra={
            "examples": [
                {
                    "org_id": "0d5a3c1e-6f0b-4f57-9a2b-0f6f3a1b2c3d",
                    "user_id": "ada",
                    "service_type": "company_enrichment",
                    "variant": "full",
                }
            ]
        },
    )

    org_id: UUID
    user_id: UserId
    """Whose credits are to be spent."""
    service_type: Name | None = None
    variant: Variant | None = None
    quantity: Quantity = Decimal(1)
    """Units of the service."""
    credits: Credits | None = None
    """What it will cost, if the service has no price; one that has must cost just that."""
    request_id: RequestId | None = None
    """Made up and answered unless given."""
    hold: bool = True
    """Whether the credits are set aside; false asks for advice only."""
    hold_ttl_seconds: HoldSeconds = holds.DEFAULT_SECONDS
    """After how many seconds a hold gives its credits back by itself."""

    def operation(self) -> Operation:
        """What the ledger is asked about."""
        return Operation(self.service_type, self.variant, self.quantity, self.credits)


_PRECHECK: Final = {
    **allows(Grant.USER, Grant.PRECHECK)["openapi_extra"],
    "requestBody": jsonbodies.described(PrecheckRequest),
}


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


@quick_router.post(
    "/precheck",
    responses=documented(401, 402, 403, 404, 409, 413, 422, 429, 503),
    openapi_extra=_PRECHECK,
)
async def precheck(request: Request) -> PrecheckAnswer:
    """Price an operation and set its credits aside; 402 and 403 say why it may not run.

    Services ask for any member of an active organization, users for themselves. Carry the
    `request_id` of the answer on to the usage event, which settles the hold. Asking again with the
    same request id answers the same hold. `hold: false` asks for advice only: it is true of the
    moment.
    """
    caller = caller_of(request)
    body = await jsonbodies.read(request, PrecheckRequest)
    _require_self(caller, body.user_id)
    request_id = body.request_id or new_id()
    gate = resources_of(request).gate
    try:
        if body.hold:
            return await _held(gate, body, request_id)
        return await _advised(gate, body, request_id)
    except (NotAMember, NotFound):
        if isinstance(caller, User):
            raise await _unseen(request, caller, body.org_id) from None
        raise


async def _held(gate: AsyncGate, body: PrecheckRequest, request_id: str) -> PrecheckAnswer:
    lasts = timedelta(seconds=body.hold_ttl_seconds)
    placed = await gate.place(
        body.org_id, body.user_id, body.operation(), request_id, lasts, utc_now()
    )
    return PrecheckAnswer(
        request_id=request_id,
        credits=placed.credits,
        remaining_credits=placed.available,
        hold=True,
        held_credits=placed.credits,
        expires_at=placed.expires_at,
    )


async def _advised(gate: AsyncGate, body: PrecheckRequest, request_id: str) -> PrecheckAnswer:
    advice = await gate.check(body.org_id, body.user_id, body.operation())
    return PrecheckAnswer(
        request_id=request_id,
        credits=advice.credits,
        remaining_credits=advice.remaining,
        hold=False,
    )


def _require_self(caller: Caller, user_id: str) -> None:
    if isinstance(caller, User) and caller.id != user_id:
        raise Forbidden("Users ask for themselves; services ask for any member.")


async def _unseen(request: Request, user: User, org_id: UUID) -> MeteringError:
    """What a user hears of an organization that is not theirs, whether or not there is one."""
    database = resources_of(request).database
    if await to_thread.run_sync(directory.has_organization, database, user.id):
        return NotFound(f"no organization {org_id}")
    return NoOrganization(f"user {user.id} belongs to no organization")


class ReleaseAnswer(BaseModel):
    """The hold is gone, and its credits are the user's to spend again."""

    released: Literal[True] = True
    request_id: str


@router.delete(
    "/precheck/{request_id}",
    responses=documented(401, 403, 404, 409, 422, 429, 503),
    **allows(Grant.USER, Grant.PRECHECK),
)
async def release(request_id: RequestId, org_id: UUID, request: Request) -> ReleaseAnswer:
    """Give a hold's credits back, because the operation failed; doing so twice is harmless.

    Users release their own holds, services any.
    """
    caller = caller_of(request)
    user_id = caller.id if isinstance(caller, User) else None
    await resources_of(request).gate.release(org_id, request_id, utc_now(), user_id)
    return ReleaseAnswer(request_id=request_id)
