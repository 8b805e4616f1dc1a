"""Reading and deciding without a database: order, identity and limits."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Final
from uuid import UUID

import pytest
from pydantic_core import to_json

from ledger.decisions import (
    MAX_CHARGE,
    Balance,
    Entry,
    Outcome,
    Pool,
    Seen,
    Verdicts,
    decide,
    read,
)
from schema.errors import DeadReason
from schema.events import UsageEvent, fingerprint
from schema.plans import PlanName
from schema.prices import INITIAL_PRICES, Price, PriceBook

NOW: Final = datetime(2026, 3, 15, 12, 30, tzinfo=UTC)
ORG: Final = UUID("6f9b2a50-94d1-4f0e-8a37-0d5a4c1a7e11")
ALLOCATION: Final = UUID("0c7de1a6-6f9e-4c8f-9a55-d8f6d1f0b002")
BOOK: Final = PriceBook(INITIAL_PRICES)
MICROSECOND: Final = timedelta(microseconds=1)


def entry(**fields: Any) -> Entry:
    """A contact lookup (10 credits) of Ada, unless `fields` say otherwise."""
    usual = {
        "request_id": "r-1",
        "org_id": ORG,
        "user_id": "ada",
        "service_type": "contact_lookup",
        "occurred_at": NOW,
    }
    return Entry(UsageEvent.of(**usual | fields).to_json())


def judge(
    entries: Sequence[Entry],
    *,
    available: int | None = 100,
    seen: dict[str, Seen] | None = None,
    plan: PlanName | None = None,
) -> Verdicts:
    """The verdicts about one organization's entries; `seen` is keyed by request id."""
    reports, deaths = read(entries, BOOK)
    verdicts = Verdicts(deaths=deaths)
    balances = {} if available is None else {(ORG.int, "ada"): balance(available)}
    decide(
        reports,
        seen={(ORG.int, request_id): known for request_id, known in (seen or {}).items()},
        organizations={ORG.int: Pool(ORG, plan)},
        balances=balances,
        now=NOW,
        verdicts=verdicts,
    )
    return verdicts


def balance(available: int) -> Balance:
    return Balance(
        ORG, ALLOCATION, available, is_active=True, period_start=NOW - timedelta(days=14)
    )


def reasons(verdicts: Verdicts) -> list[DeadReason]:
    return [death.reason for death in verdicts.deaths]


def test_a_charge_carries_credits_allocation_and_markup() -> None:
    verdicts = judge([entry(quantity=3, api_cost="0.04")], plan=PlanName.PLATFORM)
    (charge,) = verdicts.charges
    assert (charge.credits, charge.allocation_id) == (30, ALLOCATION)
    assert charge.markup == Decimal("0.02")


def test_events_are_charged_in_order_while_the_balance_lasts() -> None:
    events = [
        entry(request_id=f"r-{number}", service_type="bulk_export", quantity=quantity)
        for number, quantity in enumerate([10, 11, 9, 1, 1])
    ]
    verdicts = judge(events, available=100)
    assert [charge.report.event.request_id for charge in verdicts.charges] == ["r-0", "r-2", "r-3"]
    assert [death.detail for death in verdicts.deaths] == [
        "Insufficient credits: 50 available, 55 needed",
        "Insufficient credits: 0 available, 5 needed",
    ]


def test_what_fits_exactly_is_charged() -> None:
    assert judge([entry()], available=10).counts() == Outcome(charged=1, credits=10)
    assert reasons(judge([entry()], available=9)) == [DeadReason.INSUFFICIENT_CREDITS]


def test_the_balance_says_what_the_batch_spends() -> None:
    reports, _ = read([entry(request_id="r-1"), entry(request_id="r-2")], BOOK)
    ours = balance(25)
    decide(
        reports,
        seen={},
        organizations={ORG.int: Pool(ORG)},
        balances={(ORG.int, "ada"): ours},
        now=NOW,
        verdicts=Verdicts(),
    )
    assert (ours.available, ours.spent) == (5, 20)


def test_a_user_without_a_balance_has_no_allocation() -> None:
    assert reasons(judge([entry()], available=None)) == [DeadReason.NO_ALLOCATION]


@pytest.mark.parametrize(
    ("occurred_at", "expected"),
    [
        (NOW - timedelta(days=35), []),
        (NOW - timedelta(days=35) - MICROSECOND, [DeadReason.TOO_OLD]),
        (NOW + timedelta(minutes=5), []),
        (NOW + timedelta(minutes=5) + MICROSECOND, [DeadReason.IN_THE_FUTURE]),
    ],
)
def test_time_limits_are_exact(occurred_at: datetime, expected: list[DeadReason]) -> None:
    assert reasons(judge([entry(occurred_at=occurred_at)])) == expected


def test_an_unknown_organization_comes_before_every_other_reason() -> None:
    stranger = UUID(int=7)
    lost = entry(org_id=stranger, occurred_at=NOW - timedelta(days=99), service_type="unheard_of")
    assert reasons(judge([lost])) == [DeadReason.UNKNOWN_ORGANIZATION]


@pytest.mark.parametrize("state", ["charged", "dead"])
def test_the_same_request_again_is_a_duplicate(state: str) -> None:
    known = Seen(fingerprint("ada", "contact_lookup", 10), state)
    assert judge([entry()], seen={"r-1": known}).counts() == Outcome(duplicates=1)


@pytest.mark.parametrize("state", ["charged", "dead"])
@pytest.mark.parametrize(
    "other", [("ben", "contact_lookup", 10), ("ada", "x", 10), ("ada", "contact_lookup", 20)]
)
def test_another_request_under_the_same_id_is_a_conflict(
    state: str, other: tuple[str, str, int]
) -> None:
    verdicts = judge([entry()], seen={"r-1": Seen(fingerprint(*other), state)})
    assert reasons(verdicts) == [DeadReason.REQUEST_ID_CONFLICT]
    assert [death.takes_request_id for death in verdicts.deaths] == [False]


def test_a_request_that_died_unpriced_is_the_same_now_that_it_has_a_price() -> None:
    unpriced = fingerprint("ada", "contact_lookup", None)
    dead = judge([entry()], seen={"r-1": Seen(unpriced, "dead")})
    assert dead.counts() == Outcome(duplicates=1)
    charged = judge([entry()], seen={"r-1": Seen(unpriced, "charged")})
    assert reasons(charged) == [DeadReason.REQUEST_ID_CONFLICT]


def test_a_conflict_inside_a_batch_leaves_the_first_request_in_place() -> None:
    verdicts = judge([entry(), entry(quantity=2), entry()])
    assert verdicts.counts().charged == 1
    assert verdicts.duplicates == 1
    assert reasons(verdicts) == [DeadReason.REQUEST_ID_CONFLICT]


def test_dead_requests_are_not_tried_again_inside_a_batch() -> None:
    verdicts = judge([entry(quantity=11), entry(quantity=11)], available=100)
    assert verdicts.counts().duplicates == 1
    assert reasons(verdicts) == [DeadReason.INSUFFICIENT_CREDITS]


@pytest.mark.parametrize(
    ("fields", "credits", "reason"),
    [
        ({}, 10, None),
        ({"credits": 10}, 10, None),
        ({"credits": 9}, 9, DeadReason.PRICE_MISMATCH),
        ({"service_type": "llm", "variant": "claude-sonnet", "quantity": "0.418"}, 7, None),
        ({"service_type": "unheard_of", "credits": 4, "quantity": 9}, 4, None),
        ({"service_type": "unheard_of"}, None, DeadReason.UNKNOWN_SERVICE),
        ({"service_type": "llm", "variant": "parrot"}, None, DeadReason.UNKNOWN_SERVICE),
        ({"service_type": "llm", "variant": "parrot", "credits": 4}, 4, None),
    ],
)
def test_credits_are_the_price_or_what_the_event_says(
    fields: dict[str, Any], credits: int | None, reason: DeadReason | None
) -> None:
    ((report,), deaths) = read([entry(**fields)], BOOK)
    assert deaths == []
    assert report.credits == credits
    assert (report.refusal[0] if report.refusal else None) == reason
    assert report.fingerprint == fingerprint("ada", report.event.service_type, credits)


def test_a_charge_beyond_what_callers_can_read_is_invalid() -> None:
    dear = PriceBook([Price("moon_landing", None, Decimal(MAX_CHARGE), "landing")])
    fits, exceeds = read(
        [
            entry(service_type="moon_landing"),
            entry(service_type="moon_landing", quantity="1.0000000000000002"),
        ],
        dear,
    )[0]
    assert (fits.credits, fits.refusal) == (MAX_CHARGE, None)
    assert exceeds.credits is None
    assert exceeds.refusal is not None
    assert exceeds.refusal[0] is DeadReason.INVALID


def test_reading_sorts_the_unreadable_out_and_keeps_the_order_of_the_rest() -> None:
    broken = to_json({"request_id": "r-9", "org_id": ORG, "user_id": 5})
    reports, deaths = read(
        [Entry(b"{"), entry(request_id="r-1"), Entry(broken), entry(request_id="r-2")], BOOK
    )
    assert [report.event.request_id for report in reports] == ["r-1", "r-2"]
    assert [death.reason for death in deaths] == [DeadReason.MALFORMED, DeadReason.INVALID]
    assert [death.entry.payload for death in deaths] == [b"{", broken]
    assert [(death.clues.org_id, death.clues.request_id) for death in deaths] == [
        (None, None),
        (ORG, "r-9"),
    ]
    assert not any(death.takes_request_id for death in deaths)


def test_a_broken_entry_is_malformed_whatever_it_holds() -> None:
    reports, (death,) = read([Entry(entry().payload, fault="two fields")], BOOK)
    assert reports == []
    assert (death.reason, death.detail) == (DeadReason.MALFORMED, "two fields")
    assert death.clues.request_id == "r-1"


def test_outcomes_add_up() -> None:
    total = judge([entry(), entry(), entry(user_id="ben")]).counts()
    total.add(judge([entry()], available=0).counts())
    assert total.charged == total.duplicates == 1
    assert total.dead == {"request_id_conflict": 1, "insufficient_credits": 1}
    assert (total.credits, total.events) == (10, 4)
