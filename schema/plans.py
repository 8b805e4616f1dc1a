"""Subscription plans and what they add to the upstream cost (contract.md §3)."""

from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from enum import StrEnum
from typing import Final

_MICRO_USD: Final = Decimal("0.000001")


class PlanName(StrEnum):
    """The plans an organization can subscribe to."""

    PLATFORM = "platform"
    BYOK = "byok"
    HYBRID = "hybrid"


class KeySource(StrEnum):
    """Whose upstream API key served the operation."""

    MANAGED = "managed"
    BYOK = "byok"


@dataclass(frozen=True, slots=True)
class Plan:
    """One plan: its monthly price in USD and the factor on API cost for each key source."""

    name: PlanName
    monthly_price: Decimal
    cost_factor: dict[KeySource, Decimal]

    def markup(self, api_cost: Decimal, key_source: KeySource) -> Decimal:
        """What the plan adds to `api_cost`, in USD, rounded half up to 6 places."""
        factor = self.cost_factor[key_source]
        return (api_cost * (factor - 1)).quantize(_MICRO_USD, rounding=ROUND_HALF_UP)


_THROUGH: Final = Decimal(1)
_MARKED_UP: Final = Decimal("1.5")

PLANS: Final[dict[PlanName, Plan]] = {
    PlanName.PLATFORM: Plan(
        PlanName.PLATFORM,
        Decimal(50),
        {KeySource.MANAGED: _MARKED_UP, KeySource.BYOK: _MARKED_UP},
    ),
    PlanName.BYOK: Plan(
        PlanName.BYOK,
        Decimal(30),
        {KeySource.MANAGED: _THROUGH, KeySource.BYOK: _THROUGH},
    ),
    PlanName.HYBRID: Plan(
        PlanName.HYBRID,
        Decimal(99),
        {KeySource.MANAGED: _MARKED_UP, KeySource.BYOK: _THROUGH},
    ),
}


def markup(plan: PlanName | None, api_cost: Decimal, key_source: KeySource) -> Decimal:
    """The markup in USD under `plan`; an organization without a subscription pays none."""
    return PLANS[plan].markup(api_cost, key_source) if plan else Decimal(0)
