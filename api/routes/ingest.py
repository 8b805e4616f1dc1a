"""`/api/v1/usage/events`: usage over HTTP, for services without Redis (contract.md §4, row 21)."""

from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request

from api.access import Grant, GuardedRoute, allows
from api.errors import documented
from api.jsonbodies import raw_body
from api.resources import CurrentProducer
from api.usagebodies import Found, Unreadable, events_in
from api.usageforms import request_body
from schema.events import UsageEvent

router = APIRouter(prefix="/api/v1/usage", tags=["usage"], route_class=GuardedRoute)

_OPTIONS: Final[dict[str, Any]] = {
    **allows(Grant.USAGE_WRITE)["openapi_extra"],
    "requestBody": request_body(),
}


RawBody = Annotated[bytes, Depends(raw_body)]


class EventProblem(BaseModel):
    """Why an event was rejected; `fields` are those that break their rule."""

    error: str
    message: str
    suggested_action: str
    fields: list[str] | None = None


class AcceptedEvent(BaseModel):
    """The event of this index is on its way to the ledger, which decides what becomes of it."""

    index: int
    request_id: str
    status: Literal["accepted"] = "accepted"


class RejectedEvent(BaseModel):
    """The event of this index breaks the contract, and nothing is kept of it."""

    index: int
    request_id: str | None = None
    status: Literal["rejected"] = "rejected"
    error: EventProblem


EventResult = Annotated[AcceptedEvent | RejectedEvent, Field(discriminator="status")]


class UsageReceipt(BaseModel):
    """What became of each event of a report, in its order."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "accepted": 1,
                    "rejected": 1,
                    "results": [
                        {"index": 0, "request_id": "req-7f3a", "status": "accepted"},
                        {
                            "index": 1,
                            "request_id": "req-7f3b",
                            "status": "rejected",
                            "error": {
                                "error": "invalid_request",
                                "message": "quantity: Input should be greater than 0",
                                "suggested_action": "Correct the named fields and send the "
                                "request again.",
                                "fields": ["quantity"],
                            },
                        },
                    ],
                }
            ]
        }
    )

    accepted: int
    rejected: int
    results: list[EventResult]

    @classmethod
    def of(cls, found: Sequence[Found]) -> "UsageReceipt":
        """The receipt for these events, once the queue has those that are to be accepted."""
        results = [_result(index, item) for index, item in enumerate(found)]
        accepted = sum(isinstance(result, AcceptedEvent) for result in results)
        return cls(accepted=accepted, rejected=len(results) - accepted, results=results)


def _result(index: int, item: Found) -> AcceptedEvent | RejectedEvent:
    match item:
        case Unreadable(error, request_id):
            problem = EventProblem.model_validate(error.as_detail())
            return RejectedEvent(index=index, request_id=request_id, error=problem)
        case UsageEvent():
            return AcceptedEvent(index=index, request_id=item.request_id)


@router.post(
    "/events",
    status_code=202,
    response_model_exclude_none=True,
    responses=documented(401, 403, 413, 415, 422, 429, 503),
    openapi_extra=_OPTIONS,
)
def report(request: Request, body: RawBody, producer: CurrentProducer) -> UsageReceipt:
    """Report one event, or up to 1,000 in an array; answers when the queue has them.

    Events are plain JSON or CloudEvents 1.0: structured, as a batch, or in binary mode, which
    takes the attributes from headers `ce-specversion`, `ce-type`, `ce-id`, `ce-source`, `ce-time`
    and `ce-traceparent`, and the body as the data. Only their form is checked here: whether a
    user can pay is for the ledger to decide.

    A single event that breaks the contract is answered with 422. An array is answered with 202
    and a result per event, even if all are rejected; one bad event never rejects its neighbours.
    Nothing is accepted when the answer is 503. Sending events again is always harmless: each
    request id is charged once.
    """
    found = events_in(request.headers, body)
    producer.emit_many(event for event in found if isinstance(event, UsageEvent))
    return UsageReceipt.of(found)
