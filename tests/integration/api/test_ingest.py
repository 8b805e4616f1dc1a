"""Usage over HTTP: what is accepted is on the streams, what is not is told, event by event."""

import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from pydantic_core import to_json
from redis import Redis

from api.app import create_app
from api.usagebodies import MAX_EVENTS
from ledger.database import Database
from ops.servers import free_port
from schema.events import UsageEvent, parse_event
from schema.scopes import Scope
from schema.settings import Settings
from schema.wire import stream_name
from tests.integration.api.conftest import Callers, Headers, serving
from tests.integration.api.streams import empty_streams, queued
from tests.integration.ledger.world import World
from worker.drain import Drain

PATH = "/api/v1/usage/events"
ORG = UUID("0d5a3c1e-6f0b-4f57-9a2b-0f6f3a1b2c3d")
Fields = dict[str, Any]


def fields_of(request_id: str = "r-1", **fields: Any) -> Fields:
    """A contact lookup (10 credits) that has just succeeded, unless `fields` say otherwise."""
    return {
        "request_id": request_id,
        "org_id": str(ORG),
        "user_id": "ada",
        "service_type": "contact_lookup",
        "occurred_at": datetime.now(UTC).isoformat(),
    } | fields


def several(count: int) -> list[Fields]:
    return [fields_of(f"r-{number}") for number in range(count)]


@pytest.fixture
def queue(api_settings: Settings) -> Iterator[Redis]:
    """The usage streams of the API, empty."""
    with empty_streams(api_settings) as client:
        yield client


@pytest.fixture
def service(callers: Callers) -> Headers:
    return callers.service(Scope.USAGE_WRITE)


def ids(events: Sequence[UsageEvent]) -> list[str]:
    return [event.request_id for event in events]


def test_one_event_is_accepted_and_on_its_stream(
    api: httpx.Client, service: Headers, queue: Redis
) -> None:
    fields = fields_of(metadata={"company_id": "c-42"}, quantity="1.50")
    answer = api.post(PATH, headers=service, json=fields)
    assert answer.status_code == 202
    assert answer.json() == {
        "accepted": 1,
        "rejected": 0,
        "results": [{"index": 0, "request_id": "r-1", "status": "accepted"}],
    }
    assert queued(queue) == [UsageEvent.of(**fields)]


def test_what_is_accepted_is_charged(
    api: httpx.Client,
    service: Headers,
    queue: Redis,
    api_settings: Settings,
    api_database: Database,
    api_world: World,
) -> None:
    org_id = api_world.organization(pool=1000, allocations={"ada": 100})
    events = [fields_of(f"r-{number}", org_id=str(org_id)) for number in range(3)]
    for _ in range(2):  # sending again is harmless
        assert api.post(PATH, headers=service, json=events).json()["accepted"] == 3
    drain = Drain(api_settings, api_database, queue)
    for shard in range(api_settings.shards):
        drain.run(shard)
    assert api_world.allocations(org_id) == {"ada": (100, 30)}


def test_events_of_an_array_keep_their_order(
    api: httpx.Client, service: Headers, queue: Redis
) -> None:
    answer = api.post(PATH, headers=service, json=several(20))
    assert [result["request_id"] for result in answer.json()["results"]] == [
        f"r-{number}" for number in range(20)
    ]
    assert ids(queued(queue)) == [f"r-{number}" for number in range(20)]


BAD = {
    "no object": b"17",
    "a field that breaks its rule": to_json(fields_of("bad", quantity=0)),
    "a field that is not one": to_json(fields_of("bad", quantiti=2)),
    "a field that would be an argument": to_json(fields_of("bad", cls=2)),
    "no fields": b"{}",
    "a key twice": to_json(fields_of("bad"))[:-1] + b',"user_id":"eve"}',
    "half a surrogate pair": to_json(fields_of("bad"))[:-1] + rb',"variant":"\ud83d"}',
    "a byte that is no UTF-8": to_json(fields_of("bad"))[:-1] + b',"variant":"\xff"}',
    "a control character": to_json(fields_of("bad"))[:-1] + b',"variant":"\n"}',
    "not a number": to_json(fields_of("bad"))[:-1] + b',"metadata":{"score":NaN}}',
    "too deep": to_json(fields_of("bad"))[:-1]
    + b',"metadata":{"a":'
    + b"[" * 300
    + b"]" * 300
    + b"}}",
    "too many digits": to_json(fields_of("bad"))[:-1]
    + b',"metadata":{"a":'
    + b"9" * 10_000
    + b"}}",
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_bad_event_leaves_its_neighbours_alone(
    api: httpx.Client, service: Headers, queue: Redis, bad: bytes
) -> None:
    first, last = to_json(fields_of("first")), to_json(fields_of("last"))
    body = b" [\n" + first + b" , " + bad + b"\r\n,\t" + last + b" ] "
    headers = service | {"Content-Type": "application/json"}
    answer = api.post(PATH, headers=headers, content=body)
    assert answer.status_code == 202
    document = answer.json()
    assert (document["accepted"], document["rejected"]) == (2, 1)
    assert [result["status"] for result in document["results"]] == [
        "accepted",
        "rejected",
        "accepted",
    ]
    rejected = document["results"][1]
    assert rejected["index"] == 1
    assert rejected["error"]["error"] == "invalid_request"
    assert rejected["error"]["message"]
    assert ids(queued(queue)) == ["first", "last"]


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_bad_event_alone_is_422(
    api: httpx.Client, service: Headers, queue: Redis, bad: bytes
) -> None:
    headers = service | {"Content-Type": "application/json"}
    answer = api.post(PATH, headers=headers, content=bad)
    assert answer.status_code == 422
    detail = answer.json()["detail"]
    assert detail["error"] == "invalid_request"
    assert detail["fields"]
    assert detail["request_id"] == answer.headers["X-Request-ID"]
    assert queued(queue) == []


def test_a_rejected_event_tells_its_fields_and_its_request_id(
    api: httpx.Client, service: Headers, queue: Redis
) -> None:
    events = [fields_of("r-1", quantity=0, user_id=""), {"request_id": "a b"}]
    answer = api.post(PATH, headers=service, json=events)
    assert answer.status_code == 202
    told, untold = answer.json()["results"]
    assert told["request_id"] == "r-1"
    assert sorted(told["error"]["fields"]) == ["quantity", "user_id"]
    assert "request_id" not in untold
    assert queued(queue) == []


UNREADABLE = {
    "nothing": b"",
    "white space": b" ",
    "no JSON": b"usage",
    "a number": b"17",
    "an array without events": b"[]",
    "an array without an end": b"[" + to_json(fields_of()),
    "an event without an end": b"[" + to_json(fields_of()) + b', {"request_id": "r',
    "an array with a comma too many": b"[" + to_json(fields_of()) + b",]",
    "events without commas": b"[" + to_json(fields_of()) + to_json(fields_of("r-2")) + b"]",
    "more after the array": b"[" + to_json(fields_of()) + b"] []",
    "a byte order mark": b"\xef\xbb\xbf[" + to_json(fields_of()) + b"]",
    "UTF-16": json.dumps([fields_of()]).encode("utf-16"),
    "no end of brackets": b"[" * 1_000_000,
    "more than 1,000 events": to_json(several(MAX_EVENTS + 1)),
}


@pytest.mark.parametrize("body", UNREADABLE.values(), ids=UNREADABLE)
def test_of_a_body_that_cannot_be_read_nothing_is_accepted(
    api: httpx.Client, service: Headers, queue: Redis, body: bytes
) -> None:
    headers = service | {"Content-Type": "application/json"}
    answer = api.post(PATH, headers=headers, content=body)
    assert answer.status_code == 422
    assert answer.json()["detail"]["error"] == "invalid_request"
    assert answer.json()["detail"]["fields"] == ["body"]
    assert queued(queue) == []


def test_a_thousand_events_pass_at_once(api: httpx.Client, service: Headers, queue: Redis) -> None:
    answer = api.post(PATH, headers=service, content=to_json(several(MAX_EVENTS)))
    assert answer.status_code == 415  # no media type, no guess
    headers = service | {"Content-Type": "application/json; charset=UTF-8"}
    answer = api.post(PATH, headers=headers, content=to_json(several(MAX_EVENTS)))
    assert answer.json()["accepted"] == MAX_EVENTS
    assert len(queued(queue)) == MAX_EVENTS


def test_digits_are_as_a_worker_would_read_them(
    api: httpx.Client, service: Headers, queue: Redis
) -> None:
    numbers = (
        b',"quantity":0.1,"api_cost":"0.123456","metadata":{"n":1e-7,"big":12345678901234567}}'
    )
    payload = to_json(fields_of())[:-1] + numbers
    headers = service | {"Content-Type": "application/json"}
    assert api.post(PATH, headers=headers, content=b"[" + payload + b"]").json()["accepted"] == 1
    assert queued(queue) == [parse_event(payload)]


def test_secrets_do_not_reach_the_stream(api: httpx.Client, service: Headers, queue: Redis) -> None:
    fields = fields_of(metadata={"api_key": "sesame", "company_id": "c-42"})
    assert api.post(PATH, headers=service, json=fields).status_code == 202
    (event,) = queued(queue)
    assert event.metadata == {"company_id": "c-42"}


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "application/cloudevents+avro"},
        {"Content-Type": "application/vnd.loopnet+json"},
        {"Content-Type": "application/json; charset=latin-1"},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
    ],
)
def test_other_media_types_are_415(
    api: httpx.Client, service: Headers, queue: Redis, headers: Headers
) -> None:
    answer = api.post(PATH, headers=service | headers, content=to_json(fields_of()))
    assert answer.status_code == 415
    assert answer.json()["detail"]["error"] == "unsupported_media_type"
    assert queued(queue) == []


def test_only_services_that_may_write_usage_report_it(
    api: httpx.Client, callers: Callers, queue: Redis
) -> None:
    for scope in Scope:
        expected = 202 if scope is Scope.USAGE_WRITE else 403
        answer = api.post(PATH, headers=callers.service(scope), json=fields_of())
        assert answer.status_code == expected, scope
    assert api.post(PATH, headers=callers.system_admin(), json=fields_of()).status_code == 403
    assert len(queued(queue)) == 1
    # Who may not write learns nothing of the body.
    broken = {"content": b"{", "headers": callers.user("ada")}
    assert api.post(PATH, **broken).status_code == 403  # type: ignore[arg-type]
    assert api.post(PATH, content=b"{").status_code == 401


def test_an_event_that_is_bound_to_die_is_for_the_ledger(
    api: httpx.Client, service: Headers, queue: Redis
) -> None:
    fields = fields_of(org_id=str(uuid4()), service_type="astrology", user_id="nobody")
    assert api.post(PATH, headers=service, json=fields).status_code == 202
    assert len(queued(queue)) == 1


def test_nothing_is_accepted_while_redis_is_away(api_settings: Settings, service: Headers) -> None:
    away = api_settings.model_copy(
        update={"redis_url": type(api_settings.redis_url)(f"redis://127.0.0.1:{free_port()}")}
    )
    with serving(create_app(away)) as api:
        answer = api.post(PATH, headers=service, json=several(2))
    assert answer.status_code == 503
    assert answer.json()["detail"]["error"] == "unavailable"
    assert "results" not in answer.json()


def test_a_stream_that_refuses_entries_is_an_outage(
    api: httpx.Client, service: Headers, queue: Redis, api_settings: Settings
) -> None:
    for shard in range(api_settings.shards):
        queue.set(stream_name(shard), "no stream")
    try:
        assert api.post(PATH, headers=service, json=fields_of()).status_code == 503
    finally:
        queue.flushall()


def test_the_document_tells_every_form(api: httpx.Client) -> None:
    document = api.get("/openapi.json").json()
    operation = document["paths"][PATH]["post"]
    content = operation["requestBody"]["content"]
    assert sorted(content) == [
        "application/cloudevents+json",
        "application/cloudevents-batch+json",
        "application/json",
    ]
    assert "$ref" not in json.dumps(content)
    assert r"\\A" not in json.dumps(content)


def test_the_examples_of_the_document_are_accepted(
    api: httpx.Client, service: Headers, queue: Redis
) -> None:
    content = api.get("/openapi.json").json()["paths"][PATH]["post"]["requestBody"]["content"]
    for media_type, form in content.items():
        named = [example["value"] for example in form.get("examples", {}).values()]
        for example in [*named, *([form["example"]] if "example" in form else [])]:
            answer = api.post(
                PATH, headers=service | {"Content-Type": media_type}, content=to_json(example)
            )
            assert answer.status_code == 202
            assert answer.json()["rejected"] == 0
    assert len(queued(queue)) == 6
