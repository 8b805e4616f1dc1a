"""A realistic stream of LoopNet operations: all services, some failing, some reported twice."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Final
from uuid import UUID, uuid4

from schema.events import UsageEvent
from schema.plans import KeySource


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of operation: how often, how much, and what it costs upstream (USD per unit)."""

    service_type: str
    variant: str | None
    weight: int
    most_units: int
    cost_per_unit: str


KINDS: Final = (
    Kind("company_enrichment", "standard", 20, 1, "0.040"),
    Kind("company_enrichment", "full", 8, 1, "0.085"),
    Kind("contact_lookup", None, 25, 1, "0.008"),
    Kind("bulk_export", None, 3, 40, "0.001"),
    Kind("intelligence_cache_lookup", None, 30, 1, "0"),
    Kind("property_search", None, 25, 12, "0.002"),
    Kind("valuation", None, 6, 1, "0.055"),
    Kind("market_analysis", None, 3, 1, "0.110"),
    Kind("llm", "gpt-4-turbo", 6, 4, "0.020"),
    Kind("llm", "claude-sonnet", 10, 4, "0.009"),
    Kind("image_generation", "dall-e-3", 3, 2, "0.040"),
    Kind("embeddings", None, 10, 200, "0.00002"),
    Kind("speech_to_text", None, 4, 15, "0.006"),
)
FAILURE_RATE: Final = 0.05


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing a user does with LoopNet, and whether it works out."""

    request_id: str
    user_id: str
    kind: Kind
    quantity: Decimal
    succeeds: bool

    def event(self, org_id: UUID) -> UsageEvent:
        """What LoopNet reports after success."""
        return UsageEvent.of(
            request_id=self.request_id,
            org_id=org_id,
            user_id=self.user_id,
            service_type=self.kind.service_type,
            service_name=f"LoopNet {self.kind.service_type.replace('_', ' ').title()} v2",
            variant=self.kind.variant,
            quantity=self.quantity,
            api_cost=(Decimal(self.kind.cost_per_unit) * self.quantity).quantize(
                Decimal("0.000001")
            ),
            key_source=KeySource.MANAGED,
            occurred_at=datetime.now(UTC),
            metadata={"operation": self.kind.service_type, "record_count": int(self.quantity)},
        )


def operations(users: Sequence[str], count: int, seed: int = 7) -> Iterator[Operation]:
    """`count` operations of the users; the same seed gives the same services and quantities."""
    chance = random.Random(seed)  # noqa: S311 - a simulation
    weights = [kind.weight for kind in KINDS]
    for _ in range(count):
        kind = chance.choices(KINDS, weights)[0]
        yield Operation(
            request_id=f"op-{uuid4()}",
            user_id=chance.choice(users),
            kind=kind,
            quantity=Decimal(chance.randint(1, kind.most_units)),
            succeeds=chance.random() >= FAILURE_RATE,
        )
