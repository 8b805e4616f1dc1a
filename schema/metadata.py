"""Event metadata: what it may hold, and the removal of secrets (contract.md §1)."""

import re
from functools import lru_cache
from itertools import pairwise
from math import isfinite
from typing import Final

from pydantic import JsonValue
from pydantic_core import to_json

MAX_METADATA_BYTES: Final = 8192

_NUL: Final = "must not contain a NUL character"

_WORDS: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SECRET_WORDS = frozenset(
    {
        "apikey", "authorization", "cookie", "credential", "credentials", "passphrase",
        "passwd", "password", "passwords", "pwd", "secret", "secrets", "ssn",
    }
)  # fmt: skip
_SECRET_PAIRS = frozenset({("api", "key"), ("access", "key"), ("private", "key")})
_SECRET_ENDINGS = ("token", "password", "secret", "apikey", "passwd")


@lru_cache(maxsize=4096)
def is_secret_key(key: str) -> bool:
    """Whether a metadata key names a secret.

    Keys are read word by word, whatever their case style: `apiKey`, `X-API-KEY` and
    `user_password` are secret; `total_tokens` and `token_count` are figures and stay.
    """
    words = [word.lower() for word in _WORDS.findall(key)]
    if not words:
        return False
    return (
        words[-1].endswith(_SECRET_ENDINGS)
        or words == ["auth"]
        or not _SECRET_WORDS.isdisjoint(words)
        or not _SECRET_PAIRS.isdisjoint(pairwise(words))
    )


def clean_metadata(metadata: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """A copy without secret keys, at every depth.

    Raises:
        ValueError: it holds what PostgreSQL's `jsonb` cannot (NUL characters, infinite numbers),
            or is longer than `MAX_METADATA_BYTES` of JSON.
    """
    if not metadata:
        return metadata
    cleaned = _clean_object(metadata)
    if len(to_json(cleaned)) > MAX_METADATA_BYTES:
        raise ValueError(f"must not be longer than {MAX_METADATA_BYTES} bytes of JSON")
    return cleaned


def _clean_object(value: dict[str, JsonValue]) -> dict[str, JsonValue]:
    if "\0" in "".join(value):
        raise ValueError(_NUL)
    return {key: _clean(item) for key, item in value.items() if not is_secret_key(key)}


def _clean(value: JsonValue) -> JsonValue:
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError(_NUL)
    elif isinstance(value, dict):
        return _clean_object(value)
    elif isinstance(value, list):
        return [_clean(item) for item in value]
    elif isinstance(value, float) and not isfinite(value):
        raise ValueError("must not contain infinite numbers or NaN")
    return value
