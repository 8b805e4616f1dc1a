"""The body of a report: read whole, or not at all."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message

from api.jsonbodies import raw_body


def receiving(*messages: Message) -> Callable[[], Awaitable[Message]]:
    left = iter(messages)

    async def receive() -> Message:
        return next(left)

    return receive


def test_a_body_is_read_to_its_end() -> None:
    receive = receiving(
        {"type": "http.request", "body": b"[", "more_body": True},
        {"type": "http.request", "body": b"]"},
    )
    assert asyncio.run(raw_body(Request({"type": "http"}, receive))) == b"[]"


def test_a_caller_who_goes_away_is_no_fault_of_ours() -> None:
    receive = receiving(
        {"type": "http.request", "body": b"[", "more_body": True}, {"type": "http.disconnect"}
    )
    with pytest.raises(HTTPException) as caught:
        asyncio.run(raw_body(Request({"type": "http"}, receive)))
    assert caught.value.status_code == 400
