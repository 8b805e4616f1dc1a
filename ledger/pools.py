"""Pools: an organization's prepaid credits, how they come in, and what it may use beyond them.

The pool row is the mutex of its organization: whoever moves credits of it locks it first.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import Final
from uuid import UUID

from pydantic import BaseModel, ConfigDict
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from ledger.billing import cents
from ledger.database import Database, run, sqlstate
from ledger.idempotency import Act, once
from schema.errors import (
    Conflict,
    InsufficientCredits,
    InvalidRequest,
    MeteringError,
    NotFound,
)
from schema.periods import STEPS, ResetPeriod, boundary, zone_of

MAX_CREDITS: Final = 2**53
"""Most credits of one pool: beyond this JavaScript callers could not read the figure."""
MAX_AMOUNT: Final = Decimal("999999999999.99")
MAX_RATE: Final = Decimal("999999.999999")

_RATE_STEP: Final = Decimal("0.000001")
_RAISED: Final = "P0001"
_OUT_OF_RANGE: Final = "22003"
_TOO_SMALL: Final = re.compile(r"Insufficient credits in pool: (-?\d+) available, (\d+) needed")
_MISSING: Final = ("No organization found", "No credit pool found")

_POOL: Final = """
    SELECT
        p.id, p.org_id, o.name AS org_name, p.total_credits, p.allocated_credits, p.used_credits,
        p.available_credits, p.monthly_refresh_amount, p.last_refresh_date, p.next_refresh_date,
        p.allow_overage, p.overage_limit, p.overage_rate, p.overage_credits,
        p.overage_billed_credits, p.lifetime_purchased_credits, p.lifetime_spent_amount
    FROM organization_credit_pools p
    JOIN organizations o ON o.id = p.org_id
    WHERE p.org_id = %(org_id)b
"""

_ADD: Final = """
    SELECT add_pool_credits(
        %(org_id)b, %(kind)b::text, %(credits)b, %(amount)b, %(actor)b::text, %(reason)b::text,
        %(now)b
    )
"""

_TIMEZONE: Final = "SELECT timezone FROM organizations WHERE id = %(org_id)b"

_MAKE: Final = """
    INSERT INTO organization_credit_pools (org_id) VALUES (%(org_id)b)
    ON CONFLICT (org_id) DO NOTHING
"""

_LOCK: Final = """
    SELECT FROM organization_credit_pools WHERE org_id = %(org_id)b FOR NO KEY UPDATE
"""

# A pool that is refreshed already keeps its dates.
_SET_REFRESH: Final = """
    UPDATE organization_credit_pools
    SET monthly_refresh_amount = %(amount)b,
        refresh_anchor = CASE
            WHEN next_refresh_date IS NULL THEN %(now)b ELSE refresh_anchor
        END,
        next_refresh_date = coalesce(next_refresh_date, %(first)b)
    WHERE org_id = %(org_id)b
"""

_STOP_REFRESH: Final = """
    UPDATE organization_credit_pools
    SET monthly_refresh_amount = 0, refresh_anchor = NULL, next_refresh_date = NULL
    WHERE org_id = %(org_id)b
"""

_SET_OVERAGE: Final = """
    UPDATE organization_credit_pools
    SET allow_overage = %(allow)b, overage_limit = %(limit)b, overage_rate = %(rate)b
    WHERE org_id = %(org_id)b
"""

_IS_SUBSCRIBED: Final = """
    SELECT EXISTS (
        SELECT FROM organization_subscriptions
        WHERE org_id = %(org_id)b AND status IN ('active', 'trialing', 'past_due', 'paused')
    )
"""


class Kind(StrEnum):
    """How credits come into a pool; an adjustment may also take some out."""

    GRANT = "grant"
    PURCHASE = "purchase"
    REFUND = "refund"
    ADJUSTMENT = "adjustment"


class Pool(BaseModel):
    """A pool as contract.md §4 answers it; amounts are in USD, the rate in USD per credit."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    id: UUID
    org_id: UUID
    org_name: str
    total_credits: int
    allocated_credits: int
    used_credits: int
    available_credits: int
    """Credits that are allocated to nobody."""
    monthly_refresh_amount: int
    """In credits."""
    last_refresh_date: datetime | None
    next_refresh_date: datetime | None
    allow_overage: bool
    overage_limit: int
    overage_rate: Decimal
    overage_credits: int
    """Used beyond the prepaid ones and not billed yet."""
    overage_billed_credits: int
    lifetime_purchased_credits: int
    lifetime_spent_amount: Decimal


def get(database: Database, org_id: UUID) -> Pool:
    """The pool of an organization.

    Raises:
        NotFound: there is no such organization, or it has no pool.
    """
    with database.snapshot() as connection:
        return _read(connection, org_id)


def find(connection: Connection, org_id: UUID) -> Pool | None:
    """What `get` answers, within a transaction of the caller; None if there is no pool."""
    row = run(connection, _POOL, org_id=org_id).mappings().one_or_none()
    return None if row is None else Pool.model_validate(dict(row))


def add(  # noqa: PLR0913 - what is moved, and for the books by whom, why and when
    database: Database,
    org_id: UUID,
    credits: int,
    *,
    kind: Kind = Kind.GRANT,
    amount: Decimal = Decimal(0),
    actor: str,
    reason: str | None = None,
    key: str | None = None,
    now: datetime,
) -> Pool:
    """Put credits into a pool, making it if there is none; the pool as it is then.

    `amount` (USD, to the cent) was paid for a purchase or paid back with a refund; grants and
    adjustments have none. An adjustment may be negative, down to the available credits. Idempotent
    by `key`.

    Raises:
        InvalidRequest: credits or an amount that the kind does not have, an adjustment without a
            reason, or a key that was used for another act.
        NotFound: there is no such organization.
        InsufficientCredits: an adjustment takes more than is available.
    """
    _check_addition(kind, credits, amount, reason)
    act = Act(
        "pools.add",
        org_id,
        {"credits": credits, "kind": kind, "amount": cents(amount), "reason": reason},
        actor,
        key,
        now,
    )

    def perform(connection: Connection) -> Pool:
        with refusals_named():
            run(
                connection,
                _ADD,
                org_id=org_id,
                kind=kind.value,
                credits=credits,
                amount=amount,
                actor=actor,
                reason=reason,
                now=now,
            )
        pool = _read(connection, org_id)
        if pool.total_credits > MAX_CREDITS:
            raise InvalidRequest(
                f"credits: a pool holds at most {MAX_CREDITS} in total", fields=["credits"]
            )
        return pool

    return once(database, act, Pool, perform)


def set_refresh(database: Database, org_id: UUID, monthly_amount: int, *, now: datetime) -> Pool:
    """Have a pool refreshed with so many credits every month, or with 0 no longer.

    The first refresh comes one calendar month from now in the organization's time zone; a pool
    that is refreshed already keeps its dates. Makes the pool if there is none. Idempotent.

    Raises:
        InvalidRequest: a negative or too large amount.
        NotFound: there is no such organization.
    """
    check_credits("monthly_refresh_amount", monthly_amount, 0)
    with database.transaction() as connection:
        timezone = _make(connection, org_id)
        if monthly_amount == 0:
            run(connection, _STOP_REFRESH, org_id=org_id)
        else:
            first = boundary(now, STEPS[ResetPeriod.MONTHLY], zone_of(timezone), 1)
            run(
                connection,
                _SET_REFRESH,
                org_id=org_id,
                amount=monthly_amount,
                now=now,
                first=first,
            )
        return _read(connection, org_id)


def set_overage(
    database: Database, org_id: UUID, *, allow: bool, limit: int, rate: Decimal
) -> Pool:
    """Say whether, how far and at what price an organization may use more than it has.

    `limit` is in credits since the last bill, `rate` in USD per credit with up to 6 places. Makes
    the pool if there is none. Idempotent.

    Raises:
        InvalidRequest: a limit or rate that cannot be.
        NotFound: there is no such organization.
        Conflict: it has no live subscription, so nobody would be billed.
    """
    check_credits("overage_limit", limit, 0)
    _check_usd("overage_rate", rate, MAX_RATE, _RATE_STEP)
    with database.transaction() as connection:
        _make(connection, org_id)
        # A subscription is cancelled under this lock.
        run(connection, _LOCK, org_id=org_id)
        if allow and not run(connection, _IS_SUBSCRIBED, org_id=org_id).scalar_one():
            raise Conflict(f"organization {org_id} has no live subscription to bill overage to")
        run(connection, _SET_OVERAGE, org_id=org_id, allow=allow, limit=limit, rate=rate)
        return _read(connection, org_id)


@contextmanager
def refusals_named() -> Iterator[None]:
    """Turn what the SQL functions raise into the errors of `schema.errors`."""
    try:
        yield
    except DBAPIError as error:
        refusal = _refusal(error)
        if refusal is None:
            raise
        raise refusal from error


def check_credits(name: str, credits: int, least: int = 1) -> None:
    """Refuse credits out of range.

    Raises:
        InvalidRequest: they are fewer than `least`, or more than a pool holds.
    """
    if not least <= credits <= MAX_CREDITS:
        raise InvalidRequest(f"{name}: must be from {least} to {MAX_CREDITS}", fields=[name])


def _refusal(error: DBAPIError) -> MeteringError | None:
    message = str(error.orig).partition("\n")[0]
    if sqlstate(error) == _OUT_OF_RANGE:
        return InvalidRequest(f"credits or amount: {message}", fields=["credits", "amount"])
    if sqlstate(error) != _RAISED:
        return None
    if message.startswith(_MISSING):
        return NotFound(message)
    if too_small := _TOO_SMALL.match(message):
        available, needed = map(int, too_small.groups())
        return InsufficientCredits(
            message,
            required=needed,
            remaining=available,
            suggested_action="Add credits to the organization's pool.",
        )
    return InvalidRequest(message)


def _check_addition(kind: Kind, credits: int, amount: Decimal, reason: str | None) -> None:
    if kind is Kind.ADJUSTMENT:
        check_credits("credits", abs(credits))
        if not (reason and reason.strip()):
            raise InvalidRequest("reason: an adjustment needs one", fields=["reason"])
    else:
        check_credits("credits", credits)
    _check_usd("amount", amount, MAX_AMOUNT, Decimal("0.01"))
    if kind is Kind.PURCHASE and not amount:
        raise InvalidRequest("amount: a purchase has one; without it is a grant", fields=["amount"])
    if kind in (Kind.GRANT, Kind.ADJUSTMENT) and amount:
        raise InvalidRequest(f"amount: no money moves with a kind of {kind}", fields=["amount"])


def _check_usd(name: str, amount: Decimal, most: Decimal, step: Decimal) -> None:
    # Not a number is in no range.
    if not (amount.is_finite() and 0 <= amount <= most and amount == amount.quantize(step)):
        raise InvalidRequest(f"{name}: must be from 0 to {most}, in steps of {step}", fields=[name])


def _make(connection: Connection, org_id: UUID) -> str:
    """Make the pool if there is none; the organization's time zone."""
    timezone: str | None = run(connection, _TIMEZONE, org_id=org_id).scalar_one_or_none()
    if timezone is None:
        raise NotFound(f"no organization {org_id}")
    run(connection, _MAKE, org_id=org_id)
    return timezone


def _read(connection: Connection, org_id: UUID) -> Pool:
    pool = find(connection, org_id)
    if pool is None:
        raise NotFound(f"organization {org_id} has no credit pool")
    return pool
