"""Who may do what: each route names its grants, which are checked before its input is read.

A request is authenticated first (`api.authentication`), then counted (`api.ratelimits`), then
authorized here, and only then is its body read and validated. Which organization it is about is
told by `org_id` in its path or query; where the body tells it, the route calls `require_role`.
"""

from collections.abc import Callable, Coroutine
from enum import StrEnum
from typing import Annotated, Any, Final, TypedDict
from uuid import UUID

from anyio import to_thread
from fastapi import Depends
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from api.callers import Caller, Service, User, caller_of
from api.jsonbodies import MEDIA_TYPE
from api.resources import resources_of
from ledger import directory
from ledger.database import Database
from ledger.directory import Role
from schema.errors import Forbidden, NotFound
from schema.scopes import Scope

GRANTS: Final = "x-access"
"""Where the OpenAPI document says who may call an operation."""


class Grant(StrEnum):
    """One way to be allowed; a route takes any of those it names."""

    USER = "user"
    """Anybody with a session."""
    MEMBER = "member"
    """Members of the organization, its admins among them."""
    ADMIN = "admin"
    """Admins of the organization."""
    SYSTEM_ADMIN = "system_admin"
    """System admins; they have every other right of a user as well."""
    SERVICE = "service"
    """Any service token."""
    PRECHECK = "service:precheck"
    USAGE_WRITE = "service:usage:write"
    DEDUCT = "service:deduct"
    OPS_READ = "service:ops:read"
    OPS_WRITE = "service:ops:write"


_SCOPES: Final = {Grant(f"{Grant.SERVICE}:{scope}"): scope for scope in Scope}
_NEEDED_ROLE: Final = {Grant.MEMBER: Role.MEMBER, Grant.ADMIN: Role.ADMIN}


class _RouteOptions(TypedDict):
    openapi_extra: dict[str, Any]


def allows(*grants: Grant) -> _RouteOptions:
    """The options of a route that lets callers with any of these grants in."""
    security: list[dict[str, list[str]]] = []
    if any(grant in _SCOPES or grant is Grant.SERVICE for grant in grants):
        security.append({"service token": []})
    if any(grant not in _SCOPES and grant is not Grant.SERVICE for grant in grants):
        security.append({"session": []})
    return {"openapi_extra": {GRANTS: sorted(grants), "security": security}}


class GuardedRoute(APIRoute):
    """A route that checks its grants before it reads its input.

    Raises:
        TypeError: it was declared without `allows(…)`.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The route's handler behind the check."""
        handle = self._handler()
        grants = frozenset(map(Grant, (self.openapi_extra or {}).get(GRANTS, ())))
        if not grants:
            raise TypeError(f"{self.path}: a guarded route names its grants with allows(…)")

        async def guarded(request: Request) -> Response:
            await _authorize(request, grants)
            return await handle(request)

        return guarded

    def _handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        return super().get_route_handler()


class QuickRoute(GuardedRoute):
    """A guarded route whose endpoint takes the request itself and answers a model.

    FastAPI's handling of parameters and answers is left out, which costs more than the gate's whole
    question. The endpoint reads its body with `api.jsonbodies`.
    """

    def _handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        async def handle(request: Request) -> Response:
            answer: BaseModel = await self.endpoint(request)
            return Response(answer.model_dump_json(), media_type=MEDIA_TYPE)

        return handle


async def _authorize(request: Request, grants: frozenset[Grant]) -> None:
    match caller_of(request):
        case Service() as service:
            _authorize_service(service, grants)
        case User() as user:
            await _authorize_user(request, user, grants)


def _authorize_service(service: Service, grants: frozenset[Grant]) -> None:
    if Grant.SERVICE in grants:
        return
    wanted = {scope for grant, scope in _SCOPES.items() if grant in grants}
    if not wanted:
        raise Forbidden("This is for people with a session, not for services.")
    if not wanted & service.scopes:
        raise Forbidden(f"The service token lacks the scope {' or '.join(sorted(wanted))}.")


async def _authorize_user(request: Request, user: User, grants: frozenset[Grant]) -> None:
    of_users = grants & {Grant.USER, Grant.MEMBER, Grant.ADMIN, Grant.SYSTEM_ADMIN}
    if not of_users:
        raise Forbidden("This is for services with a token, not for people.")
    if user.is_system_admin or Grant.USER in grants:
        return
    needed = [role for grant, role in _NEEDED_ROLE.items() if grant in grants]
    if not needed:
        raise Forbidden("This needs the role of a system admin.")
    org_id = _organization_of(request)
    if org_id is not None:  # else validation refuses the request, or its body tells
        database = resources_of(request).database
        await to_thread.run_sync(require_role, database, user, org_id, min(needed))


def _organization_of(request: Request) -> UUID | None:
    text = request.path_params.get("org_id") or request.query_params.get("org_id", "")
    try:
        return UUID(str(text))
    except ValueError:
        return None


def require_role(database: Database, caller: Caller, org_id: UUID, needed: Role) -> None:
    """Let a user pass who has this role, or a higher one, in the organization.

    Raises:
        NotFound: the user does not belong to it, or there is none: the answer is the same.
        Forbidden: they belong to it with a lower role, or no user is calling.
    """
    if not isinstance(caller, User):
        raise Forbidden("This is for people with a session, not for services.")
    if caller.is_system_admin:
        return
    role = directory.role_of(database, org_id, caller.id)
    if role is None:
        raise NotFound(f"no organization {org_id}")
    if role < needed:
        raise Forbidden(f"This needs the role {needed.name.lower()} in the organization.")


async def _caller(request: Request) -> Caller:
    return caller_of(request)


async def _user(request: Request) -> User:
    caller = caller_of(request)
    if not isinstance(caller, User):
        raise Forbidden("This is for people with a session, not for services.")
    return caller


CurrentCaller = Annotated[Caller, Depends(_caller)]
"""A route's parameter: who is calling."""
CurrentUser = Annotated[User, Depends(_user)]
"""A route's parameter: the user who is calling."""
