"""Plans: prices, and what they add to the upstream cost (contract.md §3)."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schema.plans import PLANS, KeySource, PlanName, markup

costs = st.decimals(0, 99_999_999, places=6)


@pytest.mark.parametrize(
    ("plan", "key_source", "expected"),
    [
        (PlanName.PLATFORM, KeySource.MANAGED, "0.02"),
        (PlanName.PLATFORM, KeySource.BYOK, "0.02"),
        (PlanName.BYOK, KeySource.MANAGED, "0"),
        (PlanName.BYOK, KeySource.BYOK, "0"),
        (PlanName.HYBRID, KeySource.MANAGED, "0.02"),
        (PlanName.HYBRID, KeySource.BYOK, "0"),
        (None, KeySource.MANAGED, "0"),
        (None, KeySource.BYOK, "0"),
    ],
)
def test_the_markup_on_four_cents(
    plan: PlanName | None, key_source: KeySource, expected: str
) -> None:
    assert markup(plan, Decimal("0.04"), key_source) == Decimal(expected)


@pytest.mark.parametrize(
    ("api_cost", "expected"),
    [("0", "0"), ("0.000001", "0.000001"), ("0.000003", "0.000002"), ("0.000002", "0.000001")],
)
def test_half_a_millionth_of_a_dollar_rounds_up(api_cost: str, expected: str) -> None:
    assert markup(PlanName.PLATFORM, Decimal(api_cost), KeySource.MANAGED) == Decimal(expected)


@given(costs)
def test_marked_up_means_half_again_to_the_millionth(api_cost: Decimal) -> None:
    added = markup(PlanName.PLATFORM, api_cost, KeySource.MANAGED)
    assert added == added.quantize(Decimal("0.000001"))
    assert Decimal(0) <= added - api_cost / 2 <= Decimal("0.0000005")


def test_monthly_prices_are_the_contract() -> None:
    prices = {name: plan.monthly_price for name, plan in PLANS.items()}
    assert prices == {PlanName.PLATFORM: 50, PlanName.BYOK: 30, PlanName.HYBRID: 99}


def test_every_plan_is_filed_under_its_own_name() -> None:
    assert {name: plan.name for name, plan in PLANS.items()} == {name: name for name in PlanName}
