"""Authentication: before anything else is looked at, a caller of `/api/` says who they are."""

import re
from typing import Protocol

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from api.callers import Caller, User
from api.origins import refuse_foreign_page
from api.paths import API
from api.servicetokens import ServiceTokens
from api.sessions import COOKIE, Sessions
from schema.errors import NotAuthenticated


class Identities(Protocol):
    """What tells callers by what they present."""

    sessions: Sessions
    service_tokens: ServiceTokens


class Authentication:
    """Middleware that puts the caller into `request.state.caller`, or refuses the request."""

    def __init__(self, app: ASGIApp, allowed_origins: str) -> None:
        self._app = app
        self._allowed_origins = re.compile(allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an exchange on with its caller.

        Raises:
            NotAuthenticated: it names none, or not truly.
            Forbidden: a page of another site has made a user's browser send it.
            Unavailable: whoever could tell does not answer.
        """
        if scope["type"] == "http" and scope["path"].startswith(API):
            request = Request(scope)
            caller = await _caller(request)
            if isinstance(caller, User):
                refuse_foreign_page(request, self._allowed_origins)
            scope["state"]["caller"] = caller
        await self._app(scope, receive, send)


async def _caller(request: Request) -> Caller:
    identities: Identities = request.app.state.resources
    # Looked for in the raw headers: this is done for every request of the gate.
    match [value for name, value in request.scope["headers"] if name == b"authorization"]:
        case []:
            return await identities.sessions.user_of(_session(request.headers))
        case [authorization]:
            scheme, _, token = authorization.decode("latin-1").partition(" ")
            if scheme.lower() == "bearer":
                return await identities.service_tokens.service_of(token.strip())
    raise NotAuthenticated("Authorization must be 'Bearer' and a service token.")


def _session(headers: Headers) -> str:
    """The session in the cookies.

    Of several different ones none counts: a page of a neighbouring domain can add its own to
    those of a visitor, who would then act as somebody else.
    """
    cookies = ";".join(headers.getlist("cookie")).split(";")
    named = (cookie.strip().partition("=") for cookie in cookies)
    sessions = {value.strip().strip('"') for name, _, value in named if name.strip() == COOKIE}
    match list(sessions):
        case []:
            raise NotAuthenticated("This needs a session or a service token.")
        case [session]:
            return session
        case _:
            raise NotAuthenticated("There is more than one session: log out and in again.")
