"""Subscriptions: trials, periods, bills, changes of plan and the end, each of them exactly once."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import psycopg
import pytest
from structlog.testing import capture_logs

from ledger import subscriptions
from ledger.billing import BillingCycle, Status, Subscription
from ledger.database import Database
from ledger.reconcile import reconcile
from ledger.subscriptions import RollOver
from schema.errors import Conflict, InvalidRequest, NotFound, SubscriptionExists
from schema.plans import PlanName
from tests.integration.ledger.world import World, open_world

PLATFORM, BYOK, HYBRID = PlanName.PLATFORM, PlanName.BYOK, PlanName.HYBRID
NOWHERE = UUID(int=1)
DAY = timedelta(days=1)


def utc(*parts: int) -> datetime:
    return datetime(*parts, tzinfo=UTC)  # type: ignore[misc,arg-type]


START = utc(2026, 1, 10, 9)
FEBRUARY = utc(2026, 2, 10, 9)
MARCH = utc(2026, 3, 10, 9)
APRIL = utc(2026, 4, 10, 9)


@pytest.fixture
def world(database: Database, database_url: str) -> Iterator[World]:
    with open_world(database, database_url) as opened:
        yield opened
        assert reconcile(database).drifts == []


@pytest.fixture
def org_id(world: World) -> UUID:
    return world.organization()


def organization_in(world: World, timezone: str) -> UUID:
    org_id = world.organization()
    world.sql.execute("UPDATE organizations SET timezone = %s WHERE id = %s", (timezone, org_id))
    return org_id


def subscribe(
    world: World, org_id: UUID, plan: PlanName = PLATFORM, now: datetime = START, **terms: Any
) -> Subscription:
    return subscriptions.create(world.database, org_id, plan, actor="root", now=now, **terms)


def roll(world: World, now: datetime, batch: int = 100) -> RollOver:
    return subscriptions.roll_over(world.database, now, batch)


def cancel(world: World, org_id: UUID, now: datetime, *, at_period_end: bool) -> Subscription:
    return subscriptions.cancel(
        world.database, org_id, at_period_end=at_period_end, actor="root", now=now
    )


def current(world: World, org_id: UUID) -> Subscription:
    return subscriptions.get(world.database, org_id)


def history(world: World, org_id: UUID) -> list[tuple[Any, ...]]:
    """Event, amount and period of every row."""
    found = world.sql.execute(
        """
        SELECT event_type, amount, period_start, period_end
        FROM org_billing_history
        WHERE org_id = %s
        ORDER BY created_at, period_start, event_type
        """,
        (org_id,),
    )
    return [tuple(row.values()) for row in found]


def bills(world: World, org_id: UUID) -> list[tuple[str, Any]]:
    """What was to be paid, in order."""
    return [(event, amount) for event, amount, *_ in history(world, org_id) if amount]


def metadata(world: World, event: str) -> dict[str, Any]:
    """What the only row of this event says."""
    ((found,),) = world.rows(f"org_billing_history WHERE event_type = '{event}'", "event_metadata")
    return dict(found)


def set_status(world: World, org_id: UUID, status: Status) -> None:
    world.sql.execute(
        "UPDATE organization_subscriptions SET status = %s WHERE org_id = %s",
        (status.value, org_id),
    )


def overage_of(world: World, org_id: UUID) -> tuple[int, int]:
    """Overage credits that no bill has yet, and billed ones."""
    where = f"organization_credit_pools WHERE org_id = '{org_id}'"
    ((open_credits, billed),) = world.rows(where, "overage_credits", "overage_billed_credits")
    return open_credits, billed


@pytest.fixture
def overdrawing(world: World) -> UUID:
    """An organization without a credit left, whose user goes on for half a cent a credit."""
    org_id = world.organization(pool=10, allocations={"ada": 10})
    allow_overage(world, org_id)
    subscribe(world, org_id)
    world.deduct(org_id, "prepaid", 10)
    return org_id


def allow_overage(world: World, org_id: UUID) -> None:
    world.sql.execute(
        """
        UPDATE organization_credit_pools
        SET allow_overage = true, overage_limit = 10000, overage_rate = 0.005
        WHERE org_id = %s
        """,
        (org_id,),
    )


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline


def waiting(world: World, workers: int) -> bool:
    where = "wait_event_type = 'Lock' AND datname = current_database()"
    return len(world.rows(f"pg_stat_activity WHERE {where}", "pid")) >= workers


# Creation


def test_the_first_period_is_billed_in_advance(world: World, org_id: UUID) -> None:
    made = subscribe(world, org_id)
    assert made == Subscription(
        id=made.id,
        org_id=org_id,
        org_name=f"org-{org_id}",
        subscription_plan=PLATFORM,
        monthly_price=Decimal(50),
        billing_cycle=BillingCycle.MONTHLY,
        status=Status.ACTIVE,
        trial_ends_at=None,
        current_period_start=START,
        current_period_end=FEBRUARY,
        canceled_at=None,
        cancel_at_period_end=False,
        created_at=START,
    )
    assert current(world, org_id) == made
    assert history(world, org_id) == [
        ("invoice_created", 50, START, FEBRUARY),
        ("subscription_created", 0, START, FEBRUARY),
    ]
    assert world.rows("org_billing_history", "payment_status", "subscription_id") == [
        ("none", made.id),
        ("pending", made.id),
    ]


@pytest.mark.parametrize(
    ("terms", "period_end", "amount"),
    [
        ({"monthly_price": Decimal("12.34")}, FEBRUARY, "12.34"),
        ({"billing_cycle": BillingCycle.YEARLY}, utc(2027, 1, 10, 9), "600"),
        ({"billing_cycle": BillingCycle.CUSTOM}, FEBRUARY, "50"),
        ({"billing_cycle": BillingCycle.CUSTOM, "cycle_days": 45}, START + 45 * DAY, "50"),
    ],
)
def test_terms_of_ones_own(
    world: World, org_id: UUID, terms: dict[str, Any], period_end: datetime, amount: str
) -> None:
    assert subscribe(world, org_id, **terms).current_period_end == period_end
    assert bills(world, org_id) == [("invoice_created", Decimal(amount))]


def test_a_price_of_nothing_leaves_nothing_to_pay(world: World, org_id: UUID) -> None:
    subscribe(world, org_id, monthly_price=Decimal(0))
    assert world.rows("org_billing_history", "event_type", "payment_status") == [
        ("invoice_created", "none"),
        ("subscription_created", "none"),
    ]


def test_a_trial_costs_nothing_until_it_ends(world: World, org_id: UUID) -> None:
    made = subscribe(world, org_id, trial_days=14)
    ends = START + 14 * DAY
    assert (made.status, made.trial_ends_at, made.current_period_end) == (
        Status.TRIALING,
        ends,
        ends,
    )
    assert current(world, org_id) == made
    assert history(world, org_id) == [("subscription_created", 0, START, ends)]


def test_a_trial_lasts_local_days(world: World) -> None:
    org_id = organization_in(world, "America/New_York")
    made = subscribe(world, org_id, now=utc(2026, 3, 1, 17), trial_days=14)
    assert made.trial_ends_at == utc(2026, 3, 15, 16)  # noon there, before and after 8 March


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        ({"monthly_price": Decimal("-0.01")}, "monthly_price"),
        ({"monthly_price": Decimal("0.001")}, "monthly_price"),
        ({"monthly_price": Decimal("1e10")}, "monthly_price"),
        ({"monthly_price": Decimal("NaN")}, "monthly_price"),
        ({"trial_days": 0}, "trial_days"),
        ({"trial_days": 366}, "trial_days"),
        ({"cycle_days": 30}, "cycle_days"),
        ({"cycle_days": 30, "billing_cycle": BillingCycle.YEARLY}, "cycle_days"),
        ({"cycle_days": 0, "billing_cycle": BillingCycle.CUSTOM}, "cycle_days"),
        ({"cycle_days": 3661, "billing_cycle": BillingCycle.CUSTOM}, "cycle_days"),
    ],
)
def test_terms_that_cannot_be_are_refused(
    world: World, org_id: UUID, terms: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidRequest, match=said):
        subscribe(world, org_id, **terms)
    assert world.rows("organization_subscriptions", "id") == []


@pytest.mark.parametrize("status", [s for s in Status if s is not Status.CANCELED])
def test_one_live_subscription_is_enough(world: World, org_id: UUID, status: Status) -> None:
    subscribe(world, org_id)
    set_status(world, org_id, status)
    before = world.contents()
    with pytest.raises(SubscriptionExists, match=str(org_id)):
        subscribe(world, org_id, HYBRID)
    assert world.contents() == before


def test_a_key_subscribes_once(world: World, org_id: UUID) -> None:
    made = subscribe(world, org_id, HYBRID, key="k-1", monthly_price=Decimal("98.70"))
    before = world.contents()
    again = {"key": "k-1", "monthly_price": Decimal("98.7")}
    assert subscribe(world, org_id, HYBRID, START + DAY, **again) == made
    with pytest.raises(InvalidRequest, match="another request"):
        subscribe(world, org_id, PLATFORM, key="k-1")
    assert world.contents() == before
    cancel(world, org_id, START + DAY, at_period_end=False)
    assert subscribe(world, org_id, HYBRID, START + DAY, **again) == made
    with pytest.raises(NotFound):
        subscribe(world, NOWHERE, key="k-1")


def test_racing_creates_leave_one_live_subscription(
    world: World, org_id: UUID, database_url: str
) -> None:
    racers = 16
    database = Database(database_url, pool_size=racers)
    start = threading.Barrier(racers)

    def race(_: int) -> str:
        start.wait(30)
        try:
            subscriptions.create(database, org_id, PLATFORM, actor="root", now=START)
        except Conflict:
            return "conflict"
        return "created"

    with ThreadPoolExecutor(racers) as pool:
        outcomes = sorted(pool.map(race, range(racers)))
    database.close()
    assert outcomes == ["conflict"] * (racers - 1) + ["created"]
    assert len(world.rows("organization_subscriptions", "id")) == 1
    assert len(history(world, org_id)) == 2


def test_nothing_is_found_where_nothing_is(world: World, org_id: UUID) -> None:
    with pytest.raises(NotFound):
        subscribe(world, NOWHERE)
    for unsubscribed in (NOWHERE, org_id):
        with pytest.raises(NotFound):
            current(world, unsubscribed)
        with pytest.raises(NotFound):
            subscriptions.change_plan(world.database, unsubscribed, HYBRID, actor="root", now=START)
        with pytest.raises(NotFound):
            cancel(world, unsubscribed, START, at_period_end=False)


def test_the_live_subscription_is_shown_else_the_last(world: World, org_id: UUID) -> None:
    subscribe(world, org_id, PLATFORM)
    cancel(world, org_id, START + 2 * DAY, at_period_end=False)
    second = subscribe(world, org_id, BYOK, START + 3 * DAY)
    assert current(world, org_id) == second
    last = cancel(world, org_id, START + 4 * DAY, at_period_end=False)
    assert current(world, org_id) == last
    assert last.subscription_plan is BYOK


# Periods


@pytest.mark.parametrize(
    ("timezone", "cycle", "start", "ends"),
    [
        (
            "UTC",
            {},
            utc(2023, 1, 31, 8),
            [utc(2023, 2, 28, 8), utc(2023, 3, 31, 8), utc(2023, 4, 30, 8), utc(2023, 5, 31, 8)],
        ),
        ("UTC", {}, utc(2024, 1, 31, 8), [utc(2024, 2, 29, 8), utc(2024, 3, 31, 8)]),
        (
            "UTC",
            {"billing_cycle": BillingCycle.YEARLY},
            utc(2024, 2, 29),
            [utc(2025, 2, 28), utc(2026, 2, 28), utc(2027, 2, 28), utc(2028, 2, 29)],
        ),
        (
            "UTC",
            {"billing_cycle": BillingCycle.CUSTOM, "cycle_days": 10},
            utc(2024, 2, 20),
            [utc(2024, 3, 1), utc(2024, 3, 11)],
        ),
        (
            "America/New_York",  # noon there; summer time from 8 March
            {},
            utc(2026, 1, 31, 17),
            [utc(2026, 2, 28, 17), utc(2026, 3, 31, 16), utc(2026, 4, 30, 16)],
        ),
        (
            "Pacific/Auckland",  # 1 February there, at 00:30; winter time from 5 April
            {},
            utc(2026, 1, 31, 11, 30),
            [utc(2026, 2, 28, 11, 30), utc(2026, 3, 31, 11, 30), utc(2026, 4, 30, 12, 30)],
        ),
        (
            "Pacific/Auckland",
            {"billing_cycle": BillingCycle.CUSTOM, "cycle_days": 7},
            utc(2026, 3, 31, 0),
            [utc(2026, 4, 7, 1), utc(2026, 4, 14, 1)],
        ),
    ],
)
@pytest.mark.parametrize("punctual", [True, False])
def test_periods_are_counted_from_the_anchor(
    world: World,
    timezone: str,
    cycle: dict[str, Any],
    start: datetime,
    ends: list[datetime],
    punctual: bool,
) -> None:
    """The same whether each end is met in time or all are caught up at once."""
    org_id = organization_in(world, timezone)
    subscribe(world, org_id, now=start, **cycle)
    rolled = [roll(world, now).rolled for now in (ends[:-1] if punctual else ends[-2:-1])]
    assert sum(rolled) == len(ends) - 1
    where = "org_billing_history WHERE event_type = 'invoice_created'"
    assert world.rows(where, "period_start", "period_end") == list(
        zip([start, *ends[:-1]], ends, strict=True)
    )
    assert current(world, org_id).current_period_end == ends[-1]


def test_a_period_rolls_over_when_it_has_ended(world: World, org_id: UUID) -> None:
    subscribe(world, org_id)
    before = world.contents()
    assert roll(world, FEBRUARY - timedelta(microseconds=1)) == RollOver()
    assert world.contents() == before
    assert roll(world, FEBRUARY) == RollOver(rolled=1, invoices=1)
    after = world.contents()
    assert roll(world, FEBRUARY) == RollOver()
    assert world.contents() == after


def test_an_invoice_says_what_it_is_for(world: World, org_id: UUID) -> None:
    subscribe(world, org_id, trial_days=1, billing_cycle=BillingCycle.YEARLY)
    roll(world, START + DAY)
    ((amount,),) = world.rows("org_billing_history WHERE amount > 0", "amount")
    assert amount == 600
    assert metadata(world, "invoice_created") == {
        "plan": "platform",
        "monthly_price": "50.00",
        "overage_credits": 0,
        "overage_rate": "0",
        "overage_amount": "0.00",
    }


def test_a_trial_becomes_paid_and_is_anchored_at_its_end(world: World, org_id: UUID) -> None:
    subscribe(world, org_id, now=utc(2026, 1, 1), trial_days=30)
    assert roll(world, utc(2026, 1, 31)) == RollOver(rolled=1, activated=1, invoices=1)
    paid = current(world, org_id)
    assert (paid.status, paid.trial_ends_at) == (Status.ACTIVE, utc(2026, 1, 31))
    roll(world, utc(2026, 2, 28))
    assert history(world, org_id)[1:] == [
        ("invoice_created", 50, utc(2026, 1, 31), utc(2026, 2, 28)),
        ("invoice_created", 50, utc(2026, 2, 28), utc(2026, 3, 31)),
    ]


def test_a_trial_that_others_wrote_is_anchored_at_its_end(world: World, org_id: UUID) -> None:
    """Its end is on the anchor's grid by chance, and begins a grid of its own."""
    world.sql.execute(
        """
        INSERT INTO organization_subscriptions (
            org_id, subscription_plan, monthly_price, status, billing_anchor,
            current_period_start, current_period_end
        )
        VALUES (%s, 'platform', 50, 'trialing', %s, %s, %s)
        """,
        (org_id, utc(2026, 1, 31), utc(2026, 1, 31), utc(2026, 2, 28)),
    )
    roll(world, utc(2026, 2, 28))
    assert current(world, org_id).current_period_end == utc(2026, 3, 28)


def test_missed_periods_are_caught_up_one_by_one(world: World, org_id: UUID) -> None:
    subscribe(world, org_id, trial_days=3)
    trial_end = START + 3 * DAY
    assert roll(world, START + 70 * DAY) == RollOver(rolled=3, activated=1, invoices=3)
    assert history(world, org_id) == [
        ("subscription_created", 0, START, trial_end),
        ("invoice_created", 50, trial_end, utc(2026, 2, 13, 9)),
        ("invoice_created", 50, utc(2026, 2, 13, 9), utc(2026, 3, 13, 9)),
        ("invoice_created", 50, utc(2026, 3, 13, 9), utc(2026, 4, 13, 9)),
    ]


@pytest.mark.parametrize("status", [Status.PAST_DUE, Status.PAUSED])
def test_a_status_outlives_the_period(world: World, org_id: UUID, status: Status) -> None:
    subscribe(world, org_id)
    set_status(world, org_id, status)
    is_billed = status is Status.PAST_DUE
    assert roll(world, MARCH) == RollOver(rolled=2, invoices=2 * is_billed)
    rolled = current(world, org_id)
    assert (rolled.status, rolled.current_period_end) == (status, APRIL)
    assert len(history(world, org_id)) == 2 + 2 * is_billed


@pytest.mark.parametrize("anchor", [utc(2026, 1, 1), utc(2026, 2, 9), utc(2026, 6, 1)])
def test_a_period_off_the_grid_is_followed_by_a_whole_one(
    world: World, org_id: UUID, anchor: datetime
) -> None:
    """Rows that others wrote may have any anchor."""
    subscribe(world, org_id)
    world.sql.execute("UPDATE organization_subscriptions SET billing_anchor = %s", (anchor,))
    roll(world, MARCH)
    assert [row[2:] for row in history(world, org_id) if row[0] == "invoice_created"] == [
        (START, FEBRUARY),
        (FEBRUARY, MARCH),
        (MARCH, APRIL),
    ]


def test_a_moved_time_zone_does_not_cut_a_period_short(world: World) -> None:
    org_id = organization_in(world, "America/New_York")
    subscribe(world, org_id, now=utc(2026, 2, 15, 17))
    world.sql.execute("UPDATE organizations SET timezone = 'UTC'")
    assert roll(world, utc(2026, 3, 15, 18)).rolled == 1
    assert current(world, org_id).current_period_end == utc(2026, 4, 15, 16)


def test_what_cannot_be_counted_does_not_stop_the_others(world: World) -> None:
    org_ids = sorted(world.organization() for _ in range(7))
    for org_id in org_ids:
        subscribe(world, org_id)
    nowhere, endless, *others = org_ids
    world.sql.execute("SET session_replication_role = replica")  # no trigger looks at the zone
    world.sql.execute(
        "UPDATE organizations SET timezone = 'Mars/Olympus' WHERE id = %s", (nowhere,)
    )
    world.sql.execute(
        """
        UPDATE organization_subscriptions
        SET billing_cycle = 'custom', cycle_days = 2000000000
        WHERE org_id = %s
        """,
        (endless,),
    )
    with capture_logs() as logs:
        done = roll(world, FEBRUARY, batch=2)
    assert done == RollOver(rolled=5, invoices=5, failed=2)
    assert [(line["log_level"], line["org_id"]) for line in logs] == [
        ("error", str(nowhere)),
        ("error", str(endless)),
    ]
    assert "Mars/Olympus" in logs[0]["error"]
    assert {current(world, org_id).current_period_end for org_id in others} == {MARCH}
    assert current(world, nowhere).current_period_end == FEBRUARY


@pytest.mark.parametrize("locked", ["organization_credit_pools", "organization_subscriptions"])
def test_two_workers_roll_each_period_once(world: World, database_url: str, locked: str) -> None:
    """Both have found the same subscriptions due when the first of them gets to work."""
    with_pools = locked == "organization_credit_pools"
    org_ids = [world.organization(pool=10 if with_pools else None) for _ in range(5)]
    for org_id in org_ids:
        subscribe(world, org_id)
    with ThreadPoolExecutor(2) as workers:
        with psycopg.connect(database_url) as blocker:
            blocker.execute(f"SELECT FROM {locked} FOR UPDATE".encode())
            running = [workers.submit(roll, world, MARCH) for _ in range(2)]
            wait_until(lambda: waiting(world, 2))
        reports = [future.result(60) for future in running]
    assert sorted(report.rolled for report in reports) == [0, 10]
    for org_id in org_ids:
        assert bills(world, org_id) == [("invoice_created", 50)] * 3
        assert current(world, org_id).current_period_end == APRIL


def test_racing_workers_share_batches_without_deadlock(world: World, database_url: str) -> None:
    org_ids = [world.organization(pool=10) for _ in range(30)]
    for org_id in org_ids:
        subscribe(world, org_id)
    database = Database(database_url, pool_size=4)
    start = threading.Barrier(4)

    def race(batch: int) -> RollOver:
        start.wait(30)
        return subscriptions.roll_over(database, MARCH, batch)

    with ThreadPoolExecutor(4) as pool:
        reports = list(pool.map(race, (1, 3, 7, 100)))
    database.close()
    assert sum(reports, RollOver()) == RollOver(rolled=60, invoices=60)
    assert {len(bills(world, org_id)) for org_id in org_ids} == {3}


# Overage


def test_overage_is_billed_once_with_the_next_period(world: World, overdrawing: UUID) -> None:
    world.deduct(overdrawing, "r-1", 25)
    assert roll(world, MARCH) == RollOver(rolled=2, invoices=2, overage_amount=Decimal("0.13"))
    assert overage_of(world, overdrawing) == (0, 25)
    assert bills(world, overdrawing) == [
        ("invoice_created", 50),
        ("invoice_created", Decimal("50.13")),  # 12.5 cents are rounded up
        ("invoice_created", 50),
    ]
    where = "org_billing_history WHERE amount > 50"
    assert world.rows(where, "period_start", "event_metadata") == [
        (
            FEBRUARY,
            {
                "plan": "platform",
                "monthly_price": "50.00",
                "overage_credits": 25,
                "overage_rate": "0.005000",
                "overage_amount": "0.13",
            },
        )
    ]


def test_overage_after_a_bill_is_on_the_next_one(world: World, overdrawing: UUID) -> None:
    world.deduct(overdrawing, "r-1", 25)
    roll(world, FEBRUARY)
    world.deduct(overdrawing, "r-2", 1000)
    roll(world, MARCH)
    assert overage_of(world, overdrawing) == (0, 1025)
    assert bills(world, overdrawing)[1:] == [
        ("invoice_created", Decimal("50.13")),
        ("invoice_created", 55),
    ]


def test_overage_of_a_running_charge_is_not_lost(
    world: World, overdrawing: UUID, database_url: str
) -> None:
    """The roll-over waits for a charge that has begun, and bills it."""
    with ThreadPoolExecutor(1) as worker:
        with psycopg.connect(database_url) as charging:
            charging.execute(
                "SELECT deduct_credits(%s, 'ada', 1000, 'contact_lookup')", (overdrawing,)
            )
            running = worker.submit(roll, world, FEBRUARY)
            wait_until(lambda: waiting(world, 1))
        assert running.result(30).overage_amount == 5
    assert overage_of(world, overdrawing) == (0, 1000)


def test_overage_of_a_trial_is_billed_at_its_end(world: World) -> None:
    org_id = world.organization(pool=10, allocations={"ada": 10})
    allow_overage(world, org_id)
    subscribe(world, org_id, trial_days=7)
    world.deduct(org_id, "r-1", 1010)
    roll(world, START + 7 * DAY)
    assert bills(world, org_id) == [("invoice_created", 55)]


def test_a_paused_subscription_pays_for_overage_alone(world: World, overdrawing: UUID) -> None:
    world.deduct(overdrawing, "r-1", 1000)
    set_status(world, overdrawing, Status.PAUSED)
    assert roll(world, MARCH) == RollOver(rolled=2, overage_amount=Decimal(5))
    assert history(world, overdrawing)[2:] == [("overage_charged", 5, START, FEBRUARY)]
    assert overage_of(world, overdrawing) == (0, 1000)
    assert metadata(world, "overage_charged") == {
        "overage_credits": 1000,
        "overage_rate": "0.005000",
        "overage_amount": "5.00",
    }


def test_overage_beyond_all_sums_does_not_stop_the_others(
    world: World, overdrawing: UUID, org_id: UUID
) -> None:
    subscribe(world, org_id)
    world.sql.execute(
        "UPDATE organization_credit_pools SET overage_rate = 999999, overage_limit = 10000000000"
    )
    world.deduct(overdrawing, "r-1", 2_000_000)
    assert roll(world, FEBRUARY) == RollOver(rolled=1, invoices=1, failed=1)
    assert overage_of(world, overdrawing) == (2_000_000, 0)


# Changes of plan


@pytest.mark.parametrize(
    ("plan", "price", "event", "amount"),
    [
        (HYBRID, None, "subscription_upgraded", "99.00"),
        (BYOK, None, "subscription_downgraded", "30.00"),
        (BYOK, Decimal(50), "subscription_upgraded", "50.00"),
        (PLATFORM, Decimal("49.99"), "subscription_downgraded", "49.99"),
    ],
)
def test_a_plan_changes_at_once_and_costs_from_the_next_period_on(
    world: World, org_id: UUID, plan: PlanName, price: Decimal | None, event: str, amount: str
) -> None:
    before = subscribe(world, org_id)
    change = subscriptions.change_plan(
        world.database, org_id, plan, monthly_price=price, actor="root", now=START + DAY
    )
    assert (change.old_plan, change.new_plan) == (PLATFORM, plan)
    assert (change.old_price, change.new_price) == (Decimal(50), Decimal(amount))
    assert change.subscription == current(world, org_id)
    assert change.subscription.current_period_end == before.current_period_end
    assert metadata(world, event) == {
        "old_plan": "platform",
        "new_plan": plan.value,
        "old_price": "50.00",
        "new_price": amount,
        "actor": "root",
    }
    roll(world, FEBRUARY)
    assert bills(world, org_id) == [("invoice_created", 50), ("invoice_created", Decimal(amount))]


def test_the_same_plan_and_price_is_no_change(world: World, org_id: UUID) -> None:
    subscribe(world, org_id)
    before = world.contents()
    with pytest.raises(Conflict, match="platform"):
        subscriptions.change_plan(world.database, org_id, PLATFORM, actor="root", now=START)
    with pytest.raises(InvalidRequest, match="monthly_price"):
        subscriptions.change_plan(
            world.database, org_id, HYBRID, monthly_price=Decimal(-1), actor="root", now=START
        )
    assert world.contents() == before


def test_an_agreed_price_is_not_lost_by_asking_for_the_same_plan(
    world: World, org_id: UUID
) -> None:
    subscribe(world, org_id, monthly_price=Decimal(75))
    with pytest.raises(Conflict, match=r"\$75"):
        subscriptions.change_plan(world.database, org_id, PLATFORM, actor="root", now=START)
    assert current(world, org_id).monthly_price == 75
    change = subscriptions.change_plan(
        world.database, org_id, PLATFORM, monthly_price=Decimal(50), actor="root", now=START
    )
    assert (change.old_price, change.new_price) == (Decimal(75), Decimal(50))


def test_a_change_leaves_a_cancellation_asked_for(world: World, org_id: UUID) -> None:
    subscribe(world, org_id)
    cancel(world, org_id, START, at_period_end=True)
    change = subscriptions.change_plan(world.database, org_id, HYBRID, actor="root", now=START)
    assert change.subscription.cancel_at_period_end
    assert current(world, org_id).cancel_at_period_end


def test_periods_before_a_change_are_billed_at_the_old_price(world: World, org_id: UUID) -> None:
    subscribe(world, org_id)
    subscriptions.change_plan(world.database, org_id, HYBRID, actor="root", now=MARCH + DAY)
    assert roll(world, APRIL) == RollOver(rolled=1, invoices=1)
    assert [amount for _, amount in bills(world, org_id)] == [50, 50, 50, 99]


# The end


def test_canceling_now_bills_overage_and_ends(world: World, overdrawing: UUID) -> None:
    world.deduct(overdrawing, "r-1", 1000)
    now = START + 5 * DAY
    canceled = cancel(world, overdrawing, now, at_period_end=False)
    assert (canceled.status, canceled.canceled_at) == (Status.CANCELED, now)
    assert current(world, overdrawing) == canceled
    assert history(world, overdrawing)[2:] == [
        ("overage_charged", 5, START, now),
        ("subscription_canceled", 0, START, FEBRUARY),
    ]
    assert overage_of(world, overdrawing) == (0, 1000)
    with pytest.raises(NotFound):
        cancel(world, overdrawing, now, at_period_end=False)
    assert roll(world, APRIL) == RollOver()


def test_canceling_without_overage_charges_nothing(world: World, org_id: UUID) -> None:
    subscribe(world, org_id)
    cancel(world, org_id, START + DAY, at_period_end=False)
    assert history(world, org_id)[2:] == [("subscription_canceled", 0, START, FEBRUARY)]


def test_a_cancellation_at_the_periods_end_waits_for_it(world: World, org_id: UUID) -> None:
    subscribe(world, org_id)
    asked = cancel(world, org_id, START, at_period_end=True)
    assert (asked.status, asked.canceled_at, asked.cancel_at_period_end) == (
        Status.ACTIVE,
        None,
        True,
    )
    assert current(world, org_id) == asked
    before = world.contents()
    assert cancel(world, org_id, START + DAY, at_period_end=True) == asked
    assert world.contents() == before
    assert len(history(world, org_id)) == 2


def test_the_roll_over_ends_what_was_to_end(world: World, overdrawing: UUID) -> None:
    """Even if it comes months late, it ends at the end of its period and owes nothing after."""
    cancel(world, overdrawing, START, at_period_end=True)
    world.deduct(overdrawing, "r-1", 1000)
    assert roll(world, APRIL) == RollOver(canceled=1, overage_amount=Decimal(5))
    ended = current(world, overdrawing)
    assert (ended.status, ended.canceled_at) == (Status.CANCELED, FEBRUARY)
    assert history(world, overdrawing)[2:] == [
        ("overage_charged", 5, START, FEBRUARY),
        ("subscription_canceled", 0, START, FEBRUARY),
    ]
    assert overage_of(world, overdrawing) == (0, 1000)


def test_a_trial_that_is_to_end_is_never_billed(world: World, org_id: UUID) -> None:
    subscribe(world, org_id, trial_days=7)
    cancel(world, org_id, START, at_period_end=True)
    assert roll(world, START + 7 * DAY) == RollOver(canceled=1)
    assert bills(world, org_id) == []


def test_what_was_to_end_later_can_end_now(world: World, org_id: UUID) -> None:
    subscribe(world, org_id)
    cancel(world, org_id, START, at_period_end=True)
    ended = cancel(world, org_id, START + DAY, at_period_end=False)
    assert (ended.status, ended.canceled_at) == (Status.CANCELED, START + DAY)
    assert metadata(world, "subscription_canceled") == {
        "plan": "platform",
        "at_period_end": False,
        "actor": "root",
    }


def test_what_has_ended_by_now_is_not_live(world: World, org_id: UUID) -> None:
    """Also before the roll-over has said so."""
    subscribe(world, org_id)
    cancel(world, org_id, START, at_period_end=True)
    with pytest.raises(NotFound):
        subscriptions.change_plan(world.database, org_id, HYBRID, actor="root", now=FEBRUARY)
    with pytest.raises(NotFound):
        cancel(world, org_id, FEBRUARY, at_period_end=False)


def test_an_ended_subscription_stays_out_of_its_successors_life(world: World, org_id: UUID) -> None:
    subscribe(world, org_id)
    first = cancel(world, org_id, START, at_period_end=False)
    subscribe(world, org_id, HYBRID)
    assert roll(world, FEBRUARY) == RollOver(rolled=1, invoices=1)
    where = f"organization_subscriptions WHERE id = '{first.id}'"
    assert world.rows(where, "canceled_at", "current_period_end") == [(START, FEBRUARY)]


@pytest.mark.parametrize("at_period_end", [True, False])
def test_periods_before_a_cancellation_are_billed(
    world: World, org_id: UUID, at_period_end: bool
) -> None:
    """Nobody ends in a period that was over when they asked."""
    subscribe(world, org_id)
    cancel(world, org_id, MARCH + DAY, at_period_end=at_period_end)
    assert len(bills(world, org_id)) == 3
    roll(world, APRIL)
    assert current(world, org_id).canceled_at == (APRIL if at_period_end else MARCH + DAY)


# Test organizations


def test_a_test_organization_lives_the_same_life_unbilled(world: World) -> None:
    org_id = world.organization(pool=10, allocations={"ada": 10}, is_test=True)
    allow_overage(world, org_id)
    subscribe(world, org_id, trial_days=7)
    world.deduct(org_id, "r-1", 1010)
    assert roll(world, FEBRUARY) == RollOver(rolled=1, activated=1)
    assert overage_of(world, org_id) == (0, 1000)
    subscriptions.change_plan(world.database, org_id, HYBRID, actor="root", now=FEBRUARY)
    world.deduct(org_id, "r-2", 7)
    ended = cancel(world, org_id, FEBRUARY + DAY, at_period_end=False)
    assert (ended.status, ended.subscription_plan) == (Status.CANCELED, HYBRID)
    assert overage_of(world, org_id) == (0, 1007)
    assert world.rows("org_billing_history", "id") == []
