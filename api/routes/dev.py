"""`/dev/…`: log in as anybody, while developing. There only where the development issuer is."""

import re
from pathlib import Path
from typing import Annotated, Final, cast

from fastapi import APIRouter, Depends, Form
from jwt.types import JWKDict
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.status import HTTP_204_NO_CONTENT, HTTP_303_SEE_OTHER
from starlette.templating import Jinja2Templates

from api.callers import User
from api.devissuer import SESSION_TIME, DevIssuer
from api.origins import allowed_pattern, refuse_foreign_page
from api.resources import LedgerDatabase, resources_of
from api.sessions import COOKIE
from ledger import people
from ledger.clock import utc_now
from schema.errors import NotAuthenticated, Unavailable
from schema.events import UserId

PAGE: Final = "/dev/login"
MOST_PEOPLE: Final = 200
"""Of more people the page lists those whose ids come first; a field takes any other id."""
_SYSTEM_ADMIN: Final = "system-admin"
"""User id of the system admin whom the page offers."""
_HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; "
        "frame-ancestors 'none'; base-uri 'none'"
    ),
}

router = APIRouter(prefix="/dev", include_in_schema=False)
templates = Jinja2Templates(Path(__file__).parents[1] / "templates")

LocalPath = Annotated[str, Field(pattern=r"\A/([!-.0-\[\]-~][!-\[\]-~]*)?\z", max_length=2000)]
"""A path on this server: one slash, and nothing that a browser makes a second one of."""


class Login(BaseModel):
    """The form of the login page."""

    model_config = ConfigDict(extra="forbid")

    user_id: UserId
    system_admin: bool = False
    next: LocalPath = PAGE


class LoggedIn(BaseModel):
    """What programs are answered instead of the redirect; the session is in the cookie."""

    user_id: str
    expires_at: str


def _issuer(request: Request) -> DevIssuer:
    return cast("DevIssuer", resources_of(request).dev_issuer)


async def _visitor(request: Request) -> User | None:
    try:
        return await resources_of(request).sessions.user_of(request.cookies.get(COOKIE, ""))
    except (NotAuthenticated, Unavailable):
        return None


async def _own_page(request: Request) -> None:
    pattern = allowed_pattern(resources_of(request).settings)
    refuse_foreign_page(request, re.compile(pattern))


@router.get("/login")
def login_page(
    request: Request,
    database: LedgerDatabase,
    visitor: Annotated[User | None, Depends(_visitor)],
    next: LocalPath = PAGE,  # noqa: A002 - the usual name of this parameter
) -> HTMLResponse:
    """Those who belong to an organization, each with a button to log in as."""
    listed = people.listed(database, limit=MOST_PEOPLE + 1)
    return templates.TemplateResponse(
        request,
        "devlogin.html",
        {
            "visitor": visitor,
            "people": listed[:MOST_PEOPLE],
            "are_more": len(listed) > MOST_PEOPLE,
            "system_admin": _SYSTEM_ADMIN,
            "next": next,
        },
        headers=_HEADERS,
    )


@router.post("/login", dependencies=[Depends(_own_page)])
def log_in(
    request: Request,
    form: Annotated[Login, Form()],
    database: LedgerDatabase,
    issuer: Annotated[DevIssuer, Depends(_issuer)],
) -> Response:
    """Set the session cookie, and go on to `next`."""
    known = people.listed(database, user_id=form.user_id, limit=1)
    user = User(
        id=form.user_id,
        email=known[0].email if known else None,
        name=known[0].name if known else None,
        is_system_admin=form.system_admin,
    )
    token, expires_at = issuer.session(user, utc_now())
    answer: Response
    if _wants_json(request):
        logged_in = LoggedIn(user_id=user.id, expires_at=expires_at.isoformat())
        answer = JSONResponse(logged_in.model_dump(), headers=_HEADERS)
    else:
        answer = RedirectResponse(form.next, HTTP_303_SEE_OTHER, _HEADERS)
    lasts = int(SESSION_TIME.total_seconds())
    answer.set_cookie(COOKIE, token, max_age=lasts, path="/", httponly=True, samesite="lax")
    return answer


@router.post("/logout", dependencies=[Depends(_own_page)])
async def log_out(request: Request) -> Response:
    """Forget the session cookie; 204 for programs, the login page for people."""
    answer = (
        Response(status_code=HTTP_204_NO_CONTENT)
        if _wants_json(request)
        else RedirectResponse(PAGE, HTTP_303_SEE_OTHER)
    )
    answer.delete_cookie(COOKIE, path="/", httponly=True, samesite="lax")
    return answer


@router.get("/jwks")
async def jwks(issuer: Annotated[DevIssuer, Depends(_issuer)]) -> dict[str, list[JWKDict]]:
    """The key that sessions are signed with, as a JSON Web Key Set."""
    return {"keys": [issuer.published]}


def _wants_json(request: Request) -> bool:
    return "application/json" in request.headers.get("accept", "")
