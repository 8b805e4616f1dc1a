"""Which front ends may call from a browser: listed origins, and wildcards among them.

A browser sends a session along with whatever any page asks for, so what changes something is
refused to pages that are neither listed nor this server's own (cross-site request forgery).
"""

import re
from collections.abc import Mapping
from typing import Final
from urllib.parse import urlsplit

from starlette.requests import Request

from schema.errors import Forbidden
from schema.settings import Environment, Settings

_LOCAL: Final = "http://localhost:*"
"""Allowed while developing, whatever is listed."""
_SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_USUAL_PORTS: Final = {"http": "80", "https": "443"}


def allowed_pattern(settings: Settings) -> str:
    """A regular expression for all allowed origins; it never matches where there are none."""
    listed = list(settings.cors_origins)
    if settings.env is Environment.DEVELOPMENT:
        listed.append(_LOCAL)
    return "|".join(map(_pattern, listed)) or r"(?!)"


def _pattern(origin: str) -> str:
    """The expression for one origin, in the form in which browsers send it (RFC 6454 §6.2)."""
    scheme, _, rest = origin.lower().partition("://")
    subdomain = rest.startswith("*.")
    host, _, port = rest.removeprefix("*.").partition(":")
    if port == "*":
        port = r"(:[0-9]{1,5})?"
    elif port:
        port = "" if port == _USUAL_PORTS[scheme] else f":{port}"
    # A whole label before the dot, so that evil-example.com is no subdomain of example.com.
    labels = r"([a-z0-9-]+\.)+" if subdomain else ""
    return f"{scheme}://{labels}{re.escape(host)}{port}"


def refuse_foreign_page(request: Request, allowed: re.Pattern[str]) -> None:
    """Let a request pass unless a page of another site has made a user's browser send it.

    Programs send no `Origin`, and have no cookies that a page could misuse.

    Raises:
        Forbidden: it would change something, and its origin is neither allowed nor our own.
    """
    origin = request.headers.get("origin")
    if (
        origin is not None
        and request.method not in _SAFE_METHODS
        and not is_own(origin, request.headers)
        and not allowed.fullmatch(origin)
    ):
        raise Forbidden(
            "This page may not act for its visitors.",
            suggested_action="Have the page's origin listed in METERING_CORS_ORIGINS.",
        )


def is_own(origin: str, headers: Mapping[str, str]) -> bool:
    """Whether a page of this very server is calling; a proxy may have ended its TLS."""
    try:
        address = urlsplit(origin)
    except ValueError:
        return False
    host = headers.get("host", "")
    return address.scheme in _USUAL_PORTS and bool(host) and address.netloc == host.lower()
