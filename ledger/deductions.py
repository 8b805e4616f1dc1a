"""Deductions: one request charged at once, for services that wait for the outcome.

A deduction is decided by the same rules and under the same locks as an event of the queue, so that
a request which comes both ways is charged once. What cannot be charged is refused and leaves
nothing behind, no dead letter either: the caller knows.
"""

from datetime import datetime
from enum import StrEnum
from typing import Final, NamedTuple

from psycopg.errors import UniqueViolation
from pydantic import BaseModel, ConfigDict
from sqlalchemy import Connection

from ledger import charges, directory, prices
from ledger.apply import known_requests
from ledger.database import Database, run
from ledger.decisions import (
    Balance,
    Entry,
    Reported,
    Seen,
    Verdicts,
    collect,
    decide,
    read,
    want_of_credits,
)
from ledger.idempotency import Act, once
from schema.errors import (
    DeadReason,
    InsufficientCredits,
    InvalidRequest,
    MeteringError,
    NoAllocation,
    NotFound,
    RequestIdConflict,
)
from schema.events import UsageEvent
from schema.prices import PriceBook

DEBTS: Final = frozenset({DeadReason.INSUFFICIENT_CREDITS, DeadReason.NO_ALLOCATION})
"""What a request may have died of and still be charged."""

_FIELDS: Final = {
    DeadReason.UNKNOWN_SERVICE: ["service_type", "credits"],
    DeadReason.PRICE_MISMATCH: ["credits"],
    DeadReason.INVALID: ["quantity"],
    DeadReason.TOO_OLD: ["occurred_at"],
    DeadReason.IN_THE_FUTURE: ["occurred_at"],
}
"""Which fields of a request that can never be charged are to blame."""

_SETTLED: Final = """
    SELECT state, credits, reason, occurred_at
    FROM usage_requests
    WHERE org_id = %(org_id)b AND request_id = %(request_id)b::text
        AND state IN ('charged', 'dead', 'discarded')
"""

_RESOLVE: Final = """
    UPDATE dead_letters
    SET state = 'charged', resolved_at = %(now)b
    WHERE org_id = %(org_id)b AND request_id = %(request_id)b::text
        AND fingerprint = %(fingerprint)b AND state = 'open'
"""


class DeductionOutcome(StrEnum):
    """Whether this call has charged the request, or an earlier report of it."""

    CHARGED = "charged"
    DUPLICATE = "duplicate"


class Deduction(BaseModel):
    """A request that is charged; both figures are credits."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    outcome: DeductionOutcome
    request_id: str
    credits_used: int
    """What it was charged when it was."""
    remaining_credits: int
    """What its user can still spend: remaining credits less those that are held."""


class _Settled(NamedTuple):
    """How a request has ended that the ledger knows already."""

    state: str
    credits: int | None
    reason: str | None
    occurred_at: datetime

    @property
    def is_debt(self) -> bool:
        return self.state == "dead" and self.reason in DEBTS


def deduct(
    database: Database,
    event: UsageEvent,
    *,
    is_dated: bool = True,
    actor: str,
    key: str | None = None,
    now: datetime,
) -> Deduction:
    """Charge one request of a member, at the price in force when it occurred.

    Idempotent by request id, and by `key`. An open hold of the request is settled; a debt is
    charged once it is covered. The caller has dated the event unless `is_dated` is false: then one
    that is known already occurred when it did the first time, so that no price change since makes
    another request of it.

    Raises:
        InvalidRequest: no price, a price that contradicts the credits, a time out of range, or a
            key used for another act.
        NotFound: there is no such organization.
        NotAMember: the user does not belong to it, and the gate has granted nothing.
        NoAllocation: the user has no active allocation in it.
        InsufficientCredits: the allocation is too small, by `required` and `remaining`.
        RequestIdConflict: the request id stands for another request, or for one that is dead.
    """
    undated = {"occurred_at"} if not is_dated else None
    arguments = event.model_dump(mode="json", exclude=undated)
    act = Act("deductions.deduct", event.org_id, arguments, actor, key, now)

    def perform(connection: Connection) -> Deduction:
        return _perform(connection, event, is_dated=is_dated, now=now)

    try:
        return once(database, act, Deduction, perform)
    except UniqueViolation as error:
        # The gate has given the id to somebody else since it was looked for: it waits for no pool.
        raise RequestIdConflict(
            f"request id {event.request_id} was used for another request"
        ) from error


def _perform(
    connection: Connection, event: UsageEvent, *, is_dated: bool, now: datetime
) -> Deduction:
    book = prices.book(connection)
    report = _priced(event, book)
    organizations = charges.lock_organizations(connection, [report])
    # Requests are charged and die under the lock of the pool; holds change under the other one.
    settled = _settled(connection, event)
    if settled is not None and not is_dated:
        report = _priced(event.model_copy(update={"occurred_at": settled.occurred_at}), book)
    balances = charges.lock_allocations(connection, [report])
    seen = known_requests(connection, [report])
    known = seen.get(report.request_key)
    is_debt = _is_debt(report, settled, known)
    verdicts = Verdicts()
    if is_debt:
        collect([report], organizations=organizations, balances=balances, verdicts=verdicts)
    else:
        decide(
            [report],
            seen=seen,
            organizations=organizations,
            balances=balances,
            now=now,
            verdicts=verdicts,
        )
    balance = balances.get(report.user_key)
    if verdicts.duplicates and settled is not None:
        return _repeated(event, settled, balance)
    if known is None or known.state != "held":
        directory.require_member(connection, event.org_id, event.user_id)
    if not verdicts.charges or balance is None:
        raise _refusal(report, balance, known, verdicts)
    charges.write(connection, verdicts.charges, now)
    charges.write_balances(connection, organizations.values(), balances.values())
    if is_debt:
        _resolve(connection, report, now)
    return Deduction(
        outcome=DeductionOutcome.CHARGED,
        request_id=event.request_id,
        credits_used=verdicts.charges[0].credits,
        remaining_credits=balance.available,
    )


def _priced(event: UsageEvent, book: PriceBook) -> Reported:
    (report,), _ = read([Entry(event.to_json())], book)
    return report


def _settled(connection: Connection, event: UsageEvent) -> _Settled | None:
    row = run(connection, _SETTLED, org_id=event.org_id, request_id=event.request_id).one_or_none()
    return None if row is None else _Settled(*row)


def _is_debt(report: Reported, settled: _Settled | None, known: Seen | None) -> bool:
    return (
        settled is not None
        and settled.is_debt
        and known is not None
        and known.fingerprint == report.fingerprint
    )


def _repeated(event: UsageEvent, settled: _Settled, balance: Balance | None) -> Deduction:
    if settled.state != "charged" or settled.credits is None:
        raise RequestIdConflict(f"request {event.request_id} is {settled.state}: {settled.reason}")
    return Deduction(
        outcome=DeductionOutcome.DUPLICATE,
        request_id=event.request_id,
        credits_used=settled.credits,
        remaining_credits=balance.available if balance else 0,
    )


def _refusal(
    report: Reported, balance: Balance | None, known: Seen | None, verdicts: Verdicts
) -> MeteringError:
    if verdicts.deaths:
        reason, detail = verdicts.deaths[0].reason, verdicts.deaths[0].detail
    else:
        reason, detail = want_of_credits(report, balance, known)
    match reason:
        case DeadReason.INSUFFICIENT_CREDITS:
            remaining = balance.available if balance else 0
            return InsufficientCredits(detail, required=report.credits, remaining=remaining)
        case DeadReason.NO_ALLOCATION:
            return NoAllocation(detail)
        case DeadReason.UNKNOWN_ORGANIZATION:
            return NotFound(detail)
        case DeadReason.REQUEST_ID_CONFLICT:
            return RequestIdConflict(detail)
        case _:
            fields = _FIELDS[reason]
            return InvalidRequest(f"{fields[0]}: {detail}", fields=fields)


def _resolve(connection: Connection, report: Reported, now: datetime) -> None:
    event = report.event
    run(
        connection,
        _RESOLVE,
        org_id=event.org_id,
        request_id=event.request_id,
        fingerprint=report.fingerprint,
        now=now,
    )
