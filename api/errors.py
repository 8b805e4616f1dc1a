"""The one renderer of errors: whatever goes wrong is answered in the shape of contract.md §4."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any, Final

import structlog
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from schema.errors import (
    BodyTooLarge,
    InvalidRequest,
    MeteringError,
    MethodNotAllowed,
    NotAuthenticated,
    NotFound,
    Unavailable,
)

log = structlog.get_logger(__name__)

_HTTP: Final[Mapping[int, type[MeteringError]]] = {
    404: NotFound,
    405: MethodNotAllowed,
    413: BodyTooLarge,
}
_METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_FIRST_FAULT_OF_OURS: Final = 500
RETRY_AFTER_SECONDS: Final = 2
"""When to ask again for what is unavailable, unless the error says better."""


class ProblemDetail(BaseModel):
    """Code, message and way out of an error; some carry more, such as `required`."""

    model_config = ConfigDict(extra="allow")

    error: str
    message: str
    suggested_action: str
    request_id: str


class Problem(BaseModel):
    """The body of every answer that is an error."""

    detail: ProblemDetail


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors of a route, for the OpenAPI document."""
    return {status: {"model": Problem} for status in statuses}


def answer_errors_of(app: FastAPI) -> None:
    """Have every foreseen error of an app rendered here."""
    for kind in (MeteringError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, render)


class UnforeseenErrors:
    """Middleware that logs an unforeseen error whole and tells the caller only its request id."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an exchange on, and answer what goes wrong with it."""
        started = False

        async def send_noting_start(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, send_noting_start)
        except (Exception, asyncio.CancelledError) as error:
            if scope["type"] != "http" or started:
                raise
            response = await render(Request(scope), error)
            await response(scope, receive, send)
            if isinstance(error, asyncio.CancelledError):
                raise


async def render(request: Request, error: BaseException) -> Response:
    """The answer to `error`, with the id of the exchange."""
    ours = _as_ours(error)
    if ours.status >= _FIRST_FAULT_OF_OURS:
        _log(ours, error)
        ours = _told(ours)
    headers = dict((error.headers or {}) if isinstance(error, HTTPException) else {})
    match ours:
        case NotAuthenticated():
            headers["WWW-Authenticate"] = "Bearer"
        case MethodNotAllowed():
            headers["Allow"] = ", ".join(_methods_at(request))
        case MeteringError(details={"retry_after": seconds}):
            headers["Retry-After"] = str(seconds)
    detail = ours.as_detail() | {"request_id": request.state.request_id}
    return _json(ours.status, detail, headers)


def unreadable(status: int, message: str, request_id: str) -> Response:
    """The answer to what is refused before any route could say how to correct it."""
    detail = InvalidRequest(message).as_detail() | {
        "suggested_action": "Send what HTTP and this service's documentation ask for.",
        "request_id": request_id,
    }
    return _json(status, detail, {})


def _methods_at(request: Request) -> list[str]:
    """The methods of all routes at a path; the first that has the path knows but its own."""
    asked = [(method, {**request.scope, "method": method}) for method in _METHODS]
    routes = request.app.routes
    return [
        method
        for method, scope in asked
        if any(route.matches(scope)[0] is Match.FULL for route in routes)
    ]


def _json(status: int, detail: Mapping[str, object], headers: Mapping[str, str]) -> Response:
    # ASCII only: a name out of a bad request may hold what UTF-8 cannot.
    content = json.dumps({"detail": detail}, default=str)
    return Response(content, status, headers, media_type="application/json")


def _as_ours(error: BaseException) -> MeteringError:
    match error:
        case MeteringError():
            return error
        case asyncio.CancelledError():
            return Unavailable("the process had to stop before this was done")
        case RequestValidationError():
            return _invalid(error)
        case HTTPException(status_code=400):
            return InvalidRequest("body: cannot be read", fields=["body"])
        case HTTPException():
            return _HTTP.get(error.status_code, InvalidRequest)(error.detail)
        case _:
            return MeteringError(repr(error))


def _log(ours: MeteringError, cause: BaseException) -> None:
    if isinstance(ours, Unavailable):
        log.warning("dependency away", error=ours.message[:500])
    else:
        log.error("unforeseen error", exc_info=cause)


def _told(error: MeteringError) -> MeteringError:
    """A fault of ours as callers may know it: without addresses, statements and file names."""
    if isinstance(error, Unavailable):
        details = {"retry_after": RETRY_AFTER_SECONDS} | error.details
        return type(error)("A service that this one needs does not answer.", **details)
    return MeteringError("Something went wrong that is not your fault.")


def _invalid(error: RequestValidationError) -> InvalidRequest:
    problems: dict[str, str] = {}
    for item in error.errors():
        problems.setdefault(_field(item["loc"]), _in_words(item))
    message = "; ".join(f"{field}: {problem}" for field, problem in problems.items())
    return InvalidRequest(message, fields=list(problems))


def _field(location: tuple[int | str, ...]) -> str:
    """The name of a field; a body that cannot be read is the field `body`."""
    names = [str(part)[:100] for part in location if isinstance(part, str)]
    return ".".join(names[1:]) or "body"


def _in_words(item: Mapping[str, Any]) -> str:
    match item["type"]:
        case "json_invalid":
            return "is not a JSON document"
        case "model_attributes_type":
            return "must be a JSON object, sent as application/json"
        case "extra_forbidden":
            return "is not a field of this request"
        case "string_pattern_mismatch":
            return "is empty, too long, or holds a character that is not allowed"
        case _:
            return str(item["msg"]).removeprefix("Value error, ")
