"""What the gate is asked, and why an operation may not run (design decision D9)."""

from dataclasses import dataclass
from decimal import Decimal
from uuid import UUID

from schema.errors import (
    Forbidden,
    InsufficientCredits,
    InvalidRequest,
    MeteringError,
    NoAllocation,
    NotAMember,
    NotFound,
    RequestIdConflict,
)


@dataclass(frozen=True, slots=True)
class Operation:
    """What is about to run: `quantity` units of a service, or credits stated outright."""

    service_type: str | None = None
    variant: str | None = None
    quantity: Decimal = Decimal(1)
    credits: int | None = None


def refusal(  # noqa: PLR0911 - one for each outcome
    outcome: str,
    *,
    org_id: UUID,
    user_id: str,
    request_id: str = "",
    credits: int = 0,
    available: int = 0,
) -> MeteringError:
    """Why an operation may not run, by the outcome that it had.

    `credits` is what it costs, or what the price book says; `available` what the user can spend.
    """
    match outcome:
        case "unknown_service":
            return InvalidRequest(
                "service_type: it has no price: give credits", fields=["service_type", "credits"]
            )
        case "price_mismatch":
            return InvalidRequest(f"credits: the price book says {credits}", fields=["credits"])
        case "out_of_range":
            return InvalidRequest(
                "quantity: the price is more than one request can cost", fields=["quantity"]
            )
        case "unknown_organization":
            return NotFound(f"no organization {org_id}")
        case "organization_inactive":
            return Forbidden(f"organization {org_id} is suspended or closed")
        case "not_a_member":
            return NotAMember(f"user {user_id} is no member of organization {org_id}")
        case "no_allocation":
            return NoAllocation(f"No credit allocation found for user {user_id} in org {org_id}")
        case "insufficient_credits":
            return InsufficientCredits(
                f"Insufficient credits: {available} available, {credits} needed",
                required=credits,
                remaining=available,
            )
        case _:
            return RequestIdConflict(f"request id {request_id} was used for another request")
