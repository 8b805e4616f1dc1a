"""Billing: what a subscription owes as its periods turn, and the rows of the billing history.

The price of a period is billed when it begins, the overage of a period when it ends. Periods are
counted from the billing anchor in the organization's time zone. Amounts are in USD, rounded half up
to cents; a row says what is owed and is `pending` until its payment is known. Nothing of a test
organization is ever written.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import ROUND_HALF_UP, Context, Decimal
from enum import StrEnum
from typing import Final
from uuid import UUID

from psycopg.types.json import Jsonb
from pydantic import BaseModel, ConfigDict
from sqlalchemy import Connection

from ledger.database import run
from schema.money import Usd
from schema.periods import MONTHS_PER_YEAR, Step, next_boundary, zone_of
from schema.plans import PlanName

_CENT: Final = Decimal("0.01")
_DAYS_PER_MONTH: Final = Decimal("365.2425") / MONTHS_PER_YEAR
"""Of the Gregorian calendar, on average."""

_MONEY: Final = Context(prec=14, rounding=ROUND_HALF_UP)
"""As many digits as the column `amount` holds; more of them raise."""

# The pool row is the mutex of its organization: nobody uses overage between reading and billing it.
_LOCK_POOLS: Final = """
    SELECT org_id, overage_credits, overage_rate
    FROM organization_credit_pools
    WHERE org_id = ANY(%(org_ids)b::uuid[])
    ORDER BY org_id
    FOR NO KEY UPDATE
"""

_MARK_BILLED: Final = """
    UPDATE organization_credit_pools
    SET overage_billed_credits = overage_billed_credits + overage_credits,
        overage_credits = 0
    WHERE org_id = ANY(%(org_ids)b::uuid[]) AND overage_credits > 0
"""

_RECORD: Final = """
    INSERT INTO org_billing_history (
        org_id, subscription_id, event_type, amount, payment_status, period_start, period_end,
        event_metadata, created_at
    )
    SELECT
        new.org_id, new.subscription_id, new.event_type, new.amount,
        CASE WHEN new.amount > 0 THEN 'pending' ELSE 'none' END,
        new.period_start, new.period_end, new.event_metadata, %(now)b
    FROM unnest(
        %(org_ids)b::uuid[], %(subscription_ids)b::uuid[], %(event_types)b::text[],
        %(amounts)b::numeric[], %(period_starts)b::timestamptz[],
        %(period_ends)b::timestamptz[], %(event_metadata)b::jsonb[]
    ) AS new (
        org_id, subscription_id, event_type, amount, period_start, period_end, event_metadata
    )
    JOIN organizations o ON o.id = new.org_id AND NOT o.is_test
    RETURNING event_type, coalesce((event_metadata ->> 'overage_amount')::numeric, 0)
"""


class BillingCycle(StrEnum):
    """How long a period is: a calendar month, twelve of them, or a number of whole days."""

    MONTHLY = "monthly"
    YEARLY = "yearly"
    CUSTOM = "custom"


class Status(StrEnum):
    """Where a subscription stands; every one but a canceled one is live."""

    ACTIVE = "active"
    TRIALING = "trialing"
    PAST_DUE = "past_due"
    PAUSED = "paused"
    CANCELED = "canceled"


class Subscription(BaseModel):
    """A subscription as contract.md §4 answers it; times are UTC."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    id: UUID
    org_id: UUID
    org_name: str
    subscription_plan: PlanName
    monthly_price: Usd
    """In USD; a custom cycle costs as much as a month."""
    billing_cycle: BillingCycle
    status: Status
    trial_ends_at: datetime | None
    """When the trial ends, or ended; null without one."""
    current_period_start: datetime
    current_period_end: datetime
    canceled_at: datetime | None
    cancel_at_period_end: bool
    """Whether it ends with its current period."""
    created_at: datetime

    @property
    def period_price(self) -> Decimal:
        """What one period costs in USD; a custom cycle costs one monthly price."""
        months = MONTHS_PER_YEAR if self.billing_cycle is BillingCycle.YEARLY else 1
        return self.monthly_price * months


class BillingEvent(StrEnum):
    """What a row of the billing history is about."""

    INVOICE_CREATED = "invoice_created"
    INVOICE_PAID = "invoice_paid"
    INVOICE_FAILED = "invoice_failed"
    SUBSCRIPTION_CREATED = "subscription_created"
    SUBSCRIPTION_UPGRADED = "subscription_upgraded"
    SUBSCRIPTION_DOWNGRADED = "subscription_downgraded"
    SUBSCRIPTION_CANCELED = "subscription_canceled"
    CREDIT_PURCHASE = "credit_purchase"
    CREDIT_REFUND = "credit_refund"
    OVERAGE_CHARGED = "overage_charged"


@dataclass(frozen=True, slots=True)
class Overage:
    """Credits used beyond the prepaid ones since the last bill, at `rate` USD each."""

    credits: int = 0
    rate: Decimal = Decimal(0)

    @property
    def amount(self) -> Decimal:
        """What they cost in USD."""
        return cents(self.credits * self.rate)

    def as_metadata(self) -> dict[str, object]:
        """How a row of the history accounts for them."""
        return {
            "overage_credits": self.credits,
            "overage_rate": str(self.rate),
            "overage_amount": str(self.amount),
        }


NO_OVERAGE: Final = Overage()


@dataclass(frozen=True, slots=True)
class HistoryRow:
    """One row to be written; `amount` is what is owed for it, in USD."""

    org_id: UUID
    subscription_id: UUID
    event: BillingEvent
    period_start: datetime
    period_end: datetime
    amount: Decimal
    metadata: dict[str, object]


@dataclass(frozen=True, slots=True)
class Account:
    """A live subscription under lock, and what its next bill depends on.

    `overage` is what no bill has yet; `cycle_days` count for a custom cycle only.
    """

    anchor: datetime
    cycle_days: int | None
    timezone: str
    subscription: Subscription
    overage: Overage

    def is_due(self, now: datetime) -> bool:
        """Whether its current period has ended, and another one or nothing is to follow."""
        subscription = self.subscription
        return subscription.status is not Status.CANCELED and subscription.current_period_end <= now


@dataclass(frozen=True, slots=True)
class Turn:
    """What ends of periods, or an end before that, make of an account."""

    account: Account
    rows: tuple[HistoryRow, ...] = ()
    rolled: int = 0
    activated: int = 0

    def followed_by(self, later: "Turn") -> "Turn":
        """This turn and the one after it as one."""
        return Turn(
            later.account,
            self.rows + later.rows,
            self.rolled + later.rolled,
            self.activated + later.activated,
        )


def cents(amount: Decimal) -> Decimal:
    """An amount in USD, rounded half up to cents.

    Raises:
        decimal.InvalidOperation: it is more than the history can hold.
    """
    return amount.quantize(_CENT, context=_MONEY)


def turned(account: Account, now: datetime) -> Turn:
    """Take an account over the ends of all periods up to now.

    Raises:
        InvalidRequest: the organization's time zone is unknown.
        ArithmeticError: a period or an amount is beyond what can be counted.
    """
    turn = Turn(account)
    while turn.account.is_due(now):
        subscription = turn.account.subscription
        if subscription.cancel_at_period_end:
            turn = turn.followed_by(ended(turn.account, subscription.current_period_end))
        else:
            turn = turn.followed_by(_renewed(turn.account))
    return turn


def _renewed(account: Account) -> Turn:
    """Begin the next period: the price of it is billed, and the overage of the one before."""
    old = account.subscription
    is_trial = old.status is Status.TRIALING
    anchor, period_end = _next_period(account)
    new = old.model_copy(
        update={
            "status": Status.ACTIVE if is_trial else old.status,
            "current_period_start": old.current_period_end,
            "current_period_end": period_end,
        }
    )
    if old.status is Status.PAUSED:
        rows = _overage_rows(old, account.overage, old.current_period_end)
    else:
        rows = (invoice(new, account.overage),)
    after = replace(account, anchor=anchor, subscription=new, overage=NO_OVERAGE)
    return Turn(after, rows, rolled=1, activated=int(is_trial))


def _next_period(account: Account) -> tuple[datetime, datetime]:
    """The anchor of the period that begins where the current one ends, and its end."""
    old = account.subscription
    anchor, start = account.anchor, old.current_period_end
    step = step_of(old.billing_cycle, account.cycle_days)
    zone = zone_of(account.timezone)
    # A period that others wrote, or that a change of time zone moved, may end off the anchor's
    # grid. Then it is the anchor: the stretch to the next boundary would be billed as a whole.
    on_grid = start == next_boundary(anchor, step, zone, start - datetime.resolution)
    if old.status is Status.TRIALING or not on_grid:
        anchor = start
    return anchor, next_boundary(anchor, step, zone, start)


def ended(account: Account, at: datetime, actor: str | None = None) -> Turn:
    """End a subscription; overage that no bill has yet is billed.

    `actor` is who ends it before its period does.
    """
    old = account.subscription
    new = old.model_copy(update={"status": Status.CANCELED, "canceled_at": at})
    metadata: dict[str, object] = {
        "plan": old.subscription_plan.value,
        "at_period_end": at == old.current_period_end,
    }
    if actor is not None:
        metadata["actor"] = actor
    canceled = row_of(new, BillingEvent.SUBSCRIPTION_CANCELED, metadata=metadata)
    rows = (*_overage_rows(old, account.overage, at), canceled)
    return Turn(replace(account, subscription=new, overage=NO_OVERAGE), rows)


def step_of(billing_cycle: BillingCycle, cycle_days: int | None) -> Step:
    """How far one period reaches."""
    match billing_cycle:
        case BillingCycle.YEARLY:
            return Step(months=MONTHS_PER_YEAR)
        case BillingCycle.CUSTOM if cycle_days:
            return Step(days=cycle_days)
        case _:
            return Step(months=1)


def monthly_revenue(
    monthly_price: Decimal, billing_cycle: BillingCycle, cycle_days: int | None
) -> Decimal:
    """What a subscription brings in during an average month, in USD."""
    if billing_cycle is BillingCycle.CUSTOM and cycle_days:
        return cents(monthly_price * _DAYS_PER_MONTH / cycle_days)
    return monthly_price


def invoice(subscription: Subscription, overage: Overage) -> HistoryRow:
    """The bill for the current period, and for the overage of the one before."""
    metadata: dict[str, object] = {
        "plan": subscription.subscription_plan.value,
        "monthly_price": str(subscription.monthly_price),
        **overage.as_metadata(),
    }
    amount = cents(subscription.period_price + overage.amount)
    return row_of(subscription, BillingEvent.INVOICE_CREATED, amount=amount, metadata=metadata)


def _overage_rows(
    subscription: Subscription, overage: Overage, until: datetime
) -> tuple[HistoryRow, ...]:
    """The bill for overage alone, if there is any."""
    if not overage.credits:
        return ()
    row = row_of(
        subscription,
        BillingEvent.OVERAGE_CHARGED,
        amount=overage.amount,
        metadata=overage.as_metadata(),
    )
    return (replace(row, period_end=until),)


def row_of(
    subscription: Subscription,
    event: BillingEvent,
    *,
    amount: Decimal = Decimal(0),
    metadata: dict[str, object],
) -> HistoryRow:
    """A row about the current period of a subscription."""
    return HistoryRow(
        org_id=subscription.org_id,
        subscription_id=subscription.id,
        event=event,
        period_start=subscription.current_period_start,
        period_end=subscription.current_period_end,
        amount=amount,
        metadata=metadata,
    )


@dataclass(frozen=True, slots=True)
class Written:
    """What the history took: invoices, and the overage (USD) that was billed."""

    invoices: int = 0
    overage_amount: Decimal = Decimal(0)


def lock_overage(connection: Connection, org_ids: Sequence[UUID]) -> dict[UUID, Overage]:
    """Lock the pools of these organizations, and read the overage that no bill has yet."""
    rows = run(connection, _LOCK_POOLS, org_ids=org_ids).fetchall()
    return {org_id: Overage(credits, rate) for org_id, credits, rate in rows}


def mark_billed(connection: Connection, org_ids: Sequence[UUID]) -> None:
    """Count the overage of these organizations as billed; the caller has their pools locked."""
    if org_ids:
        run(connection, _MARK_BILLED, org_ids=org_ids)


def record(connection: Connection, rows: Sequence[HistoryRow], now: datetime) -> Written:
    """Write rows to the history, but those of test organizations."""
    if not rows:
        return Written()
    written = run(
        connection,
        _RECORD,
        now=now,
        org_ids=[row.org_id for row in rows],
        subscription_ids=[row.subscription_id for row in rows],
        event_types=[row.event.value for row in rows],
        amounts=[row.amount for row in rows],
        period_starts=[row.period_start for row in rows],
        period_ends=[row.period_end for row in rows],
        event_metadata=[Jsonb(row.metadata) for row in rows],
    ).fetchall()
    return Written(
        sum(event == BillingEvent.INVOICE_CREATED for event, _ in written),
        sum((overage for _, overage in written), Decimal(0)),
    )
