"""The gate: whether a user may run an operation now, before it runs (design decision D9).

What is given here is advice: nothing is held, so the answer is true of the moment it was read.
"""

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Final
from uuid import UUID

from ledger import prices
from ledger.database import Database, run
from ledger.decisions import MAX_CHARGE
from schema.errors import InsufficientCredits, InvalidRequest, NoAllocation, NotFound
from schema.prices import PriceBook, credits_for

_AVAILABLE: Final = """
    SELECT
        a.remaining_credits - a.held_credits,
        CASE WHEN p.allow_overage THEN overage_room(o.id) ELSE 0 END
    FROM organizations o
    LEFT JOIN organization_credit_pools p ON p.org_id = o.id
    LEFT JOIN user_credit_allocations a
        ON a.org_id = o.id AND a.user_id = %(user_id)b AND a.is_active
    WHERE o.id = %(org_id)b
"""


@dataclass(frozen=True, slots=True)
class Operation:
    """What is about to run: `quantity` units of a service, or credits stated outright."""

    service_type: str | None = None
    variant: str | None = None
    quantity: Decimal = Decimal(1)
    credits: int | None = None


@dataclass(frozen=True, slots=True)
class Advice:
    """The operation may run. Both figures are credits."""

    credits: int
    """What the operation will cost."""
    remaining: int
    """What the user can spend before it: remaining credits less those held by others."""


def check(
    database: Database, org_id: UUID, user_id: str, operation: Operation, now: datetime
) -> Advice:
    """Say whether allocation and overage cover the operation at the prices of `now`.

    Raises:
        InvalidRequest: the operation has no price, or its credits contradict the price book.
        NotFound: there is no such organization.
        NoAllocation: the user has no active allocation in it.
        InsufficientCredits: the allocation is too small, by `required` and `remaining`.
        LedgerUnavailable: PostgreSQL does not answer.
    """
    with database.snapshot() as connection:
        credits = cost(operation, prices.book(connection), now)
        row = run(connection, _AVAILABLE, org_id=org_id, user_id=user_id).one_or_none()
    if row is None:
        raise NotFound(f"no organization {org_id}")
    available: int | None = row[0]
    overage_room: int = row[1]
    if available is None:
        raise NoAllocation(f"No credit allocation found for user {user_id} in org {org_id}")
    if available + overage_room < credits:
        raise InsufficientCredits(
            f"Insufficient credits: {available} available, {credits} needed",
            required=credits,
            remaining=available,
        )
    return Advice(credits, available)


def cost(operation: Operation, book: PriceBook, at: datetime) -> int:
    """What an operation costs at a time, in whole credits (contract.md §3).

    Raises:
        InvalidRequest: it has neither a price nor credits, both and they differ, or the amount is
            beyond what one request can cost.
    """
    priced = _price(operation, book, at)
    if priced is None and operation.credits is None:
        named = "/".join(filter(None, (operation.service_type, operation.variant)))
        message = f"{named} has no price: give credits" if named else "give a service or credits"
        raise InvalidRequest(f"service_type: {message}", fields=["service_type", "credits"])
    if priced is not None and operation.credits not in (None, priced):
        raise InvalidRequest(
            f"credits: the request says {operation.credits}, the price book {priced}",
            fields=["credits"],
        )
    credits = operation.credits if priced is None else priced
    assert credits is not None  # noqa: S101 - one of the two was given
    if credits > MAX_CHARGE:
        raise InvalidRequest(f"quantity: {credits} credits are out of range", fields=["quantity"])
    return credits


def _price(operation: Operation, book: PriceBook, at: datetime) -> int | None:
    if operation.service_type is None:
        return None
    price = book.price_of(operation.service_type, operation.variant, at)
    return credits_for(price.credits, operation.quantity) if price else None
