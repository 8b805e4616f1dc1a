"""Subscriptions: an organization's plan, from its trial or first period to its end.

At most one subscription of an organization is live; a partial unique index decides. Whatever
changes one locks the organization's pool first and rolls over what is due, so that every period
that passed is billed as it was (`ledger.billing`).
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from datetime import datetime
from decimal import Decimal
from typing import Final
from uuid import UUID, uuid4

import structlog
from sqlalchemy import Connection

from ledger import billing, pages
from ledger.billing import (
    NO_OVERAGE,
    Account,
    BillingCycle,
    BillingEvent,
    HistoryRow,
    Status,
    Subscription,
    Turn,
)
from ledger.database import Database, run
from ledger.idempotency import Act, check_id, once
from ledger.pages import Page, Window
from schema.errors import Conflict, InvalidRequest, NotFound, SubscriptionExists
from schema.periods import Step, boundary, zone_of
from schema.plans import PLANS, PlanName

MAX_TRIAL_DAYS: Final = 365
MAX_CYCLE_DAYS: Final = 3660
MAX_MONTHLY_PRICE: Final = Decimal("9999999999.99")
BATCH: Final = 100
"""Subscriptions that one transaction of the roll-over looks at, and pools that it locks."""

log = structlog.get_logger(__name__)

_ORGANIZATION: Final = "SELECT name, timezone FROM organizations WHERE id = %(org_id)b"

# A live one that another transaction is just making is waited for.
_INSERT: Final = """
    INSERT INTO organization_subscriptions (
        id, org_id, subscription_plan, monthly_price, billing_cycle, cycle_days, status,
        trial_ends_at, current_period_start, current_period_end, billing_anchor, created_at
    )
    VALUES (
        %(id)b, %(org_id)b, %(plan)b::text, %(monthly_price)b, %(billing_cycle)b::text,
        %(cycle_days)b, %(status)b::text, %(trial_ends_at)b, %(period_start)b, %(period_end)b,
        %(anchor)b, %(created_at)b
    )
    ON CONFLICT (org_id) WHERE status IN ('active', 'trialing', 'past_due', 'paused') DO NOTHING
"""

_LATEST: Final = """
    SELECT
        s.id, s.org_id, o.name AS org_name, s.subscription_plan, s.monthly_price, s.billing_cycle,
        s.status, s.trial_ends_at, s.current_period_start, s.current_period_end, s.canceled_at,
        s.cancel_at_period_end, s.created_at
    FROM organization_subscriptions s
    JOIN organizations o ON o.id = s.org_id
    WHERE s.org_id = %(org_id)b
    ORDER BY s.status = 'canceled', s.canceled_at DESC NULLS LAST, s.created_at DESC, s.id
    LIMIT 1
"""

# One subscription for each organization is chosen first, and only then asked for plan and status:
# a live subscription hides the canceled ones before it from every filter.
_LISTED: Final = """
    WITH chosen AS (
        SELECT DISTINCT ON (org_id) *
        FROM organization_subscriptions
        WHERE %(of_all)b
            OR org_id IN (
                SELECT org_id FROM organization_members WHERE user_id = %(user_id)b::text
            )
        ORDER BY
            org_id, status = 'canceled', canceled_at DESC NULLS LAST, created_at DESC, id
    )
    SELECT
        s.id, s.org_id, o.name AS org_name, s.subscription_plan, s.monthly_price, s.billing_cycle,
        s.status, s.trial_ends_at, s.current_period_start, s.current_period_end, s.canceled_at,
        s.cancel_at_period_end, s.created_at
    FROM chosen s
    JOIN organizations o ON o.id = s.org_id
    WHERE (%(status)b::text IS NULL OR s.status = %(status)b::text)
        AND (%(plan)b::text IS NULL OR s.subscription_plan = %(plan)b::text)
"""

_LOCK_LIVE: Final = """
    SELECT
        s.billing_anchor, s.cycle_days, o.timezone,
        s.id, s.org_id, o.name AS org_name, s.subscription_plan, s.monthly_price, s.billing_cycle,
        s.status, s.trial_ends_at, s.current_period_start, s.current_period_end, s.canceled_at,
        s.cancel_at_period_end, s.created_at
    FROM organization_subscriptions s
    JOIN organizations o ON o.id = s.org_id
    WHERE s.org_id = ANY(%(org_ids)b::uuid[])
        AND s.status IN ('active', 'trialing', 'past_due', 'paused')
    ORDER BY s.org_id
    FOR NO KEY UPDATE OF s
"""

_DUE: Final = """
    SELECT org_id
    FROM organization_subscriptions
    WHERE status IN ('active', 'trialing', 'past_due', 'paused')
        AND current_period_end <= %(now)b
        AND (%(after)b::uuid IS NULL OR org_id > %(after)b)
    ORDER BY org_id
    LIMIT %(limit)b
"""

_SAVE: Final = """
    UPDATE organization_subscriptions s
    SET subscription_plan = new.plan,
        monthly_price = new.monthly_price,
        status = new.status,
        current_period_start = new.period_start,
        current_period_end = new.period_end,
        billing_anchor = new.anchor,
        canceled_at = new.canceled_at,
        cancel_at_period_end = new.cancel_at_period_end
    FROM unnest(
        %(ids)b::uuid[], %(plans)b::text[], %(monthly_prices)b::numeric[], %(statuses)b::text[],
        %(period_starts)b::timestamptz[], %(period_ends)b::timestamptz[],
        %(anchors)b::timestamptz[], %(canceled_at)b::timestamptz[],
        %(cancel_at_period_end)b::boolean[]
    ) AS new (
        id, plan, monthly_price, status, period_start, period_end, anchor, canceled_at,
        cancel_at_period_end
    )
    WHERE s.id = new.id
"""


@dataclass(frozen=True, slots=True)
class PlanChange:
    """A change of plan or price; prices are monthly, in USD."""

    old_plan: PlanName
    new_plan: PlanName
    old_price: Decimal
    new_price: Decimal
    subscription: Subscription


@dataclass(frozen=True, slots=True)
class RollOver:
    """What a roll-over did; of test organizations, nothing is an invoice or an amount."""

    rolled: int = 0
    """Periods that began."""
    activated: int = 0
    """Trials that became paid subscriptions."""
    canceled: int = 0
    """Subscriptions that ended as had been asked for."""
    invoices: int = 0
    overage_amount: Decimal = Decimal(0)
    """Overage that was billed, in USD."""
    failed: int = 0
    """Subscriptions that are due and cannot be rolled over; the log says why."""

    def __add__(self, other: "RollOver") -> "RollOver":
        return RollOver(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def create(  # noqa: PLR0913 - the terms, and for the books by whom and when
    database: Database,
    org_id: UUID,
    plan: PlanName,
    *,
    monthly_price: Decimal | None = None,
    billing_cycle: BillingCycle = BillingCycle.MONTHLY,
    cycle_days: int | None = None,
    trial_days: int | None = None,
    actor: str,
    key: str | None = None,
    now: datetime,
) -> Subscription:
    """Subscribe an organization, with a trial or from the first paid period on.

    The first period is billed at once, and after a trial when the trial ends. A trial and a custom
    cycle last whole days of the organization's time zone; a custom cycle without `cycle_days` lasts
    a month. `monthly_price` (USD, to the cent) is the plan's unless given. Concurrent calls end
    with one subscription. Idempotent by `key`.

    Raises:
        InvalidRequest: a price, cycle or trial that cannot be, or a key used for another act.
        NotFound: there is no such organization.
        SubscriptionExists: it has a live one.
    """
    price = _checked_price(plan, monthly_price)
    _check_lengths(billing_cycle, cycle_days, trial_days)
    terms = {
        "plan": plan,
        "monthly_price": None if monthly_price is None else price,
        "billing_cycle": billing_cycle,
        "cycle_days": cycle_days,
        "trial_days": trial_days,
    }

    def perform(connection: Connection) -> Subscription:
        organization = run(connection, _ORGANIZATION, org_id=org_id).one_or_none()
        if organization is None:
            raise NotFound(f"no organization {org_id}")
        org_name, timezone = organization
        length = Step(days=trial_days) if trial_days else billing.step_of(billing_cycle, cycle_days)
        period_end = boundary(now, length, zone_of(timezone), 1)
        subscription = Subscription(
            id=uuid4(),
            org_id=org_id,
            org_name=org_name,
            subscription_plan=plan,
            monthly_price=price,
            billing_cycle=billing_cycle,
            status=Status.TRIALING if trial_days else Status.ACTIVE,
            trial_ends_at=period_end if trial_days else None,
            current_period_start=now,
            current_period_end=period_end,
            canceled_at=None,
            cancel_at_period_end=False,
            created_at=now,
        )
        _insert(connection, subscription, cycle_days)
        billing.record(connection, _first_rows(subscription, actor), now)
        return subscription

    act = Act("subscriptions.create", org_id, terms, actor, key, now)
    return once(database, act, Subscription, perform)


def _insert(connection: Connection, new: Subscription, cycle_days: int | None) -> None:
    inserted = run(
        connection,
        _INSERT,
        id=new.id,
        org_id=new.org_id,
        plan=new.subscription_plan.value,
        monthly_price=new.monthly_price,
        billing_cycle=new.billing_cycle.value,
        cycle_days=cycle_days,
        status=new.status.value,
        trial_ends_at=new.trial_ends_at,
        period_start=new.current_period_start,
        period_end=new.current_period_end,
        anchor=new.current_period_start,
        created_at=new.created_at,
    )
    if not inserted.rowcount:
        raise SubscriptionExists(
            f"organization {new.org_id} has a live subscription: change its plan or cancel it first"
        )


def _first_rows(new: Subscription, actor: str) -> list[HistoryRow]:
    terms: dict[str, object] = {
        "plan": new.subscription_plan.value,
        "monthly_price": str(new.monthly_price),
        "billing_cycle": new.billing_cycle.value,
        "actor": actor,
    }
    created = billing.row_of(new, BillingEvent.SUBSCRIPTION_CREATED, metadata=terms)
    if new.status is Status.TRIALING:
        return [created]
    return [created, billing.invoice(new, NO_OVERAGE)]


def _checked_price(plan: PlanName, monthly_price: Decimal | None) -> Decimal:
    if monthly_price is None:
        return billing.cents(PLANS[plan].monthly_price)
    if not (monthly_price.is_finite() and 0 <= monthly_price <= MAX_MONTHLY_PRICE):
        raise InvalidRequest(
            f"monthly_price: must be from 0 to {MAX_MONTHLY_PRICE}", fields=["monthly_price"]
        )
    price = billing.cents(monthly_price)
    if price != monthly_price:
        raise InvalidRequest("monthly_price: must be in whole cents", fields=["monthly_price"])
    return price


def _check_lengths(
    billing_cycle: BillingCycle, cycle_days: int | None, trial_days: int | None
) -> None:
    if cycle_days is not None and billing_cycle is not BillingCycle.CUSTOM:
        raise InvalidRequest(
            "cycle_days: only a custom billing_cycle has them",
            fields=["cycle_days", "billing_cycle"],
        )
    _check_days("cycle_days", cycle_days, MAX_CYCLE_DAYS)
    _check_days("trial_days", trial_days, MAX_TRIAL_DAYS)


def _check_days(name: str, days: int | None, most: int) -> None:
    if days is not None and not 1 <= days <= most:
        raise InvalidRequest(f"{name}: must be from 1 to {most}", fields=[name])


def get(database: Database, org_id: UUID) -> Subscription:
    """The live subscription of an organization or, failing that, the one canceled last.

    Raises:
        NotFound: it never had one, or there is no such organization.
    """
    with database.snapshot() as connection:
        found = find(connection, org_id)
    if found is None:
        raise NotFound(f"organization {org_id} has no subscription")
    return found


def find(connection: Connection, org_id: UUID) -> Subscription | None:
    """What `get` answers, within a transaction of the caller; None if there never was one."""
    row = run(connection, _LATEST, org_id=org_id).mappings().one_or_none()
    return None if row is None else Subscription.model_validate(dict(row))


def listed(
    database: Database,
    user_id: str | None,
    window: Window,
    *,
    status: Status | None = None,
    plan: PlanName | None = None,
) -> Page[Subscription]:
    """The subscription of each organization of a user, or of all for None, by organization name.

    That is the live one or, failing that, the one canceled last.
    """
    with database.snapshot() as connection:
        return pages.read(
            connection,
            Subscription,
            _LISTED,
            "org_name",
            window,
            of_all=user_id is None,
            user_id=user_id,
            status=status and status.value,
            plan=plan and plan.value,
        )


def change_plan(
    database: Database,
    org_id: UUID,
    new_plan: PlanName,
    *,
    monthly_price: Decimal | None = None,
    actor: str,
    now: datetime,
) -> PlanChange:
    """Move an organization to another plan or price (USD a month), in force at once.

    Nothing is prorated: the period that runs stays billed as it was, and the next invoice is at
    the new price, the plan's unless given. A cancellation that was asked for stays asked for.

    Raises:
        InvalidRequest: a price that cannot be.
        NotFound: the organization has no live subscription.
        Conflict: it is on this plan already, and no other price is given.
    """
    price = _checked_price(new_plan, monthly_price)
    check_id("actor", actor)
    with database.transaction() as connection:
        account = _lock_live(connection, org_id, now)
        old = account.subscription
        # A price that was agreed on is not lost by asking for the plan that there is.
        if new_plan is old.subscription_plan and monthly_price in (None, old.monthly_price):
            raise Conflict(
                f"organization {org_id} is on {new_plan.value} at ${old.monthly_price} already"
            )
        new = old.model_copy(update={"subscription_plan": new_plan, "monthly_price": price})
        change = PlanChange(
            old.subscription_plan, new_plan, old.monthly_price, new.monthly_price, new
        )
        _save(connection, [replace(account, subscription=new)])
        billing.record(connection, [_change_row(change, actor)], now)
    return change


def _change_row(change: PlanChange, actor: str) -> HistoryRow:
    event = (
        BillingEvent.SUBSCRIPTION_UPGRADED
        if change.new_price >= change.old_price
        else BillingEvent.SUBSCRIPTION_DOWNGRADED
    )
    metadata: dict[str, object] = {
        "old_plan": change.old_plan.value,
        "new_plan": change.new_plan.value,
        "old_price": str(change.old_price),
        "new_price": str(change.new_price),
        "actor": actor,
    }
    return billing.row_of(change.subscription, event, metadata=metadata)


def cancel(
    database: Database, org_id: UUID, *, at_period_end: bool, actor: str, now: datetime
) -> Subscription:
    """End a subscription, now or when its period ends; nothing is paid back.

    Now, outstanding overage is billed. At the period's end, the roll-over does both then; asking
    twice changes nothing, and it can still be ended earlier.

    Raises:
        NotFound: the organization has no live subscription.
    """
    check_id("actor", actor)
    with database.transaction() as connection:
        account = _lock_live(connection, org_id, now)
        if not at_period_end:
            turn = billing.ended(account, now, actor)
            _write(connection, [turn], now)
            return turn.account.subscription
        asked = account.subscription.model_copy(update={"cancel_at_period_end": True})
        if asked != account.subscription:
            _save(connection, [replace(account, subscription=asked)])
            log.info("cancellation asked for", org_id=str(org_id), actor=actor, at=now.isoformat())
        return asked


def roll_over(database: Database, now: datetime, batch: int = BATCH) -> RollOver:
    """Begin the next period of every live subscription whose period has ended, or end it as asked.

    Missed periods are caught up one by one. Each period begins once, whoever else is at it. A
    subscription that cannot be rolled over is logged, counted and left as it is; the others are
    not affected. Every batch is a transaction of its own.

    Raises:
        LedgerUnavailable: PostgreSQL does not answer; finished batches stay.
    """
    total = RollOver()
    after: UUID | None = None
    while True:
        with database.transaction() as connection:
            org_ids = list(run(connection, _DUE, now=now, after=after, limit=batch).scalars())
            if org_ids:
                total += _roll_over(connection, org_ids, now)
        if len(org_ids) < batch:
            return total
        after = org_ids[-1]


def _roll_over(connection: Connection, org_ids: Sequence[UUID], now: datetime) -> RollOver:
    accounts = _lock(connection, org_ids)
    turns: list[Turn] = []
    for account in accounts:
        try:
            turns.append(billing.turned(account, now))
        except (InvalidRequest, ArithmeticError) as error:
            log.error(  # noqa: TRY400 - the message says it all
                "subscription cannot be rolled over",
                org_id=str(account.subscription.org_id),
                subscription_id=str(account.subscription.id),
                error=str(error),
            )
    written = _write(connection, turns, now)
    return RollOver(
        rolled=sum(turn.rolled for turn in turns),
        activated=sum(turn.activated for turn in turns),
        canceled=sum(turn.account.subscription.status is Status.CANCELED for turn in turns),
        invoices=written.invoices,
        overage_amount=written.overage_amount,
        failed=len(accounts) - len(turns),
    )


def _lock_live(connection: Connection, org_id: UUID, now: datetime) -> Account:
    """Lock the live subscription of an organization, as it stands once what is due is rolled over.

    Raises:
        NotFound: there is none.
    """
    for account in _lock(connection, [org_id]):
        turn = billing.turned(account, now)
        _write(connection, [turn], now)
        if turn.account.subscription.status is not Status.CANCELED:
            return turn.account
    raise NotFound(f"organization {org_id} has no live subscription")


def _lock(connection: Connection, org_ids: Sequence[UUID]) -> list[Account]:
    overage = billing.lock_overage(connection, org_ids)
    accounts = []
    for row in run(connection, _LOCK_LIVE, org_ids=org_ids).mappings():
        subscription = Subscription.model_validate(dict(row))
        owed = overage.get(subscription.org_id, NO_OVERAGE)
        terms = row["billing_anchor"], row["cycle_days"], row["timezone"]
        accounts.append(Account(*terms, subscription, owed))
    return accounts


def _write(connection: Connection, turns: Sequence[Turn], now: datetime) -> billing.Written:
    """Write what turns did: state, billed overage, history."""
    changed = [turn for turn in turns if turn.rows or turn.rolled]
    if not changed:
        return billing.Written()
    _save(connection, [turn.account for turn in changed])
    billing.mark_billed(connection, [turn.account.subscription.org_id for turn in changed])
    return billing.record(connection, [row for turn in changed for row in turn.rows], now)


def _save(connection: Connection, accounts: Sequence[Account]) -> None:
    subscriptions = [account.subscription for account in accounts]
    run(
        connection,
        _SAVE,
        ids=[s.id for s in subscriptions],
        plans=[s.subscription_plan.value for s in subscriptions],
        monthly_prices=[s.monthly_price for s in subscriptions],
        statuses=[s.status.value for s in subscriptions],
        period_starts=[s.current_period_start for s in subscriptions],
        period_ends=[s.current_period_end for s in subscriptions],
        anchors=[account.anchor for account in accounts],
        canceled_at=[s.canceled_at for s in subscriptions],
        cancel_at_period_end=[s.cancel_at_period_end for s in subscriptions],
    )
