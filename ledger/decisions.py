"""What becomes of each event of a batch: pure rules, no I/O (design decisions D4 to D6).

Deciding event by event, in order, over balances held in memory gives by construction what one
`deduct_credits()` call after the other would give; `ledger.apply` locks the rows that make those
balances true and writes all decisions at once.

Records that are made once per event are named tuples: they cost a third of a frozen dataclass.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Final, NamedTuple
from uuid import UUID

from schema.errors import DeadReason, EventError, MalformedEvent
from schema.events import Clues, UsageEvent, clues_in, fingerprint, parse_event
from schema.plans import PlanName, markup
from schema.prices import PriceBook, credits_for

MAX_AGE: Final = timedelta(days=35)
MAX_AHEAD: Final = timedelta(minutes=5)
MAX_CHARGE: Final = 2**53
"""Most credits of one request: beyond this JavaScript callers could not read the figure."""

OPEN_STATES: Final = frozenset({"held", "released", "expired"})

Key = tuple[int, str]
"""An organization's id as a number, and a request or user id: compared by the million, so cheap."""


class Entry(NamedTuple):
    """One entry as it was found on a stream, or came from elsewhere."""

    payload: bytes
    """The event as JSON, byte for byte as it was sent."""
    stream: str | None = None
    entry_id: str | None = None
    fault: str | None = None
    """Why the entry around the payload is broken, where it is."""


class Seen(NamedTuple):
    """What is already known of a request id."""

    fingerprint: bytes
    state: str
    user_id: str = ""
    service_type: str = ""
    held: int = 0
    """Credits that are set aside for it right now."""
    short: int = 0
    """Credits beyond those that its hold counts on: overage."""

    @property
    def is_open(self) -> bool:
        """Whether it is only a hold so far, which an event settles."""
        return self.state in OPEN_STATES


class ClosedPeriod(NamedTuple):
    """A period of an allocation that a reset has ended; the end belongs to the next one."""

    start: datetime
    end: datetime


@dataclass(slots=True)
class Pool:
    """An organization: what its pool can give, and what this batch takes from it."""

    org_id: UUID
    plan: PlanName | None = None
    available: int = 0
    """Credits that are allocated to nobody."""
    overage_room: int | None = None
    """Credits it may still use on account; None if it allows no overage."""
    funded: int = 0
    lent: int = 0

    def fund(self, credits: int) -> None:
        """Take available credits for usage of a closed period."""
        self.available -= credits
        self.funded += credits

    def can_lend(self, credits: int) -> bool:
        """Whether so many credits may be used on account."""
        return self.overage_room is not None and credits <= self.overage_room

    def lend(self, credits: int) -> None:
        """Use credits on account."""
        assert self.overage_room is not None  # noqa: S101 - `can_lend` was asked
        self.overage_room -= credits
        self.lent += credits

    def unhold(self, short: int) -> None:
        """Free the overage that the hold of the request at hand counted on."""
        if self.overage_room is not None:
            self.overage_room += short


@dataclass(slots=True)
class Balance:
    """An allocation: credits its user can still spend, and what this batch does to them."""

    org_id: UUID
    allocation_id: UUID
    available: int
    """What is left beside all holds."""
    is_active: bool
    period_start: datetime
    closed: Sequence[ClosedPeriod] = ()
    """The closed periods in which events of this batch may have occurred."""
    spent: int = 0
    unheld: int = 0
    lent: int = 0
    given: int = 0

    def spend(self, credits: int) -> None:
        """Take credits that are available."""
        self.available -= credits
        self.spent += credits

    def unhold(self, credits: int) -> None:
        """Make credits available that were set aside for the request at hand."""
        self.available += credits
        self.unheld += credits

    def borrow(self, credits: int) -> None:
        """Take in credits on account."""
        self.available += credits
        self.lent += credits

    def give(self, credits: int) -> None:
        """Hand available credits to a closed period."""
        self.available -= credits
        self.given += credits

    def closed_at(self, moment: datetime) -> ClosedPeriod | None:
        """The closed period of this moment; None if it belongs to the running one."""
        if moment >= self.period_start:
            return None
        return next((p for p in self.closed if p.start <= moment < p.end), None)

    @property
    def is_touched(self) -> bool:
        """Whether this batch changes the allocation."""
        return bool(self.spent or self.unheld or self.lent or self.given)


class Reported(NamedTuple):
    """An entry that holds a readable event, with its price if it has one."""

    entry: Entry
    event: UsageEvent
    credits: int | None
    fingerprint: bytes
    request_key: Key
    user_key: Key
    refusal: tuple[DeadReason, str] | None = None
    """Why it cannot be priced, where it cannot."""


class Charge(NamedTuple):
    """An event to be charged to an allocation; `markup` is in USD."""

    report: Reported
    allocation_id: UUID
    period_start: datetime
    """Start of the period it is attributed to."""
    markup: Decimal
    settles: bool = False
    """Whether the request has a row already, from its hold or its death."""
    overage: int = 0
    """How many of its credits are used on account."""
    is_late: bool = False
    """Whether it is attributed to a period that is closed."""
    is_funded: bool = False
    """Whether the pool's available credits pay for it, and not the user's."""

    @property
    def credits(self) -> int:
        """What it costs."""
        assert self.report.credits is not None  # noqa: S101 - an event without a price is dead
        return self.report.credits


@dataclass(frozen=True, slots=True)
class Death:
    """An entry that becomes a dead letter."""

    entry: Entry
    reason: DeadReason
    detail: str
    report: Reported | None = None
    clues: Clues = field(default_factory=Clues)

    @property
    def takes_request_id(self) -> bool:
        """Whether the request itself is dead, and not only this report of it."""
        return self.report is not None and self.reason is not DeadReason.REQUEST_ID_CONFLICT


@dataclass(slots=True)
class Verdicts:
    """The decisions about one batch, in the order of its entries."""

    charges: list[Charge] = field(default_factory=list)
    deaths: list[Death] = field(default_factory=list)
    duplicates: int = 0

    def counts(self) -> "Outcome":
        """The figures of the batch."""
        return Outcome(
            charged=len(self.charges),
            duplicates=self.duplicates,
            credits=sum(charge.credits for charge in self.charges),
            dead=Counter(str(death.reason) for death in self.deaths),
        )


@dataclass(slots=True)
class Outcome:
    """What became of one or more batches: events, credits, dead letters by reason."""

    charged: int = 0
    duplicates: int = 0
    credits: int = 0
    dead: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Outcome") -> None:
        """Count another batch in."""
        self.charged += other.charged
        self.duplicates += other.duplicates
        self.credits += other.credits
        self.dead.update(other.dead)

    @property
    def events(self) -> int:
        """How many entries were dealt with."""
        return self.charged + self.duplicates + self.dead.total()


def read(entries: Iterable[Entry], book: PriceBook) -> tuple[list[Reported], list[Death]]:
    """Sort the readable entries, priced, from those that are beyond reading."""
    reports: list[Reported] = []
    deaths: list[Death] = []
    for entry in entries:
        try:
            if entry.fault:
                raise MalformedEvent(entry.fault)
            reports.append(_priced(entry, parse_event(entry.payload), book))
        except EventError as error:
            clues = clues_in(entry.payload)
            deaths.append(Death(entry, error.reason, error.message, clues=clues))
    return reports, deaths


def _priced(entry: Entry, event: UsageEvent, book: PriceBook) -> Reported:
    price = book.price_of(event.service_type, event.variant, event.occurred_at)
    credits = credits_for(price.credits, event.quantity) if price else event.credits
    refusal: tuple[DeadReason, str] | None = None
    if credits is None:
        named = f"{event.service_type}/{event.variant}" if event.variant else event.service_type
        refusal = (
            DeadReason.UNKNOWN_SERVICE,
            f"{named} has no price at {event.occurred_at.isoformat()}, and no credits are given",
        )
    elif event.credits not in (None, credits):
        refusal = (
            DeadReason.PRICE_MISMATCH,
            f"the event says {event.credits} credits, the price book {credits}",
        )
        credits = event.credits
    elif credits > MAX_CHARGE:
        refusal = (DeadReason.INVALID, f"quantity: {credits} credits are out of range")
        credits = None
    org = event.org_id.int
    return Reported(
        entry,
        event,
        credits,
        fingerprint(event.user_id, event.service_type, credits),
        (org, event.request_id),
        (org, event.user_id),
        refusal,
    )


def decide(
    reports: Iterable[Reported],
    *,
    seen: dict[Key, Seen],
    organizations: Mapping[int, Pool],
    balances: Mapping[Key, Balance],
    now: datetime,
    verdicts: Verdicts,
) -> None:
    """Charge, recognize or refuse each report in order, keeping `seen` and `balances` current.

    Args:
        reports: readable events, in the order in which they were sent.
        seen: the request ids of this batch that the ledger knows already.
        organizations: the known organizations of this batch, by id number.
        balances: the allocations of this batch's users.
        now: the time of the decision.
        verdicts: where the decisions go.
    """
    oldest, latest = now - MAX_AGE, now + MAX_AHEAD
    for report in reports:
        event = report.event
        known = seen.get(report.request_key)
        if known is not None and not known.is_open and _is_same_request(report, known):
            verdicts.duplicates += 1
            continue
        if known is not None and not _is_settled_by(report, known):
            detail = f"request id {event.request_id} was used for another request"
            conflict = Death(report.entry, DeadReason.REQUEST_ID_CONFLICT, detail, report)
            verdicts.deaths.append(conflict)
            continue
        pool = organizations.get(event.org_id.int)
        balance = balances.get(report.user_key)
        if known is not None and balance is not None and pool is not None:
            balance.unhold(known.held)
            pool.unhold(known.short)
        refusal = _refused_by_time_or_place(event, pool, oldest, latest) or report.refusal
        charge = None
        if refusal is None and pool is not None:
            charge = _charge(report, balance, pool, known)
        if charge is None:
            reason, detail = refusal or want_of_credits(report, balance, known)
            verdicts.deaths.append(Death(report.entry, reason, detail, report))
            seen[report.request_key] = Seen(report.fingerprint, "dead")
            continue
        seen[report.request_key] = Seen(report.fingerprint, "charged")
        verdicts.charges.append(charge)


def collect(
    debts: Iterable[Reported],
    *,
    organizations: Mapping[int, Pool],
    balances: Mapping[Key, Balance],
    verdicts: Verdicts,
) -> None:
    """Charge each debt that is covered by now, in order; the others stay as they are."""
    for report in debts:
        balance = balances.get(report.user_key)
        pool = organizations[report.event.org_id.int]
        charge = _charge(report, balance, pool, Seen(report.fingerprint, "dead"))
        if charge is not None:
            verdicts.charges.append(charge)


def _charge(
    report: Reported, balance: Balance | None, pool: Pool, known: Seen | None
) -> Charge | None:
    """Take an event's credits where they are to be found; None if they are not."""
    credits = report.credits
    if balance is None or credits is None or not _may_spend(balance, known):
        return None
    event = report.event
    added = markup(pool.plan, event.api_cost, event.key_source) if event.api_cost else Decimal(0)
    settles = known is not None
    period = balance.closed_at(event.occurred_at)
    if period is None:
        overage = max(0, credits - balance.available)
        if not _covered(overage, balance, pool):
            return None
        balance.spend(credits)
        return Charge(report, balance.allocation_id, balance.period_start, added, settles, overage)
    if credits <= pool.available:
        pool.fund(credits)
        return Charge(
            report, balance.allocation_id, period.start, added, settles, is_late=True,
            is_funded=True,
        )  # fmt: skip
    overage = max(0, credits - balance.available)
    if not _covered(overage, balance, pool):
        return None
    balance.give(credits)
    return Charge(
        report, balance.allocation_id, period.start, added, settles, overage, is_late=True
    )


def _may_spend(balance: Balance, known: Seen | None) -> bool:
    # What was granted before an allocation was switched off may still be charged to it.
    return balance.is_active or (known is not None and known.held > 0)


def _covered(overage: int, balance: Balance, pool: Pool) -> bool:
    if overage == 0:
        return True
    if not balance.is_active or not pool.can_lend(overage):
        return False
    pool.lend(overage)
    balance.borrow(overage)
    return True


def _is_settled_by(report: Reported, known: Seen) -> bool:
    """Whether the event is what a hold was for; its price is known better now than then."""
    event = report.event
    return known.is_open and (known.user_id, known.service_type) == (
        event.user_id,
        event.service_type,
    )


def _is_same_request(report: Reported, known: Seen) -> bool:
    if report.fingerprint == known.fingerprint:
        return True
    # It may have died without a price that it has by now.
    event = report.event
    return known.state == "dead" and known.fingerprint == fingerprint(
        event.user_id, event.service_type, event.credits
    )


def _refused_by_time_or_place(
    event: UsageEvent, pool: Pool | None, oldest: datetime, latest: datetime
) -> tuple[DeadReason, str] | None:
    if pool is None:
        return DeadReason.UNKNOWN_ORGANIZATION, f"no organization {event.org_id}"
    if event.occurred_at < oldest:
        return DeadReason.TOO_OLD, f"occurred at {event.occurred_at}, over {MAX_AGE.days} days ago"
    if event.occurred_at > latest:
        return DeadReason.IN_THE_FUTURE, f"occurred at {event.occurred_at}, which is yet to come"
    return None


def want_of_credits(
    report: Reported, balance: Balance | None, known: Seen | None
) -> tuple[DeadReason, str]:
    """Why an event whose credits are not to be found is refused, and with which words."""
    event = report.event
    if balance is None or not _may_spend(balance, known):
        return (
            DeadReason.NO_ALLOCATION,
            f"No credit allocation found for user {event.user_id} in org {event.org_id}",
        )
    return (
        DeadReason.INSUFFICIENT_CREDITS,
        f"Insufficient credits: {balance.available} available, {report.credits} needed",
    )
