"""CloudEvents: whatever its form, the event is the one that plain JSON would have told."""

import json
from base64 import b64encode
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from api import cloudevents
from api.usagebodies import Unreadable, events_in
from schema.errors import InvalidEvent, InvalidRequest, MalformedEvent
from schema.events import UsageEvent

Document = dict[str, Any]

TIME = "2026-03-15T12:30:00Z"
DATA: Document = {
    "org_id": "0d5a3c1e-6f0b-4f57-9a2b-0f6f3a1b2c3d",
    "user_id": "ada",
    "service_type": "contact_lookup",
}
ATTRIBUTES: Document = {
    "specversion": "1.0",
    "type": "com.loopnet.usage.v1",
    "id": "r-1",
    "source": "/loopnet",
    "time": TIME,
}
EVENT = UsageEvent.of(request_id="r-1", source="/loopnet", occurred_at=TIME, **DATA)

texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)


@st.composite
def plain_events(draw: st.DrawFn) -> Document:
    """The fields of an event, some of the optional ones among them."""
    optional = {
        "service_name": texts,
        "variant": texts,
        "quantity": st.decimals("0.001", 1000, places=3).map(str) | st.integers(1, 1000),
        "credits": st.integers(1, 1_000_000),
        "api_cost": st.decimals(0, 100, places=6).map(str),
        "key_source": st.sampled_from(["managed", "byok"]),
        "metadata": st.dictionaries(texts, texts | st.integers() | st.booleans(), max_size=3),
        "traceparent": texts.filter(bool),
    }
    required = {
        "request_id": st.from_regex(r"[A-Za-z0-9_.:\-]{1,40}", fullmatch=True),
        "org_id": st.uuids().map(str),
        "user_id": texts.filter(bool),
        "service_type": texts.filter(bool),
        "occurred_at": st.datetimes(timezones=st.timezones()).map(
            lambda moment: moment.replace(year=2026, month=3, day=3).isoformat(timespec="seconds")
        ),
        "source": texts.filter(bool),
    }
    return draw(st.fixed_dictionaries(required, optional=optional))


def parted(event: Document) -> tuple[Document, Document]:
    """The attributes and the data of an event."""
    names = {
        "id": "request_id",
        "source": "source",
        "time": "occurred_at",
        "traceparent": "traceparent",
    }
    fixed = {"specversion": "1.0", "type": "com.loopnet.usage.v1"}
    told = {name: event[field] for name, field in names.items() if field in event}
    return fixed | told, {k: v for k, v in event.items() if k not in names.values()}


def structured(attributes: Document, **data: Any) -> bytes:
    return json.dumps(attributes | data).encode()


def headers_of(attributes: Document, encode: Callable[[str], str] = quote) -> Headers:
    pairs = [(f"ce-{name}".encode(), encode(v).encode()) for name, v in attributes.items()]
    return Headers(raw=[(b"content-type", b"application/json"), *pairs])


@given(plain_events(), st.data())
def test_every_form_tells_the_same_event(fields: Document, data: st.DataObject) -> None:
    event = UsageEvent.of(**fields)
    attributes, others = parted(fields)
    repeated = data.draw(st.sets(st.sampled_from(sorted(fields))))
    others |= {name: fields[name] for name in repeated}
    encoded = b64encode(json.dumps(others).encode()).decode()
    assert cloudevents.parse(structured(attributes, data=others)) == event
    assert cloudevents.parse(structured(attributes, data_base64=encoded)) == event
    body = json.dumps(others).encode()
    for quoting in (quote, lambda text: quote(text, safe="")):
        assert cloudevents.parse_binary(headers_of(attributes, quoting), body) == event


def test_the_media_type_says_which_form_it_is() -> None:
    attributes, body = ATTRIBUTES, json.dumps(DATA).encode()
    one = structured(attributes, data=DATA)
    for media_type, content in [
        ("application/cloudevents+json; charset=utf-8", one),
        ("application/cloudevents-batch+json", b"[" + one + b"]"),
    ]:
        assert events_in(Headers({"content-type": media_type}), content) == [EVENT]
    for media_type in ("application/json", "application/vnd.loopnet+json", "text/json"):
        headers = headers_of(attributes).mutablecopy()
        headers["content-type"] = media_type
        assert events_in(headers, body) == [EVENT]


def test_structured_mode_ignores_attributes_in_headers() -> None:
    headers = headers_of(ATTRIBUTES | {"id": "another"}).mutablecopy()
    headers["content-type"] = cloudevents.STRUCTURED
    assert events_in(headers, structured(ATTRIBUTES, data=DATA)) == [EVENT]


@pytest.mark.parametrize("name", ["specversion", "type", "id", "source"])
def test_every_required_attribute_is_missed(name: str) -> None:
    for attributes in (
        {key: value for key, value in ATTRIBUTES.items() if key != name},
        ATTRIBUTES | {name: None},
    ):
        with pytest.raises(InvalidEvent, match="required") as caught:
            cloudevents.parse(structured(attributes, data=DATA))
        assert caught.value.details["fields"] == [name]
    headers = headers_of({key: value for key, value in ATTRIBUTES.items() if key != name})
    assert cloudevents.is_binary(headers)
    with pytest.raises(InvalidEvent, match="required"):
        cloudevents.parse_binary(headers, json.dumps(DATA).encode())


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"specversion": "0.3"}, "specversion"),
        ({"specversion": 1.0}, "specversion"),
        ({"type": "com.loopnet.usage.v2"}, "type"),
        ({"type": "COM.LOOPNET.USAGE.V1"}, "type"),
        ({"id": ""}, "request_id"),
        ({"id": 17}, "request_id"),
        ({"id": "a b"}, "request_id"),
        ({"source": ""}, "source"),
        ({"source": "/" + "a" * 100}, "source"),
        ({"time": "yesterday"}, "occurred_at"),
        ({"time": None}, "occurred_at"),
        ({"time": "2026-03-15T12:30:00"}, "occurred_at"),
        ({"traceparent": 1}, "traceparent"),
        ({"datacontenttype": "application/xml"}, "datacontenttype"),
        ({"datacontenttype": 1}, "datacontenttype"),
        ({"data": None}, "data"),
        ({"data": [DATA]}, "data"),
        ({"data": json.dumps(DATA)}, "data"),
        ({"data": DATA | {"request_id": "r-2"}}, "id"),
        ({"data": DATA | {"source": "/another"}}, "source"),
        ({"data": DATA | {"occurred_at": "2026-03-15T12:31:00Z"}}, "time"),
        ({"traceparent": "a", "data": DATA | {"traceparent": "b"}}, "traceparent"),
        ({"data": DATA | {"quantiti": 2}}, "quantiti"),
        ({"data": DATA | {"cls": 2}}, "cls"),
        ({"data_base64": "e30="}, "data_base64"),
    ],
)
def test_what_breaks_a_rule_is_named(change: Document, field: str) -> None:
    with pytest.raises(InvalidEvent) as caught:
        cloudevents.parse(structured(ATTRIBUTES | {"data": DATA} | change))
    assert caught.value.details["fields"] == [field]
    assert str(caught.value).startswith(f"{field}: ")


@pytest.mark.parametrize(
    "encoded", ["", "e3", "e30", "e30=\n", "*", "é", "bnVsbA==", "eyJhIjoxLCJhIjoyfQ==", 7]
)
def test_data_in_base64_is_one_json_object(encoded: object) -> None:
    with pytest.raises(InvalidEvent) as caught:
        cloudevents.parse(structured(ATTRIBUTES, data_base64=encoded))
    assert caught.value.details["fields"] == ["data_base64"]


def test_without_data_there_is_no_event() -> None:
    with pytest.raises(InvalidEvent, match="data: is required"):
        cloudevents.parse(structured(ATTRIBUTES))


def test_the_same_time_may_be_told_twice_in_two_ways() -> None:
    data = DATA | {"occurred_at": "2026-03-15T13:30:00+01:00"}
    assert cloudevents.parse(structured(ATTRIBUTES, data=data)) == EVENT


def test_the_time_may_be_in_data_alone() -> None:
    attributes = ATTRIBUTES | {"time": None}
    assert cloudevents.parse(structured(attributes, data=DATA | {"occurred_at": TIME})) == EVENT


def test_other_attributes_and_extensions_are_ignored() -> None:
    others = {
        "subject": "ada",
        "dataschema": "https://example.com/usage",
        "datacontenttype": "application/vnd.loopnet+json; charset=utf-8",
        "partitionkey": 7,
        "sampled": True,
    }
    assert cloudevents.parse(structured(ATTRIBUTES | others, data=DATA)) == EVENT


def test_a_key_twice_is_malformed() -> None:
    payload = structured(ATTRIBUTES, data=DATA)[:-1] + b',"id":"r-2"}'
    with pytest.raises(MalformedEvent):
        cloudevents.parse(payload)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (b"/a%20b", "/a b"),
        (b"/%e2%82%ac", "/€"),
        (b"/%E2%82%AC", "/€"),
        ("/€".encode(), "/€"),
        (b"%2Fa", "/a"),
        (b"/a%2520b", "/a%20b"),
        (b"/50%", "/50%"),
        (b'"/a b"', "/a b"),
        (rb'"/a\"b\\c"', '/a"b\\c'),
        (b'"/a%20b"', "/a b"),
        (b'/a"b"', '/a"b"'),
    ],
)
def test_header_values_are_decoded_once(value: bytes, text: str) -> None:
    raw = [pair for pair in headers_of(ATTRIBUTES).raw if pair[0] != b"ce-source"]
    event = cloudevents.parse_binary(
        Headers(raw=[*raw, (b"Ce-Source", value)]), json.dumps(DATA).encode()
    )
    assert event.source == text


@pytest.mark.parametrize(
    ("header", "field"),
    [
        ((b"ce-id", b"r-2"), "id"),
        ((b"ce-subject", b"%C0%A0"), "subject"),
        ((b"ce-subject", b"\xff"), "subject"),
        ((b"ce-datacontenttype", b"application/json"), "datacontenttype"),
    ],
)
def test_headers_that_are_not_of_the_binding_are_refused(
    header: tuple[bytes, bytes], field: str
) -> None:
    headers = Headers(raw=[*headers_of(ATTRIBUTES).raw, header])
    with pytest.raises(InvalidEvent) as caught:
        cloudevents.parse_binary(headers, json.dumps(DATA).encode())
    assert caught.value.details["fields"] == [field]


def test_a_trace_is_told_by_an_extension_and_not_by_the_request() -> None:
    headers = headers_of(ATTRIBUTES | {"traceparent": "00-a-b-01"}).mutablecopy()
    headers["traceparent"] = "00-c-d-01"
    event = cloudevents.parse_binary(headers, json.dumps(DATA).encode())
    assert event.traceparent == "00-a-b-01"


def test_a_broken_one_of_a_batch_is_told_by_its_id() -> None:
    good = structured(ATTRIBUTES, data=DATA)
    bad = structured(ATTRIBUTES | {"type": "another", "id": "bad"}, data=DATA)
    headers = Headers({"content-type": cloudevents.BATCH})
    first, second, third, fourth = events_in(
        headers, b"[" + b",".join([good, bad, b"1", good]) + b"]"
    )
    assert first == fourth == EVENT
    assert isinstance(second, Unreadable)
    assert isinstance(third, Unreadable)
    assert (second.request_id, third.request_id) == ("bad", None)


@pytest.mark.parametrize(
    ("media_type", "body"),
    [
        (cloudevents.BATCH, structured(ATTRIBUTES, data=DATA)),
        (cloudevents.STRUCTURED, b"[" + structured(ATTRIBUTES, data=DATA) + b"]"),
    ],
)
def test_one_is_no_batch_and_a_batch_is_not_one(media_type: str, body: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        events_in(Headers({"content-type": media_type}), body)
    assert caught.value.details["fields"] == ["body"]
