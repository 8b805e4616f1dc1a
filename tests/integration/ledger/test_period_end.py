"""The end of an allocation's first period in SQL, against `schema.periods` (D8)."""

from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta
from typing import Final
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg.errors import CheckViolation

from ledger.database import Database
from schema.periods import STEPS, ResetPeriod, boundary, zone_of
from tests.integration.ledger.world import World, open_world

NEW_YORK: Final = "America/New_York"
LORD_HOWE: Final = "Australia/Lord_Howe"
APIA: Final = "Pacific/Apia"

ZONES: Final = (
    "UTC", NEW_YORK, LORD_HOWE, APIA, "Africa/Johannesburg", "Africa/Lagos", "Africa/Windhoek",
    "America/Adak", "America/Argentina/Buenos_Aires", "America/Caracas", "America/Chicago",
    "America/Halifax", "America/Havana", "America/Los_Angeles", "America/Phoenix",
    "America/Sao_Paulo", "America/St_Johns", "Antarctica/Troll", "Asia/Kathmandu", "Asia/Kolkata",
    "Asia/Pyongyang", "Asia/Shanghai", "Asia/Singapore", "Asia/Tokyo", "Atlantic/Azores",
    "Atlantic/Reykjavik", "Australia/Adelaide", "Australia/Eucla", "Australia/Perth",
    "Australia/Sydney", "Europe/Athens", "Europe/Berlin", "Europe/Dublin", "Europe/Istanbul",
    "Europe/London", "Europe/Moscow", "Europe/Samara", "Pacific/Auckland", "Pacific/Chatham",
    "Pacific/Fakaofo", "Pacific/Honolulu", "Pacific/Kiritimati", "Pacific/Marquesas",
    "Etc/GMT+12", "EST5EDT", "EST", "WET", "CET", "MET", "EET",
)  # fmt: skip
"""Zones about which all recent releases of the time zone database agree.

PostgreSQL brings one release, Python reads another; they may differ where the law just changed.
"""

PERIOD_ENDS: Final = """
    SELECT period_end(%(org_id)s, %(period)s, anchor) AS moment
    FROM unnest(%(anchors)s::timestamptz[]) WITH ORDINALITY AS a (anchor, position)
    ORDER BY position
"""

recurring = st.sampled_from(list(STEPS))
nights = st.builds(
    datetime.combine,
    st.dates(date(2000, 1, 1), date(2035, 12, 31)),
    st.builds(time, st.integers(0, 3), st.sampled_from([0, 15, 30, 45])),
)
local_times = nights | st.datetimes(datetime(2000, 1, 1), datetime(2035, 12, 31))  # noqa: DTZ001  # local


@pytest.fixture
def world(database: Database, database_url: str) -> Iterator[World]:
    with open_world(database, database_url) as opened:
        yield opened


@pytest.fixture
def org_id(world: World) -> UUID:
    return world.organization()


@pytest.fixture
def org_ids(world: World) -> dict[str, UUID]:
    """An organization in every zone."""
    found = {zone: world.organization() for zone in ZONES}
    for zone, org_id in found.items():
        move(world, org_id, zone)
    return found


def move(world: World, org_id: UUID, zone: str) -> None:
    world.sql.execute("UPDATE organizations SET timezone = %s WHERE id = %s", (zone, org_id))


def zone_in_sql(world: World, org_id: UUID) -> str:
    ((zone,),) = world.rows(f"organizations WHERE id = '{org_id}'", "timezone")
    return str(zone)


def in_sql(world: World, org_id: UUID, period: str, anchors: list[datetime]) -> list[datetime]:
    rows = world.sql.execute(
        PERIOD_ENDS, {"org_id": org_id, "period": period, "anchors": anchors}
    ).fetchall()
    return [row["moment"] for row in rows]


def in_python(zone: str, period: ResetPeriod, anchors: list[datetime]) -> list[datetime]:
    return [boundary(anchor, STEPS[period], zone_of(zone), 1) for anchor in anchors]


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


# The function


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    zone=st.sampled_from(ZONES),
    period=recurring,
    local=st.lists(local_times, min_size=1, max_size=50),
    fold=st.integers(0, 1),
)
def test_period_ends_are_equal_in_sql_and_python(
    world: World,
    org_ids: dict[str, UUID],
    zone: str,
    period: ResetPeriod,
    local: list[datetime],
    fold: int,
) -> None:
    anchors = [moment.replace(tzinfo=zone_of(zone), fold=fold).astimezone(UTC) for moment in local]
    assert in_sql(world, org_ids[zone], period, anchors) == in_python(zone, period, anchors)


@pytest.mark.parametrize("period", STEPS)
@pytest.mark.parametrize(
    ("zone", "day"),
    [
        (NEW_YORK, date(2027, 3, 14)),
        (NEW_YORK, date(2027, 11, 7)),
        (LORD_HOWE, date(2027, 10, 3)),
        (LORD_HOWE, date(2027, 4, 4)),
        (APIA, date(2011, 12, 30)),
    ],
)
def test_every_minute_of_a_day_of_change_is_equal(
    world: World, org_id: UUID, zone: str, day: date, period: ResetPeriod
) -> None:
    move(world, org_id, zone)
    start = {
        ResetPeriod.DAILY: day - timedelta(days=1),
        ResetPeriod.WEEKLY: day - timedelta(days=7),
        ResetPeriod.MONTHLY: day.replace(month=day.month - 1),
    }[period]
    midnight = datetime.combine(start, time(), zone_of(zone)).astimezone(UTC)
    anchors = [midnight + timedelta(minutes=minute) for minute in range(24 * 60)]
    assert in_sql(world, org_id, period, anchors) == in_python(zone, period, anchors)


@pytest.mark.parametrize(
    ("zone", "period", "anchor", "expected"),
    [
        ("UTC", "monthly", "2027-01-31 12:00", "2027-02-28 12:00"),
        ("UTC", "monthly", "2028-01-31 12:00", "2028-02-29 12:00"),
        ("UTC", "daily", "2027-12-31 12:00", "2028-01-01 12:00"),
        ("Pacific/Auckland", "monthly", "2028-01-30 11:00", "2028-02-28 11:00"),
        # 02:30 in New York is skipped on 14 March 2027, 01:30 comes twice on 7 November.
        (NEW_YORK, "daily", "2027-03-13 07:30", "2027-03-14 07:30"),
        (NEW_YORK, "weekly", "2027-10-31 05:30", "2027-11-07 06:30"),
        (NEW_YORK, "daily", "2027-11-07 05:30", "2027-11-08 06:30"),
        # 02:15 in Lord Howe is skipped on 3 October 2027, 01:45 comes twice on 4 April.
        (LORD_HOWE, "weekly", "2027-09-25 15:45", "2027-10-02 15:45"),
        (LORD_HOWE, "monthly", "2027-03-03 14:45", "2027-04-03 15:15"),
        # Apia skipped 30 December 2011.
        (APIA, "daily", "2011-12-29 20:00", "2011-12-30 20:00"),
        (APIA, "monthly", "2011-11-30 20:00", "2011-12-30 20:00"),
        # An abbreviation to AT TIME ZONE, so the summer time of Brussels does not count.
        ("CET", "daily", "2027-03-27 12:00", "2027-03-28 12:00"),
    ],
)
def test_period_ends_by_hand(
    world: World, org_id: UUID, zone: str, period: str, anchor: str, expected: str
) -> None:
    move(world, org_id, zone)
    assert in_sql(world, org_id, period, [utc(anchor)]) == [utc(expected)]


@pytest.mark.parametrize("zone", ["UTC", NEW_YORK])
def test_a_period_without_resets_never_ends(world: World, org_id: UUID, zone: str) -> None:
    move(world, org_id, zone)
    assert in_sql(world, org_id, "never", [utc("2027-01-31")]) == [None]


def test_the_zone_is_the_organizations_and_not_the_sessions(world: World, org_id: UUID) -> None:
    move(world, org_id, NEW_YORK)
    world.sql.execute("SET timezone = 'Pacific/Auckland'")
    assert in_sql(world, org_id, "daily", [utc("2027-03-13 14:00")]) == [utc("2027-03-14 13:00")]


# The zones of organizations


UNKNOWN: Final = (
    "Mars/Olympus_Mons", "../etc/passwd", "europe/berlin", "utc", "Europe", "", " UTC", "PST",
    "right/UTC", "a" * 5000,
    # AT TIME ZONE would take these three.
    "FOO+5", "EST5EDT,M3.2.0,M11.1.0", "+05:00",
)  # fmt: skip


@pytest.mark.parametrize("zone", UNKNOWN, ids=lambda zone: zone[:20])
def test_no_organization_is_made_in_an_unknown_zone(world: World, zone: str) -> None:
    with pytest.raises(CheckViolation, match="Unknown time zone: "):
        world.sql.execute(
            "INSERT INTO organizations (name, display_name, timezone) VALUES ('x', 'X', %s)",
            (zone,),
        )
    assert world.rows("organizations", "name") == []


@pytest.mark.parametrize("zone", UNKNOWN, ids=lambda zone: zone[:20])
def test_no_organization_moves_to_an_unknown_zone(world: World, org_id: UUID, zone: str) -> None:
    move(world, org_id, NEW_YORK)
    with pytest.raises(CheckViolation, match="Unknown time zone: "):
        move(world, org_id, zone)
    assert zone_in_sql(world, org_id) == NEW_YORK


@pytest.mark.parametrize("zone", ["UTC", "Etc/UTC", NEW_YORK, LORD_HOWE, "CET"])
def test_an_organization_is_made_in_a_known_zone(world: World, zone: str) -> None:
    world.sql.execute(
        "INSERT INTO organizations (name, display_name, timezone) VALUES ('x', 'X', %s)", (zone,)
    )
    assert world.row("organizations")["timezone"] == zone


def test_an_organization_without_a_zone_is_in_utc(world: World, org_id: UUID) -> None:
    assert zone_in_sql(world, org_id) == "UTC"


def test_python_knows_every_zone_that_an_organization_may_have(world: World) -> None:
    names = [row["name"] for row in world.sql.execute("SELECT name FROM pg_timezone_names")]
    assert set(ZONES) <= set(names)
    for name in names:
        zone_of(name)
