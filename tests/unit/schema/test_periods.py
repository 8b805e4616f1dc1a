"""Boundaries of periods, counted from the anchor in the organization's zone (D8)."""

from calendar import monthrange
from datetime import UTC, date, datetime, time, timedelta
from itertools import pairwise
from typing import Final, NamedTuple
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schema.errors import InvalidRequest
from schema.periods import (
    STEPS,
    ResetPeriod,
    Step,
    boundaries,
    boundary,
    next_boundary,
    zone_of,
)

DAILY: Final = STEPS[ResetPeriod.DAILY]
WEEKLY: Final = STEPS[ResetPeriod.WEEKLY]
MONTHLY: Final = STEPS[ResetPeriod.MONTHLY]
YEARLY: Final = Step(months=12)

DAY: Final = timedelta(days=1)
MICROSECOND: Final = timedelta(microseconds=1)

NEW_YORK: Final = "America/New_York"
LORD_HOWE: Final = "Australia/Lord_Howe"
APIA: Final = "Pacific/Apia"
AUCKLAND: Final = "Pacific/Auckland"


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def check(zone: str, step: Step, anchor: str, *expected: str) -> None:
    """The boundaries after the anchor, up to the last expected one, are the expected ones."""
    found = boundaries(utc(anchor), step, zone_of(zone), utc(anchor), utc(expected[-1]))
    assert found == [utc(moment) for moment in expected]


# Month ends, leap days, year ends


@pytest.mark.parametrize(
    ("step", "anchor", "expected"),
    [
        (MONTHLY, "2027-01-31", ["2027-02-28", "2027-03-31", "2027-04-30", "2027-05-31"]),
        (MONTHLY, "2028-01-31", ["2028-02-29", "2028-03-31", "2028-04-30", "2028-05-31"]),
        (MONTHLY, "2027-01-30", ["2027-02-28", "2027-03-30", "2027-04-30"]),
        (MONTHLY, "2028-01-29", ["2028-02-29", "2028-03-29"]),
        (MONTHLY, "2027-01-28", ["2027-02-28", "2027-03-28"]),
        (MONTHLY, "2028-02-29", ["2028-03-29", "2028-04-29", "2028-05-29"]),
        (MONTHLY, "2100-01-31", ["2100-02-28", "2100-03-31"]),
        (YEARLY, "2028-02-29", ["2029-02-28", "2030-02-28", "2031-02-28", "2032-02-29"]),
        (Step(months=3), "2026-11-30", ["2027-02-28", "2027-05-30", "2027-08-30"]),
        (DAILY, "2027-02-27", ["2027-02-28", "2027-03-01"]),
        (DAILY, "2028-02-27", ["2028-02-28", "2028-02-29", "2028-03-01"]),
        (WEEKLY, "2028-02-23", ["2028-03-01", "2028-03-08"]),
        (Step(days=10), "2027-01-25", ["2027-02-04", "2027-02-14"]),
    ],
)
def test_months_end_where_the_calendar_has_it(step: Step, anchor: str, expected: list[str]) -> None:
    check("UTC", step, anchor, *expected)


@pytest.mark.parametrize(
    ("number", "expected"), [(1, "2028-02-29"), (2, "2028-03-31"), (3, "2028-04-30")]
)
def test_a_short_month_does_not_shorten_the_later_ones(number: int, expected: str) -> None:
    assert boundary(utc("2028-01-31"), MONTHLY, zone_of("UTC"), number) == utc(expected)


@pytest.mark.parametrize(
    ("zone", "step", "anchor", "expected"),
    [
        ("UTC", DAILY, "2026-12-30 18:00", ["2026-12-31 18:00", "2027-01-01 18:00"]),
        ("UTC", WEEKLY, "2026-12-30 18:00", ["2027-01-06 18:00", "2027-01-13 18:00"]),
        ("UTC", MONTHLY, "2026-11-30 18:00", ["2026-12-30 18:00", "2027-01-30 18:00"]),
        ("UTC", Step(months=14), "2026-11-30 18:00", ["2028-01-30 18:00"]),
        # 1 January 2027 00:30 in Tokyo: the day of the month is Tokyo's.
        ("Asia/Tokyo", MONTHLY, "2026-12-31 15:30", ["2027-01-31 15:30", "2027-02-28 15:30"]),
    ],
)
def test_years_end_like_any_month(zone: str, step: Step, anchor: str, expected: list[str]) -> None:
    check(zone, step, anchor, *expected)


def test_the_last_day_of_the_month_is_the_last_in_the_zone() -> None:
    # 31 January 2028 00:00 in Auckland (+13) and on, through the winter (+12).
    check(
        AUCKLAND, MONTHLY, "2028-01-30 11:00",
        "2028-02-28 11:00",  # 29 February
        "2028-03-30 11:00",  # 31 March
        "2028-04-29 12:00",  # 30 April
        "2028-05-30 12:00",
        "2028-06-29 12:00",
        "2028-07-30 12:00",
        "2028-08-30 12:00",
        "2028-09-29 11:00",  # 30 September, summer time again
        "2028-10-30 11:00",
        "2028-11-29 11:00",
        "2028-12-30 11:00",
    )  # fmt: skip


# Daylight saving


@pytest.mark.parametrize(
    ("zone", "step", "anchor", "expected"),
    [
        # New York leaves -5 for -4 on 14 March 2027 and returns on 7 November; always 09:00.
        (NEW_YORK, DAILY, "2027-03-13 14:00", ["2027-03-14 13:00", "2027-03-15 13:00"]),
        (NEW_YORK, DAILY, "2027-11-06 13:00", ["2027-11-07 14:00", "2027-11-08 14:00"]),
        (NEW_YORK, WEEKLY, "2027-03-10 14:00", ["2027-03-17 13:00", "2027-03-24 13:00"]),
        (NEW_YORK, WEEKLY, "2027-11-03 13:00", ["2027-11-10 14:00", "2027-11-17 14:00"]),
        (NEW_YORK, MONTHLY, "2027-02-20 14:00", ["2027-03-20 13:00", "2027-04-20 13:00"]),
        (NEW_YORK, MONTHLY, "2027-10-20 13:00", ["2027-11-20 14:00", "2027-12-20 14:00"]),
        # Lord Howe leaves +10:30 for +11 on 3 October 2027, having returned on 4 April; 09:00.
        (LORD_HOWE, DAILY, "2027-10-01 22:30", ["2027-10-02 22:00", "2027-10-03 22:00"]),
        (LORD_HOWE, DAILY, "2027-04-02 22:00", ["2027-04-03 22:30", "2027-04-04 22:30"]),
        (LORD_HOWE, WEEKLY, "2027-09-28 22:30", ["2027-10-05 22:00", "2027-10-12 22:00"]),
        (LORD_HOWE, WEEKLY, "2027-03-30 22:00", ["2027-04-06 22:30", "2027-04-13 22:30"]),
        (LORD_HOWE, MONTHLY, "2027-09-19 22:30", ["2027-10-19 22:00", "2027-11-19 22:00"]),
        (LORD_HOWE, MONTHLY, "2027-03-19 22:00", ["2027-04-19 22:30", "2027-05-19 22:30"]),
    ],
)
def test_wall_clock_time_is_kept_across_a_change(
    zone: str, step: Step, anchor: str, expected: list[str]
) -> None:
    check(zone, step, anchor, *expected)


@pytest.mark.parametrize(
    ("zone", "step", "anchor", "expected"),
    [
        # 02:30 in New York is skipped on 14 March: 03:30 by the new clock, then 02:30 again.
        (NEW_YORK, DAILY, "2027-03-13 07:30", ["2027-03-14 07:30", "2027-03-15 06:30"]),
        (NEW_YORK, WEEKLY, "2027-03-07 07:30", ["2027-03-14 07:30", "2027-03-21 06:30"]),
        (NEW_YORK, MONTHLY, "2027-02-14 07:30", ["2027-03-14 07:30", "2027-04-14 06:30"]),
        # 02:15 in Lord Howe is skipped on 3 October: 02:45 by the new clock, then 02:15 again.
        (LORD_HOWE, DAILY, "2027-10-01 15:45", ["2027-10-02 15:45", "2027-10-03 15:15"]),
        (LORD_HOWE, WEEKLY, "2027-09-25 15:45", ["2027-10-02 15:45", "2027-10-09 15:15"]),
        (LORD_HOWE, MONTHLY, "2027-09-02 15:45", ["2027-10-02 15:45", "2027-11-02 15:15"]),
    ],
)
def test_a_skipped_local_time_is_read_by_the_clock_before_the_change(
    zone: str, step: Step, anchor: str, expected: list[str]
) -> None:
    check(zone, step, anchor, *expected)


@pytest.mark.parametrize(
    ("zone", "step", "anchor", "expected"),
    [
        # 01:30 comes twice in New York on 7 November: at 05:30 UTC and at 06:30.
        (NEW_YORK, DAILY, "2027-11-06 05:30", ["2027-11-07 06:30", "2027-11-08 06:30"]),
        (NEW_YORK, WEEKLY, "2027-10-31 05:30", ["2027-11-07 06:30", "2027-11-14 06:30"]),
        (NEW_YORK, MONTHLY, "2027-10-07 05:30", ["2027-11-07 06:30", "2027-12-07 06:30"]),
        # 01:45 comes twice in Lord Howe on 4 April: at 14:45 UTC of the day before and at 15:15.
        (LORD_HOWE, DAILY, "2027-04-02 14:45", ["2027-04-03 15:15", "2027-04-04 15:15"]),
        (LORD_HOWE, WEEKLY, "2027-03-27 14:45", ["2027-04-03 15:15", "2027-04-10 15:15"]),
        (LORD_HOWE, MONTHLY, "2027-03-03 14:45", ["2027-04-03 15:15", "2027-05-03 15:15"]),
    ],
)
def test_a_local_time_that_comes_twice_is_its_second_coming(
    zone: str, step: Step, anchor: str, expected: list[str]
) -> None:
    check(zone, step, anchor, *expected)


@pytest.mark.parametrize("anchor", ["2027-11-07 05:30", "2027-11-07 06:30"])
def test_an_anchor_at_a_doubled_time_stays_where_it_is(anchor: str) -> None:
    zone = zone_of(NEW_YORK)
    assert boundary(utc(anchor), DAILY, zone, 0) == utc(anchor)
    assert boundary(utc(anchor), DAILY, zone, 1) == utc("2027-11-08 06:30")


@pytest.mark.parametrize(
    ("step", "anchor", "expected"),
    [
        # Apia went from 29 December 2011 (-10) to the 31st (+14); always 10:00.
        (DAILY, "2011-12-28 20:00", ["2011-12-29 20:00", "2011-12-30 20:00", "2011-12-31 20:00"]),
        (WEEKLY, "2011-12-23 20:00", ["2011-12-30 20:00", "2012-01-05 20:00"]),
        (MONTHLY, "2011-11-30 20:00", ["2011-12-30 20:00", "2012-01-29 20:00"]),
    ],
)
def test_a_skipped_day_ends_with_the_day_after_it(
    step: Step, anchor: str, expected: list[str]
) -> None:
    check(APIA, step, anchor, *expected)


def test_a_skipped_day_has_the_boundary_of_the_day_after_it() -> None:
    anchor, zone = utc("2011-12-28 20:00"), zone_of(APIA)
    skipped, following = (boundary(anchor, DAILY, zone, number) for number in (2, 3))
    assert skipped == following == utc("2011-12-30 20:00")


# Which boundaries are found


MONTH_ENDS: Final = ["2027-02-28", "2027-03-31", "2027-04-30", "2027-05-31"]


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (utc("1999-12-31"), "2027-02-28"),
        (utc("2027-01-31"), "2027-02-28"),
        (utc("2027-02-28") - MICROSECOND, "2027-02-28"),
        (utc("2027-02-28"), "2027-03-31"),
        (utc("2027-03-31") - MICROSECOND, "2027-03-31"),
        (utc("2027-03-31"), "2027-04-30"),
        (utc("2099-12-31"), "2100-01-31"),
    ],
)
def test_the_next_boundary_is_later_than_the_moment(after: datetime, expected: str) -> None:
    assert next_boundary(utc("2027-01-31"), MONTHLY, zone_of("UTC"), after) == utc(expected)


def test_the_next_boundary_may_be_of_the_local_day_before() -> None:
    # On 29 October 2006, 00:01, Saint John's went back to the 28th, 23:01. The boundary is at the
    # second 23:30; the moment lies between the two, when the 29th had begun for the first time.
    anchor, after = utc("2006-10-21 02:00"), utc("2006-10-29 02:30:30")
    found = next_boundary(anchor, DAILY, zone_of("America/St_Johns"), after)
    assert found == utc("2006-10-29 03:00")


@pytest.mark.parametrize(
    ("after", "until", "expected"),
    [
        (utc("2027-01-31"), utc("2027-05-31"), MONTH_ENDS),
        (utc("2027-02-28"), utc("2027-05-31"), MONTH_ENDS[1:]),
        (utc("2027-02-28") - MICROSECOND, utc("2027-05-31") - MICROSECOND, MONTH_ENDS[:3]),
        (utc("2000-01-01"), utc("2027-03-31"), MONTH_ENDS[:2]),
        (utc("2027-03-31"), utc("2027-04-30") - MICROSECOND, []),
        (utc("2027-05-31"), utc("2027-02-28"), []),
        (utc("2000-01-01"), utc("2027-02-27"), []),
    ],
)
def test_boundaries_lie_after_the_one_moment_and_up_to_the_other(
    after: datetime, until: datetime, expected: list[str]
) -> None:
    found = boundaries(utc("2027-01-31"), MONTHLY, zone_of("UTC"), after, until)
    assert found == [utc(moment) for moment in expected]


# Properties


ZONES: Final = (
    "UTC", NEW_YORK, LORD_HOWE, APIA, AUCKLAND, "America/Los_Angeles", "America/Phoenix",
    "America/Sao_Paulo", "America/St_Johns", "America/Havana", "America/Caracas", "America/Adak",
    "Antarctica/Troll", "Africa/Cairo", "Africa/Casablanca", "Africa/Lagos", "Africa/Windhoek",
    "Asia/Gaza", "Asia/Kathmandu", "Asia/Kolkata", "Asia/Pyongyang", "Asia/Tehran", "Asia/Tokyo",
    "Atlantic/Azores", "Australia/Adelaide", "Australia/Eucla", "Europe/Berlin", "Europe/Dublin",
    "Europe/London", "Europe/Moscow", "Pacific/Chatham", "Pacific/Fakaofo", "Pacific/Kiritimati",
    "Etc/GMT+12",
)  # fmt: skip

FIRST, LAST = datetime(2000, 1, 1), datetime(2060, 12, 31, 23, 59, 59)  # noqa: DTZ001  # local
WINDOW_DAYS: Final = 800

zones = st.sampled_from(ZONES).map(zone_of)
steps = st.one_of(
    st.sampled_from([DAILY, WEEKLY, MONTHLY, YEARLY]),
    st.builds(Step, days=st.integers(1, 400)),
    st.builds(Step, months=st.integers(1, 60)),
)
# Clocks change at night, on the quarter of an hour.
nights = st.builds(
    datetime.combine,
    st.dates(FIRST.date(), LAST.date()),
    st.builds(time, st.integers(0, 3), st.sampled_from([0, 15, 30, 45])),
)
local_times = nights | st.datetimes(FIRST, LAST)


class Periods(NamedTuple):
    """The first arguments of every function under test."""

    anchor: datetime
    step: Step
    zone: ZoneInfo

    def local(self, moment: datetime) -> datetime:
        return moment.astimezone(self.zone)


@st.composite
def periods(draw: st.DrawFn, steps: st.SearchStrategy[Step] = steps) -> Periods:
    zone = draw(zones)
    local = draw(local_times).replace(tzinfo=zone, fold=draw(st.integers(0, 1)))
    return Periods(local.astimezone(UTC), draw(steps), zone)


days = st.timedeltas(timedelta(0), timedelta(days=WINDOW_DAYS))
moments = st.datetimes(datetime(1990, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001  # made aware


def offset(local: datetime) -> timedelta:
    """What the zone adds to UTC at this time."""
    return local.utcoffset() or timedelta(0)


def numbered(found: Periods) -> list[datetime]:
    """Boundaries 1, 2, 3 … to beyond the window after the anchor."""
    count = WINDOW_DAYS // (found.step.days or found.step.months * 28) + 3
    return [boundary(*found, number) for number in range(1, count)]


def nominal(found: Periods, number: int) -> datetime:
    """What the calendar and the clock on the wall should show, were there no changes."""
    local = found.local(found.anchor).replace(tzinfo=None, fold=0)
    if found.step.days:
        return local + number * found.step.days * DAY
    years, month = divmod(local.month - 1 + number * found.step.months, 12)
    year = local.year + years
    day = min(local.day, monthrange(year, month + 1)[1])
    return datetime.combine(date(year, month + 1, day), local.time())


@given(periods())
def test_boundary_zero_is_the_anchor(found: Periods) -> None:
    assert boundary(*found, 0) == found.anchor


@settings(deadline=None)
@given(periods(), moments | days, days)
def test_boundaries_strictly_increase(
    found: Periods, start: datetime | timedelta, length: timedelta
) -> None:
    after = found.anchor + start if isinstance(start, timedelta) else start
    until = after + length
    line = boundaries(*found, after, until)
    assert all(max(after, found.anchor) < moment <= until for moment in line)
    assert all(earlier < later for earlier, later in pairwise(line))


@settings(deadline=None)
@given(periods(), days, days)
def test_boundaries_are_the_numbered_ones_of_their_window(
    found: Periods, start: timedelta, end: timedelta
) -> None:
    after, until = found.anchor + start, found.anchor + end
    inside = {moment for moment in numbered(found) if after < moment <= until}
    assert boundaries(*found, after, until) == sorted(inside)


@given(periods(), moments)
def test_the_next_boundary_is_the_first_of_all_later_ones(found: Periods, after: datetime) -> None:
    following = next_boundary(*found, after)
    assert following > after
    assert boundaries(*found, after, following) == [following]


@settings(deadline=None)
@given(periods(), days)
def test_no_numbered_boundary_comes_before_the_next_one(found: Periods, start: timedelta) -> None:
    after = found.anchor + start
    assert next_boundary(*found, after) == min(m for m in numbered(found) if m > after)


@settings(deadline=None)
@given(periods(), st.lists(days, min_size=3, max_size=3).map(sorted))
def test_boundaries_of_two_adjoining_windows_are_those_of_the_whole(
    found: Periods, edges: list[timedelta]
) -> None:
    a, b, c = (found.anchor + edge for edge in edges)
    assert boundaries(*found, a, b) + boundaries(*found, b, c) == boundaries(*found, a, c)


@settings(deadline=None)
@given(periods())
def test_every_boundary_keeps_the_wall_clock_unless_it_was_skipped(found: Periods) -> None:
    for number, moment in enumerate(numbered(found), start=1):
        wanted = nominal(found, number)
        before, after = (offset(wanted.replace(tzinfo=found.zone, fold=fold)) for fold in (0, 1))
        skipped = max(after - before, timedelta(0))
        assert found.local(moment).replace(tzinfo=None) == wanted + skipped


@settings(deadline=None)
@given(periods(st.builds(Step, months=st.integers(1, 24))))
def test_boundaries_in_months_fall_on_the_anchors_day_or_the_months_last(found: Periods) -> None:
    anchor = found.local(found.anchor)
    for moment in numbered(found):
        shown = found.local(moment)
        # Right after a change of the clock, it may show the time that it skipped to.
        if offset(shown) == offset(found.local(moment - DAY)):
            is_last = (shown + DAY).month != shown.month
            assert shown.day == anchor.day or (is_last and shown.day < anchor.day)


@settings(deadline=None)
@given(periods())
def test_what_a_boundary_shows_is_not_shown_again_later(found: Periods) -> None:
    for moment in numbered(found):
        assert found.local(moment).replace(fold=1).astimezone(UTC) == moment


@given(periods(), zones, st.integers(0, 1000))
def test_boundaries_are_in_utc_in_whatever_zone_the_anchor_is_written(
    found: Periods, written: ZoneInfo, number: int
) -> None:
    moment = boundary(found.anchor.astimezone(written), found.step, found.zone, number)
    assert moment.tzinfo is UTC
    assert moment == boundary(*found, number)


# Zones


@pytest.mark.parametrize("name", ZONES)
def test_a_zone_has_its_name(name: str) -> None:
    assert zone_of(name).key == name


@pytest.mark.parametrize(
    "name",
    [
        "Mars/Olympus_Mons",
        "../etc/passwd",
        "/etc/passwd",
        "Europe",
        "Europe/",
        "Europe/../UTC",
        "europe/berlin",
        "zone.tab",
        "FOO+5",
        "+05:00",
        " UTC",
        "UTC\n",
        "",
        ".",
        "a\0b",
        "\ud800",
        "right/UTC",
        "a" * 5000,
        "a/" * 3000 + "b",
        "a." * 3000 + "b",
    ],
    ids=lambda name: ascii(name[:20]),
)
def test_an_unknown_zone_is_an_invalid_request(name: str) -> None:
    with pytest.raises(InvalidRequest, match="timezone: no time zone ") as caught:
        zone_of(name)
    assert caught.value.details == {"fields": ["timezone"]}


@given(st.text())
def test_no_text_at_all_does_anything_worse(name: str) -> None:
    with pytest.raises(InvalidRequest):
        zone_of(f"no/{name}")


@pytest.mark.parametrize(
    ("name", "offset"),
    [("WET", timedelta(0)), ("CET", timedelta(hours=1)), ("MET", timedelta(hours=1)),
     ("EET", timedelta(hours=2))],
)  # fmt: skip
@pytest.mark.parametrize("moment", [utc("2027-01-15"), utc("2027-07-15")])
def test_names_that_postgresql_reads_as_abbreviations_have_no_summer_time(
    name: str, offset: timedelta, moment: datetime
) -> None:
    assert moment.astimezone(zone_of(name)).utcoffset() == offset


# Steps


@pytest.mark.parametrize(
    ("months", "days"),
    [(0, 0), (1, 1), (-1, 0), (0, -1), (-1, -1), (1, -1), (-1, 1)],
)
def test_a_step_is_of_months_or_of_days_and_leads_forward(months: int, days: int) -> None:
    with pytest.raises(ValueError, match="a step is of months or of days"):
        Step(months=months, days=days)


def test_every_period_but_never_has_its_step() -> None:
    assert {period: (step.months, step.days) for period, step in STEPS.items()} == {
        "daily": (0, 1),
        "weekly": (0, 7),
        "monthly": (1, 0),
    }


# The end of the calendar


@pytest.mark.parametrize(
    ("step", "anchor", "number", "expected"),
    [
        (MONTHLY, "9999-01-31", 11, "9999-12-31"),
        (MONTHLY, "9999-12-01", 0, "9999-12-01"),
        (YEARLY, "9996-02-29", 3, "9999-02-28"),
        (DAILY, "9999-01-31", 334, "9999-12-31"),
        (WEEKLY, "9999-12-24", 1, "9999-12-31"),
    ],
)
def test_the_last_month_is_in_the_calendar(
    step: Step, anchor: str, number: int, expected: str
) -> None:
    assert boundary(utc(anchor), step, zone_of("UTC"), number) == utc(expected)


def test_an_anchor_at_the_end_of_the_calendar_is_boundary_zero_everywhere() -> None:
    end = datetime.max.replace(tzinfo=UTC)
    assert boundary(end, DAILY, zone_of(AUCKLAND), 0) == end


@pytest.mark.parametrize(
    ("zone", "step", "anchor", "number"),
    [
        ("UTC", MONTHLY, "9999-01-31", 12),
        ("UTC", DAILY, "9999-12-31", 1),
        ("UTC", WEEKLY, "9999-12-25", 1),
        ("UTC", YEARLY, "9999-12-31", 1),
        ("UTC", DAILY, "2027-01-31", 10**9),
        ("UTC", DAILY, "2027-01-31", 10**30),
        ("UTC", MONTHLY, "2027-01-31", 10**9),
        ("UTC", MONTHLY, "2027-01-31", 10**30),
        # 31 December 9999 22:00 in New York is of the year 10000 in UTC.
        (NEW_YORK, DAILY, "9999-12-31 03:00", 1),
        (NEW_YORK, MONTHLY, "9999-11-01 03:00", 2),
        # 31 December 9999 12:00 UTC is of the year 10000 in Auckland.
        (AUCKLAND, DAILY, "9999-12-30 12:00", 1),
        (AUCKLAND, DAILY, "9999-12-31 12:00", 1),
        (AUCKLAND, MONTHLY, "9999-12-31 12:00", 1),
    ],
)
def test_beyond_the_calendar_is_an_overflow(
    zone: str, step: Step, anchor: str, number: int
) -> None:
    with pytest.raises(OverflowError):
        boundary(utc(anchor), step, zone_of(zone), number)


@pytest.mark.parametrize("step", [DAILY, WEEKLY, MONTHLY, YEARLY])
@pytest.mark.parametrize("zone", ["UTC", NEW_YORK, AUCKLAND])
def test_the_search_for_a_boundary_ends_with_the_calendar(zone: str, step: Step) -> None:
    anchor, end = utc("9999-01-31"), datetime.max.replace(tzinfo=UTC)
    with pytest.raises(OverflowError):
        next_boundary(anchor, step, zone_of(zone), end)
    with pytest.raises(OverflowError):
        boundaries(anchor, step, zone_of(zone), anchor, end)


def test_the_search_may_start_before_the_calendar_does() -> None:
    start = datetime.min.replace(tzinfo=UTC)
    for name in (NEW_YORK, AUCKLAND):
        zone = zone_of(name)
        first = boundary(utc("2027-01-31"), MONTHLY, zone, 1)
        assert next_boundary(utc("2027-01-31"), MONTHLY, zone, start) == first
