"""`X-Request-ID`: taken from the caller or made, answered on everything, named in every log line.

It names one HTTP exchange. The `request_id` of an operation is another thing: it is in the body.
"""

import re
from typing import Final

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.ids import new_id

HEADER: Final = b"x-request-id"
_ACCEPTED: Final = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class RequestId:
    """Middleware that gives each exchange its id, in `request.state.request_id`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an exchange on with its id."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _taken_or_made(scope)
        scope.setdefault("state", {})["request_id"] = request_id.decode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (HEADER, request_id)]
            await send(message)

        # The server runs each exchange in a context of its own, so that nothing is to be unbound;
        # threads that work for it inherit the context.
        structlog.contextvars.bind_contextvars(http_request_id=request_id.decode())
        await self._app(scope, receive, send_with_id)


def _taken_or_made(scope: Scope) -> bytes:
    """The caller's id if it is harmless to log and to answer; else a new one."""
    given: bytes = next((value for name, value in scope["headers"] if name == HEADER), b"")
    return given if _ACCEPTED.fullmatch(given) else new_id().encode()
