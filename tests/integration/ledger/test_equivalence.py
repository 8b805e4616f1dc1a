"""Batches equal one `deduct_credits()` call per event, in order (design decision D5).

Random histories are applied twice: to one set of organizations in batches by the ledger, to a
second set of the same shape one event at a time in SQL. `Oracle` knows the contract by itself,
with its own prices, and leaves to SQL everything that is about balances and conflicts.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from math import ceil
from typing import Any, Final
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg.errors import RaiseException

from ledger.apply import apply_batch
from ledger.database import Database
from ledger.decisions import Entry, Outcome
from schema.events import UsageEvent
from schema.plans import PlanName
from tests.integration.ledger.world import NOW, STREAM, World, open_world

EXAMPLES: Final = int(os.environ.get("EQUIVALENCE_EXAMPLES", "60"))
SHRINKING_SECONDS: Final = 330
"""What Hypothesis may take to make a counterexample small, and then some."""

PRICES: Final[Mapping[tuple[str, str | None], Fraction]] = {
    ("contact_lookup", None): Fraction(10),
    ("property_search", None): Fraction(3),
    ("llm", None): Fraction(30),
    ("llm", "claude-sonnet"): Fraction(15),
}
UNPRICED: Final = "skip_trace"
POOL: Final = 200
LENDER: Final = 1
"""Number of the organization that allows overage."""
OVERAGE_LIMIT: Final = 45
STRANGER: Final = 2
"""Number of the organization that does not exist."""


@dataclass(frozen=True, slots=True)
class Report:
    """One event; organizations and users are numbers."""

    org: int
    user: int
    request: int
    service: tuple[str, str | None]
    quantity: str
    said_credits: int | None
    ago: timedelta

    @property
    def user_id(self) -> str:
        return f"user-{self.user}"

    @property
    def request_id(self) -> str:
        return f"request-{self.request}"

    @property
    def price(self) -> int | None:
        per_unit = PRICES.get(self.service)
        return None if per_unit is None else ceil(per_unit * Fraction(self.quantity))

    @property
    def credits(self) -> int | None:
        """What is reported: the event's own figure, else the price."""
        return self.price if self.said_credits is None else self.said_credits

    @property
    def identity(self) -> tuple[str, str, int | None]:
        """What tells two requests under one id apart."""
        return self.user_id, self.service[0], self.credits

    def event(self, org_ids: Sequence[UUID]) -> UsageEvent:
        return UsageEvent.of(
            request_id=self.request_id,
            org_id=org_ids[self.org],
            user_id=self.user_id,
            service_type=self.service[0],
            variant=self.service[1],
            quantity=Decimal(self.quantity),
            credits=self.said_credits,
            occurred_at=NOW - self.ago,
        )


@dataclass(frozen=True, slots=True)
class TopUp:
    """Credits allocated to a user between two batches; the pool may be too small."""

    org: int
    user: int
    credits: int


@dataclass(frozen=True, slots=True)
class Deactivation:
    """An allocation that is switched off between two batches."""

    org: int
    user: int


Step = Sequence[Report] | TopUp | Deactivation

organizations = st.integers(0, 1)
users = st.integers(0, 3)
purses = st.lists(st.lists(st.integers(0, 90), min_size=3, max_size=3), min_size=2, max_size=2)
top_ups = st.builds(TopUp, org=organizations, user=users, credits=st.integers(1, 60))
deactivations = st.builds(Deactivation, org=organizations, user=users)
# Most events are in order, or there would be no empty purse, duplicate or conflict to find.
reports = st.builds(
    Report,
    org=st.sampled_from([0, 0, 0, 0, 1, 1, 1, STRANGER]),
    user=st.sampled_from([0, 0, 0, 1, 1, 2, 2, 3]),
    request=st.integers(0, 40),
    service=st.sampled_from([*PRICES, *PRICES, (UNPRICED, None), (UNPRICED, "deep")]),
    quantity=st.sampled_from(["1", "1", "2", "0.5", "2.3"]),
    said_credits=st.sampled_from([None] * 7 + [10, 3, 15]),
    ago=st.sampled_from(
        [timedelta()] * 8 + [timedelta(days=34), timedelta(days=36), timedelta(minutes=-6)]
    ),
)


@st.composite
def histories(draw: st.DrawFn) -> list[Step]:
    """Batches of reports, many of them sent more than once, with changes between them."""
    sent = draw(st.lists(reports, min_size=30, max_size=60))
    batches = st.lists(st.sampled_from(sent), min_size=10, max_size=40)
    steps = st.one_of(batches, batches, batches, top_ups, deactivations)
    return draw(st.lists(steps, min_size=4, max_size=8))


@dataclass(slots=True)
class Ledger:
    """What is compared: every row about usage, with organizations as numbers."""

    requests: list[tuple[Any, ...]] = field(default_factory=list)
    attributions: list[tuple[Any, ...]] = field(default_factory=list)
    allocations: list[tuple[Any, ...]] = field(default_factory=list)
    pools: list[tuple[Any, ...]] = field(default_factory=list)
    letters: list[tuple[Any, ...]] = field(default_factory=list)


class Side:
    """One set of organizations: two that exist, with purses for users 0 to 2, and a stranger."""

    def __init__(self, world: World, purses: Sequence[Sequence[int]]) -> None:
        self.sql = world.sql
        self.org_ids = [world.organization(pool=POOL) for _ in purses] + [uuid4()]
        world.subscribe(self.org_ids[LENDER], PlanName.BYOK)
        self.sql.execute(
            """
            UPDATE organization_credit_pools
            SET allow_overage = true, overage_limit = %s
            WHERE org_id = %s
            """,
            (OVERAGE_LIMIT, self.org_ids[LENDER]),
        )
        for org, purse in enumerate(purses):
            for user, credits in enumerate(purse):
                if credits:
                    self.allocate(TopUp(org, user, credits))

    def allocate(self, top_up: TopUp) -> str:
        """Allocate, and say what SQL said to it."""
        try:
            self.sql.execute(
                "SELECT allocate_credits_to_user(%s, %s, %s)",
                (self.org_ids[top_up.org], f"user-{top_up.user}", top_up.credits),
            )
        except RaiseException as error:
            return str(error.diag.message_primary)
        return "done"

    def deactivate(self, deactivation: Deactivation) -> None:
        self.sql.execute(
            """
            UPDATE user_credit_allocations SET is_active = false
            WHERE org_id = %s AND user_id = %s
            """,
            (self.org_ids[deactivation.org], f"user-{deactivation.user}"),
        )

    def select(self, query: str) -> list[tuple[Any, ...]]:
        """Rows of this side's organizations, sorted; the first column is the organization's id."""
        found = self.sql.execute(query.encode(), {"org_ids": self.org_ids})
        rows = [tuple(row.values()) for row in found]
        return sorted(((self.org_ids.index(row[0]), *row[1:]) for row in rows), key=repr)

    def ledger(self) -> Ledger:
        """What the database holds of this side."""
        return Ledger(
            self.select(
                """
                SELECT org_id, request_id, user_id, service_type, state, credits, reason,
                    fingerprint
                FROM usage_requests
                WHERE org_id = ANY(%(org_ids)s)
                """
            ),
            self.select(
                """
                SELECT u.org_id, u.user_id, u.credits_used, u.service_type, u.request_id,
                    u.overage_credits,
                    a.org_id = u.org_id AND a.user_id = u.user_id AS own_allocation
                FROM credit_usage_attribution u
                JOIN user_credit_allocations a ON a.id = u.allocation_id
                WHERE u.org_id = ANY(%(org_ids)s)
                """
            ),
            self.select(
                """
                SELECT org_id, user_id, allocated_credits, used_credits, remaining_credits,
                    held_credits, is_active
                FROM user_credit_allocations
                WHERE org_id = ANY(%(org_ids)s)
                """
            ),
            self.select(
                """
                SELECT org_id, total_credits, allocated_credits, used_credits, available_credits,
                    overage_credits
                FROM organization_credit_pools
                WHERE org_id = ANY(%(org_ids)s)
                """
            ),
            self.select(
                """
                SELECT org_id, reason, detail, request_id, user_id, service_type, credits, state,
                    occurred_at, entry_id
                FROM dead_letters
                WHERE org_id = ANY(%(org_ids)s)
                """
            ),
        )


class Oracle(Side):
    """Calls `deduct_credits()` for one event after the other, and keeps the dead by itself."""

    def __init__(self, world: World, purses: Sequence[Sequence[int]]) -> None:
        super().__init__(world, purses)
        self.charged: set[tuple[int, str]] = set()
        self.dead: dict[tuple[int, str], Report] = {}
        self.reasons: dict[tuple[int, str], str] = {}
        self.letters: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def take(self, batch: Sequence[tuple[str, Report]]) -> Outcome:
        """The outcome of a batch of events with their entry ids."""
        outcome = Outcome(dead=Counter())
        with self.sql.transaction():
            for entry_id, report in batch:
                verdict, detail = self._judge(report)
                if verdict == "charged":
                    outcome.charged += 1
                    outcome.credits += report.credits or 0
                elif verdict == "duplicate":
                    outcome.duplicates += 1
                else:
                    outcome.dead[verdict] += 1
                    self._bury(entry_id, report, verdict, detail)
        return outcome

    def _judge(self, report: Report) -> tuple[str, str]:
        key = (report.org, report.request_id)
        if key in self.dead:
            same = self.dead[key].identity == report.identity
            return ("duplicate", "") if same else self._conflict(report)
        if key in self.charged:
            return self._deduct(report, "duplicate")
        reason, detail = self._refusal(report)
        if not reason:
            reason, detail = self._deduct(report, "charged")
        if reason == "charged":
            self.charged.add(key)
        else:
            self.dead[key] = report
            self.reasons[key] = reason
        return reason, detail

    @staticmethod
    def _conflict(report: Report) -> tuple[str, str]:
        detail = f"request id {report.request_id} was used for another request"
        return "request_id_conflict", detail

    def _refusal(self, report: Report) -> tuple[str, str]:
        occurred_at = NOW - report.ago
        if report.org == STRANGER:
            return "unknown_organization", f"no organization {self.org_ids[STRANGER]}"
        if report.ago > timedelta(days=35):
            return "too_old", f"occurred at {occurred_at}, over 35 days ago"
        if report.ago < timedelta(minutes=-5):
            return "in_the_future", f"occurred at {occurred_at}, which is yet to come"
        if report.credits is None:
            named = "/".join(filter(None, report.service))
            at = occurred_at.isoformat()
            return "unknown_service", f"{named} has no price at {at}, and no credits are given"
        if report.price not in (None, report.credits):
            detail = f"the event says {report.credits} credits, the price book {report.price}"
            return "price_mismatch", detail
        return "", ""

    def _deduct(self, report: Report, success: str) -> tuple[str, str]:
        if report.credits is None:  # SQL cannot be asked; nothing without credits was charged
            return self._conflict(report)
        try:
            with self.sql.transaction():
                self.sql.execute(
                    """
                    SELECT deduct_credits(
                        %(org_id)s, %(user_id)s, %(credits)s, %(service_type)s,
                        p_request_id => %(request_id)s
                    )
                    """,
                    {
                        "org_id": self.org_ids[report.org],
                        "user_id": report.user_id,
                        "credits": report.credits,
                        "service_type": report.service[0],
                        "request_id": report.request_id,
                    },
                )
        except RaiseException as error:
            message = str(error.diag.message_primary)
            if message.startswith("Request id conflict"):
                return self._conflict(report)
            refusals = {
                "Insufficient credits": "insufficient_credits",
                "No credit allocation found": "no_allocation",
            }
            (reason,) = [reason for text, reason in refusals.items() if message.startswith(text)]
            return reason, message
        return success, ""

    def _bury(self, entry_id: str, report: Report, reason: str, detail: str) -> None:
        letter = (
            report.org,
            reason,
            detail,
            report.request_id,
            *report.identity,
            "open",
            NOW - report.ago,
            entry_id,
        )
        self.letters.setdefault((report.org, report.request_id, report.identity), letter)

    def ledger(self) -> Ledger:
        """What the database would hold if every death had been written to it."""
        found = super().ledger()
        assert found.letters == []
        found.letters = sorted(self.letters.values(), key=repr)
        deaths = [
            (org, request_id, *report.identity[:2], "dead", report.credits, self.reasons[key], mark)
            for key, report in self.dead.items()
            for org, request_id in [key]
            for mark in [self._fingerprint(report)]
        ]
        found.requests = sorted([*found.requests, *deaths], key=repr)
        return found

    def _fingerprint(self, report: Report) -> bytes:
        row = self.sql.execute(
            "SELECT usage_fingerprint(%s, %s, %s) AS mark", report.identity
        ).fetchone()
        assert row is not None
        return bytes(row["mark"])


@pytest.fixture
def world(database: Database, database_url: str) -> Iterator[World]:
    with open_world(database, database_url) as opened:
        opened.sql.execute("SET synchronous_commit = off")
        yield opened


def comparable(ledger: Ledger, org_ids: Sequence[UUID]) -> Ledger:
    """The same with the ids of organizations in texts replaced by their numbers."""

    def named(text: object) -> object:
        if isinstance(text, str):
            for number, org_id in enumerate(org_ids):
                text = text.replace(str(org_id), f"org-{number}")
        return text

    ledger.letters = sorted(
        (tuple(named(value) for value in letter) for letter in ledger.letters), key=repr
    )
    return ledger


@pytest.mark.timeout(SHRINKING_SECONDS + EXAMPLES)
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    # One database serves all examples: each makes organizations of its own.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(purses=purses, history=histories())
def test_batches_equal_one_deduct_credits_call_per_event(
    world: World, purses: list[list[int]], history: list[Step]
) -> None:
    batched, single = Side(world, purses), Oracle(world, purses)
    entry_numbers = iter(range(1, 1000))
    with world.database.session() as connection:
        for step in history:
            match step:
                case TopUp():
                    assert batched.allocate(step) == single.allocate(step)
                case Deactivation():
                    batched.deactivate(step)
                    single.deactivate(step)
                case _:
                    batch = [(f"{next(entry_numbers)}-0", report) for report in step]
                    entries = [
                        Entry(report.event(batched.org_ids).to_json(), STREAM, entry_id)
                        for entry_id, report in batch
                    ]
                    assert apply_batch(connection, entries, NOW) == single.take(batch)
    assert comparable(batched.ledger(), batched.org_ids) == comparable(
        single.ledger(), single.org_ids
    )
