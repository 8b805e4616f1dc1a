"""The price book: credits per unit of each service, versioned by effective date (contract.md §3).

Prices are data; what an event costs is a pure function of the book and the event.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import ROUND_CEILING, Context, Decimal
from typing import Final

_EXACT: Final = Context(prec=60)
"""Wide enough for the longest quantity times the longest price without rounding."""

BOOK_OPENS: Final = datetime(2000, 1, 1, tzinfo=UTC)
"""From when the initial prices are in force."""


@dataclass(frozen=True, slots=True)
class Price:
    """One row of the book. `credits` are charged per `unit`; no variant means any variant."""

    service_type: str
    variant: str | None
    credits: Decimal
    unit: str
    effective_from: datetime = BOOK_OPENS
    position: int = 0
    """Order of the variants of a service; the first counts when an event names none."""


def credits_for(price: Decimal, quantity: Decimal) -> int:
    """Credits charged for `quantity` units: price x quantity, fractions rounded up."""
    product = _EXACT.multiply(price, quantity)
    return int(product.to_integral_value(rounding=ROUND_CEILING))


class PriceBook:
    """The prices in force at any time."""

    def __init__(self, prices: Iterable[Price]) -> None:
        self._versions: dict[tuple[str, str | None], list[Price]] = {}
        self._first: dict[str, list[tuple[str, str | None]]] = {}
        for price in sorted(prices, key=lambda p: (p.position, p.variant or "")):
            key = (price.service_type, price.variant)
            if key not in self._versions:
                self._first.setdefault(price.service_type, []).append(key)
            self._versions.setdefault(key, []).append(price)
        for versions in self._versions.values():
            versions.sort(key=lambda p: p.effective_from, reverse=True)

    def price_of(self, service_type: str, variant: str | None, at: datetime) -> Price | None:
        """The row in force at `at`, or None for a service or variant without a price.

        A row without a variant serves every variant of its service; an event without a variant
        takes the first row of the service that is in force.
        """
        if variant is None:
            candidates = self._first.get(service_type, [])
        else:
            candidates = [(service_type, variant), (service_type, None)]
        for key in candidates:
            for price in self._versions.get(key, ()):
                if price.effective_from <= at:
                    return price
        return None


def _initial(*rows: tuple[str, str | None, str, str]) -> tuple[Price, ...]:
    return tuple(
        Price(service, variant, Decimal(credits), unit, BOOK_OPENS, position)
        for position, (service, variant, credits, unit) in enumerate(rows)
    )


INITIAL_PRICES: Final[tuple[Price, ...]] = _initial(
    ("company_enrichment", "standard", "50", "request"),
    ("company_enrichment", "full", "100", "request"),
    ("contact_lookup", None, "10", "request"),
    ("bulk_export", None, "5", "record"),
    ("intelligence_cache_lookup", None, "2", "request"),
    ("property_search", None, "3", "result"),
    ("valuation", None, "75", "request"),
    ("market_analysis", None, "150", "request"),
    ("llm", "gpt-4-turbo", "30", "1,000 tokens"),
    ("llm", "claude-sonnet", "15", "1,000 tokens"),
    ("image_generation", "dall-e-3", "48", "image"),
    ("embeddings", None, "0.02", "1,000 tokens"),
    ("speech_to_text", None, "6", "minute"),
)
"""The book that a new installation starts with; later versions live in the database."""
