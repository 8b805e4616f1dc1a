"""Bodies of usage reports: arrays fall into their elements, which are judged as workers judge."""

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic_core import to_json
from starlette.datastructures import Headers

from api.usagebodies import MAX_EVENTS, Unreadable, events_in
from schema.errors import EventError, InvalidRequest, UnsupportedMediaType
from schema.events import UsageEvent, parse_event

JSON = Headers({"content-type": "application/json"})

good = to_json(
    {
        "request_id": "r-1",
        "org_id": "0d5a3c1e-6f0b-4f57-9a2b-0f6f3a1b2c3d",
        "user_id": "ada",
        "service_type": "contact_lookup",
        "occurred_at": "2026-03-15T12:30:00Z",
    }
)

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
space = st.text(" \t\r\n", max_size=3)


def judged(element: bytes) -> UsageEvent | str:
    """What a worker makes of an entry."""
    try:
        return parse_event(element)
    except EventError as error:
        return error.message


def told(found: UsageEvent | Unreadable) -> UsageEvent | str:
    return found.error.message if isinstance(found, Unreadable) else found


@given(st.lists(values, min_size=1, max_size=5), st.data())
def test_elements_of_an_array_are_what_a_worker_would_get_one_by_one(
    documents: list[Any], data: st.DataObject
) -> None:
    elements = [json.dumps(item, ensure_ascii=data.draw(st.booleans())) for item in documents]
    encoded = [element.encode("utf-8", "surrogatepass") for element in elements] + [good]
    padded = [
        data.draw(space).encode() + element + data.draw(space).encode() for element in encoded
    ]
    body = data.draw(space).encode() + b"[" + b",".join(padded) + b"]" + data.draw(space).encode()
    assert [told(item) for item in events_in(JSON, body)] == [judged(one) for one in encoded]


def with_field(field: bytes) -> bytes:
    return good[:-1] + b"," + field + b"}"


@pytest.mark.parametrize(
    "bad",
    [
        b"null",
        with_field(b'"user_id":"eve"'),
        with_field(rb'"variant":"\ud83d"'),
        with_field(b'"variant":"\xff"'),
        with_field(b'"variant":"\n"'),
        with_field(b'"metadata":{"a":NaN}'),
        with_field(b'"metadata":{"a":' + b"9" * 10_000 + b"}"),
        with_field(b'"metadata":{"a":' + b"[" * 300 + b"]" * 300 + b"}"),
    ],
)
def test_an_element_that_is_no_event_leaves_its_neighbours_alone(bad: bytes) -> None:
    first, middle, last = events_in(JSON, b"[" + good + b"," + bad + b"," + good + b"]")
    assert first == last == parse_event(good)
    assert isinstance(middle, Unreadable)
    assert middle.error.message == judged(bad)


@pytest.mark.parametrize(
    "body",
    [
        b"[" + good + b"] x",
        b"[" + good + b"]]",
        b"[" + good + good + b"]",
        b"[" + good + b",]",
        b"[,]",
        b"[" * 100_000,
        b"\xef\xbb\xbf[" + good + b"]",
    ],
)
def test_where_elements_end_must_be_clear(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="not a JSON"):
        events_in(JSON, body)


@given(st.binary(max_size=60))
@example(b"[")
@example(b"[]")
@example(b"[]]")
@example(b"[1 2]")
@example(b'["\\')
@example(b"[\xff]")
def test_no_bytes_are_a_fault_of_ours(body: bytes) -> None:
    for prefix in (b"", b"["):
        try:
            found = events_in(JSON, prefix + body)
        except InvalidRequest as error:
            assert error.details["fields"]  # noqa: PT017 - either outcome is right
        else:
            assert all(isinstance(item, Unreadable) for item in found)


@given(st.integers(1, len(good)))
def test_a_body_that_was_cut_off_is_not_read_in_part(length: int) -> None:
    body = b"[" + good + b"," + good + b"]"
    with pytest.raises(InvalidRequest, match="not a JSON"):
        events_in(JSON, body[:-length])


@pytest.mark.parametrize(("count", "is_fine"), [(0, False), (MAX_EVENTS, True), (1001, False)])
def test_an_array_has_up_to_a_thousand_events(count: int, is_fine: bool) -> None:
    body = b"[" + b",".join([good] * count) + b"]"
    if is_fine:
        assert len(events_in(JSON, body)) == count
    else:
        with pytest.raises(InvalidRequest, match="events"):
            events_in(JSON, body)


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "APPLICATION/JSON",
        "application/json;charset=utf-8",
        'application/json; charset="UTF-8"',
        "application/json ; version=1",
    ],
)
def test_media_types_are_compared_without_case_and_parameters(content_type: str) -> None:
    assert events_in(Headers({"content-type": content_type}), good) == [parse_event(good)]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": ""},
        {"content-type": "text/json"},
        {"content-type": "application/jsonp"},
        {"content-type": "application/cloudevents"},
        {"content-type": "application/json; charset=utf-16"},
        {"content-type": "application/json", "content-encoding": "br"},
    ],
)
def test_other_media_types_are_refused(headers: dict[str, str]) -> None:
    with pytest.raises(UnsupportedMediaType):
        events_in(Headers(headers), good)
