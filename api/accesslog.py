"""One log line per answered request."""

import time
from typing import Final

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = structlog.get_logger(__name__)

PROBES: Final = frozenset({"/livez", "/readyz"})
"""Paths that are asked every few seconds; their answers are logged only when they are bad."""
_FIRST_BAD_STATUS: Final = 400


class AccessLog:
    """Middleware that logs method, path, status and milliseconds; never bodies or query strings."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an exchange on, and log its answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()

        async def send_and_log(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.start":
                _log(scope, message["status"], time.perf_counter() - started)

        await self._app(scope, receive, send_and_log)


def _log(scope: Scope, status: int, seconds: float) -> None:
    if scope["path"] in PROBES and status < _FIRST_BAD_STATUS:
        return
    log.info(
        "request answered",
        method=scope["method"],
        path=scope["path"],
        status=status,
        milliseconds=round(seconds * 1000, 1),
    )
