"""The price book over time: versions follow each other, and a preview touches nothing."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any, Final
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ledger import holds, prices, repricing
from ledger.clock import utc_now
from ledger.database import Database
from ledger.gate import Operation
from ledger.prices import NewPrice, PriceChange
from ledger.reconcile import reconcile
from ledger.repricing import ServicePreview
from schema.errors import Conflict, InvalidRequest
from schema.events import MAX_CREDITS, MAX_QUANTITY
from schema.prices import BOOK_OPENS, INITIAL_PRICES, Price, PriceBook, credits_for
from tests.integration.ledger.world import NOW, World, event, open_world

HOUR: Final = timedelta(hours=1)
TICK: Final = timedelta(microseconds=1)
TO_COME: Final = NOW + HOUR


@pytest.fixture
def world(database: Database, database_url: str) -> Iterator[World]:
    with open_world(database, database_url) as opened:
        yield opened
        assert reconcile(database, now=NOW).drifts == []


@pytest.fixture
def org_id(world: World) -> UUID:
    return world.organization(pool=100_000, allocations={"ada": 100_000})


def put(
    database: Database,
    service_type: str = "contact_lookup",
    credits: object = 20,
    now: datetime = NOW,
    **fields: Any,
) -> Price:
    new = NewPrice.of(service_type=service_type, credits=credits, **fields)
    return prices.set_price(database, new, now)


def charged(world: World) -> dict[str, int]:
    return dict(world.rows("credit_usage_attribution", "request_id", "credits_used"))


def previewed(
    world: World, *changes: tuple[str, str | None, object], days: int = 30, now: datetime = NOW
) -> list[ServicePreview]:
    """The preview's services; no row may differ after it."""
    before = world.contents()
    asked = [PriceChange.of(service_type=s, variant=v, credits=c) for s, v, c in changes]
    found = repricing.preview(world.database, asked, days, now)
    assert world.contents() == before
    assert (found.since, found.until) == (now - timedelta(days=days), now)
    return list(found.services)


def test_an_event_costs_what_was_in_force_when_it_occurred(world: World, org_id: UUID) -> None:
    put(world.database, effective_from=TO_COME)
    world.apply(
        event(org_id, "before", occurred_at=TO_COME - TICK),
        event(org_id, "at", occurred_at=TO_COME),
        event(org_id, "after", occurred_at=TO_COME + TICK, quantity="1.5"),
        now=TO_COME + HOUR,
    )
    assert charged(world) == {"before": 10, "at": 20, "after": 30}


def test_a_new_price_does_not_turn_a_repetition_into_a_conflict(world: World, org_id: UUID) -> None:
    first = event(org_id, occurred_at=NOW - TICK)
    world.apply(first)
    put(world.database)
    assert world.apply(first).duplicates == 1
    assert charged(world) == {"r-1": 10}


def test_a_hold_costs_what_is_in_force_when_it_is_placed(world: World, org_id: UUID) -> None:
    put(world.database, effective_from=TO_COME)
    placed = [
        holds.place(
            world.database, org_id, "ada", Operation("contact_lookup"), str(at), HOUR, at
        ).credits
        for at in (TO_COME - TICK, TO_COME)
    ]
    assert placed == [10, 20]


def test_a_direct_call_and_the_event_at_the_new_price_are_one_request(
    world: World, org_id: UUID
) -> None:
    put(world.database)
    assert world.deduct(org_id, "r-1", 20)
    assert world.apply(event(org_id)).duplicates == 1
    assert world.apply(event(org_id, occurred_at=NOW - TICK)).dead == {"request_id_conflict": 1}
    assert charged(world) == {"r-1": 20}


def test_a_version_is_added_and_none_is_changed(world: World) -> None:
    before = world.contents()
    added = put(world.database, variant="deep", credits="0.000001", unit="page")
    last = max(price.position for price in INITIAL_PRICES)
    assert added == Price(
        "contact_lookup", "deep", Decimal("0.000001"), "page", NOW, position=last + 1
    )
    after = world.contents()
    (row,) = [row for row in after["service_prices"] if row not in before["service_prices"]]
    assert (row["variant"], row["position"]) == ("deep", last + 1)
    after["service_prices"].remove(row)
    assert after == before


def test_what_is_not_said_is_taken_from_the_service(database: Database) -> None:
    assert put(database, "bulk_export") == Price(
        "bulk_export", None, Decimal(20), "record", NOW, position=3
    )
    assert put(database, "llm", variant="o9").unit == "1,000 tokens"
    put(database, "llm", variant="claude-sonnet", unit="token")
    again = put(database, "llm", variant="claude-sonnet", now=TO_COME)
    assert (again.unit, again.effective_from, again.position) == ("token", TO_COME, 9)


def test_an_event_without_a_variant_keeps_to_the_first_row(world: World, org_id: UUID) -> None:
    put(world.database, "llm", variant="a-new-one", credits=1)
    put(world.database, "llm", variant="gpt-4-turbo", credits=31)
    world.apply(
        event(org_id, "none", service_type="llm"),
        event(org_id, "new", service_type="llm", variant="a-new-one"),
    )
    assert charged(world) == {"none": 31, "new": 1}


def test_the_listing_is_what_is_in_force_and_what_comes(database: Database) -> None:
    assert prices.listing(database, NOW) == list(INITIAL_PRICES)
    assert prices.listing(database, BOOK_OPENS - TICK) == list(INITIAL_PRICES)
    later = put(database, effective_from=TO_COME + HOUR, credits=30)
    sooner = put(database, effective_from=TO_COME)
    other = put(database, "teleport", unit="trip")

    def lookups(at: datetime) -> list[Price]:
        return [p for p in prices.listing(database, at) if p.service_type == "contact_lookup"]

    old = INITIAL_PRICES[2]
    assert lookups(NOW) == [old, sooner, later]
    assert lookups(TO_COME) == [sooner, later]
    assert lookups(TO_COME + HOUR) == [later]
    assert prices.listing(database, NOW)[-1] == other


def test_a_price_cannot_begin_in_the_past(world: World) -> None:
    before = world.contents()
    for moment in (NOW - TICK, datetime.min.replace(tzinfo=timezone(timedelta(hours=14)))):
        with pytest.raises(InvalidRequest, match="is in the past: events since then") as refused:
            put(world.database, effective_from=moment)
        assert refused.value.details["fields"] == ["effective_from"]
    assert world.contents() == before
    assert put(world.database, effective_from=NOW).effective_from == NOW


@pytest.mark.parametrize("variant", [None, "standard"])
def test_one_time_has_one_price(world: World, variant: str | None) -> None:
    put(world.database, "company_enrichment", variant=variant, effective_from=TO_COME)
    before = world.contents()
    elsewhere = TO_COME.astimezone(timezone(-5 * HOUR))
    with pytest.raises(Conflict, match="has a price from 2026-03-15T13:30:00"):
        put(world.database, "company_enrichment", 21, variant=variant, effective_from=elsewhere)
    assert world.contents() == before
    put(world.database, "company_enrichment", 22, variant="full", effective_from=TO_COME)


def test_whoever_sets_prices_at_once_gets_positions_apart(database: Database) -> None:
    def add(number: int) -> int:
        return put(database, f"service-{number}", unit="call").position

    with ThreadPoolExecutor(4) as pool:
        positions = sorted(pool.map(add, range(16)))
    assert positions == list(range(len(INITIAL_PRICES), len(INITIAL_PRICES) + 16))


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"credits": 0}, "credits: "),
        ({"credits": "-1"}, "credits: "),
        ({"credits": "0.0000001"}, "credits: .* 6 decimal places"),
        ({"credits": MAX_CREDITS + 1}, "credits: "),
        ({"credits": "NaN"}, "credits: "),
        ({"credits": "many"}, "credits: "),
        ({"service_type": ""}, "service_type: "),
        ({"service_type": "llm/deep"}, "service_type: must not .* slash"),
        ({"service_type": "l" * 101}, "service_type: "),
        ({"variant": ""}, "variant: "),
        ({"variant": "\0"}, "variant: "),
        ({"unit": " "}, "unit: must not be blank"),
        ({"effective_from": NOW.replace(tzinfo=None)}, "effective_from: "),
        ({"effective_from": datetime.max.replace(tzinfo=NOW.tzinfo)}, "effective_from: "),
        ({"service_type": "contact_lokup"}, "unit: contact_lokup is not in the price book yet"),
    ],
)
def test_a_bad_price_is_refused(world: World, fields: dict[str, Any], problem: str) -> None:
    before = world.contents()
    with pytest.raises(InvalidRequest, match=problem):
        put(world.database, **fields)
    assert world.contents() == before


def test_a_preview_is_what_one_computes_by_hand(world: World, org_id: UUID) -> None:
    world.apply(
        event(org_id, "1"),  # 10
        event(org_id, "2", quantity="1.25", variant="express"),  # 13
        event(org_id, "3", occurred_at=NOW - timedelta(days=30)),  # outside the window
        event(org_id, "4", service_type="llm", quantity="0.1"),  # 3, by the first variant
        event(org_id, "5", service_type="llm", variant="gpt-4-turbo", quantity="2"),  # 60
        event(org_id, "6", service_type="llm", variant="claude-sonnet", quantity="2"),  # 30
        event(org_id, "7", service_type="teleport", credits=500, quantity="3"),
        event(org_id, "8", service_type="valuation"),  # 75
    )
    assert previewed(world, ("contact_lookup", None, "8.5"), ("llm", "gpt-4-turbo", 31)) == [
        ServicePreview("contact_lookup", 2, 2, 23, 9 + 11),
        ServicePreview("llm", 3, 2, 93, 4 + 62 + 30),
        ServicePreview("teleport", 1, 0, 500, 500),
        ServicePreview("valuation", 1, 0, 75, 75),
    ]
    assert previewed(world, ("contact_lookup", "express", 100))[0] == ServicePreview(
        "contact_lookup", 2, 1, 23, 10 + 125
    )
    assert previewed(world, ("llm", None, 1))[1].difference == 0


def test_a_preview_adds_up(world: World, org_id: UUID) -> None:
    world.apply(event(org_id, "1"), event(org_id, "2", service_type="valuation"))
    change = PriceChange.of(service_type="valuation", credits=70)
    total = repricing.preview(world.database, [change], 1, NOW).total
    assert (total.requests, total.repriced, total.charged, total.changed) == (2, 1, 85, 80)
    assert total.difference == -5


def test_a_preview_of_nothing_is_nothing(world: World) -> None:
    assert previewed(world, ("valuation", None, 70)) == []


def test_a_preview_knows_the_versions_that_were_charged(world: World, org_id: UUID) -> None:
    put(world.database, effective_from=TO_COME)
    put(world.database, "teleport", unit="trip", effective_from=TO_COME)
    world.apply(
        event(org_id, "1", occurred_at=TO_COME - TICK),  # 10
        event(org_id, "2", occurred_at=TO_COME),  # 20
        event(org_id, "3", occurred_at=NOW, service_type="teleport", credits=20),
        event(org_id, "4", occurred_at=TO_COME, service_type="teleport"),  # 20
        now=TO_COME,
    )
    changes = (("contact_lookup", None, 11), ("teleport", None, 5))
    assert previewed(world, *changes, now=TO_COME) == [
        ServicePreview("contact_lookup", 2, 2, 30, 22),
        ServicePreview("teleport", 2, 1, 40, 25),
    ]


def test_credits_that_a_direct_call_stated_stay(world: World, org_id: UUID) -> None:
    world.deduct(org_id, "r-1", 10)
    world.deduct(org_id, "r-2", 25)
    soon = utc_now() + HOUR
    assert previewed(world, ("contact_lookup", None, 11), now=soon) == [
        ServicePreview("contact_lookup", 2, 1, 35, 36)
    ]


@pytest.mark.parametrize(
    ("changes", "days", "problem"),
    [
        ([], 30, "at least one"),
        ([("contact_lookup", None, 1)] * 2, 30, "contact_lookup is given twice"),
        ([("contact_lokup", None, 1)], 30, "contact_lokup is not in the price book"),
        ([("contact_lookup", None, 1)], 0, "days: must be from 1 to"),
        ([("contact_lookup", None, 1)], repricing.MAX_PREVIEW_DAYS + 1, "days: must be from 1 to"),
    ],
)
def test_a_preview_that_makes_no_sense_is_refused(
    world: World, changes: list[tuple[str, str | None, object]], days: int, problem: str
) -> None:
    with pytest.raises(InvalidRequest, match=problem):
        previewed(world, *changes, days=days)


per_unit = st.decimals("0.000001", MAX_CREDITS, places=6)
quantities = st.decimals("0.000001", MAX_QUANTITY, places=9).filter(bool)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(price=per_unit, quantity=quantities)
def test_sql_rounds_as_the_price_book_does(world: World, price: Decimal, quantity: Decimal) -> None:
    found = world.sql.execute(
        "SELECT ceil(%s::numeric * %s::numeric) AS credits", (price, quantity)
    ).fetchone()
    assert found == {"credits": credits_for(price, quantity)}


SERVICES: Final = ("a", "b")
VARIANTS: Final = (None, "x", "y")
MOMENTS: Final = tuple(NOW + n * HOUR for n in range(4))


@st.composite
def books(draw: st.DrawFn) -> list[Price]:
    """Any book that `set_price` can make: all versions of one variant share a position."""
    every = st.sampled_from([(s, v) for s in SERVICES for v in VARIANTS])
    keys = draw(st.lists(every, unique=True, max_size=6))
    return [
        Price(service, variant, Decimal(draw(st.integers(1, 10**6))), "call", moment, position)
        for position, (service, variant) in enumerate(keys)
        for moment in draw(st.sets(st.sampled_from(MOMENTS[1:]), min_size=1))
    ]


def replace_book(world: World, book: Sequence[Price]) -> None:
    world.sql.execute("SET session_replication_role = replica")  # past the append-only trigger
    world.sql.execute("DELETE FROM service_prices")
    with world.sql.cursor() as cursor:
        cursor.executemany(
            """
            INSERT INTO service_prices
                (service_type, variant, credits, unit, effective_from, position)
            VALUES (%s, %s, %s, %s, %s, %s)
            """,
            [
                (p.service_type, p.variant, p.credits, p.unit, p.effective_from, p.position)
                for p in book
            ],
        )


@settings(
    max_examples=60,
    deadline=None,
    # One database serves all examples: each replaces the book.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(rows=books())
def test_sql_and_python_find_the_same_price(world: World, rows: list[Price]) -> None:
    replace_book(world, rows)
    book = PriceBook(rows)
    asked = [(s, v, at) for s in SERVICES for v in (*VARIANTS, "z", "") for at in MOMENTS]
    found = world.sql.execute(
        """
        SELECT price_of(service, variant, at) AS credits
        FROM unnest(%s::text[], %s::text[], %s::timestamptz[])
            WITH ORDINALITY AS asked (service, variant, at, number)
        ORDER BY number
        """,
        [list(column) for column in zip(*asked, strict=True)],
    )
    expected = [price.credits if (price := book.price_of(*one)) else None for one in asked]
    assert [row["credits"] for row in found] == expected
