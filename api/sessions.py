"""Sessions: the Keycloak token in the cookie `session_token`, and whom it names.

Checked are the signature (RS256 and nothing else), the issuer, for whom the token is (`aud` or
`azp`), that it is an access token (`typ`), and its times (`exp`, `nbf`, `iat`) with some leeway.
Callers are told no more than that a session is not valid or has expired; the log says what makes it
invalid.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated, Final, Literal, NoReturn, Protocol

import structlog
from jwt import PyJWK, PyJWS, PyJWTError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from api.callers import User
from schema.errors import NotAuthenticated
from schema.events import UserId

log = structlog.get_logger(__name__)

COOKIE: Final = "session_token"
SYSTEM_ADMIN: Final = "system_admin"
"""The realm role that makes a system admin."""
ALGORITHM: Final = "RS256"
ACCESS_TOKEN: Final = "Bearer"  # noqa: S105 - what Keycloak calls the type
MAX_TOKEN_CHARACTERS: Final = 16 * 1024
REMEMBERED_SECONDS: Final = 60.0
"""How long a token that has been checked is known by its hash: a check takes some 80 µs."""
_MOST: Final = 10_000
_TYPES: Final = ("JWT", "AT+JWT")
_END_OF_9999: Final = 253_402_300_799

_signatures: Final = PyJWS(algorithms=[ALGORITHM])


class SigningKeys(Protocol):
    """The issuer's public keys."""

    async def key(self, key_id: str) -> PyJWK | None:
        """The key with this id, or None if the issuer has none.

        Raises:
            Unavailable: the issuer does not answer, and no earlier answer of it will do.
        """


_Seconds = Annotated[float, Field(ge=0, le=_END_OF_9999)]
"""A time in Unix seconds."""
_Text = Annotated[str, Field(pattern=r"\A[^\x00]*\z")]


class _RealmAccess(BaseModel):
    model_config = ConfigDict(strict=True)

    roles: list[str] = []


class _Claims(BaseModel):
    """What is read of a token; it is not valid where any of it is missing or of another type."""

    model_config = ConfigDict(strict=True)

    iss: str
    sub: UserId
    typ: Literal["Bearer"]
    exp: _Seconds
    iat: _Seconds
    nbf: _Seconds = 0
    azp: str | None = None
    aud: str | list[str] = []
    email: _Text | None = None
    name: _Text | None = None
    realm_access: _RealmAccess = _RealmAccess()

    def is_for(self, audience: str) -> bool:
        """Whether the token was issued for this client, or to it."""
        named = [self.aud] if isinstance(self.aud, str) else self.aud
        return audience in named or audience == self.azp

    def user(self) -> User:
        """Whom the token names."""
        return User(
            id=self.sub,
            email=self.email,
            name=self.name,
            is_system_admin=SYSTEM_ADMIN in self.realm_access.roles,
        )


@dataclass(frozen=True, slots=True)
class _Remembered:
    user: User
    key_id: str
    key: PyJWK
    until: float


class Sessions:
    """Tells users by their tokens. `clock` tells Unix seconds."""

    def __init__(
        self,
        keys: SigningKeys,
        *,
        issuer: str,
        audience: str,
        leeway_seconds: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._keys = keys
        self._issuer = issuer
        self._audience = audience
        self._leeway_seconds = leeway_seconds
        self._clock = clock
        self._remembered: dict[bytes, _Remembered] = {}

    async def user_of(self, token: str) -> User:
        """The user whose session this is.

        Raises:
            NotAuthenticated: it is no token, is not for this service, or is not in force.
            Unavailable: the issuer's keys cannot be had.
        """
        if len(token) > MAX_TOKEN_CHARACTERS or not token.isascii():
            _refuse("it cannot be a token")
        token_hash = sha256(token.encode()).digest()
        known = self._remembered.get(token_hash)
        if known is None or not await self._still_holds(known):
            known = await self._check(token)
            if len(self._remembered) >= _MOST:
                self._remembered.clear()
            self._remembered[token_hash] = known
        return known.user

    async def _still_holds(self, known: _Remembered) -> bool:
        """Whether nothing that was checked may have changed, the issuer's keys included."""
        return self._clock() < known.until and await self._keys.key(known.key_id) is known.key

    async def _check(self, token: str) -> _Remembered:
        key_id = _key_id(token)
        key = await self._keys.key(key_id)
        if key is None:
            _refuse("its key is not the issuer's")
        claims = _signed_claims(token, key)
        if claims.iss != self._issuer:
            _refuse("it is another issuer's")
        if not claims.is_for(self._audience):
            _refuse("it is for another service")
        now, leeway = self._clock(), self._leeway_seconds
        if max(claims.nbf, claims.iat) > now + leeway:
            _refuse("it is of the future")
        if claims.exp + leeway <= now:
            raise NotAuthenticated("The session has expired.")
        until = min(now + REMEMBERED_SECONDS, claims.exp + leeway)
        return _Remembered(claims.user(), key_id, key, until)


def _key_id(token: str) -> str:
    """The id of the key that a token says it is signed with, once its head is one of ours."""
    try:
        head = _signatures.get_unverified_header(token)
    except PyJWTError:
        _refuse("it is not a token")
    key_id, type_ = head.get("kid"), head.get("typ", _TYPES[0])
    if (
        head.get("alg") != ALGORITHM
        or not (isinstance(type_, str) and type_.upper() in _TYPES)
        or not isinstance(key_id, str)
        or "crit" in head  # whatever it asks for, this is not done here (RFC 7515 §4.1.11)
    ):
        _refuse("its head is not that of a session")
    return key_id


def _signed_claims(token: str, key: PyJWK) -> _Claims:
    try:
        payload = _signatures.decode(token, key, algorithms=[ALGORITHM])
        return _Claims.model_validate_json(payload)
    except PyJWTError:
        _refuse("its signature is not that of its key")
    except ValidationError as error:
        odd = {str(item["loc"][0]) for item in error.errors() if item["loc"]}
        _refuse("a claim is missing or odd", claims=sorted(odd))


def _refuse(reason: str, **details: object) -> NoReturn:
    log.info("session refused", reason=reason, **details)
    raise NotAuthenticated("The session is not valid.") from None
