"""The longest request body that is read."""

from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """Middleware that ends the reading of a body over the limit with 413.

    It acts when a route begins to read, and not before, so that who may not call learns just
    that. A `Content-Length` over the limit ends it there, and what arrives is counted whatever
    was announced. The server throws away what is still to come of the body.
    """

    def __init__(
        self, app: ASGIApp, max_bytes: int, max_bytes_at: Mapping[str, int] | None = None
    ) -> None:
        """Limit bodies to `max_bytes`, or to what `max_bytes_at` says for a path."""
        self._app = app
        self._max_bytes = max_bytes
        self._max_bytes_at = max_bytes_at or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an exchange on, counting what is read of its body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        max_bytes = self._max_bytes_at.get(scope["path"], self._max_bytes)
        received: int | None = None

        async def receive_limited() -> Message:
            nonlocal received
            if received is None:
                received = 0
                _refuse_over(max_bytes, _announced(scope))
            message = await receive()
            received += len(message.get("body", b""))
            _refuse_over(max_bytes, received)
            return message

        await self._app(scope, receive_limited, send)


def _announced(scope: Scope) -> int:
    """What `Content-Length` says; the server has checked that it is a number."""
    return next((int(value) for name, value in scope["headers"] if name == b"content-length"), 0)


def _refuse_over(max_bytes: int, number: int) -> None:
    if number > max_bytes:
        # Of all errors, FastAPI lets only this one through while it reads a body.
        raise HTTPException(413, f"the body is longer than {max_bytes} bytes")
