"""The one source of time for business decisions, and how to put another in its place."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

Clock = Callable[[], datetime]
"""Tells the time; the answer carries a time zone."""


def system_clock() -> datetime:
    """The time of this machine, in UTC."""
    return datetime.now(UTC)


_clock: Clock = system_clock


def utc_now() -> datetime:
    """The current time in UTC, by the clock of this process."""
    return _clock().astimezone(UTC)


@contextmanager
def clock_replaced(clock: Clock) -> Iterator[None]:
    """Let the whole process go by another clock for a while: for tests and rehearsals."""
    global _clock  # noqa: PLW0603 - that there is one for all is the point
    before, _clock = _clock, clock
    try:
        yield
    finally:
        _clock = before
