"""CORS: which pages of other origins may read answers, told to their visitors' browsers."""

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.errors import unreadable


class CrossOrigin(CORSMiddleware):
    """Starlette's middleware, whose refusals of preflights have the shape of all errors."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """The answer to a preflight."""
        answer = super().preflight_response(request_headers)
        return answer if answer.status_code == 200 else _Refusal(answer)  # noqa: PLR2004 - OK


class _Refusal(Response):
    def __init__(self, plain: Response) -> None:
        super().__init__(plain.body, plain.status_code)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reason = bytes(self.body).decode()
        answer = unreadable(self.status_code, reason, Request(scope).state.request_id)
        answer.headers["Vary"] = "Origin"
        await answer(scope, receive, send)
