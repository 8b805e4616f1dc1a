"""What other prices would have made of past usage; nothing is written."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from ledger.database import Database, run
from ledger.prices import Key, PriceChange, key_of, position_of, versions_in
from schema.errors import InvalidRequest
from schema.prices import Price, PriceBook

MAX_PREVIEW_DAYS: Final = 3660
_ALWAYS: Final = datetime(1, 1, 2, tzinfo=UTC)

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
        versions = versions_in(connection)
        _check(changes, versions)
        starts = sorted({price.effective_from for price in versions})
        used = [tuple(row) for row in run(connection, _USED, starts=starts, **window)]
        prices = _changed_prices(versions, changes, starts, used)
        rows = run(connection, _REPRICED, starts=starts, **prices, **window)
        services = [ServicePreview(name, *map(int, figures)) for name, *figures in rows]
    return Preview(services=services, **window)


def _check(changes: Sequence[PriceChange], versions: Sequence[Price]) -> None:
    if not changes:
        raise InvalidRequest("changes: give at least one", fields=["changes"])
    known = {price.service_type for price in versions}
    seen: set[Key] = set()
    for change in changes:
        if change.service_type not in known:
            raise InvalidRequest(
                f"changes: {change.service_type} is not in the price book: its usage was charged "
                "by the credits that came with it",
                fields=["changes"],
            )
        if key_of(change) in seen:
            raise InvalidRequest(f"changes: {change.name} is given twice", fields=["changes"])
        seen.add(key_of(change))


def _changed_prices(
    versions: Sequence[Price],
    changes: Sequence[PriceChange],
    starts: Sequence[datetime],
    used: Sequence[tuple[str, str | None, int]],
) -> dict[str, list[Any]]:
    """Old and new price of all usage that the changes concern, as columns."""
    changed_keys = {key_of(change) for change in changes}
    changed = [
        Price(*key_of(change), change.credits, "", _ALWAYS, position_of(change, versions))
        for change in changes
    ]
    before = PriceBook(versions)
    after = PriceBook([*changed, *(p for p in versions if key_of(p) not in changed_keys)])
    columns: dict[str, list[Any]] = {
        name: [] for name in ("services", "variants", "eras", "old_prices", "new_prices")
    }
    for service_type, variant, era in used:
        at = starts[era - 1] if era else _ALWAYS
        old = before.price_of(service_type, variant, at)
        new = after.price_of(service_type, variant, at)
        if old and new and key_of(new) in changed_keys:
            row = (service_type, variant, era, old.credits, new.credits)
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
    return columns
