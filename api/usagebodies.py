"""The usage events in the body of a request, whatever form they have (contract.md §1)."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from starlette.datastructures import Headers

from api import cloudevents
from schema.errors import EventError, InvalidRequest, MalformedEvent, UnsupportedMediaType
from schema.events import UsageEvent, clues_in, parse_event

MAX_EVENTS: Final = 1000
PLAIN: Final = "application/json"

_CHARSET: Final = re.compile(r';\s*charset\s*=\s*"?([^\s;"]*)', re.IGNORECASE)
_SPACE: Final = re.compile(r"[ \t\n\r]*")

# Only finds where an element ends: what it holds is for the parser of events to judge.
_ELEMENTS: Final = json.JSONDecoder(strict=False, parse_int=str, parse_float=str)


@dataclass(frozen=True, slots=True)
class Unreadable:
    """An event that breaks the contract, and its request id if it still tells it."""

    error: EventError
    request_id: str | None


Found = UsageEvent | Unreadable


class _Form(NamedTuple):
    parse: Callable[[bytes], UsageEvent]
    request_id_in: Callable[[bytes], str | None]


def _plain_request_id(payload: bytes) -> str | None:
    return clues_in(payload).request_id


_PLAIN: Final = _Form(parse_event, _plain_request_id)
_CLOUD: Final = _Form(cloudevents.parse, cloudevents.request_id_in)


def events_in(headers: Headers, body: bytes) -> list[Found]:
    """The events of a body, in order; those of an array are judged one by one.

    Each is read by the parser that the workers use, so that what is accepted here is never
    malformed or invalid there.

    Raises:
        UnsupportedMediaType: the headers announce neither events nor CloudEvents in JSON.
        InvalidRequest: there is no telling the events apart, there are none or too many, or a
            single one breaks the contract.
    """
    content_type = headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    _check_encoding(headers, content_type)
    if media_type == cloudevents.BATCH:
        return _several(body, _CLOUD)
    if media_type == cloudevents.STRUCTURED:
        return [_single(body, cloudevents.parse)]
    if cloudevents.is_json(media_type) and cloudevents.is_binary(headers):
        return [_single(body, lambda data: cloudevents.parse_binary(headers, data))]
    if media_type == PLAIN:
        return _several(body, _PLAIN) if _is_array(body) else [_single(body, parse_event)]
    raise UnsupportedMediaType(
        f"usage events come as {PLAIN}, {cloudevents.STRUCTURED} or {cloudevents.BATCH}"
    )


def _check_encoding(headers: Headers, content_type: str) -> None:
    charset = _CHARSET.search(content_type)
    if charset and charset[1].lower() not in {"utf-8", "utf8", "us-ascii"}:
        raise UnsupportedMediaType("usage events come in UTF-8")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType("usage events come uncompressed")


def _is_array(body: bytes) -> bool:
    return body.lstrip(b" \t\n\r").startswith(b"[")


def _single(body: bytes, parse: Callable[[bytes], UsageEvent]) -> UsageEvent:
    try:
        return parse(body)
    except MalformedEvent as error:
        raise _unreadable(error.message) from None


def _several(body: bytes, form: _Form) -> list[Found]:
    elements: list[bytes] = []
    for element in _elements(body):
        if len(elements) == MAX_EVENTS:
            raise _unreadable(f"has more than {MAX_EVENTS:,} events")
        elements.append(element)
    if not elements:
        raise _unreadable("has no events")
    return [_judged(element, form) for element in elements]


def _judged(element: bytes, form: _Form) -> Found:
    try:
        return form.parse(element)
    except EventError as error:
        return Unreadable(error, form.request_id_in(element))


def _elements(body: bytes) -> Iterator[bytes]:
    """The elements of a JSON array, byte for byte as they were sent."""
    if not _is_array(body):
        raise _unreadable("not a JSON array")
    text = body.decode("utf-8", "surrogateescape")
    position = _next(text, text.index("[") + 1)
    separator = "]" if text.startswith("]", position) else ","
    end = position
    while separator == ",":
        try:
            _, end = _ELEMENTS.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise _unreadable(f"not a JSON document: {error}") from None
        yield text[position:end].encode("utf-8", "surrogateescape")
        end = _next(text, end)
        separator = text[end : end + 1]
        position = _next(text, end + 1)
    if separator != "]" or _next(text, end + 1) != len(text):
        raise _unreadable(f"not a JSON document: unexpected text at character {end}")


def _next(text: str, position: int) -> int:
    """The position after white space."""
    found = _SPACE.match(text, position)
    return found.end() if found else position


def _unreadable(problem: str) -> InvalidRequest:
    return InvalidRequest(f"body: {problem}", fields=["body"])
