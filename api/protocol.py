"""HTTP/1.1 as uvicorn speaks it, with an end to headers, and refusals in the shape of all errors.

`uvicorn --http api.protocol:Protocol`. Uvicorn would collect headers for as long as somebody sends
them, before it asks any application; and it answers what is no HTTP in plain text.
"""

from typing import Final
from uuid import uuid4

import structlog
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from api.errors import unreadable
from api.requestid import HEADER
from api.securityheaders import ALWAYS

log = structlog.get_logger(__name__)

MAX_HEAD_BYTES: Final = 64 * 1024
_BAD_REQUEST: Final = 400
_HEAD_TOO_LARGE: Final = 431


class Protocol(HttpToolsProtocol):
    """One connection. What is refused here ends it."""

    _bytes_without_progress = 0
    """What came in a row and was neither of a body nor the end of a head or body."""
    _is_progress = False

    def data_received(self, data: bytes) -> None:
        """Parse what has arrived."""
        self._is_progress = False
        super().data_received(data)
        # Trailers and the sizes of chunks count like headers, since they are collected as well.
        self._bytes_without_progress += len(data)
        if self._is_progress:
            self._bytes_without_progress = 0
        elif self._bytes_without_progress > MAX_HEAD_BYTES and not self.transport.is_closing():
            message = f"The headers are longer than {MAX_HEAD_BYTES} bytes."
            self._refuse(_HEAD_TOO_LARGE, message)

    def on_headers_complete(self) -> None:
        """Have the application serve the request."""
        self._is_progress = True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Keep a part of the body for the application."""
        self._is_progress = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Tell the application that the body is whole."""
        self._is_progress = True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP."""
        self._refuse(_BAD_REQUEST, msg)

    def _refuse(self, status: int, message: str) -> None:
        request_id = str(uuid4())
        answer = unreadable(status, message, request_id)
        headers = [
            *self.server_state.default_headers,
            *answer.raw_headers,
            *ALWAYS,
            (HEADER, request_id.encode()),
            (b"connection", b"close"),
        ]
        lines = [b"%s: %s\r\n" % header for header in headers]
        self.transport.write(b"".join((STATUS_LINE[status], *lines, b"\r\n", answer.body)))
        self.transport.close()
        log.info("request refused", status=status, reason=message, http_request_id=request_id)
