"""Who is calling: a user with a session, or a service with a token (contract.md §4, Identity)."""

from dataclasses import dataclass
from typing import cast
from uuid import UUID

from starlette.requests import Request

from schema.scopes import Scope


@dataclass(frozen=True, slots=True)
class User:
    """A person with a session; `id` is the Keycloak subject."""

    id: str
    email: str | None = None
    name: str | None = None
    is_system_admin: bool = False

    @property
    def actor(self) -> str:
        """How the books call them."""
        return self.id

    @property
    def identity(self) -> str:
        """By what their requests are counted."""
        return f"user:{self.id}"


@dataclass(frozen=True, slots=True)
class Service:
    """A program with a service token."""

    id: UUID
    name: str
    scopes: frozenset[Scope]

    @property
    def actor(self) -> str:
        """How the books call it."""
        return f"service:{self.name}"

    @property
    def identity(self) -> str:
        """By what its requests are counted."""
        return f"service:{self.id}"


Caller = User | Service


def caller_of(request: Request) -> Caller:
    """Who sent this request; authentication has put them there."""
    return cast("Caller", request.state.caller)
