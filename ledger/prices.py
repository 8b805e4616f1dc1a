"""The price book as it stands in the database: versions by effective date (contract.md §3).

A price is never changed: a later version follows it, so that an event costs the same whenever it
is applied.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, Final, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError
from sqlalchemy import Connection

from ledger.database import Database, run
from schema.errors import Conflict, InvalidRequest
from schema.events import MAX_CREDITS, Name
from schema.prices import Price, PriceBook

LATEST: Final = datetime(9998, 12, 31, tzinfo=UTC)
"""Times beyond it cannot be told in every time zone."""
_BOOK: Final = """
    SELECT service_type, variant, credits, unit, effective_from, position FROM service_prices
"""

# Readers go on; whoever else sets a price waits, so that positions and versions stay unique.
_LOCK: Final = "LOCK TABLE service_prices IN SHARE ROW EXCLUSIVE MODE"

_ADD: Final = """
    INSERT INTO service_prices (service_type, variant, credits, unit, effective_from, position)
    VALUES (
        %(service_type)s, %(variant)s, %(credits)s, %(unit)s, %(effective_from)s, %(position)s
    )
"""

Key = tuple[str, str | None]


class PriceChange(BaseModel):
    """Another price of a service, or of one variant of it; `credits` are charged per unit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    service_type: Annotated[Name, Field(pattern=r"\A[^/\x00]*\z")]
    variant: Name | None = None
    credits: Annotated[Decimal, Field(gt=0, le=MAX_CREDITS, decimal_places=6, allow_inf_nan=False)]

    @classmethod
    def of(cls, **fields: Any) -> Self:  # noqa: ANN401 - the fields are checked here
        """Build it, or raise `InvalidRequest` naming what is wrong."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise _invalid(error) from None

    @property
    def name(self) -> str:
        """Service and variant, as people write them."""
        return f"{self.service_type}/{self.variant}" if self.variant else self.service_type


class NewPrice(PriceChange):
    """A version to be added to the book.

    Without `unit` it keeps that of the service, without `effective_from` it counts at once.
    """

    unit: Annotated[Name, Field(pattern=r"\S")] | None = None
    effective_from: Annotated[AwareDatetime, Field(le=LATEST)] | None = None


def book(connection: Connection) -> PriceBook:
    """All versions of all prices, read in the transaction of the caller."""
    return PriceBook(versions_in(connection))


def listing(database: Database, at: datetime) -> list[Price]:
    """The row in force at a time for each service and variant, followed by those to come."""
    with database.snapshot() as connection:
        versions = versions_in(connection)
    in_force: dict[Key, Price] = {}
    coming: list[Price] = []
    for price in sorted(versions, key=lambda p: p.effective_from):
        if price.effective_from <= at:
            in_force[key_of(price)] = price
        else:
            coming.append(price)
    listed = [*in_force.values(), *coming]
    return sorted(listed, key=lambda p: (p.position, p.variant or "", p.effective_from))


def set_price(database: Database, new: NewPrice, now: datetime) -> Price:
    """Add a version to the book; what was there stays as it is.

    Raises:
        InvalidRequest: it begins before `now`, or a new service lacks its unit.
        Conflict: this service and variant has a version from that very time.
        LedgerUnavailable: PostgreSQL does not answer.
    """
    effective_from = new.effective_from or now
    if effective_from < now:
        raise InvalidRequest(
            f"effective_from: {effective_from.isoformat()} is in the past: events since then may "
            "have been charged at the price before, and would conflict if they came again",
            fields=["effective_from"],
        )
    with database.transaction() as connection:
        run(connection, _LOCK)
        added = _next_version(new, effective_from.astimezone(UTC), versions_in(connection))
        run(
            connection,
            _ADD,
            service_type=added.service_type,
            variant=added.variant,
            credits=added.credits,
            unit=added.unit,
            effective_from=added.effective_from,
            position=added.position,
        )
    return added


def versions_in(connection: Connection) -> list[Price]:
    """All versions of all prices, in no order, read in the transaction of the caller."""
    return [Price(*row) for row in run(connection, _BOOK)]


def key_of(price: Price | PriceChange) -> Key:
    """What the versions of one price have in common."""
    return price.service_type, price.variant


def _next_version(new: NewPrice, effective_from: datetime, versions: Sequence[Price]) -> Price:
    of_service = sorted(
        (price for price in versions if price.service_type == new.service_type),
        key=lambda p: (p.variant == new.variant, -p.position, p.effective_from),
    )
    same = [price for price in of_service if price.variant == new.variant]
    if any(price.effective_from == effective_from for price in same):
        raise Conflict(f"{new.name} has a price from {effective_from.isoformat()} already")
    if not of_service and new.unit is None:
        raise InvalidRequest(
            f"unit: {new.service_type} is not in the price book yet: say what its credits are per",
            fields=["unit"],
        )
    return Price(
        new.service_type,
        new.variant,
        new.credits,
        new.unit or of_service[-1].unit,
        effective_from,
        position_of(new, versions),
    )


def position_of(change: PriceChange, versions: Sequence[Price]) -> int:
    """Where its other versions stand, or behind all others."""
    same = [price.position for price in versions if key_of(price) == key_of(change)]
    return min(same, default=max((price.position + 1 for price in versions), default=0))


def _invalid(error: ValidationError) -> InvalidRequest:
    problems = {
        str(item["loc"][0]): _in_words(item["type"], item["msg"])
        for item in error.errors(include_url=False, include_input=False)
    }
    message = "; ".join(f"{field}: {problem}" for field, problem in problems.items())
    return InvalidRequest(message, fields=list(problems))


def _in_words(kind: str, message: str) -> str:
    if kind == "string_pattern_mismatch":
        return "must not be blank, nor contain a slash or NUL character"
    return message
