"""The price book as it stands in the database: versions by effective date (contract.md §3).

A price is never changed: a later version follows it, so that an event costs the same whenever it
is applied.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
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
MAX_PREVIEW_DAYS: Final = 3660
_ALWAYS: Final = datetime(1, 1, 2, tzinfo=UTC)

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

# An era is the time between two changes of the book; `starts` are where they begin.
_USED: Final = """
    SELECT DISTINCT service_type, variant, width_bucket(occurred_at, %(starts)b::timestamptz[])
    FROM credit_usage_attribution
    WHERE occurred_at > %(since)b AND occurred_at <= %(until)b
"""

# Credits that the book does not explain were stated by the caller, and no price changes them.
_REPRICED: Final = """
    SELECT
        used.service_type,
        count(*),
        count(change.new_price),
        sum(used.credits_used),
        sum(coalesce(ceil(change.new_price * used.quantity), used.credits_used)) AS changed
    FROM credit_usage_attribution used
    LEFT JOIN unnest(
        %(services)b::text[], %(variants)b::text[], %(eras)b::int[],
        %(old_prices)b::numeric[], %(new_prices)b::numeric[]
    ) AS change (service_type, variant, era, old_price, new_price)
        ON used.service_type = change.service_type
        AND used.variant IS NOT DISTINCT FROM change.variant
        AND width_bucket(used.occurred_at, %(starts)b::timestamptz[]) = change.era
        AND used.credits_used = ceil(change.old_price * used.quantity)
    WHERE used.occurred_at > %(since)b AND used.occurred_at <= %(until)b
    GROUP BY used.service_type
    ORDER BY used.service_type
"""

_Key = tuple[str, str | None]


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


@dataclass(frozen=True, slots=True)
class ServicePreview:
    """The usage of one service, in credits: as it was charged, and under changed prices."""

    service_type: str
    requests: int
    repriced: int
    """How many of the requests the change concerns."""
    charged: int
    changed: int

    @property
    def difference(self) -> int:
        """Credits that the change adds, negative where it saves."""
        return self.changed - self.charged


@dataclass(frozen=True, slots=True)
class Preview:
    """What changed prices would have made of the usage after `since`, up to `until`."""

    since: datetime
    until: datetime
    services: Sequence[ServicePreview]

    @property
    def total(self) -> ServicePreview:
        """All services together."""
        return ServicePreview(
            "total",
            requests=sum(service.requests for service in self.services),
            repriced=sum(service.repriced for service in self.services),
            charged=sum(service.charged for service in self.services),
            changed=sum(service.changed for service in self.services),
        )


def book(connection: Connection) -> PriceBook:
    """All versions of all prices, read in the transaction of the caller."""
    return PriceBook(_versions(connection))


def listing(database: Database, at: datetime) -> list[Price]:
    """The row in force at a time for each service and variant, followed by those to come."""
    with database.snapshot() as connection:
        versions = _versions(connection)
    in_force: dict[_Key, Price] = {}
    coming: list[Price] = []
    for price in sorted(versions, key=lambda p: p.effective_from):
        if price.effective_from <= at:
            in_force[_key(price)] = price
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
        added = _next_version(new, effective_from.astimezone(UTC), _versions(connection))
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


def preview(
    database: Database, changes: Sequence[PriceChange], days: int, now: datetime
) -> Preview:
    """Price the usage of the last days as if `changes` had been in force all along.

    Nothing is written. Usage whose credits were stated by the caller keeps them.

    Raises:
        InvalidRequest: no change, two of one price, one of a service without prices, or bad days.
        LedgerUnavailable: PostgreSQL does not answer.
    """
    if not 1 <= days <= MAX_PREVIEW_DAYS:
        raise InvalidRequest(f"days: must be from 1 to {MAX_PREVIEW_DAYS}", fields=["days"])
    window = {"since": now - timedelta(days=days), "until": now}
    with database.snapshot() as connection:
        versions = _versions(connection)
        _check(changes, versions)
        starts = sorted({price.effective_from for price in versions})
        used = [tuple(row) for row in run(connection, _USED, starts=starts, **window)]
        prices = _changed_prices(versions, changes, starts, used)
        rows = run(connection, _REPRICED, starts=starts, **prices, **window)
        services = [ServicePreview(name, *map(int, figures)) for name, *figures in rows]
    return Preview(services=services, **window)


def _versions(connection: Connection) -> list[Price]:
    return [Price(*row) for row in run(connection, _BOOK)]


def _key(price: Price | PriceChange) -> _Key:
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
        _position(new, versions),
    )


def _position(change: PriceChange, versions: Sequence[Price]) -> int:
    """Where its other versions stand, or behind all others."""
    same = [price.position for price in versions if _key(price) == _key(change)]
    return min(same, default=max((price.position + 1 for price in versions), default=0))


def _check(changes: Sequence[PriceChange], versions: Sequence[Price]) -> None:
    if not changes:
        raise InvalidRequest("changes: give at least one", fields=["changes"])
    known = {price.service_type for price in versions}
    seen: set[_Key] = set()
    for change in changes:
        if change.service_type not in known:
            raise InvalidRequest(
                f"changes: {change.service_type} is not in the price book: its usage was charged "
                "by the credits that came with it",
                fields=["changes"],
            )
        if _key(change) in seen:
            raise InvalidRequest(f"changes: {change.name} is given twice", fields=["changes"])
        seen.add(_key(change))


def _changed_prices(
    versions: Sequence[Price],
    changes: Sequence[PriceChange],
    starts: Sequence[datetime],
    used: Sequence[tuple[str, str | None, int]],
) -> dict[str, list[Any]]:
    """Old and new price of all usage that the changes concern, as columns."""
    changed_keys = {_key(change) for change in changes}
    changed = [
        Price(*_key(change), change.credits, "", _ALWAYS, _position(change, versions))
        for change in changes
    ]
    before = PriceBook(versions)
    after = PriceBook([*changed, *(p for p in versions if _key(p) not in changed_keys)])
    columns: dict[str, list[Any]] = {
        name: [] for name in ("services", "variants", "eras", "old_prices", "new_prices")
    }
    for service_type, variant, era in used:
        at = starts[era - 1] if era else _ALWAYS
        old = before.price_of(service_type, variant, at)
        new = after.price_of(service_type, variant, at)
        if old and new and _key(new) in changed_keys:
            row = (service_type, variant, era, old.credits, new.credits)
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
    return columns


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
