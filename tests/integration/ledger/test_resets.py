"""Resets: full again from the pool, each period closed once, nothing minted and nothing missed."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo

import psycopg
import pytest
from structlog.testing import capture_logs

from ledger import debts, holds, resets
from ledger.database import Database, run
from ledger.gate import Operation
from ledger.resetplans import Allocation, Pool, plan_refresh, plan_reset
from ledger.resets import ResetReport, reset_due
from schema.errors import Conflict
from tests.integration.ledger.world import World, event, open_world

DAY = timedelta(days=1)
LOOKUP = Operation("contact_lookup")


def utc(*parts: int) -> datetime:
    return datetime(*parts, tzinfo=UTC)  # type: ignore[misc,arg-type]


START = utc(2026, 1, 31, 9)
FEBRUARY = utc(2026, 2, 28, 9)
MARCH = utc(2026, 3, 31, 9)
APRIL = utc(2026, 4, 30, 9)

# Whatever the movements add up to, and what the balances say instead.
UNEVEN = """
    SELECT 'pool', p.org_id::text,
        ARRAY[p.total_credits, p.allocated_credits, p.used_credits],
        ARRAY[coalesce(t.added, 0), coalesce(t.handed_out, 0), coalesce(u.credits, 0)]
    FROM organization_credit_pools p
    LEFT JOIN (
        SELECT org_id,
            sum(credits) FILTER (WHERE allocation_id IS NULL) AS added,
            sum(credits) FILTER (WHERE allocation_id IS NOT NULL) AS handed_out
        FROM credit_transactions GROUP BY org_id
    ) t USING (org_id)
    LEFT JOIN (
        SELECT org_id, sum(credits_used) AS credits
        FROM credit_usage_attribution GROUP BY org_id
    ) u USING (org_id)
    UNION ALL
    SELECT 'allocation', a.user_id,
        ARRAY[
            a.used_credits,
            a.allocated_credits + coalesce(
                (SELECT sum(used_credits) FROM allocation_periods WHERE allocation_id = a.id), 0
            )
        ],
        ARRAY[
            coalesce(
                (
                    SELECT sum(credits_used) FROM credit_usage_attribution
                    WHERE allocation_id = a.id AND period_start = a.last_reset_date
                ),
                0
            ),
            coalesce(
                (SELECT sum(credits) FROM credit_transactions WHERE allocation_id = a.id), 0
            )
        ]
    FROM user_credit_allocations a
    UNION ALL
    SELECT 'period', c.period_start::text, ARRAY[c.used_credits],
        ARRAY[
            coalesce(
                (
                    SELECT sum(credits_used) FROM credit_usage_attribution
                    WHERE allocation_id = c.allocation_id AND period_start = c.period_start
                ),
                0
            )
        ]
    FROM allocation_periods c
"""

# Periods of an allocation follow each other without gap or overlap, up to the one that runs.
UNJOINED = """
    SELECT user_id, period_start, period_end, following
    FROM (
        SELECT a.user_id, c.period_start, c.period_end,
            coalesce(
                lead(c.period_start) OVER (PARTITION BY a.id ORDER BY c.period_start),
                a.last_reset_date
            ) AS following
        FROM allocation_periods c
        JOIN user_credit_allocations a ON a.id = c.allocation_id
    ) periods
    WHERE period_end <> following
"""


def assert_books_even(world: World) -> None:
    sums = world.sql.execute(
        f"SELECT * FROM ({UNEVEN}) sums (what, whose, recorded, computed)"
        " WHERE recorded::numeric[] <> computed::numeric[]".encode()
    )
    assert sums.fetchall() == []
    assert world.sql.execute(UNJOINED.encode()).fetchall() == []


@pytest.fixture
def world(database: Database, database_url: str) -> Iterator[World]:
    with open_world(database, database_url) as opened:
        yield opened
        assert_books_even(opened)


@pytest.fixture
def org_id(world: World) -> UUID:
    return world.organization(pool=1000, members={"ada": "member"})


def organization_in(world: World, timezone: str, pool: int = 1000) -> UUID:
    org_id = world.organization(pool=pool)
    world.sql.execute("UPDATE organizations SET timezone = %s WHERE id = %s", (timezone, org_id))
    return org_id


def fund(
    world: World,
    org_id: UUID,
    credits: int = 100,
    user: str = "ada",
    at: datetime = START,
    period: str | None = "monthly",
) -> None:
    world.sql.execute(
        "SELECT fund_allocation(%s, %s, %s, false, %s, NULL, 'admin', NULL, %s)",
        (org_id, user, credits, period, at),
    )


def top_up(world: World, org_id: UUID, credits: int, at: datetime) -> None:
    fund(world, org_id, credits, at=at, period=None)


def use(
    world: World,
    org_id: UUID,
    credits: int,
    at: datetime,
    user: str = "ada",
    now: datetime | None = None,
) -> dict[str, int]:
    """Charge so many credits, used at a time and reported then or later; returns the deaths."""
    used = event(
        org_id,
        f"r-{uuid4()}",
        user_id=user,
        quantity=f"{credits / 10:.1f}",
        occurred_at=at.isoformat(),
    )
    return dict(world.apply(used, now=now or at).dead)


def due(world: World, now: datetime) -> ResetReport:
    return reset_due(world.database, now)


def allocation(world: World, org_id: UUID, user: str = "ada") -> tuple[Any, ...]:
    """Allocated and used credits, when the period began and when it ends."""
    where = f"user_credit_allocations WHERE org_id = '{org_id}' AND user_id = '{user}'"
    (found,) = world.rows(
        where, "allocated_credits", "used_credits", "last_reset_date", "next_reset_date"
    )
    return found


def closed(world: World) -> list[tuple[Any, ...]]:
    """Start, end, allocated, used, drawn and short credits of the closed periods."""
    return world.rows(
        "allocation_periods",
        "period_start",
        "period_end",
        "allocated_credits",
        "used_credits",
        "drawn_credits",
        "short_credits",
    )


def moved(world: World, kind: str) -> list[tuple[Any, ...]]:
    return world.rows(f"credit_transactions WHERE kind = '{kind}'", "credits", "reason")


def refresh_monthly(
    world: World, org_id: UUID, credits: int, anchor: datetime, due_at: datetime
) -> None:
    world.sql.execute(
        """
        UPDATE organization_credit_pools
        SET monthly_refresh_amount = %s, refresh_anchor = %s, next_refresh_date = %s
        WHERE org_id = %s
        """,
        (credits, anchor, due_at, org_id),
    )


def test_a_reset_fills_up_what_was_used(world: World, org_id: UUID) -> None:
    fund(world, org_id)
    use(world, org_id, 70, START + DAY)
    assert due(world, FEBRUARY - timedelta(microseconds=1)) == ResetReport()
    assert due(world, FEBRUARY) == ResetReport(
        allocations_reset=1, periods_closed=1, credits_drawn=70
    )
    assert allocation(world, org_id) == (100, 0, FEBRUARY, MARCH)
    assert closed(world) == [(START, FEBRUARY, 100, 70, 70, 0)]
    assert moved(world, "reset") == [(70, "monthly reset of 2026-02-28")]
    assert world.pool(org_id) == (1000, 170, 70)


def test_a_reset_with_nothing_to_move_leaves_no_movement(world: World, org_id: UUID) -> None:
    fund(world, org_id)
    assert due(world, FEBRUARY) == ResetReport(allocations_reset=1, periods_closed=1)
    assert allocation(world, org_id) == (100, 0, FEBRUARY, MARCH)
    assert closed(world) == [(START, FEBRUARY, 100, 0, 0, 0)]
    assert moved(world, "reset") == []


def test_a_top_up_lasts_for_its_period(world: World, org_id: UUID) -> None:
    fund(world, org_id)
    top_up(world, org_id, 50, START + DAY)
    use(world, org_id, 130, START + 2 * DAY)
    due(world, FEBRUARY)
    assert allocation(world, org_id)[:2] == (100, 0)
    assert closed(world) == [(START, FEBRUARY, 150, 130, 80, 0)]


def test_what_is_left_beyond_the_allowance_goes_back(world: World, org_id: UUID) -> None:
    fund(world, org_id)
    top_up(world, org_id, 50, START + DAY)
    use(world, org_id, 10, START + 2 * DAY)
    assert due(world, FEBRUARY).credits_returned == 40
    assert allocation(world, org_id)[:2] == (100, 0)
    assert closed(world) == [(START, FEBRUARY, 150, 10, -40, 0)]
    assert [credits for credits, _ in moved(world, "reset")] == [-40]
    assert world.pool(org_id) == (1000, 110, 10)


def test_a_pool_that_cannot_fill_up_gives_what_it_has(world: World) -> None:
    org_id = world.organization(pool=330)
    for user in ("ada", "bob", "cyd"):
        fund(world, org_id, user=user)
        use(world, org_id, 80, START + DAY, user)
    top_up(world, org_id, 10, START + DAY)
    # 20 are left in the pool; ada needs 70, and bob and cyd get nothing after her.
    assert due(world, FEBRUARY) == ResetReport(
        allocations_reset=3,
        periods_closed=3,
        credits_drawn=20,
        allocations_short=3,
        credits_short=50 + 80 + 80,
    )
    assert world.allocations(org_id) == {"ada": (50, 0), "bob": (20, 0), "cyd": (20, 0)}
    assert sorted(row[4:] for row in closed(world)) == [(0, 80), (0, 80), (20, 50)]
    assert world.pool(org_id) == (330, 330, 240)


def test_what_one_returns_fills_up_those_after_it(world: World) -> None:
    org_id = world.organization(pool=230)
    fund(world, org_id, user="ada")
    fund(world, org_id, user="bob")
    top_up(world, org_id, 30, START + DAY)
    use(world, org_id, 25, START + DAY, "bob")
    report = due(world, FEBRUARY)
    assert (report.credits_returned, report.credits_drawn, report.credits_short) == (30, 25, 0)
    assert world.allocations(org_id) == {"ada": (100, 0), "bob": (100, 0)}


def test_a_shortfall_is_made_up_at_the_next_reset(world: World) -> None:
    org_id = world.organization(pool=100)
    fund(world, org_id)
    use(world, org_id, 60, START + DAY)
    assert due(world, FEBRUARY).credits_short == 60
    world.sql.execute("SELECT add_credits_to_pool(%s, 500)", (org_id,))
    assert due(world, MARCH).credits_drawn == 60
    assert allocation(world, org_id) == (100, 0, MARCH, APRIL)


def test_held_credits_cross_the_boundary(world: World, org_id: UUID) -> None:
    fund(world, org_id)
    before = FEBRUARY - timedelta(minutes=1)
    use(world, org_id, 80, START + DAY)
    hold = ("ada", LOOKUP, "held", timedelta(hours=1), before)
    holds.place(world.database, org_id, *hold)
    assert due(world, FEBRUARY).credits_drawn == 80
    assert world.rows("user_credit_allocations", "allocated_credits", "held_credits") == [(100, 10)]
    at = FEBRUARY + timedelta(minutes=1)
    world.apply(event(org_id, "held", occurred_at=at.isoformat()), now=at)
    assert world.rows(
        "user_credit_allocations", "allocated_credits", "used_credits", "held_credits"
    ) == [(100, 10, 0)]


def test_credits_held_beyond_the_allowance_stay_held(world: World, org_id: UUID) -> None:
    fund(world, org_id, 10)
    top_up(world, org_id, 50, START + DAY)
    at = FEBRUARY - timedelta(minutes=1)
    for number in range(3):
        holds.place(world.database, org_id, "ada", LOOKUP, f"h-{number}", DAY, at)
    assert due(world, FEBRUARY).credits_returned == 30
    assert world.rows("user_credit_allocations", "allocated_credits", "held_credits") == [(30, 30)]


@pytest.mark.parametrize("batch", [1, 2, 500])
def test_batches_draw_as_one_run_would(world: World, batch: int) -> None:
    orgs = [world.organization(pool=320) for _ in range(2)]
    for org_id in orgs:
        for user in ("ada", "Bob", "cyd"):
            fund(world, org_id, user=user)
            use(world, org_id, 15, START + DAY, user)
    planned = resets.preview(world.database, FEBRUARY).resets
    report = reset_due(world.database, FEBRUARY, batch)
    assert (report.allocations_reset, report.credits_drawn, report.credits_short) == (6, 40, 50)
    given = world.rows("credit_transactions WHERE kind = 'reset'", "org_id", "user_id", "credits")
    assert given == sorted((p.org_id, p.user_id, p.drawn) for p in planned if p.drawn)


def test_long_absences_are_caught_up_in_transactions_of_bounded_size(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    org_id = world.organization(pool=10_000)
    for number in range(5):
        fund(world, org_id, user=f"u{number}", period="daily")
    monkeypatch.setattr(resets, "MAX_PERIODS", 20)
    told: list[int] = []
    report = reset_due(
        world.database, START + 10 * DAY, tell=lambda r: told.append(r.periods_closed)
    )
    assert (report.allocations_reset, report.periods_closed) == (5, 50)
    assert told == [20, 40, 50]


def test_the_pool_is_refreshed_before_its_allocations_are_reset(world: World) -> None:
    org_id = world.organization(pool=100)
    fund(world, org_id)
    use(world, org_id, 90, START + DAY)
    refresh_monthly(world, org_id, 60, START, FEBRUARY)
    assert due(world, FEBRUARY) == ResetReport(
        pools_refreshed=1,
        credits_refreshed=60,
        allocations_reset=1,
        periods_closed=1,
        credits_drawn=60,
        allocations_short=1,
        credits_short=30,
    )
    assert world.pool(org_id) == (160, 160, 90)
    row = world.row("organization_credit_pools")
    assert (row["last_refresh_date"], row["next_refresh_date"]) == (FEBRUARY, MARCH)
    assert row["lifetime_purchased_credits"] == 100


def test_every_missed_month_is_refreshed(world: World) -> None:
    org_id = organization_in(world, "Pacific/Auckland", pool=10)
    anchor = utc(2027, 12, 30, 11)  # 31 December, midnight in Auckland
    refresh_monthly(world, org_id, 5, anchor, utc(2028, 1, 30, 11))
    report = due(world, utc(2028, 4, 1))
    assert (report.pools_refreshed, report.credits_refreshed) == (1, 15)
    assert moved(world, "refresh") == [
        (5, "monthly refresh of 2028-01-31"),
        (5, "monthly refresh of 2028-02-29"),
        (5, "monthly refresh of 2028-03-31"),
    ]
    assert world.pool(org_id) == (25, 0, 0)
    row = world.row("organization_credit_pools")
    assert row["last_refresh_date"] == utc(2028, 3, 30, 11)
    assert row["next_refresh_date"] == utc(2028, 4, 29, 12)  # daylight saving has ended


def test_a_pool_without_an_anchor_takes_its_first_date(world: World, org_id: UUID) -> None:
    world.sql.execute(
        "UPDATE organization_credit_pools SET monthly_refresh_amount = 1, next_refresh_date = %s",
        (START,),
    )
    due(world, START)
    due(world, FEBRUARY)
    row = world.row("organization_credit_pools")
    assert (row["refresh_anchor"], row["next_refresh_date"]) == (START, MARCH)
    assert world.pool(org_id)[0] == 1002


def test_a_refresh_of_nothing_moves_its_date_on(world: World, org_id: UUID) -> None:
    refresh_monthly(world, org_id, 0, START, START)
    due(world, FEBRUARY)
    assert world.row("organization_credit_pools")["next_refresh_date"] == MARCH
    assert moved(world, "refresh") == []


@pytest.mark.parametrize(
    ("period", "ends"),
    [
        ("daily", [START + n * DAY for n in range(1, 71)]),
        ("weekly", [START + n * 7 * DAY for n in range(1, 11)]),
        ("monthly", [FEBRUARY, MARCH]),
    ],
)
def test_seventy_days_away_are_caught_up_period_by_period(
    world: World, org_id: UUID, period: str, ends: Sequence[datetime]
) -> None:
    fund(world, org_id, period=period)
    top_up(world, org_id, 20, START)
    use(world, org_id, 50, START + timedelta(hours=1))
    now = START + 70 * DAY
    assert due(world, now) == ResetReport(
        allocations_reset=1, periods_closed=len(ends), credits_drawn=30
    )
    rows = closed(world)
    assert [row[:2] for row in rows] == list(zip([START, *ends], ends, strict=False))
    assert [row[2:] for row in rows] == [(120, 50, 30, 0), *[(100, 0, 0, 0)] * (len(ends) - 1)]
    assert allocation(world, org_id)[:3] == (100, 0, ends[-1])


def test_a_run_again_changes_nothing(world: World, org_id: UUID) -> None:
    fund(world, org_id)
    use(world, org_id, 70, START + DAY)
    refresh_monthly(world, org_id, 60, START, FEBRUARY)
    due(world, MARCH)
    before = world.contents()
    assert due(world, MARCH) == ResetReport()
    assert due(world, FEBRUARY) == ResetReport()
    assert world.contents() == before


def test_never_and_switched_off_are_not_reset(world: World, org_id: UUID) -> None:
    fund(world, org_id, period="never")
    fund(world, org_id, user="bob")
    world.sql.execute("UPDATE user_credit_allocations SET is_active = false WHERE user_id = 'bob'")
    for user in ("ada", "bob"):
        use(world, org_id, 10, START, user)
    assert allocation(world, org_id)[3] is None
    before = world.contents()
    assert due(world, utc(2040, 1, 1)) == ResetReport()
    assert resets.preview(world.database, utc(2040, 1, 1)).resets == []
    assert world.contents() == before


def test_another_rhythm_keeps_the_periods_that_are_closed(world: World, org_id: UUID) -> None:
    fund(world, org_id)
    due(world, FEBRUARY)
    fund(world, org_id, 1, at=FEBRUARY + DAY, period="weekly")
    due(world, FEBRUARY + 14 * DAY)
    assert [row[:2] for row in closed(world)] == [
        (START, FEBRUARY),
        (FEBRUARY, FEBRUARY + 7 * DAY),
        (FEBRUARY + 7 * DAY, FEBRUARY + 14 * DAY),
    ]
    assert allocation(world, org_id)[2:] == (FEBRUARY + 14 * DAY, FEBRUARY + 21 * DAY)


@pytest.mark.parametrize(
    ("timezone", "period", "anchor", "at", "ends"),
    [
        pytest.param(
            "UTC", "monthly", utc(2027, 10, 31), utc(2028, 4, 1),
            [utc(2027, 11, 30), utc(2027, 12, 31), utc(2028, 1, 31), utc(2028, 2, 29),
             utc(2028, 3, 31), utc(2028, 4, 30)],
            id="month ends, a leap day and the turn of the year",
        ),
        pytest.param(
            "UTC", "monthly", utc(2027, 1, 30), utc(2027, 2, 28),
            [utc(2027, 2, 28), utc(2027, 3, 30)], id="no leap day",
        ),
        pytest.param(
            "Pacific/Auckland", "monthly", utc(2028, 1, 30, 11), utc(2028, 3, 1),
            [utc(2028, 2, 28, 11), utc(2028, 3, 30, 11)], id="31 January in Auckland",
        ),
        pytest.param(
            "America/New_York", "daily", utc(2026, 3, 6, 7, 30), utc(2026, 3, 9, 12),
            [utc(2026, 3, 7, 7, 30), utc(2026, 3, 8, 7, 30), utc(2026, 3, 9, 6, 30),
             utc(2026, 3, 10, 6, 30)],
            id="2:30 is skipped in New York",
        ),
        pytest.param(
            "America/New_York", "daily", utc(2026, 10, 31, 5, 30), utc(2026, 11, 2, 12),
            [utc(2026, 11, 1, 6, 30), utc(2026, 11, 2, 6, 30), utc(2026, 11, 3, 6, 30)],
            id="1:30 comes twice in New York",
        ),
        pytest.param(
            "Australia/Lord_Howe", "weekly", utc(2026, 9, 26, 15, 45), utc(2026, 10, 11),
            [utc(2026, 10, 3, 15, 45), utc(2026, 10, 10, 15, 15), utc(2026, 10, 17, 15, 15)],
            id="2:15 is skipped on Lord Howe",
        ),
        pytest.param(
            "Australia/Lord_Howe", "weekly", utc(2026, 3, 28, 14, 45), utc(2026, 4, 12),
            [utc(2026, 4, 4, 15, 15), utc(2026, 4, 11, 15, 15), utc(2026, 4, 18, 15, 15)],
            id="1:45 comes twice on Lord Howe",
        ),
        pytest.param(
            "America/New_York", "weekly", utc(2026, 12, 26, 5), utc(2027, 1, 3),
            [utc(2027, 1, 2, 5), utc(2027, 1, 9, 5)], id="the turn of the year in New York",
        ),
    ],
)  # fmt: skip
def test_periods_end_by_the_clock_of_the_organization(
    world: World,
    timezone: str,
    period: str,
    anchor: datetime,
    at: datetime,
    ends: Sequence[datetime],
) -> None:
    org_id = organization_in(world, timezone)
    fund(world, org_id, at=anchor, period=period)
    before = world.contents()
    (plan,) = resets.preview(world.database, at).resets
    assert world.contents() == before
    assert [*plan.boundaries, plan.next_date] == ends
    due(world, at)
    assert [row[:2] for row in closed(world)] == list(
        zip([anchor, *ends], plan.boundaries, strict=False)
    )
    assert allocation(world, org_id)[2:] == tuple(ends[-2:])


def test_a_preview_tells_what_the_run_then_does(world: World) -> None:
    org_id = world.organization(pool=210)
    other = world.organization(pool=500)
    for user in ("ada", "bob"):
        fund(world, org_id, user=user)
        use(world, org_id, 45, START + DAY, user)
    fund(world, other)
    refresh_monthly(world, org_id, 30, START, FEBRUARY)
    found = resets.preview(world.database, MARCH, org_id)
    assert [(p.org_id, p.total, p.dates, p.next_date) for p in found.refreshes] == [
        (org_id, 60, (FEBRUARY, MARCH), APRIL)
    ]
    assert [
        (p.user_id, p.used, p.drawn, p.short, p.boundaries, p.next_date) for p in found.resets
    ] == [
        ("ada", 45, 45, 0, (FEBRUARY, MARCH), APRIL),
        ("bob", 45, 25, 20, (FEBRUARY, MARCH), APRIL),
    ]
    assert {p.org_id for p in resets.preview(world.database, MARCH).resets} == {org_id, other}
    report = due(world, MARCH)
    assert (report.credits_refreshed, report.credits_drawn, report.credits_short) == (60, 70, 20)
    assert resets.preview(world.database, MARCH) == resets.Preview([], [], {})


def test_what_is_overdue_is_counted(world: World, org_id: UUID) -> None:
    assert resets.overdue(world.database, FEBRUARY) == resets.Overdue(0, 0, None)
    fund(world, org_id)
    fund(world, org_id, user="bob", at=START + DAY)
    fund(world, org_id, user="cyd", period="never")
    refresh_monthly(world, org_id, 1, START, START)
    assert resets.overdue(world.database, MARCH) == resets.Overdue(2, 1, START)
    due(world, MARCH)
    assert resets.overdue(world.database, MARCH) == resets.Overdue(0, 0, None)


def test_the_next_date_of_all_is_known(world: World, org_id: UUID) -> None:
    assert resets.next_due(world.database, START) is None
    fund(world, org_id, user="cyd", period="never")
    assert resets.next_due(world.database, START) is None
    fund(world, org_id)
    assert resets.next_due(world.database, START) == FEBRUARY
    refresh_monthly(world, org_id, 1, START, START + DAY)
    assert resets.next_due(world.database, START) == START + DAY
    assert resets.next_due(world.database, START + DAY) == FEBRUARY
    assert resets.next_due(world.database, FEBRUARY) is None


def strange_zone(world: World, org_id: UUID) -> None:
    """A zone that PostgreSQL knew once and this Python does not."""
    world.sql.execute("ALTER TABLE organizations DISABLE TRIGGER timezone_exists")
    world.sql.execute("UPDATE organizations SET timezone = 'Mars/Base' WHERE id = %s", (org_id,))
    world.sql.execute("ALTER TABLE organizations ENABLE TRIGGER timezone_exists")


@pytest.mark.parametrize("batch", [1, 500])
def test_an_unknown_time_zone_stops_only_its_organization(world: World, batch: int) -> None:
    orgs = sorted(world.organization(pool=1000) for _ in range(3))
    for org_id in orgs:
        for user in ("ada", "bob"):
            fund(world, org_id, user=user)
        refresh_monthly(world, org_id, 7, START, FEBRUARY)
    strange_zone(world, orgs[1])
    with capture_logs() as logs:
        report = reset_due(world.database, FEBRUARY, batch)
    assert (report.allocations_reset, report.pools_refreshed) == (4, 2)
    assert report.organizations_failed == 1
    (line,) = logs
    assert (line["org_id"], line["log_level"]) == (str(orgs[1]), "error")
    assert "Mars/Base" in line["error"]
    assert allocation(world, orgs[1])[2:] == (START, FEBRUARY)
    assert list(resets.preview(world.database, FEBRUARY).failed) == [orgs[1]]


def test_an_allocation_without_a_pool_is_left(world: World) -> None:
    org_id = world.organization()
    world.sql.execute(
        """
        INSERT INTO user_credit_allocations (org_id, user_id, last_reset_date, next_reset_date)
        VALUES (%s, 'ada', %s, %s)
        """,
        (org_id, START, FEBRUARY),
    )
    with capture_logs() as logs:
        assert due(world, FEBRUARY) == ResetReport(organizations_failed=1)
    assert logs[0]["error"] == "it has no credit pool"


def test_the_end_of_the_calendar_stops_only_those_who_reach_it(world: World, org_id: UUID) -> None:
    fund(world, org_id, at=utc(9999, 11, 15))
    refresh_monthly(world, org_id, 1, utc(9999, 11, 15), utc(9999, 12, 15))
    other = world.organization(pool=100)
    fund(world, other, at=utc(9999, 10, 20))
    with capture_logs() as logs:
        report = due(world, utc(9999, 12, 16))
    assert (report.allocations_reset, report.pools_refreshed) == (1, 0)
    assert [line["org_id"] for line in logs] == [str(org_id)]
    assert allocation(world, other)[2:] == (utc(9999, 11, 20), utc(9999, 12, 20))


def test_a_period_is_closed_once(world: World, org_id: UUID) -> None:
    """Should a date be put back by hand, the period that is closed already stays as it was."""
    fund(world, org_id)
    fund(world, org_id, user="bob")
    due(world, FEBRUARY)
    put_back = "UPDATE user_credit_allocations SET last_reset_date = %s, next_reset_date = %s"
    world.sql.execute(f"{put_back} WHERE user_id = 'ada'".encode(), (START, FEBRUARY))
    rows = closed(world)
    with capture_logs() as logs:
        report = due(world, FEBRUARY)
    assert (report.allocations_reset, report.organizations_failed) == (0, 1)
    assert "is closed already" in logs[0]["error"]
    assert closed(world) == rows
    with capture_logs():
        assert due(world, MARCH).allocations_reset == 1
    world.sql.execute(f"{put_back} WHERE user_id = 'ada'".encode(), (FEBRUARY, MARCH))


def test_usage_of_a_closed_period_is_paid_by_the_pool(world: World, org_id: UUID) -> None:
    fund(world, org_id)
    use(world, org_id, 40, START + DAY)
    due(world, FEBRUARY)
    assert use(world, org_id, 30, FEBRUARY - DAY, now=FEBRUARY + DAY) == {}
    assert allocation(world, org_id)[:2] == (100, 0)
    assert closed(world) == [(START, FEBRUARY, 130, 70, 40, 0)]
    assert world.pool(org_id) == (1000, 170, 70)
    assert use(world, org_id, 10, FEBRUARY, now=FEBRUARY + DAY) == {}
    assert allocation(world, org_id)[:2] == (100, 10)


def test_usage_of_a_closed_period_is_paid_by_the_user_if_the_pool_is_empty(world: World) -> None:
    org_id = world.organization(pool=140)
    fund(world, org_id)
    use(world, org_id, 40, START + DAY)
    due(world, FEBRUARY)
    assert use(world, org_id, 30, FEBRUARY - DAY, now=FEBRUARY + DAY) == {}
    assert allocation(world, org_id)[:2] == (70, 0)
    assert closed(world) == [(START, FEBRUARY, 130, 70, 40, 0)]
    due(world, MARCH)
    assert closed(world)[1:] == [(FEBRUARY, MARCH, 70, 0, 0, 30)]


def test_usage_of_a_closed_period_that_nobody_can_pay_is_a_debt(world: World) -> None:
    org_id = world.organization(pool=140)
    fund(world, org_id)
    use(world, org_id, 40, START + DAY)
    due(world, FEBRUARY)
    use(world, org_id, 80, FEBRUARY + DAY)
    late = use(world, org_id, 30, FEBRUARY - DAY, now=FEBRUARY + DAY)
    assert late == {"insufficient_credits": 1}
    assert closed(world) == [(START, FEBRUARY, 100, 40, 40, 0)]
    world.sql.execute("SELECT add_credits_to_pool(%s, 30)", (org_id,))
    assert debts.settle(world.database, FEBRUARY + DAY).debts == 1
    assert closed(world) == [(START, FEBRUARY, 130, 70, 40, 0)]


def test_late_usage_finds_its_period_among_many(world: World, org_id: UUID) -> None:
    fund(world, org_id, period="daily")
    now = START + 10 * DAY
    due(world, now)
    for day in (0, 3, 9):
        use(world, org_id, 10 + day, START + day * DAY, now=now)
    assert [row[3] for row in closed(world)] == [10, 0, 0, 13, 0, 0, 0, 0, 0, 19]


def test_a_reset_waits_for_the_pool_and_sees_what_changed(
    world: World, database_url: str, org_id: UUID
) -> None:
    fund(world, org_id)
    with (
        psycopg.connect(database_url) as other,
        ThreadPoolExecutor(1) as threads,
    ):
        other.execute(
            "SELECT fund_allocation(%s, 'ada', 25, false, NULL, NULL, 'admin', NULL, %s)",
            (org_id, FEBRUARY),
        )
        running = threads.submit(due, world, FEBRUARY)
        until_waiting(world)
        other.commit()
        assert running.result(30).credits_returned == 25
    assert allocation(world, org_id)[:2] == (100, 0)


def test_a_run_that_waited_for_another_leaves_what_that_one_did(
    world: World, database_url: str, org_id: UUID
) -> None:
    fund(world, org_id)
    refresh_monthly(world, org_id, 5, START, FEBRUARY)
    with (
        psycopg.connect(database_url) as other,
        ThreadPoolExecutor(2) as threads,
    ):
        other.execute("SELECT FROM organization_credit_pools FOR NO KEY UPDATE")
        running = [threads.submit(due, world, FEBRUARY) for _ in range(2)]
        until_waiting(world, 2)
        other.commit()
        reports = [future.result(30) for future in running]
    assert sum(report.allocations_reset for report in reports) == 1
    assert sum(report.pools_refreshed for report in reports) == 1


def until_waiting(world: World, number: int = 1) -> None:
    """Until so many sessions of this database wait for a lock."""
    waiting = """
        SELECT count(*) AS number FROM pg_stat_activity
        WHERE datname = current_database() AND wait_event_type = 'Lock'
    """
    deadline = datetime.now(UTC) + timedelta(seconds=30)
    while True:
        row = world.sql.execute(waiting).fetchone()
        if row is not None and row["number"] >= number:
            return
        assert datetime.now(UTC) < deadline, "nobody waits"


def test_two_runs_at_once_under_load_reset_each_period_once(
    world: World, database_url: str
) -> None:
    users = [f"u{number}" for number in range(12)]
    orgs = [world.organization(pool=100_000) for _ in range(4)]
    for org_id in orgs:
        for user in users:
            fund(world, org_id, 1000, user, period="daily")
        refresh_monthly(world, org_id, 11, START, FEBRUARY)
    days = [START + number * DAY for number in range(1, 40)]
    database = Database(database_url, pool_size=6)

    def resetting() -> ResetReport:
        total = [reset_due(database, day, batch=5) for day in days]
        return total[-1]

    def charging(part: int) -> None:
        for number, day in enumerate(days):
            batch = [
                event(
                    org_id,
                    f"{part}-{number}-{user}",
                    user_id=user,
                    occurred_at=(day - DAY * (number % 3)).isoformat(),
                )
                for org_id in reversed(orgs)
                for user in users[:: part + 2]
            ]
            World(database, world.sql).apply(*batch, now=day)

    def allocating() -> None:
        fund_sql = (
            "SELECT fund_allocation(%(o)s, %(u)s, 3, false, NULL, NULL, 'admin', NULL, %(now)s)"
        )
        for number, day in enumerate(days):
            with database.transaction() as connection:
                org_id, user = orgs[number % len(orgs)], users[number % len(users)]
                run(connection, fund_sql, o=org_id, u=user, now=day)

    jobs: list[Callable[[], object]] = [
        resetting, resetting, lambda: charging(0), lambda: charging(1), allocating,
    ]  # fmt: skip
    with ThreadPoolExecutor(len(jobs)) as threads:
        for future in [threads.submit(job) for job in jobs]:
            future.result(100)
    database.close()
    (per_allocation,) = {
        tuple(row.values())
        for row in world.sql.execute(
            "SELECT count(*), min(period_start), max(period_end) FROM allocation_periods"
            " GROUP BY allocation_id"
        )
    }
    assert per_allocation == (len(days), START, days[-1])
    assert len(moved(world, "refresh")) == len(orgs)
    charged = len(orgs) * len(days) * (len(users[::2]) + len(users[::3]))
    assert len(world.rows("usage_requests WHERE state = 'charged'", "request_id")) == charged


POOL = Pool(uuid4(), "acme", ZoneInfo("UTC"), 50, 20, FEBRUARY, START)
ALLOCATION = Allocation(
    uuid4(), POOL.org_id, "ada", 100, 30, 0, 100, "monthly", START, START, FEBRUARY
)


@pytest.mark.parametrize(
    ("fields", "available", "drawn", "short", "begins_with"),
    [
        ({}, 50, 30, 0, 100),
        ({}, 30, 30, 0, 100),
        ({}, 29, 29, 1, 99),
        ({}, 0, 0, 30, 70),
        ({"used": 0}, 0, 0, 0, 100),
        ({"allocated": 150}, 0, -20, 0, 100),
        ({"allocated": 150, "held": 110}, 0, -10, 0, 110),
        ({"allocated": 150, "held": 120}, 0, 0, 0, 120),
        ({"allowance": 0}, 50, -70, 0, 0),
    ],
)
def test_what_a_reset_moves(
    fields: dict[str, Any], available: int, drawn: int, short: int, begins_with: int
) -> None:
    plan = plan_reset(replace(ALLOCATION, **fields), replace(POOL, available=available), FEBRUARY)
    assert (plan.drawn, plan.short, plan.begins_with) == (drawn, short, begins_with)


def test_a_closed_period_cannot_be_planned() -> None:
    with pytest.raises(Conflict):
        plan_reset(replace(ALLOCATION, is_closed=True), POOL, FEBRUARY)


def test_a_refresh_is_planned_on_its_date() -> None:
    assert plan_refresh(POOL, FEBRUARY - timedelta(microseconds=1)) is None
    plan = plan_refresh(POOL, MARCH)
    assert plan is not None
    assert (plan.total, plan.dates, plan.next_date) == (40, (FEBRUARY, MARCH), APRIL)


def test_new_time_zone_data_does_not_make_a_period_of_an_hour(world: World, org_id: UUID) -> None:
    fund(world, org_id)
    world.sql.execute(
        "UPDATE user_credit_allocations SET next_reset_date = next_reset_date - interval '1 hour'"
    )
    report = due(world, FEBRUARY)
    assert (report.allocations_reset, report.periods_closed) == (1, 1)
    assert world.row("user_credit_allocations")["next_reset_date"] == MARCH
