"""What a batch of events does to the ledger: charges, dead letters, duplicates, balances."""

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from decimal import Decimal
from threading import Barrier
from time import monotonic
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from pydantic_core import from_json, to_json

from ledger.apply import apply_batch
from ledger.database import Database
from ledger.decisions import Entry, Outcome
from schema.errors import DeadReason
from schema.plans import KeySource, PlanName
from tests.integration.ledger.world import (
    NOW,
    STREAM,
    World,
    entry,
    event,
    fields_of,
    open_world,
)

MICROSECOND = timedelta(microseconds=1)


@pytest.fixture
def world(database: Database, database_url: str) -> Iterator[World]:
    with open_world(database, database_url) as opened:
        yield opened


@pytest.fixture
def org(world: World) -> UUID:
    """An organization with 1,000 credits, 100 of them with Ada."""
    return world.organization(pool=1000, allocations={"ada": 100})


def dead(**reasons: int) -> Counter[str]:
    return Counter(reasons)


# Charges


def test_a_charge_writes_one_attribution_with_all_that_the_event_says(
    world: World, org: UUID
) -> None:
    world.subscribe(org, PlanName.PLATFORM)
    charged = event(
        org,
        service_type="llm",
        service_name="Summaries",
        variant="claude-sonnet",
        quantity="0.418",
        api_cost="0.04",
        metadata={"company_id": "c-7", "nested": [1, None]},
        source="crawler",
        occurred_at=NOW - timedelta(hours=3),
    )
    assert world.apply(charged) == Outcome(charged=1, credits=7)
    row = world.row("credit_usage_attribution")
    allocation = world.row("user_credit_allocations")
    assert row.pop("id") == 1
    assert row == {
        "org_id": org,
        "user_id": "ada",
        "allocation_id": allocation["id"],
        "period_start": allocation["last_reset_date"],
        "overage_credits": 0,
        "corrects": None,
        "actor": None,
        "reason": None,
        "credits_used": 7,
        "service_type": "llm",
        "service_name": "Summaries",
        "variant": "claude-sonnet",
        "quantity": Decimal("0.418"),
        "api_cost": Decimal("0.04"),
        "markup_applied": Decimal("0.02"),
        "total_cost": Decimal("0.06"),
        "key_source": "managed",
        "request_id": "r-1",
        "request_metadata": {"company_id": "c-7", "nested": [1, None]},
        "source": "crawler",
        "created_at": NOW,
        "occurred_at": NOW - timedelta(hours=3),
    }


def test_a_charge_writes_one_request_in_state_charged(world: World, org: UUID) -> None:
    world.apply(event(org, occurred_at=NOW - timedelta(hours=3)))
    row = world.row("usage_requests")
    assert len(row.pop("fingerprint")) == 16
    assert row == {
        "org_id": org,
        "request_id": "r-1",
        "user_id": "ada",
        "service_type": "contact_lookup",
        "state": "charged",
        "credits": 10,
        "reason": None,
        "occurred_at": NOW - timedelta(hours=3),
        "created_at": NOW,
        "settled_at": NOW,
        "held_credits": None,
        "hold_expires_at": None,
    }


def test_balances_are_the_sums_of_what_was_charged(world: World) -> None:
    first = world.organization(pool=1000, allocations={"ada": 100, "ben": 200, "cy": 300})
    second = world.organization(pool=500, allocations={"ada": 400})
    outcome = world.apply(
        event(first, "r-1"),
        event(second, "r-2", service_type="valuation"),
        event(first, "r-3", user_id="ben", service_type="bulk_export", quantity=7),
        event(first, "r-4"),
    )
    assert outcome == Outcome(charged=4, credits=10 + 75 + 35 + 10)
    assert world.allocations(first) == {"ada": (100, 20), "ben": (200, 35), "cy": (300, 0)}
    assert world.allocations(second) == {"ada": (400, 75)}
    assert world.pool(first) == (1000, 600, 55)
    assert world.pool(second) == (500, 400, 75)


def test_an_empty_batch_does_nothing(world: World, org: UUID) -> None:
    before = world.contents()
    assert world.apply() == Outcome()
    assert world.contents() == before
    assert world.pool(org) == (1000, 100, 0)


def test_one_request_id_in_two_organizations_is_two_requests(world: World, org: UUID) -> None:
    other = world.organization(pool=50, allocations={"ada": 50})
    assert world.apply(event(org), event(other)) == Outcome(charged=2, credits=20)
    assert world.pool(org) == (1000, 100, 10)
    assert world.pool(other) == (50, 50, 10)


def test_the_price_in_force_when_it_occurred_counts(world: World, org: UUID) -> None:
    change = NOW - timedelta(days=10)
    world.sql.execute(
        """
        INSERT INTO service_prices (service_type, credits, unit, position, effective_from)
        VALUES ('contact_lookup', 12, 'request', 2, %s)
        """,
        (change,),
    )
    world.apply(
        event(org, "before", occurred_at=change - MICROSECOND),
        event(org, "after", occurred_at=change),
    )
    assert world.rows("usage_requests", "request_id", "credits") == [("after", 12), ("before", 10)]


def test_secrets_that_reach_the_stream_do_not_reach_the_ledger(world: World, org: UUID) -> None:
    metadata = {"api_key": "sk-1", "deep": [{"password": "x", "kept": 1}], "total_tokens": 9}
    world.apply(entry(fields_of(org, metadata=metadata)))
    stored = world.row("credit_usage_attribution")["request_metadata"]
    assert stored == {"deep": [{"kept": 1}], "total_tokens": 9}


# Markup


@pytest.mark.parametrize(
    ("plan", "managed", "byok"),
    [
        (PlanName.PLATFORM, "0.02", "0.02"),
        (PlanName.BYOK, "0", "0"),
        (PlanName.HYBRID, "0.02", "0"),
        (None, "0", "0"),
    ],
)
def test_markup_follows_plan_and_key_source(
    world: World, plan: PlanName | None, managed: str, byok: str
) -> None:
    org_id = world.organization(plan=plan, pool=100, allocations={"ada": 100})
    world.apply(
        *(
            event(org_id, source.value, api_cost="0.04", key_source=source.value)
            for source in KeySource
        )
    )
    columns = ("request_id", "key_source", "markup_applied", "total_cost")
    assert world.rows("credit_usage_attribution", *columns) == [
        ("byok", "byok", Decimal(byok), Decimal("0.04") + Decimal(byok)),
        ("managed", "managed", Decimal(managed), Decimal("0.04") + Decimal(managed)),
    ]


@pytest.mark.parametrize(
    ("status", "markup"),
    [("active", 2), ("trialing", 2), ("past_due", 2), ("paused", 2), ("canceled", 0)],
)
def test_only_a_live_subscription_marks_up(
    world: World, org: UUID, status: str, markup: int
) -> None:
    world.subscribe(org, PlanName.PLATFORM, status)
    world.apply(event(org, api_cost=4))
    assert world.row("credit_usage_attribution")["markup_applied"] == markup


# Dead letters


@pytest.mark.parametrize(
    ("reason", "fields", "credits", "detail"),
    [
        (
            DeadReason.NO_ALLOCATION,
            {"user_id": "nobody"},
            10,
            "No credit allocation found for user nobody in org {org}",
        ),
        (
            DeadReason.INSUFFICIENT_CREDITS,
            {"service_type": "market_analysis"},
            150,
            "Insufficient credits: 100 available, 150 needed",
        ),
        (
            DeadReason.UNKNOWN_SERVICE,
            {"service_type": "fortune_telling"},
            None,
            f"fortune_telling has no price at {NOW.isoformat()}, and no credits are given",
        ),
        (
            DeadReason.UNKNOWN_SERVICE,
            {"service_type": "llm", "variant": "parrot"},
            None,
            f"llm/parrot has no price at {NOW.isoformat()}, and no credits are given",
        ),
        (
            DeadReason.PRICE_MISMATCH,
            {"credits": 11},
            11,
            "the event says 11 credits, the price book 10",
        ),
        (
            DeadReason.TOO_OLD,
            {"occurred_at": NOW - timedelta(days=35) - MICROSECOND},
            10,
            f"occurred at {NOW - timedelta(days=35) - MICROSECOND}, over 35 days ago",
        ),
        (
            DeadReason.IN_THE_FUTURE,
            {"occurred_at": NOW + timedelta(minutes=5) + MICROSECOND},
            10,
            f"occurred at {NOW + timedelta(minutes=5) + MICROSECOND}, which is yet to come",
        ),
    ],
    ids=lambda value: value.value if isinstance(value, DeadReason) else "",
)
def test_a_readable_event_that_cannot_be_charged_is_dead_with_its_reason(
    world: World,
    org: UUID,
    reason: DeadReason,
    fields: dict[str, Any],
    credits: int | None,
    detail: str,
) -> None:
    lost = entry(event(org, **fields))
    assert world.apply(lost) == Outcome(dead=dead(**{reason.value: 1}))
    reported = event(org, **fields)
    letter = world.row("dead_letters")
    mark = letter.pop("fingerprint")
    assert letter == {
        "id": 1,
        "reason": reason.value,
        "detail": detail.format(org=org),
        "org_id": org,
        "request_id": "r-1",
        "user_id": reported.user_id,
        "service_type": reported.service_type,
        "credits": credits,
        "occurred_at": reported.occurred_at,
        "payload": lost.payload,
        "stream": STREAM,
        "entry_id": lost.entry_id,
        "state": "open",
        "created_at": NOW,
        "resolved_at": None,
    }
    request = world.row("usage_requests")
    assert request == {
        "org_id": org,
        "request_id": "r-1",
        "user_id": reported.user_id,
        "service_type": reported.service_type,
        "fingerprint": mark,
        "state": "dead",
        "credits": credits,
        "reason": reason.value,
        "occurred_at": reported.occurred_at,
        "created_at": NOW,
        "settled_at": NOW,
        "held_credits": None,
        "hold_expires_at": None,
    }
    assert world.rows("credit_usage_attribution", "id") == []
    assert world.allocations(org) == {"ada": (100, 0)}
    assert world.pool(org) == (1000, 100, 0)


@pytest.mark.parametrize(
    "occurred_at", [NOW - timedelta(days=35), NOW + timedelta(minutes=5)], ids=["old", "ahead"]
)
def test_the_limits_of_time_are_still_charged(
    world: World, org: UUID, occurred_at: datetime
) -> None:
    assert world.apply(event(org, occurred_at=occurred_at)) == Outcome(charged=1, credits=10)


def test_an_unknown_organization_is_a_dead_letter_and_no_organization(world: World) -> None:
    stranger = uuid4()
    assert world.apply(event(stranger)) == Outcome(dead=dead(unknown_organization=1))
    assert world.rows("dead_letters", "reason", "org_id", "request_id", "detail") == [
        ("unknown_organization", stranger, "r-1", f"no organization {stranger}")
    ]
    assert world.rows("usage_requests", "org_id", "state", "reason") == [
        (stranger, "dead", "unknown_organization")
    ]
    assert world.rows("organizations", "id") == []


def test_an_inactive_allocation_is_none(world: World, org: UUID) -> None:
    world.sql.execute("UPDATE user_credit_allocations SET is_active = false")
    assert world.apply(event(org)) == Outcome(dead=dead(no_allocation=1))
    assert world.allocations(org) == {"ada": (100, 0)}


def test_credits_that_other_requests_hold_are_not_available(world: World, org: UUID) -> None:
    world.sql.execute("UPDATE user_credit_allocations SET held_credits = 85")
    outcome = world.apply(event(org, "r-1"), event(org, "r-2"))
    assert outcome == Outcome(charged=1, credits=10, dead=dead(insufficient_credits=1))
    assert world.row("dead_letters")["detail"] == "Insufficient credits: 5 available, 10 needed"


def test_a_user_who_runs_dry_still_affords_what_fits(world: World, org: UUID) -> None:
    outcome = world.apply(
        event(org, "r-1", service_type="valuation"),
        event(org, "r-2", service_type="company_enrichment"),
        event(org, "r-3", service_type="bulk_export", quantity=5),
        event(org, "r-4", service_type="intelligence_cache_lookup"),
    )
    assert outcome == Outcome(charged=2, credits=100, dead=dead(insufficient_credits=2))
    assert world.rows("dead_letters", "request_id", "detail") == [
        ("r-2", "Insufficient credits: 25 available, 50 needed"),
        ("r-4", "Insufficient credits: 0 available, 2 needed"),
    ]
    assert world.allocations(org) == {"ada": (100, 100)}


def test_what_is_no_json_is_malformed_and_known_by_its_place(world: World) -> None:
    lost = entry(b'{"request_id": "r-1"')
    assert world.apply(lost) == Outcome(dead=dead(malformed=1))
    letter = world.row("dead_letters")
    assert (letter["reason"], letter["payload"]) == ("malformed", lost.payload)
    assert (letter["stream"], letter["entry_id"]) == (STREAM, lost.entry_id)
    assert (letter["org_id"], letter["request_id"], letter["fingerprint"]) == (None, None, None)
    assert world.rows("usage_requests", "request_id") == []


def test_a_broken_entry_is_malformed_however_good_its_event(world: World, org: UUID) -> None:
    good = entry(event(org))
    broken = Entry(good.payload, good.stream, good.entry_id, fault="two fields")
    assert world.apply(broken) == Outcome(dead=dead(malformed=1))
    assert world.rows("dead_letters", "reason", "detail", "request_id") == [
        ("malformed", "two fields", "r-1")
    ]
    assert world.pool(org) == (1000, 100, 0)


def test_an_invalid_event_is_found_by_what_it_still_tells(world: World, org: UUID) -> None:
    outcome = world.apply(entry(fields_of(org, quantity=0)))
    assert outcome == Outcome(dead=dead(invalid=1))
    letter = world.row("dead_letters")
    assert letter["detail"] == "quantity: Input should be greater than 0"
    assert (letter["org_id"], letter["request_id"]) == (org, "r-1")
    assert (letter["user_id"], letter["service_type"]) == ("ada", "contact_lookup")
    assert world.rows("usage_requests", "request_id") == []


def test_a_charge_out_of_range_is_invalid(world: World, org: UUID) -> None:
    world.sql.execute(
        """
        INSERT INTO service_prices (service_type, credits, unit, position, effective_from)
        VALUES ('moon_landing', 99999, 'landing', 99, '2000-01-01Z')
        """
    )
    vast = event(org, service_type="moon_landing", quantity=10**12)
    assert world.apply(vast) == Outcome(dead=dead(invalid=1))
    assert world.rows("usage_requests", "state", "reason", "credits") == [("dead", "invalid", None)]


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b'\x00{"request_id": "r-1"}\x00', "malformed"),
        (b'{"request_id": "r-1", "field\\u0000name": "\\u0000"}', "invalid"),
        (b"\xff\xfe\x00 not UTF-8", "malformed"),
        (b'{"request_id": "' + b"x" * 10_000_000 + b'"}', "invalid"),
        (b"[" * 10_000_000, "malformed"),
        (to_json({f"field-{number}": None for number in range(200)}), "invalid"),
    ],
    ids=["NUL", "escaped NUL", "not UTF-8", "10 MB invalid", "10 MB malformed", "200 faults"],
)
def test_a_dead_letter_keeps_the_payload_byte_for_byte(
    world: World, payload: bytes, reason: str
) -> None:
    assert world.apply(entry(payload)) == Outcome(dead=dead(**{reason: 1}))
    letter = world.row("dead_letters")
    assert letter["payload"] == payload
    assert len(letter["detail"]) <= 2000


def test_a_bad_event_never_harms_its_neighbours(world: World, org: UUID) -> None:
    outcome = world.apply(
        entry(b"nonsense"), entry(event(org, "r-1")), entry(b"[]"), entry(event(org, "r-2"))
    )
    assert outcome == Outcome(charged=2, credits=20, dead=dead(malformed=2))


# One request, one outcome


def test_a_duplicate_inside_a_batch_has_no_effect(world: World, org: UUID) -> None:
    outcome = world.apply(event(org), event(org), event(org))
    assert outcome == Outcome(charged=1, duplicates=2, credits=10)
    assert world.allocations(org) == {"ada": (100, 10)}


def test_a_duplicate_in_a_later_batch_has_no_effect(world: World, org: UUID) -> None:
    world.apply(event(org))
    before = world.contents()
    outcome = world.apply(event(org, metadata={"attempt": 2}), now=NOW + timedelta(hours=1))
    assert outcome == Outcome(duplicates=1)
    assert world.contents() == before


def test_the_first_outcome_is_the_answer_even_if_it_was_death(world: World, org: UUID) -> None:
    costly = event(org, service_type="market_analysis")
    assert world.apply(costly, costly) == Outcome(duplicates=1, dead=dead(insufficient_credits=1))
    world.allocate(org, "ada", 900)
    before = world.contents()
    assert world.apply(costly) == Outcome(duplicates=1)
    assert world.contents() == before


def every_outcome(org_id: UUID) -> list[Entry]:
    """A batch that meets every outcome at least once."""
    return [
        entry(b"nonsense"),
        entry(fields_of(org_id, "invalid", quantity=-1)),
        entry(event(uuid4(), "elsewhere")),
        entry(event(org_id, "charged")),
        entry(event(org_id, "charged")),
        entry(event(org_id, "charged", service_type="valuation")),
        entry(event(org_id, "charged", user_id="ben")),
        entry(event(org_id, "no-allocation", user_id="nobody")),
        entry(event(org_id, "poor", service_type="market_analysis")),
        entry(event(org_id, "poor", service_type="contact_lookup")),
        entry(event(org_id, "unknown", service_type="fortune_telling")),
        entry(event(org_id, "mismatch", credits=3)),
        entry(event(org_id, "old", occurred_at=NOW - timedelta(days=36))),
        entry(event(org_id, "ahead", occurred_at=NOW + timedelta(hours=1))),
        entry(event(org_id, "charged-too")),
    ]


def test_applying_the_same_batch_again_changes_no_row(world: World, org: UUID) -> None:
    batch = every_outcome(org)
    first = world.apply(*batch)
    assert set(first.dead) == set(DeadReason) - {DeadReason.UNPROCESSABLE}
    before = world.contents()
    later = NOW + timedelta(minutes=1)
    again = world.apply(*batch, now=later)
    assert (again.charged, again.credits) == (0, 0)
    assert again.events == first.events
    assert world.contents() == before


def test_applying_the_same_entries_one_by_one_changes_no_row(world: World, org: UUID) -> None:
    batch = every_outcome(org)
    world.apply(*batch)
    before = world.contents()
    for redelivered in batch:
        assert world.apply(redelivered).charged == 0
    assert world.contents() == before


@pytest.mark.parametrize(
    "other",
    [
        {"user_id": "ben"},
        {"service_type": "property_search"},
        {"quantity": 2},
        {"service_type": "fortune_telling"},
    ],
    ids=["user", "service", "credits", "unpriced"],
)
@pytest.mark.parametrize("together", [True, False], ids=["one batch", "two batches"])
def test_another_request_under_a_used_id_is_a_conflict_and_never_charged(
    world: World, *, together: bool, other: dict[str, Any]
) -> None:
    org_id = world.organization(pool=500, allocations={"ada": 100, "ben": 100})
    first, second = entry(event(org_id)), entry(event(org_id, **other))
    if together:
        outcome = world.apply(first, second)
    else:
        outcome = world.apply(first)
        outcome.add(world.apply(second))
    assert outcome == Outcome(charged=1, credits=10, dead=dead(request_id_conflict=1))
    assert world.rows("dead_letters", "reason", "payload") == [
        ("request_id_conflict", second.payload)
    ]
    assert world.rows("usage_requests", "request_id", "user_id", "state", "credits") == [
        ("r-1", "ada", "charged", 10)
    ]
    assert world.allocations(org_id) == {"ada": (100, 10), "ben": (100, 0)}


def test_a_conflict_with_a_dead_request_leaves_it_dead(world: World, org: UUID) -> None:
    world.apply(event(org, user_id="nobody"))
    assert world.apply(event(org)) == Outcome(dead=dead(request_id_conflict=1))
    assert world.rows("usage_requests", "user_id", "state", "reason") == [
        ("nobody", "dead", "no_allocation")
    ]
    assert world.rows("dead_letters", "reason", "user_id") == [
        ("no_allocation", "nobody"),
        ("request_id_conflict", "ada"),
    ]
    assert world.pool(org) == (1000, 100, 0)


@pytest.mark.parametrize(
    "broken",
    [b'{"request_id": "r-1",', to_json({"request_id": "r-1", "quantity": "many"})],
    ids=["malformed", "invalid"],
)
def test_an_event_that_was_unreadable_is_charged_once_it_is_fixed(
    world: World, org: UUID, broken: bytes
) -> None:
    world.apply(entry(broken))
    assert world.apply(event(org)) == Outcome(charged=1, credits=10)
    assert world.rows("dead_letters", "state") == [("open",)]
    assert world.rows("usage_requests", "state") == [("charged",)]


def test_an_unpriced_request_stays_dead_when_it_comes_again_after_the_price(
    world: World, org: UUID
) -> None:
    unpriced = entry(event(org, service_type="fortune_telling"))
    world.apply(unpriced)
    world.sql.execute(
        """
        INSERT INTO service_prices (service_type, credits, unit, position, effective_from)
        VALUES ('fortune_telling', 4, 'fortune', 99, '2000-01-01Z')
        """
    )
    before = world.contents()
    assert world.apply(unpriced) == Outcome(duplicates=1)
    assert world.contents() == before
    fresh = event(org, "r-2", service_type="fortune_telling")
    assert world.apply(fresh) == Outcome(charged=1, credits=4)


# Concurrency


def wait_until_blocked(world: World) -> None:
    """Wait for a session that waits for one of our locks."""
    deadline = monotonic() + 10
    while not world.sql.execute("SELECT FROM pg_locks WHERE NOT granted").rowcount:
        assert monotonic() < deadline, "nobody waits for a lock"


def apply_one(world: World, org_id: UUID) -> None:
    world.apply(event(org_id))


def deduct_one(world: World, org_id: UUID) -> None:
    with psycopg.connect(world.sql.info.dsn, password=world.sql.info.password) as other:
        other.execute("SELECT deduct_credits(%s, 'ada', 10, 'contact_lookup')", (org_id,))


@pytest.mark.parametrize("act", [apply_one, deduct_one])
def test_the_pool_is_locked_before_its_allocations(
    world: World, org: UUID, act: Callable[[World, UUID], None]
) -> None:
    with ThreadPoolExecutor(1) as pool:
        with world.sql.transaction():
            world.sql.execute("SELECT FROM organization_credit_pools FOR UPDATE")
            acting = pool.submit(act, world, org)
            wait_until_blocked(world)
            world.sql.execute("SELECT FROM user_credit_allocations FOR UPDATE NOWAIT")
        acting.result(timeout=30)
    assert world.pool(org) == (1000, 100, 10)


def test_pools_are_locked_in_the_order_of_their_organizations(world: World) -> None:
    *others, first = sorted((world.organization() for _ in range(6)), reverse=True)
    for org_id in [*others, first]:  # the order in which they lie in the table is the opposite
        world.sql.execute("SELECT add_credits_to_pool(%s, 100)", (org_id,))
        world.allocate(org_id, "ada", 100)
    with ThreadPoolExecutor(1) as pool:
        with world.sql.transaction():
            world.sql.execute(
                "SELECT FROM organization_credit_pools WHERE org_id = %s FOR UPDATE", (first,)
            )
            applying = pool.submit(world.apply, *map(event, [*others, first]))
            wait_until_blocked(world)
            world.sql.execute(
                "SELECT FROM organization_credit_pools WHERE org_id = ANY(%s) FOR UPDATE NOWAIT",
                (others,),
            )
        assert applying.result(timeout=30) == Outcome(charged=6, credits=60)


def test_overlapping_batches_and_direct_calls_charge_each_request_once(
    world: World, database: Database, database_url: str
) -> None:
    users = [f"user-{number}" for number in range(5)]
    organizations = [
        world.organization(pool=10_000, allocations=dict.fromkeys(users, 2000)) for _ in range(2)
    ]
    requests = [
        (org_id, f"r-{number}", users[number % len(users)])
        for number in range(150)
        for org_id in organizations
    ]
    events = [
        entry(event(org_id, request_id, user_id=user_id))
        for org_id, request_id, user_id in requests
    ]
    size = 20
    batches = [events[start : start + size] for start in range(0, len(events), size)]
    start = Barrier(3, timeout=30)

    def apply_all(batches: list[list[Entry]]) -> Outcome:
        total = Outcome()
        with database.session() as connection:
            start.wait()
            for batch in batches:
                total.add(apply_batch(connection, batch, NOW))
        return total

    def call_all() -> int:
        with psycopg.connect(database_url, autocommit=True) as connection:
            start.wait()
            for org_id, request_id, user_id in requests[::3]:
                connection.execute(
                    "SELECT deduct_credits(%s, %s, 10, 'contact_lookup', NULL, %s)",
                    (org_id, user_id, request_id),
                )
            found = connection.execute(
                "SELECT count(*) FROM credit_usage_attribution WHERE source = 'sql'"
            ).fetchone()
        return int(found[0]) if found else 0

    backwards = [batch[::-1] for batch in batches]
    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(apply_all, batches), pool.submit(apply_all, backwards)]
        direct = pool.submit(call_all)
        first, second = (future.result(timeout=60) for future in running)
        called = direct.result(timeout=60)

    assert first.dead == second.dead == Counter()
    assert first.charged + second.charged + called == len(requests)
    assert world.rows("credit_usage_attribution", "org_id", "request_id", "user_id") == sorted(
        requests
    )
    for org_id in organizations:
        assert world.allocations(org_id) == dict.fromkeys(users, (2000, 300))
        assert world.pool(org_id) == (10_000, 10_000, 1500)


def test_two_threads_never_overspend_one_allocation(world: World, database: Database) -> None:
    org_id = world.organization(pool=300, allocations={"ada": 300})
    start = Barrier(2, timeout=30)

    def spend(name: str) -> Outcome:
        total = Outcome()
        with database.session() as connection:
            start.wait()
            for number in range(20):
                batch = [entry(event(org_id, f"{name}-{number}"))]
                total.add(apply_batch(connection, batch, NOW))
        return total

    with ThreadPoolExecutor(2) as pool:
        ours, theirs = pool.map(spend, ["ours", "theirs"], timeout=60)
    assert ours.charged + theirs.charged == 30
    assert ours.dead + theirs.dead == dead(insufficient_credits=10)
    assert world.allocations(org_id) == {"ada": (300, 300)}


def test_the_payload_of_a_dead_letter_can_be_read_again(world: World, org: UUID) -> None:
    lost = event(org, user_id="nobody", metadata={"note": "ünïcödé 😀"})
    world.apply(lost)
    assert from_json(world.row("dead_letters")["payload"]) == from_json(lost.to_json())
