"""`X-Request-ID`: taken from the caller or made, answered on everything, named in every log line.

It names one HTTP exchange. The `request_id` of an operation is another thing: it is in the body.
"""

import re
from typing import Final
from uuid import uuid4

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER: Final = "X-Request-ID"
_ACCEPTED: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")


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
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(http_request_id=request_id):
            await self._app(scope, receive, send_with_id)


def _taken_or_made(scope: Scope) -> str:
    """The caller's id if it is harmless to log and to answer; else a new one."""
    given = Headers(scope=scope).get(HEADER, "")
    return given if _ACCEPTED.fullmatch(given) else str(uuid4())
