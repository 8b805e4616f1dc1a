"""One log line per answered request, but for those that are too many to read.

A line costs as much as a tenth of a pre-check, so that good answers of the gate are logged at debug
level only; what it allowed is in the ledger. Probes come every few seconds and are no news either.
"""

import logging
import time
from typing import Final

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.paths import PRECHECK, is_at

log = structlog.get_logger(__name__)

PROBES: Final = frozenset({"/livez", "/readyz"})
_FIRST_BAD_STATUS: Final = 400
_levels: Final = logging.getLogger(__name__)


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
    is_quiet = _is_quiet(scope["path"], status)
    # Asked here, since structlog builds a whole line before anybody looks at its level.
    if is_quiet and not _levels.isEnabledFor(logging.DEBUG):
        return
    log.log(
        logging.DEBUG if is_quiet else logging.INFO,
        "request answered",
        method=scope["method"],
        path=scope["path"],
        status=status,
        milliseconds=round(seconds * 1000, 1),
    )


def _is_quiet(path: str, status: int) -> bool:
    return status < _FIRST_BAD_STATUS and (path in PROBES or is_at(path, PRECHECK))
