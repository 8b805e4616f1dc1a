"""The public keys that sessions are checked with: those of the realm, fetched and kept.

What callers send decides when keys are fetched, so the rules below bound it: however many of them
come, and whatever key ids they make up, the issuer is asked once per `LOOKUP_SECONDS`, and
everybody waits for the same answer.
"""

import asyncio
import math
import time
from collections.abc import Callable
from typing import Annotated, Final, Literal

import httpx
import structlog
from jwt import PyJWK, PyJWTError
from pydantic import BaseModel, Field, JsonValue, ValidationError

from api.sessions import ALGORITHM, SigningKeys
from schema.errors import Unavailable
from schema.settings import Settings

log = structlog.get_logger(__name__)

REFRESH_SECONDS: Final = 300.0
"""Age at which kept keys are fetched anew: how long a withdrawn key may still be good."""
LOOKUP_SECONDS: Final = 10.0
"""Least time between two fetches that are due to a key id nobody has heard of."""
RETRY_SECONDS: Final = 5.0
"""How long an issuer that did not answer is left alone."""
FETCH_SECONDS: Final = 5.0
"""How long the issuer may take for its whole answer."""
MAX_DOCUMENT_BYTES: Final = 128 * 1024
MIN_KEY_BITS: Final = 2048

Clock = Callable[[], float]


class FixedKeys:
    """Keys that are at hand; without any, no session is valid."""

    def __init__(self, *keys: PyJWK) -> None:
        self._keys = {key.key_id: key for key in keys}

    async def key(self, key_id: str) -> PyJWK | None:
        """The key with this id, or None."""
        return self._keys.get(key_id)


class RemoteKeys:
    """The keys that an issuer publishes as a JSON Web Key Set (RFC 7517).

    They are fetched when they are first needed and again when they are `REFRESH_SECONDS` old or
    an unknown id comes up, so that a new key works at once. While the issuer is away the keys
    that it last published go on being used. `clock` counts seconds and never goes back.
    """

    def __init__(self, url: str, clock: Clock = time.monotonic) -> None:
        self._url = url
        self._clock = clock
        self._tls = httpx.create_ssl_context()  # here, because it reads files
        self._keys: dict[str, PyJWK] = {}
        self._stale_at = -math.inf
        self._rests_until = -math.inf
        self._is_failing = False
        self._fetching: asyncio.Task[None] | None = None

    async def key(self, key_id: str) -> PyJWK | None:
        """The key with this id, or None if the issuer has none.

        Raises:
            Unavailable: the issuer does not answer, and never did.
        """
        is_unknown = key_id not in self._keys
        is_stale = self._clock() >= self._stale_at
        if is_unknown or is_stale:
            self._fetch_unless_resting()
            # Nobody who has a key waits for an issuer that failed a moment ago.
            if self._fetching and (is_unknown or not self._is_failing):
                await asyncio.shield(self._fetching)
        if not self._keys:
            raise Unavailable(f"no keys from {self._url}")
        return self._keys.get(key_id)

    def _fetch_unless_resting(self) -> None:
        now = self._clock()
        if self._fetching or now < self._rests_until:
            return
        if now < self._stale_at:  # only a key id asks for it
            self._rests_until = now + LOOKUP_SECONDS
        self._fetching = asyncio.create_task(self._fetch())

    async def _fetch(self) -> None:
        try:
            keys = usable_keys(await self._document())
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            self._is_failing = True
            self._rests_until = max(self._rests_until, self._clock() + RETRY_SECONDS)
            log.warning("issuer gave no keys", url=self._url, error=repr(error)[:500])
        else:
            if keys.keys() != self._keys.keys():
                log.info("issuer has other keys", key_ids=sorted(keys))
            self._is_failing = False
            self._keys = keys
            self._stale_at = self._clock() + REFRESH_SECONDS
        finally:
            self._fetching = None

    async def _document(self) -> bytes:
        """What the issuer publishes, in bounded time and size."""
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        document = bytearray()
        async with (
            asyncio.timeout(FETCH_SECONDS),
            httpx.AsyncClient(verify=self._tls, timeout=FETCH_SECONDS) as client,
            client.stream("GET", self._url, headers=headers) as answer,
        ):
            async for chunk in answer.raise_for_status().aiter_raw():
                document += chunk
                if len(document) > MAX_DOCUMENT_BYTES:
                    raise ValueError(f"the document is longer than {MAX_DOCUMENT_BYTES} bytes")
        return bytes(document)


class _KeySet(BaseModel):
    keys: list[JsonValue]


class _SigningKey(BaseModel):
    """What is read of a published key: its public half, whatever else it carries."""

    kty: Literal["RSA"]
    kid: Annotated[str, Field(min_length=1)]
    use: Literal["sig"] = "sig"
    alg: Literal["RS256"] = ALGORITHM
    n: str
    e: str


def usable_keys(document: bytes) -> dict[str, PyJWK]:
    """The keys of a JSON Web Key Set that may sign sessions, by their ids; others are passed over.

    Raises:
        ValueError: it is no key set, or has no such key.
    """
    published = _KeySet.model_validate_json(document).keys
    keys = {key.key_id: key for key in map(_usable_key, published) if key and key.key_id}
    if not keys:
        raise ValueError("the document has no usable key")
    return keys


def _usable_key(published: JsonValue) -> PyJWK | None:
    try:
        key = PyJWK(_SigningKey.model_validate(published).model_dump())
    except (ValidationError, PyJWTError):
        return None
    return key if key.key.key_size >= MIN_KEY_BITS else None


def keys_of(settings: Settings) -> SigningKeys:
    """Where these settings have the keys come from."""
    if not settings.oidc_issuer:
        return FixedKeys()
    below = f"{settings.oidc_issuer.rstrip('/')}/protocol/openid-connect/certs"
    return RemoteKeys(settings.oidc_jwks_url or below)
