"""Headers that tell browsers what they may do with answers: next to nothing."""

from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

ALWAYS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
)
_IN_PRODUCTION: Final = ((b"strict-transport-security", b"max-age=31536000"),)
"""Only there is TLS in front of us; a browser that was told so would shun a plain localhost."""


class SecurityHeaders:
    """Middleware that adds those of the headers that a route has not set itself."""

    def __init__(self, app: ASGIApp, *, in_production: bool) -> None:
        self._app = app
        self._headers = ALWAYS + (_IN_PRODUCTION if in_production else ())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an exchange on, and complete the headers of its answer."""

        async def send_complete(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = {name for name, _ in message["headers"]}
                added = (header for header in self._headers if header[0] not in given)
                message["headers"] = [*message["headers"], *added]
            await send(message)

        await self._app(scope, receive, send_complete)
