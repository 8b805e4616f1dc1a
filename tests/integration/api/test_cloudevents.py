"""CloudEvents over HTTP, in all three modes: they end on the streams as events like any other."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import httpx
import pytest
from redis import Redis

from schema.events import UsageEvent
from schema.scopes import Scope
from schema.settings import Settings
from tests.integration.api.conftest import Callers, Headers
from tests.integration.api.streams import empty_streams, queued

PATH = "/api/v1/usage/events"
ORG = UUID("0d5a3c1e-6f0b-4f57-9a2b-0f6f3a1b2c3d")
DATA = {"org_id": str(ORG), "user_id": "ada", "service_type": "contact_lookup"}


def attributes_of(request_id: str = "r-1") -> dict[str, str]:
    return {
        "specversion": "1.0",
        "type": "com.loopnet.usage.v1",
        "id": request_id,
        "source": "/loopnet/enrichment",
        "time": datetime.now(UTC).isoformat(),
        "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    }


def event_of(attributes: dict[str, str]) -> UsageEvent:
    return UsageEvent.of(
        request_id=attributes["id"],
        source=attributes["source"],
        occurred_at=attributes["time"],
        traceparent=attributes["traceparent"],
        **DATA,
    )


@pytest.fixture
def queue(api_settings: Settings) -> Iterator[Redis]:
    with empty_streams(api_settings) as client:
        yield client


@pytest.fixture
def service(callers: Callers) -> Headers:
    return callers.service(Scope.USAGE_WRITE)


def test_a_structured_event(api: httpx.Client, service: Headers, queue: Redis) -> None:
    attributes = attributes_of()
    headers = service | {"Content-Type": "application/cloudevents+json; charset=utf-8"}
    answer = api.post(PATH, headers=headers, content=json.dumps(attributes | {"data": DATA}))
    assert answer.status_code == 202
    assert answer.json()["results"] == [{"index": 0, "request_id": "r-1", "status": "accepted"}]
    assert queued(queue) == [event_of(attributes)]


def test_an_event_in_headers_and_body(api: httpx.Client, service: Headers, queue: Redis) -> None:
    attributes = attributes_of()
    headers = {f"ce-{name}": value for name, value in attributes.items()}
    headers["CE-Source"] = headers.pop("ce-source").replace("/", "%2f")
    answer = api.post(PATH, headers=service | headers, json=DATA)
    assert answer.status_code == 202
    assert queued(queue) == [event_of(attributes)]


def test_a_batch_with_a_bad_event(api: httpx.Client, service: Headers, queue: Redis) -> None:
    first, bad, last = attributes_of("first"), attributes_of("bad"), attributes_of("last")
    batch: list[dict[str, Any]] = [one | {"data": DATA} for one in (first, bad, last)]
    batch[1]["data"] = DATA | {"request_id": "another"}
    headers = service | {"Content-Type": "application/cloudevents-batch+json"}
    answer = api.post(PATH, headers=headers, content=json.dumps(batch))
    assert answer.status_code == 202
    document = answer.json()
    assert (document["accepted"], document["rejected"]) == (2, 1)
    assert document["results"][1]["request_id"] == "bad"
    assert document["results"][1]["error"]["fields"] == ["id"]
    assert queued(queue) == [event_of(first), event_of(last)]


@pytest.mark.parametrize("wrong", ["type", "source", "specversion", "id"])
def test_a_single_bad_event_is_422(
    api: httpx.Client, service: Headers, queue: Redis, wrong: str
) -> None:
    attributes = attributes_of() | {wrong: "~" * 300}
    headers = service | {"Content-Type": "application/cloudevents+json"}
    answers = [
        api.post(PATH, headers=headers, content=json.dumps(attributes | {"data": DATA})),
        api.post(PATH, headers=service | {f"ce-{k}": v for k, v in attributes.items()}, json=DATA),
    ]
    for answer in answers:
        assert answer.status_code == 422
        assert answer.json()["detail"]["error"] == "invalid_request"
        assert len(answer.json()["detail"]["fields"]) == 1
    assert queued(queue) == []
