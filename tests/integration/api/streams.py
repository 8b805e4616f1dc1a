"""The usage streams of an API under test, emptied, and what is on them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from redis import Redis

from schema.events import UsageEvent, parse_event
from schema.settings import Settings
from schema.wire import EVENT_FIELD, STREAM_PREFIX
from worker import stream


@contextmanager
def empty_streams(settings: Settings) -> Iterator[Redis]:
    """A client as the workers use it, of a Redis that holds nothing before and after."""
    with stream.connect(settings) as client:
        client.flushall()
        yield client
        client.flushall()


def queued(queue: Redis) -> list[UsageEvent]:
    """What is on the streams, as workers would read it; in order within an organization."""
    events = []
    for name in queue.scan_iter(f"{STREAM_PREFIX}*"):
        entries: Any = queue.xrange(name)
        events += [parse_event(fields[EVENT_FIELD.encode()]) for _, fields in entries]
    return events
