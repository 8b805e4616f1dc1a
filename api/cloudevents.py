"""Usage events as CloudEvents 1.0: structured in JSON, or binary in headers (contract.md §1).

The attribute `id` is the request id, `time` when the operation succeeded, `source` the source and
the extension `traceparent` the trace; all other fields are in `data`. What `data` repeats of the
attributes must say the same. Other attributes and extensions are ignored. The rules are those of
the CloudEvents specification, of its JSON format and of its HTTP binding.
"""

import re
from base64 import b64decode
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import unquote_to_bytes

import jiter
from pydantic import TypeAdapter
from starlette.datastructures import Headers

from schema.errors import InvalidEvent, MalformedEvent
from schema.events import RequestId, UsageEvent, parse_object

TYPE: Final = "com.loopnet.usage.v1"
SPECIFICATION: Final = "1.0"
STRUCTURED: Final = "application/cloudevents+json"
BATCH: Final = "application/cloudevents-batch+json"

_REQUIRED: Final = ("specversion", "type", "id", "source")
_FIXED: Final = {"specversion": SPECIFICATION, "type": TYPE}
_FIELDS: Final = {
    "id": "request_id",
    "source": "source",
    "time": "occurred_at",
    "traceparent": "traceparent",
}
"""The field of an event that each attribute tells."""
_DATA: Final = frozenset({"data", "data_base64"})

_HEADER_PREFIX: Final = "ce-"
_QUOTED: Final = re.compile(rb'"((?:[^"\\]|\\.)*+)"', re.DOTALL)
_ESCAPED: Final = re.compile(rb"\\(.)", re.DOTALL)
_JSON_TYPE: Final = re.compile(r"[^/;\s]+/(?:[^/;\s]+\+)?json\s*(?:;.*)?", re.IGNORECASE)

_request_id: Final = TypeAdapter[str](RequestId)


def parse(payload: bytes) -> UsageEvent:
    """Read one event of the JSON format.

    Raises:
        MalformedEvent: it is not JSON, not an object, or names a key twice.
        InvalidEvent: an attribute or a field breaks its rule.
    """
    envelope = parse_object(payload)
    attributes = {
        name: value
        for name, value in envelope.items()
        if value is not None and name not in _DATA  # null is the same as not there
    }
    _check(attributes)
    return _event(attributes, _data_of(envelope))


def parse_binary(headers: Headers, body: bytes) -> UsageEvent:
    """Read one event whose attributes are the headers `ce-…` and whose data is the body.

    Raises:
        MalformedEvent: the body is not JSON, not an object, or names a key twice.
        InvalidEvent: an attribute or a field breaks its rule.
    """
    attributes = _attributes_in(headers)
    _check(attributes)
    if "datacontenttype" in attributes:
        raise _invalid(datacontenttype="is told by the header Content-Type alone")
    return _event(attributes, parse_object(body))


def is_binary(headers: Headers) -> bool:
    """Whether headers tell attributes that every CloudEvent has."""
    return any(_HEADER_PREFIX + name in headers for name in _REQUIRED)


def is_json(media_type: str) -> bool:
    """Whether a media type, with or without parameters, declares JSON."""
    return _JSON_TYPE.fullmatch(media_type.strip()) is not None


def request_id_in(payload: bytes) -> str | None:
    """The request id of an event of the JSON format, if a broken one still tells it."""
    try:
        return _request_id.validate_python(jiter.from_json(payload)["id"])
    except (ValueError, RecursionError, TypeError, KeyError):
        return None


def _invalid(**problems: str) -> InvalidEvent:
    message = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
    return InvalidEvent(message, fields=list(problems))


def _check(attributes: Mapping[str, object]) -> None:
    problems = {name: "is required" for name in _REQUIRED if name not in attributes}
    for name, value in _FIXED.items():
        if attributes.get(name) != value:
            problems.setdefault(name, f"must be {value}")
    if problems:
        raise _invalid(**problems)


def _event(attributes: Mapping[str, object], data: Mapping[str, Any]) -> UsageEvent:
    told = {field: attributes[name] for name, field in _FIELDS.items() if name in attributes}
    event = UsageEvent.of(**{**data, **told})
    if not told.keys().isdisjoint(data):
        otherwise = UsageEvent.of(**{**told, **data})
        contradicted = [
            name
            for name, field in _FIELDS.items()
            if getattr(event, field) != getattr(otherwise, field)
        ]
        if contradicted:
            raise _invalid(**{name: f"data says another {_FIELDS[name]}" for name in contradicted})
    return event


def _data_of(envelope: Mapping[str, Any]) -> dict[str, Any]:
    media_type = envelope.get("datacontenttype")
    if media_type is not None and not (isinstance(media_type, str) and is_json(media_type)):
        raise _invalid(datacontenttype="must be application/json")
    encoded = envelope.get("data_base64")
    if encoded is not None:
        if "data" in envelope:
            raise _invalid(data_base64="must not be there together with data")
        return _decoded(encoded)
    data = envelope.get("data")
    if not isinstance(data, dict):
        raise _invalid(data="must be a JSON object" if "data" in envelope else "is required")
    return data


def _decoded(encoded: object) -> dict[str, Any]:
    try:
        payload = b64decode(encoded, validate=True) if isinstance(encoded, str) else b""
        return parse_object(payload)
    except ValueError:
        raise _invalid(data_base64="must be Base64") from None
    except MalformedEvent as error:
        raise _invalid(data_base64=error.message) from None


def _attributes_in(headers: Headers) -> dict[str, str]:
    attributes: dict[str, str] = {}
    for raw_name, value in headers.raw:
        header = raw_name.decode("latin-1").lower()
        if header.startswith(_HEADER_PREFIX):
            name = header.removeprefix(_HEADER_PREFIX)
            if name in attributes:
                raise _invalid(**{name: "is there more than once"})
            attributes[name] = _attribute(name, value)
    return attributes


def _attribute(name: str, value: bytes) -> str:
    """The text of a header: out of its quotes, if it has any, then percent-decoded, once."""
    quoted = _QUOTED.fullmatch(value)
    plain = _ESCAPED.sub(rb"\1", quoted[1]) if quoted else value
    try:
        return unquote_to_bytes(plain).decode()
    except UnicodeDecodeError:
        raise _invalid(**{name: "is not UTF-8"}) from None
