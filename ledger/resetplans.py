"""What a reset does: pure decisions about pools and allocations, without a database (D7, D8)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID
from zoneinfo import ZoneInfo

from schema.errors import Conflict
from schema.periods import STEPS, ResetPeriod, next_boundary

SLACK: Final = timedelta(hours=3)
"""By how much a stored boundary may differ from the computed one, after new time zone data."""


@dataclass(slots=True)
class Pool:
    """An organization's pool, as far as refreshes and resets depend on it."""

    org_id: UUID
    org_name: str
    zone: ZoneInfo
    available: int
    """Credits that are allocated to nobody; less what was planned so far."""
    refresh_credits: int
    next_refresh_date: datetime | None
    refresh_anchor: datetime | None


@dataclass(frozen=True, slots=True)
class Allocation:
    """A user's allocation before its reset."""

    allocation_id: UUID
    org_id: UUID
    user_id: str
    allocated: int
    used: int
    held: int
    allowance: int
    """The credits with which every period begins."""
    reset_period: str
    anchor: datetime
    period_start: datetime
    period_end: datetime
    is_closed: bool = False
    """Whether this period, or a later one, has a row among the closed ones."""


@dataclass(frozen=True, slots=True)
class PlannedRefresh:
    """What a pool gets: `credits` on each of `dates`, the missed months included."""

    org_id: UUID
    org_name: str
    credits: int
    anchor: datetime
    dates: tuple[datetime, ...]
    next_date: datetime
    reasons: tuple[str, ...]

    @property
    def total(self) -> int:
        """The credits of all dates."""
        return self.credits * len(self.dates)

    def as_document(self) -> dict[str, Any]:
        """The plan for programs; `credits` are those of all dates."""
        return {
            "org_id": str(self.org_id),
            "organization": self.org_name,
            "credits": self.total,
            "refresh_dates": [date.isoformat() for date in self.dates],
            "next_refresh_date": self.next_date.isoformat(),
        }


@dataclass(frozen=True, slots=True)
class PlannedReset:
    """What a reset does to one allocation; all figures are credits."""

    org_id: UUID
    org_name: str
    user_id: str
    allocation_id: UUID
    period_start: datetime
    """Start of the period that ran."""
    boundaries: tuple[datetime, ...]
    """The boundaries that have passed: one period ends at each, the new one begins at the last."""
    next_date: datetime
    """When the new period ends."""
    allocated: int
    used: int
    drawn: int
    """Taken from the pool; negative if credits go back to it."""
    short: int
    """What the pool could not give."""
    reason: str

    @property
    def begins_with(self) -> int:
        """The credits of the new period, held ones included."""
        return self.allocated - self.used + self.drawn

    def closed(self) -> Iterator[tuple[UUID, datetime, datetime, int, int, int, int]]:
        """The rows of the periods that end; nothing was used in those that were missed."""
        first, *missed = self.boundaries
        figures = (self.allocated, self.used, self.drawn, self.short)
        yield self.allocation_id, self.period_start, first, *figures
        for start, end in zip(self.boundaries, missed, strict=False):
            yield self.allocation_id, start, end, self.begins_with, 0, 0, 0

    def as_document(self) -> dict[str, Any]:
        """The plan for programs; the figures are credits."""
        starts = (self.period_start, *self.boundaries)
        return {
            "org_id": str(self.org_id),
            "organization": self.org_name,
            "user_id": self.user_id,
            "closed_periods": [
                {"start": start.isoformat(), "end": end.isoformat()}
                for start, end in zip(starts, self.boundaries, strict=False)
            ],
            "used": self.used,
            "drawn": self.drawn,
            "short": self.short,
            "begins_with": self.begins_with,
            "next_reset_date": self.next_date.isoformat(),
        }


def plan_refresh(pool: Pool, now: datetime) -> PlannedRefresh | None:
    """The refreshes of a pool up to `now`; None if none is due.

    Raises:
        OverflowError: the next one lies beyond the calendar.
    """
    first, anchor = pool.next_refresh_date, pool.refresh_anchor
    if first is None or anchor is None or first > now:
        return None
    dates, next_date = _passed(first, anchor, ResetPeriod.MONTHLY, pool.zone, now)
    return PlannedRefresh(
        org_id=pool.org_id,
        org_name=pool.org_name,
        credits=pool.refresh_credits,
        anchor=anchor,
        dates=dates,
        next_date=next_date,
        reasons=tuple(f"monthly refresh of {date.astimezone(pool.zone):%F}" for date in dates),
    )


def plan_reset(allocation: Allocation, pool: Pool, now: datetime) -> PlannedReset:
    """The reset of an allocation that is due, from what its pool has available.

    Credits that are held stay held, beyond the allowance if need be.

    Raises:
        Conflict: the period that should end is closed already.
        OverflowError: the next boundary lies beyond the calendar.
    """
    if allocation.is_closed:
        start = allocation.period_start.isoformat()
        raise Conflict(f"user {allocation.user_id}: the period from {start} is closed already")
    period = ResetPeriod(allocation.reset_period)
    passed, next_date = _passed(allocation.period_end, allocation.anchor, period, pool.zone, now)
    wanted = max(allocation.allowance, allocation.held) - allocation.allocated + allocation.used
    drawn = min(wanted, pool.available)
    return PlannedReset(
        org_id=pool.org_id,
        org_name=pool.org_name,
        user_id=allocation.user_id,
        allocation_id=allocation.allocation_id,
        period_start=allocation.period_start,
        boundaries=passed,
        next_date=next_date,
        allocated=allocation.allocated,
        used=allocation.used,
        drawn=drawn,
        short=wanted - drawn,
        reason=f"{allocation.reset_period} reset of {passed[-1].astimezone(pool.zone):%F}",
    )


def _passed(
    first: datetime, anchor: datetime, period: ResetPeriod, zone: ZoneInfo, now: datetime
) -> tuple[tuple[datetime, ...], datetime]:
    """The boundaries from the first one that is due up to `now`, and the one that follows."""
    passed = [first]
    while (following := next_boundary(anchor, STEPS[period], zone, passed[-1] + SLACK)) <= now:
        passed.append(following)
    return tuple(passed), following


def plan_refreshes(
    pools: Iterable[Pool], now: datetime, failed: dict[UUID, str]
) -> Iterator[PlannedRefresh]:
    """Plan the refreshes that are due; what cannot be computed is named in `failed`."""
    for pool in pools:
        try:
            plan = plan_refresh(pool, now)
        except OverflowError as error:
            failed.setdefault(pool.org_id, str(error))
            continue
        if plan is not None:
            pool.available += plan.total
            yield plan


def plan_resets(
    allocations: Iterable[Allocation],
    pools: dict[UUID, Pool],
    now: datetime,
    failed: dict[UUID, str],
) -> Iterator[PlannedReset]:
    """Plan one reset after the other, each from what those before it leave in the pool."""
    for allocation in allocations:
        pool = pools.get(allocation.org_id)
        if pool is None:
            failed.setdefault(allocation.org_id, "it has no credit pool")
            continue
        try:
            plan = plan_reset(allocation, pool, now)
        except (Conflict, OverflowError) as error:
            failed.setdefault(allocation.org_id, str(error))
            continue
        pool.available -= plan.drawn
        yield plan
