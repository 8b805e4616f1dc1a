"""Who asks: services present a bearer token (contract.md §4, Identity)."""

from collections.abc import Callable, Coroutine
from hmac import compare_digest
from typing import Any

from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from pydantic import SecretStr
from starlette.requests import Request
from starlette.responses import Response

from api.resources import resources_of
from schema.errors import NotAuthenticated

service_scheme = HTTPBearer(
    scheme_name="service token", description="METERING_SERVICE_TOKEN", auto_error=False
)
"""For the OpenAPI document; `ServiceRoute` does the work."""


class ServiceRoute(APIRoute):
    """A route for services: the token is checked before the body is so much as read."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The route's handler behind the check of the token."""
        handle = super().get_route_handler()

        async def authenticated(request: Request) -> Response:
            require_service(request)
            return await handle(request)

        return authenticated


def require_service(request: Request) -> None:
    """Let a service pass.

    Raises:
        NotAuthenticated: the request carries no service token, or not the right one.
    """
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise NotAuthenticated("This needs a service token.")
    if not _is_service_token(token.strip(), resources_of(request).settings.service_token):
        raise NotAuthenticated("The service token is not valid.")


def _is_service_token(given: str, expected: SecretStr) -> bool:
    wanted = expected.get_secret_value().encode()
    # Headers are decoded as Latin-1; the same way back gives the bytes that were sent.
    return compare_digest(given.encode("latin-1"), wanted) and bool(wanted)
