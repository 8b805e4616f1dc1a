"""What LoopNet calls after each success: on the right stream, at once, or refused by name."""

import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import pytest
from pydantic import SecretStr
from redis import Redis

from ops.servers import free_port
from producers import InvalidEvent, QueueUnavailable, UsageEvent, UsageProducer
from schema.errors import ConfigurationError
from schema.events import parse_event
from schema.settings import Settings, load_settings
from schema.wire import CELERY_QUEUE, stream_name
from worker.stream import UsageStream

ORG_ID = UUID("7e9a2f4c-54c1-4a39-8d0a-2f4f4f2f7a11")
SHARD = 14
"""CRC-32 of the id's bytes, modulo 16."""


@pytest.fixture
def producer(settings: Settings) -> Iterator[UsageProducer]:
    with UsageProducer(settings) as opened:
        yield opened


def fields(**changes: Any) -> dict[str, Any]:
    usual = {
        "request_id": f"r-{uuid4()}",
        "org_id": ORG_ID,
        "user_id": "ana",
        "service_type": "contact_lookup",
        "occurred_at": datetime.now(UTC),
    }
    return usual | changes


def test_an_event_lands_on_its_organizations_stream(
    producer: UsageProducer, redis: "Redis"
) -> None:
    entry_id = producer.emit(**fields(request_id="r-1"))
    (entry,) = UsageStream(redis, SHARD).read_new(10)
    assert entry.entry_id == entry_id
    assert entry.fault is None
    assert parse_event(entry.payload).request_id == "r-1"


def test_many_events_keep_their_order(producer: UsageProducer, redis: "Redis") -> None:
    events = [UsageEvent.of(**fields(request_id=f"r-{number}")) for number in range(50)]
    ids = producer.emit_many(events)
    entries = UsageStream(redis, SHARD).read_new(100)
    assert [entry.entry_id for entry in entries] == ids
    assert [parse_event(entry.payload) for entry in entries] == events


def test_no_events_are_no_round_trip(settings: Settings) -> None:
    assert UsageProducer(unreachable(settings)).emit_many([]) == []


def test_a_bad_field_is_refused_by_name(producer: UsageProducer, redis: "Redis") -> None:
    with pytest.raises(InvalidEvent, match="quantity") as caught:
        producer.emit(**fields(quantity=-1))
    assert caught.value.details["fields"] == ["quantity"]
    assert redis.exists(stream_name(SHARD)) == 0


def test_secrets_do_not_reach_redis(producer: UsageProducer, redis: "Redis") -> None:
    metadata = {"company_id": "c-1", "auth": {"password": "p", "nested": [{"api_key": "k"}]}}
    producer.emit(**fields(metadata=metadata))
    (entry,) = UsageStream(redis, SHARD).read_new(1)
    assert parse_event(entry.payload).metadata == {"company_id": "c-1"}
    assert b"api_key" not in entry.payload


def test_a_shard_is_woken_once_a_second(
    producer: UsageProducer, settings: Settings, redis: "Redis"
) -> None:
    with UsageProducer(settings) as other:
        for _ in range(20):
            producer.emit(**fields())
            other.emit(**fields())
    assert redis.llen(CELERY_QUEUE) == 1


def unreachable(settings: Settings) -> Settings:
    url = SecretStr(f"redis://127.0.0.1:{free_port()}/0")
    return settings.model_copy(update={"redis_url": url})


def test_without_redis_the_error_is_clear_and_quick(settings: Settings) -> None:
    started = time.monotonic()
    with pytest.raises(QueueUnavailable, match="Redis does not take usage events"):
        UsageProducer(unreachable(settings)).emit(**fields())
    assert time.monotonic() - started < settings.emit_timeout_seconds + 1


def test_without_an_address_the_setting_is_named() -> None:
    with pytest.raises(ConfigurationError, match="METERING_REDIS_URL"):
        UsageProducer(load_settings())


def test_the_import_is_light() -> None:
    heavy = ("sqlalchemy", "fastapi", "alembic", "psycopg", "ledger", "worker")
    code = f"import sys, producers; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
