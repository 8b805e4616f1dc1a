"""What the ledger has to do, in plain Python: the specification that random histories are held to.

One object is one organization. Every method is one act, at an explicit time; one that raises
`Refused` must not have happened, so it is tried on a copy. Credits are whole; prices are not its
subject.
"""

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from schema.periods import STEPS, ResetPeriod, next_boundary, zone_of

UTC_ZONE: Final = zone_of("UTC")
MONTH: Final = STEPS[ResetPeriod.MONTHLY]
MAX_AGE: Final = timedelta(days=35)
OPEN: Final = ("held", "released", "expired")
DEBTS: Final = ("insufficient_credits", "no_allocation")


class Refused(Exception):
    """The act is not possible; `code` says why, in the words of contract.md §4."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


@dataclass(slots=True)
class Period:
    """A period of an allocation that a reset has closed."""

    start: datetime
    end: datetime
    allocated: int
    used: int


@dataclass(slots=True)
class Allocation:
    """The credits of one user, in the period that is running."""

    rhythm: ResetPeriod
    anchor: datetime
    start: datetime
    end: datetime | None = None
    allowance: int = 0
    allocated: int = 0
    used: int = 0
    held: int = 0
    active: bool = True
    closed: list[Period] = field(default_factory=list)

    @property
    def available(self) -> int:
        """What its user can spend beside all holds."""
        return self.allocated - self.used - self.held

    def closed_at(self, moment: datetime) -> Period | None:
        """The closed period of this moment; None if it counts for the running one."""
        return next((p for p in self.closed if p.start <= moment < p.end), None)

    def run_until_next_boundary(self) -> None:
        """Find the end of the running period, counted from the anchor."""
        step = STEPS.get(self.rhythm)
        self.end = next_boundary(self.anchor, step, UTC_ZONE, self.start) if step else None


@dataclass(slots=True)
class Request:
    """One request id and what became of it."""

    user: str
    service: str
    credits: int
    state: str
    reason: str | None = None
    held: int = 0
    short: int = 0
    """Credits that its hold counts on beyond the user's own: overage."""
    expires_at: datetime | None = None
    occurred_at: datetime | None = None
    period: datetime | None = None
    """Start of the period that it was charged to."""
    cost: int = 0
    """What it was charged, corrections included."""
    overage: int = 0
    """How much of that is on account."""

    @property
    def identity(self) -> tuple[str, str, int]:
        """What tells two requests under one id apart."""
        return self.user, self.service, self.credits


@dataclass(frozen=True, slots=True)
class Event:
    """A report of one request."""

    request_id: str
    user: str
    service: str
    credits: int
    occurred_at: datetime

    @property
    def identity(self) -> tuple[str, str, int]:
        """What tells two requests under one id apart."""
        return self.user, self.service, self.credits


@dataclass(slots=True)
class Organization:
    """A pool, the allocations made from it, and the requests charged to them."""

    total: int = 0
    allocated: int = 0
    used: int = 0
    overage: int = 0
    """Used on account since the last bill."""
    overage_limit: int = 0
    bill_date: datetime | None = None
    """End of the period of its subscription; without one nothing is lent."""
    bill_anchor: datetime | None = None
    refresh: int = 0
    refresh_date: datetime | None = None
    refresh_anchor: datetime | None = None
    allocations: dict[str, Allocation] = field(default_factory=dict)
    requests: dict[str, Request] = field(default_factory=dict)
    debts: list[str] = field(default_factory=list)
    """Request ids of open debts, oldest first."""
    conflicts: set[tuple[str, tuple[str, str, int]]] = field(default_factory=set)
    """Reports of other requests under an id that was taken."""

    @property
    def available(self) -> int:
        """Credits that are allocated to nobody."""
        return self.total - self.allocated

    def overage_room(self) -> int:
        """Credits that may still be used on account, beside those that holds count on."""
        if self.bill_date is None:
            return 0
        return (
            self.overage_limit
            - self.overage
            - sum(request.short for request in self.requests.values() if request.state == "held")
        )

    # The pool

    def subscribe(self, now: datetime) -> None:
        """Begin a monthly subscription."""
        self.bill_anchor, self.bill_date = now, next_boundary(now, MONTH, UTC_ZONE, now)

    def bill(self, now: datetime) -> None:
        """End the periods of the subscription that are over: what was lent is billed."""
        while self.bill_anchor and self.bill_date and self.bill_date <= now:
            self.overage = 0
            self.bill_date = next_boundary(self.bill_anchor, MONTH, UTC_ZONE, self.bill_date)

    def set_refresh(self, credits: int, now: datetime) -> None:
        """Have so many credits every month from now on, or none."""
        self.refresh = credits
        if not credits:
            self.refresh_anchor = self.refresh_date = None
        elif self.refresh_date is None:
            self.refresh_anchor, self.refresh_date = now, next_boundary(now, MONTH, UTC_ZONE, now)

    def add(self, credits: int) -> None:
        """Purchase, grant, refund; an adjustment may be negative."""
        if self.available + credits < 0:
            raise Refused("insufficient_credits")
        self.total += credits

    # Allocations

    def allocate(
        self, user: str, credits: int, rhythm: ResetPeriod | None, *, raises: bool, now: datetime
    ) -> None:
        """Give a user credits of the pool: once, and with every reset if it raises the allowance.

        A new allocation, or one that was switched off, recurs to what it is given.
        """
        if credits > self.available:
            raise Refused("insufficient_credits")
        own = self.allocations.get(user)
        if own is None:
            own = Allocation(rhythm or ResetPeriod.MONTHLY, anchor=now, start=now)
            own.run_until_next_boundary()
            self.allocations[user] = own
            raises = True
        elif not own.active:
            own.active, own.allowance, raises = True, 0, True
        if rhythm not in (None, own.rhythm):
            own.rhythm, own.anchor = rhythm, own.start
            own.run_until_next_boundary()
        own.allowance += credits if raises else 0
        own.allocated += credits
        self.allocated += credits

    def reclaim(self, user: str, credits: int | None) -> None:
        """Take unused credits back into the pool, all of them unless told."""
        own = self._allocation(user)
        wanted = own.available if credits is None else credits
        if wanted > own.available:
            raise Refused("insufficient_credits")
        self._take_back(own, wanted)

    def deactivate(self, user: str) -> None:
        """Switch an allocation off; what is held for operations under way stays with it."""
        own = self._allocation(user)
        self._take_back(own, own.available)
        own.active = False

    def return_unused(self) -> None:
        """Take back what came free in allocations that are switched off."""
        for own in self.allocations.values():
            if not own.active:
                self._take_back(own, own.available)

    def reset_due(self, now: datetime) -> None:
        """Refresh the pool, close the periods that have ended, and fill up to the allowance.

        What was used is drawn from the pool as far as it goes; what is left beyond allowance and
        holds goes back.
        """
        while self.refresh_anchor and self.refresh_date and self.refresh_date <= now:
            self.total += self.refresh
            self.refresh_date = next_boundary(
                self.refresh_anchor, MONTH, UTC_ZONE, self.refresh_date
            )
        for user in sorted(self.allocations):
            own = self.allocations[user]
            while own.active and own.end is not None and own.end <= now:
                own.closed.append(Period(own.start, own.end, own.allocated, own.used))
                left = own.allocated - own.used
                drawn = min(max(own.allowance, own.held) - left, self.available)
                self.allocated += drawn
                own.allocated, own.used = left + drawn, 0
                own.start = own.end
                own.run_until_next_boundary()

    # Holds

    def hold(self, request_id: str, user: str, service: str, credits: int, until: datetime) -> None:
        """Set credits aside; the user's own first, then what may be used on account."""
        own = self.allocations.get(user)
        if own is None or not own.active:
            raise Refused("no_allocation")
        known = self.requests.get(request_id)
        if known is not None and (
            known.state not in OPEN or known.identity != (user, service, credits)
        ):
            raise Refused("request_id_conflict")
        if known is not None and known.state == "held":
            return
        held = min(own.available, credits)
        if credits > held and credits - held > self.overage_room():
            raise Refused("insufficient_credits")
        own.held += held
        self.requests[request_id] = Request(
            user, service, credits, "held", None, held, credits - held, until
        )

    def release(self, request_id: str) -> None:
        """Give a hold's credits back."""
        known = self.requests.get(request_id)
        if known is None:
            raise Refused("not_found")
        if known.state not in OPEN:
            raise Refused("conflict")
        self._end_hold(known, "released")

    def expire(self, now: datetime) -> None:
        """Give the credits of overdue holds back."""
        for request in self.requests.values():
            if request.expires_at is not None and request.expires_at <= now:
                self._end_hold(request, "expired")

    # Usage

    def apply(self, event: Event, now: datetime) -> str:
        """Charge, recognize or bury one event; the verdict."""
        known = self.requests.get(event.request_id)
        if known is not None and known.state not in OPEN and known.identity == event.identity:
            return "duplicate"
        if known is not None and not (
            known.state in OPEN and (known.user, known.service) == (event.user, event.service)
        ):
            self.conflicts.add((event.request_id, event.identity))
            return "request_id_conflict"
        own = self.allocations.get(event.user)
        may_spend = own is not None and self._may_spend(own, known)
        self._end_hold(known, "released")
        request = Request(*event.identity, "dead", occurred_at=event.occurred_at)
        self.requests[event.request_id] = request
        if event.occurred_at < now - MAX_AGE:
            request.reason = "too_old"
        elif own is None or not may_spend:
            request.reason = "no_allocation"
        elif not self._charge(request, own, own.closed_at(event.occurred_at)):
            request.reason = "insufficient_credits"
        if request.reason in DEBTS:
            self.debts.append(event.request_id)
        return request.reason or "charged"

    def deduct(self, request_id: str, user: str, service: str, credits: int) -> None:
        """Charge one request by a direct SQL call, always to the running period."""
        known = self.requests.get(request_id)
        request = Request(user, service, credits, "dead")
        if known is not None and known.state in OPEN:
            if (known.user, known.service) != (user, service):
                raise Refused("conflict")
        elif known is not None:
            if known.identity != request.identity:
                raise Refused("conflict")
            if known.state == "charged":
                return
            if known.reason not in DEBTS:
                raise Refused("dead")
        own = self.allocations.get(user)
        if own is None or not self._may_spend(own, known):
            raise Refused("no_allocation")
        self._end_hold(known, "released")
        if not self._charge(request, own, None):
            raise Refused("insufficient_credits")
        self.requests[request_id] = request
        if request_id in self.debts:
            self.debts.remove(request_id)

    def settle(self) -> None:
        """Charge the debts that are covered by now, oldest first, each whole or not at all."""
        for request_id in list(self.debts):
            request = self.requests[request_id]
            own = self.allocations.get(request.user)
            if own is None or not own.active or request.occurred_at is None:
                continue
            if self._charge(request, own, own.closed_at(request.occurred_at)):
                self.debts.remove(request_id)

    # Corrections

    def refund(self, request_id: str, credits: int | None) -> None:
        """Give back what a request was charged, wholly or in part."""
        request = self._charged(request_id)
        back = request.cost if credits is None else credits
        if not 0 < back <= request.cost:
            raise Refused("conflict")
        self._correct(request, -back)

    def adjust(self, request_id: str, to: int) -> None:
        """Change what a request is charged in all."""
        request = self._charged(request_id)
        if to == request.cost:
            raise Refused("conflict")
        self._correct(request, to - request.cost)

    def _charged(self, request_id: str) -> Request:
        request = self.requests.get(request_id)
        if request is None:
            raise Refused("not_found")
        if request.state != "charged":
            raise Refused("conflict")
        return request

    def _correct(self, request: Request, difference: int) -> None:
        """Move a difference in the period of the charge; what is not billed is not owed any more.

        A closed period takes from the pool, else from its user, and gives back to the pool.
        """
        own = self.allocations[request.user]
        closed = next((p for p in own.closed if p.start == request.period), None)
        unowed = max(0, min(-difference, request.overage, self.overage))
        if closed is None:
            if difference > own.available:
                raise Refused("insufficient_credits")
            own.used += difference
            gone = unowed if own.active else max(0, -difference)
            self._take_back(own, gone)
        else:
            if difference <= self.available:
                self.allocated += difference
            elif difference <= own.available:
                own.allocated -= difference
            else:
                raise Refused("insufficient_credits")
            closed.allocated += difference
            closed.used += difference
        self.total -= unowed
        self.overage -= unowed
        self.used += difference
        request.cost += difference
        request.overage -= unowed

    # What acts are made of

    def _allocation(self, user: str) -> Allocation:
        try:
            return self.allocations[user]
        except KeyError:
            raise Refused("no_allocation") from None

    def _take_back(self, own: Allocation, credits: int) -> None:
        own.allocated -= credits
        self.allocated -= credits

    def _end_hold(self, request: Request | None, state: str) -> None:
        if request is not None and request.state == "held":
            self.allocations[request.user].held -= request.held
            request.state = state

    @staticmethod
    def _may_spend(own: Allocation, known: Request | None) -> bool:
        # What was granted before an allocation was switched off may still be charged to it.
        return own.active or (known is not None and known.state == "held" and known.held > 0)

    def _charge(self, request: Request, own: Allocation, closed: Period | None) -> bool:
        """Take a request's credits where they are to be found; false if they are not.

        The pool pays for a closed period, else the user, who may have the rest on account.
        """
        cost = request.credits
        if closed is not None and cost <= self.available:
            self.allocated += cost
        else:
            overage = max(0, cost - own.available)
            if overage and not (own.active and overage <= self.overage_room()):
                return False
            self._lend(own, overage)
            request.overage = overage
            if closed is None:
                own.used += cost
            else:
                own.allocated -= cost
        if closed is not None:
            closed.allocated += cost
            closed.used += cost
        self.used += cost
        request.state, request.reason, request.cost = "charged", None, cost
        request.period = own.start if closed is None else closed.start
        return True

    def _lend(self, own: Allocation, credits: int) -> None:
        self.total += credits
        self.allocated += credits
        self.overage += credits
        own.allocated += credits
