"""Periods of credits and subscriptions, counted from an anchor in the organization's zone (D8).

Every boundary is computed from the anchor itself, never from the boundary before it: 31 January
is followed by 28 or 29 February and then by 31 March. Wall-clock time is kept across changes of
daylight saving. A local time that a change skips, or that it brings twice, is read as the later of
its two meanings; `period_end` in SQL does the same.
"""

from calendar import monthrange
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from schema.errors import InvalidRequest

MONTHS_PER_YEAR: Final = 12

_LONGEST_ZONE_NAME: Final = 64
"""Twice what there is. Each slash of a longer one would be a level of recursion in `zoneinfo`."""

_FIXED: Final = {"WET": "Etc/GMT", "CET": "Etc/GMT-1", "MET": "Etc/GMT-1", "EET": "Etc/GMT-2"}
"""Zones whose names PostgreSQL's AT TIME ZONE reads as abbreviations: without summer time."""


class ResetPeriod(StrEnum):
    """How often an allocation is filled up again."""

    DAILY = "daily"
    WEEKLY = "weekly"
    MONTHLY = "monthly"
    NEVER = "never"


class Step:
    """The distance between two boundaries: calendar months, or whole days."""

    __slots__ = ("days", "months")

    def __init__(self, *, months: int = 0, days: int = 0) -> None:
        if min(months, days) < 0 or (months > 0) == (days > 0):
            raise ValueError("a step is of months or of days")
        self.months = months
        self.days = days


STEPS: Final[dict[ResetPeriod, Step]] = {
    ResetPeriod.DAILY: Step(days=1),
    ResetPeriod.WEEKLY: Step(days=7),
    ResetPeriod.MONTHLY: Step(months=1),
}


def zone_of(name: str) -> ZoneInfo:
    """The time zone of this IANA name, as PostgreSQL understands it.

    Raises:
        InvalidRequest: there is no such zone.
    """
    unknown = InvalidRequest(f"timezone: no time zone {name!r}", fields=["timezone"])
    # Zones under right/ count leap seconds; PostgreSQL has none of them.
    if len(name) > _LONGEST_ZONE_NAME or name.startswith("right/"):
        raise unknown
    try:
        return ZoneInfo(_FIXED.get(name, name))
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise unknown from None


def boundary(anchor: datetime, step: Step, zone: ZoneInfo, number: int) -> datetime:
    """The moment `number` steps after the anchor, in UTC; number 0 is the anchor itself.

    Raises:
        OverflowError: it lies beyond the calendar, in UTC or in the zone.
    """
    if number == 0:
        return anchor.astimezone(UTC)
    local = anchor.astimezone(zone).replace(tzinfo=None)
    if step.days:
        moved = local + timedelta(days=step.days * number)
    else:
        moved = _months_later(local, step.months * number)
    readings = (moved.replace(tzinfo=zone, fold=fold).astimezone(UTC) for fold in (0, 1))
    return max(readings)


def next_boundary(anchor: datetime, step: Step, zone: ZoneInfo, after: datetime) -> datetime:
    """The first boundary later than `after`, and later than the anchor.

    Raises:
        OverflowError: it lies beyond the calendar.
    """
    return next(_later(anchor, step, zone, after))


def boundaries(
    anchor: datetime, step: Step, zone: ZoneInfo, after: datetime, until: datetime
) -> list[datetime]:
    """All boundaries later than `after` and the anchor, up to `until` inclusive, in order.

    Raises:
        OverflowError: the first one later than `until` lies beyond the calendar.
    """
    found: list[datetime] = []
    for moment in _later(anchor, step, zone, after):
        if moment > until:
            break
        found.append(moment)
    return found


def _later(anchor: datetime, step: Step, zone: ZoneInfo, after: datetime) -> Iterator[datetime]:
    last = max(after, anchor)
    number = max(1, _steps_between(anchor, step, zone, last) - 1)
    while True:
        moment = boundary(anchor, step, zone, number)
        # Where a zone skipped a whole day, two boundaries are one.
        if moment > last:
            yield moment
            last = moment
        number += 1


def _steps_between(anchor: datetime, step: Step, zone: ZoneInfo, moment: datetime) -> int:
    start, end = anchor.astimezone(zone), moment.astimezone(zone)
    if step.days:
        return (end.date() - start.date()).days // step.days
    months = (end.year - start.year) * MONTHS_PER_YEAR + end.month - start.month
    return months // step.months


def _months_later(local: datetime, months: int) -> datetime:
    count = local.year * MONTHS_PER_YEAR + local.month - 1 + months
    year, month = divmod(count, MONTHS_PER_YEAR)
    day = min(local.day, monthrange(year, month + 1)[1])
    try:
        return local.replace(year=year, month=month + 1, day=day)
    except ValueError:
        raise OverflowError(f"{months} months after {local} is beyond the calendar") from None
