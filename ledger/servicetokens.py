"""Service tokens: what services present to the API, kept only as hashes (contract.md §4, Identity).

A token is random and long, so a plain hash of it is as safe as a slow one, and quick to compare.
"""

import re
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Any, Final
from uuid import UUID

from ledger.database import Database, run
from ledger.idempotency import check_id
from ledger.prices import LATEST
from schema.errors import Conflict, InvalidRequest, NotFound
from schema.scopes import Scope

PREFIX: Final = "lnm_"
"""By which people and secret scanners recognize a token."""
_RANDOM_BYTES: Final = 32
_TOKEN: Final = re.compile(rf"{PREFIX}[A-Za-z0-9_-]{{43}}")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SCOPES: Final = frozenset(scope.value for scope in Scope)

# Readers go on; whoever else makes or revokes a token waits, so that a valid one owns its name.
_LOCK: Final = "LOCK TABLE service_tokens IN SHARE ROW EXCLUSIVE MODE"

_INSERT: Final = """
    INSERT INTO service_tokens (name, token_hash, scopes, created_by, created_at, expires_at)
    VALUES (
        %(name)b::text, %(token_hash)b, %(scopes)b::text[], %(actor)b::text, %(now)b,
        %(expires_at)b
    )
    RETURNING id, name, scopes, created_by, created_at, expires_at, revoked_at
"""

_EVERY: Final = """
    SELECT id, name, scopes, created_by, created_at, expires_at, revoked_at
    FROM service_tokens
    ORDER BY created_at DESC, id
"""

_VALID_OF_NAME: Final = """
    SELECT id
    FROM service_tokens
    WHERE name = %(name)b::text AND revoked_at IS NULL
        AND (expires_at IS NULL OR expires_at > %(now)b)
"""

_REVOKE: Final = """
    UPDATE service_tokens
    SET revoked_at = %(now)b
    WHERE name = %(name)b::text AND revoked_at IS NULL
        AND (expires_at IS NULL OR expires_at > %(now)b)
    RETURNING id, name, scopes, created_by, created_at, expires_at, revoked_at
"""

_BY_HASH: Final = """
    SELECT id, name, scopes, created_by, created_at, expires_at, revoked_at
    FROM service_tokens
    WHERE token_hash = %(token_hash)b
"""


@dataclass(frozen=True, slots=True)
class ServiceToken:
    """A token as it is known afterwards: never itself."""

    id: UUID
    name: str
    scopes: tuple[Scope, ...]
    created_by: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None

    def is_valid(self, now: datetime) -> bool:
        """Whether it is neither revoked nor expired."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


def create(
    database: Database,
    name: str,
    scopes: Collection[Scope],
    *,
    actor: str,
    expires_at: datetime | None = None,
    now: datetime,
) -> tuple[str, ServiceToken]:
    """Make a token; it is returned once and cannot be read again.

    A name is free again once its token has expired or was revoked.

    Raises:
        InvalidRequest: a name or actor that cannot be, no scope, or an end that has passed.
        Conflict: a valid token has this name.
        LedgerUnavailable: PostgreSQL does not answer.
    """
    text = new_text()
    return text, register(database, name, text, scopes, actor=actor, expires_at=expires_at, now=now)


def register(
    database: Database,
    name: str,
    text: str,
    scopes: Collection[Scope],
    *,
    actor: str,
    expires_at: datetime | None = None,
    now: datetime,
) -> ServiceToken:
    """Let a token that exists already be valid: the one that a stack keeps in its directory.

    Raises:
        InvalidRequest: as `create`, or a text that cannot be a token.
        Conflict: a valid token has this name, or the token is known: it is never valid again.
        LedgerUnavailable: PostgreSQL does not answer.
    """
    _check_name(name)
    _check(text, scopes, expires_at, now)
    check_id("actor", actor)
    token_hash = hash_of(text)
    with database.transaction() as connection:
        run(connection, _LOCK)
        if run(connection, _BY_HASH, token_hash=token_hash).first():
            raise Conflict("the token is known already: make a new one")
        if run(connection, _VALID_OF_NAME, name=name, now=now).first():
            raise Conflict(f"a valid token has the name {name}: revoke it, or choose another name")
        row = run(
            connection,
            _INSERT,
            name=name,
            token_hash=token_hash,
            scopes=sorted({scope.value for scope in scopes}),
            actor=actor,
            expires_at=expires_at,
            now=now,
        ).one()
    return _token(row)


def every(database: Database) -> list[ServiceToken]:
    """All tokens, valid or not, the newest first.

    Raises:
        LedgerUnavailable: PostgreSQL does not answer.
    """
    with database.snapshot() as connection:
        return [_token(row) for row in run(connection, _EVERY)]


def revoke(database: Database, name: str, *, now: datetime) -> ServiceToken:
    """End the valid token of this name.

    Raises:
        InvalidRequest: no token can have this name.
        NotFound: no valid one has it.
        LedgerUnavailable: PostgreSQL does not answer.
    """
    _check_name(name)
    with database.transaction() as connection:
        row = run(connection, _REVOKE, name=name, now=now).one_or_none()
    if row is None:
        raise NotFound(f"no valid token has the name {name}: 'metering token list' names those")
    return _token(row)


def find(database: Database, token_hash: bytes) -> ServiceToken | None:
    """The token with this hash, valid or not.

    Raises:
        LedgerUnavailable: PostgreSQL does not answer.
    """
    with database.snapshot() as connection:
        row = run(connection, _BY_HASH, token_hash=token_hash).one_or_none()
    return _token(row) if row else None


def new_text() -> str:
    """A new token; it is worth nothing until it is registered."""
    return PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)


def is_well_formed(text: str) -> bool:
    """Whether this can be a token at all."""
    return _TOKEN.fullmatch(text) is not None


def hash_of(text: str) -> bytes:
    """What is kept of a well-formed token."""
    return sha256(text.encode("ascii")).digest()


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            "name: must be 1 to 100 of the characters A-Z a-z 0-9 . _ -, the first of them a "
            "letter or digit",
            fields=["name"],
        )


def _check(
    text: str, scopes: Collection[Scope], expires_at: datetime | None, now: datetime
) -> None:
    if not is_well_formed(text):
        raise InvalidRequest("token: is not in the form of one", fields=["token"])
    if not scopes:
        raise InvalidRequest("scopes: a token needs at least one", fields=["scopes"])
    if expires_at is not None and not now < expires_at <= LATEST:
        raise InvalidRequest(
            f"expires_at: must be after {now.isoformat(timespec='seconds')}, and not after "
            f"{LATEST:%F}",
            fields=["expires_at"],
        )


def _token(row: Sequence[Any]) -> ServiceToken:
    id_, name, scopes, *others = row
    # What a later version has added means nothing to this one, and grants nothing.
    known = tuple(Scope(scope) for scope in scopes if scope in _SCOPES)
    return ServiceToken(id_, name, known, *others)
