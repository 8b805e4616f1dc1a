"""The price book and what an operation costs (contract.md §3)."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from math import ceil
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schema.events import MAX_QUANTITY
from schema.prices import BOOK_OPENS, INITIAL_PRICES, Price, PriceBook, credits_for

NOW: Final = datetime(2026, 3, 15, tzinfo=UTC)
INITIAL: Final = PriceBook(INITIAL_PRICES)

CONTRACT: Final = [
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
]

prices = st.decimals("0.000001", 999_999_999_999, places=6)
quantities = st.decimals("0.000001", MAX_QUANTITY, places=9).filter(bool)


def cost(service_type: str, variant: str | None, quantity: str = "1") -> int | None:
    """Credits for an operation by the initial book, or None without a price."""
    price = INITIAL.price_of(service_type, variant, NOW)
    return None if price is None else credits_for(price.credits, Decimal(quantity))


def test_the_initial_book_is_the_contract() -> None:
    rows = [(p.service_type, p.variant, str(p.credits), p.unit) for p in INITIAL_PRICES]
    assert rows == CONTRACT


@pytest.mark.parametrize(("service_type", "variant", "credits", "unit"), CONTRACT)
def test_every_row_of_the_contract_is_found(
    service_type: str, variant: str | None, credits: str, unit: str
) -> None:
    price = INITIAL.price_of(service_type, variant, NOW)
    assert price is not None
    assert (str(price.credits), price.unit) == (credits, unit)


@pytest.mark.parametrize(
    ("service_type", "variant", "quantity", "credits"),
    [
        ("llm", "claude-sonnet", "0.418", 7),
        ("llm", "claude-sonnet", "1", 15),
        ("llm", "gpt-4-turbo", "0.418", 13),
        ("embeddings", None, "1", 1),
        ("embeddings", None, "50", 1),
        ("embeddings", None, "50.001", 2),
        ("embeddings", None, "0.001", 1),
        ("bulk_export", None, "1000", 5000),
        ("speech_to_text", None, "2.5", 15),
        ("speech_to_text", None, "0.1", 1),
        ("image_generation", "dall-e-3", "4", 192),
    ],
)
def test_fractions_of_a_credit_round_up(
    service_type: str, variant: str | None, quantity: str, credits: int
) -> None:
    assert cost(service_type, variant, quantity) == credits


@pytest.mark.parametrize(
    ("price", "quantity", "credits"),
    [
        ("2.3", "1", 3),
        ("3", "1", 3),
        ("3.000001", "1", 4),
        ("0.1", "30", 3),
        ("999999999999.999999", "1000000000000", 999_999_999_999_999_999_000_000),
        ("1", "1.00000000000000000000000000000000000001", 2),
    ],
)
def test_the_product_is_exact_before_it_is_rounded(price: str, quantity: str, credits: int) -> None:
    assert credits_for(Decimal(price), Decimal(quantity)) == credits


@given(prices, quantities)
def test_credits_are_the_ceiling_of_the_exact_product(price: Decimal, quantity: Decimal) -> None:
    assert credits_for(price, quantity) == ceil(Fraction(price) * Fraction(quantity))


@pytest.mark.parametrize(
    ("service_type", "credits"), [("company_enrichment", 50), ("llm", 30), ("image_generation", 48)]
)
def test_without_a_variant_the_first_row_of_the_service_counts(
    service_type: str, credits: int
) -> None:
    assert cost(service_type, None) == credits


def test_the_first_row_is_told_by_its_position_and_not_by_its_turn() -> None:
    second = Price("llm", "a", Decimal(2), "call", position=2)
    first = Price("llm", "b", Decimal(1), "call", position=1)
    assert PriceBook([second, first]).price_of("llm", None, NOW) == first


def test_a_row_without_a_variant_serves_every_variant() -> None:
    assert cost("contact_lookup", "express") == 10


def test_a_row_of_the_variant_comes_before_the_row_for_all() -> None:
    for_all = Price("llm", None, Decimal(1), "call", position=1)
    special = Price("llm", "deep", Decimal(9), "call", position=2)
    book = PriceBook([for_all, special])
    assert book.price_of("llm", "deep", NOW) == special
    assert book.price_of("llm", "quick", NOW) == for_all
    assert book.price_of("llm", None, NOW) == for_all


@pytest.mark.parametrize(
    ("service_type", "variant"),
    [
        ("fortune_telling", None),
        ("llm", "parrot"),
        ("LLM", "claude-sonnet"),
        ("llm", "Claude-Sonnet"),
        ("company_enrichment", ""),
    ],
)
def test_what_is_not_in_the_book_has_no_price(service_type: str, variant: str | None) -> None:
    assert INITIAL.price_of(service_type, variant, NOW) is None


def version(credits: int, effective_from: datetime, variant: str | None = None) -> Price:
    return Price("llm", variant, Decimal(credits), "call", effective_from)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("at", "credits"),
    [
        (BOOK_OPENS, 1),
        (NOW - timedelta(microseconds=1), 1),
        (NOW, 2),
        (NOW + timedelta(days=364), 2),
        (NOW + timedelta(days=365), 3),
        (NOW + timedelta(days=9999), 3),
    ],
)
def test_the_version_in_force_at_that_time_counts(
    at: datetime, credits: int, *, reverse: bool
) -> None:
    versions = [
        version(1, BOOK_OPENS),
        version(2, NOW),
        version(3, NOW + timedelta(days=365)),
    ]
    book = PriceBook(reversed(versions) if reverse else versions)
    price = book.price_of("llm", None, at)
    assert price is not None
    assert price.credits == credits


def test_before_its_first_version_a_service_has_no_price() -> None:
    book = PriceBook([version(1, NOW)])
    assert book.price_of("llm", None, NOW - timedelta(microseconds=1)) is None


def test_a_new_price_of_one_variant_leaves_the_others_alone() -> None:
    book = PriceBook(
        [version(1, BOOK_OPENS, "a"), version(5, BOOK_OPENS, "b"), version(2, NOW, "a")]
    )
    in_force = [book.price_of("llm", variant, NOW) for variant in ("a", "b")]
    assert [price.credits for price in in_force if price] == [2, 5]


def test_effective_dates_are_compared_across_time_zones() -> None:
    book = PriceBook([version(1, BOOK_OPENS), version(2, NOW)])
    elsewhere = datetime.fromisoformat("2026-03-15T09:00:00+09:00")
    price = book.price_of("llm", None, elsewhere)
    assert price is not None
    assert price.credits == 2
