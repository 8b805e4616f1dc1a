"""Event metadata: what it may hold, and the removal of secrets (contract.md §1)."""

import json
import re
from collections.abc import Iterable
from functools import lru_cache
from math import isfinite
from typing import Any, Final

from pydantic import JsonValue
from pydantic_core import to_json

MAX_METADATA_BYTES: Final = 8192

MAX_METADATA_DEPTH: Final = 64
MAX_INTEGER_BITS: Final = 1024
"""Deeper or longer than this, parsers of other systems give up."""

_TOO_DEEP: Final = f"must not be nested deeper than {MAX_METADATA_DEPTH} levels"
_NUL: Final = "must not contain a NUL character"

_WORDS: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_SECRET_WORDS: Final = frozenset({"bearer", "cookie", "cookies", "jwt", "pwd", "ssn", "ssns"})
_SECRET_INFIXES: Final = (
    "accesskey", "apikey", "authorization", "credential", "passphrase", "passwd", "password",
    "privatekey",
)  # fmt: skip
_SECRET_ENDINGS: Final = (
    "auth", "secret", "secrets", "ssn", "ssns", "token", "tokenvalue",
    "accesstokens", "apitokens", "authtokens", "bearertokens", "refreshtokens", "sessiontokens",
)  # fmt: skip


@lru_cache(maxsize=4096)
def is_secret_key(key: str) -> bool:
    """Whether a metadata key names a secret.

    Case style and digits do not matter: `apiKeys`, `X-API-KEY`, `user_password` and `token_1` are
    secret; `total_tokens` and `token_count` are figures and stay.
    """
    words = [word.lower() for word in _WORDS.findall(key)]
    run_together = "".join(words)
    return (
        not _SECRET_WORDS.isdisjoint(words)
        or run_together.endswith(_SECRET_ENDINGS)
        or any(infix in run_together for infix in _SECRET_INFIXES)
        or any(word.endswith("secret") for word in words)
    )


def clean_metadata(metadata: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """A copy without secret keys, at every depth.

    Raises:
        ValueError: it holds what PostgreSQL's `jsonb` cannot (NUL characters, infinite numbers),
            or exceeds one of the limits above.
    """
    if not metadata:
        return metadata
    cleaned = _clean_object(metadata, MAX_METADATA_DEPTH)
    if len(to_json(cleaned)) > MAX_METADATA_BYTES:
        raise ValueError(f"must not be longer than {MAX_METADATA_BYTES} bytes of JSON")
    return cleaned


def _clean_object(value: dict[str, JsonValue], levels: int) -> dict[str, JsonValue]:
    if levels == 0:
        raise ValueError(_TOO_DEEP)
    if "\0" in "".join(value):
        raise ValueError(_NUL)
    return {key: _clean(item, levels) for key, item in value.items() if not is_secret_key(key)}


def _clean(value: JsonValue, levels: int) -> JsonValue:
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError(_NUL)
    elif isinstance(value, dict):
        return _clean_object(value, levels - 1)
    elif isinstance(value, list):
        if levels == 1:
            raise ValueError(_TOO_DEEP)
        return [_clean(item, levels - 1) for item in value]
    elif isinstance(value, float):
        if not isfinite(value):
            raise ValueError("must not contain infinite numbers or NaN")
    elif isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
        raise ValueError(f"must not contain integers of more than {MAX_INTEGER_BITS} bits")
    return value


def without_secrets(text: str) -> str:
    """A JSON document without secret keys, at every depth; any other text as it is.

    Unlike `clean_metadata` this takes a document of any kind and length. One without secrets is
    not changed by a character.
    """
    found = False

    def clean(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal found
        kept = {}
        for key, value in pairs:
            if is_secret_key(key):
                found = True
            else:
                kept[key] = value
        return kept

    try:
        document = json.loads(text, strict=False, object_pairs_hook=clean, parse_int=_integer)
    except (ValueError, RecursionError):
        return text
    if not found:
        return text
    return json.dumps(document, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


def _integer(digits: str) -> int | float:
    # Python refuses to read integers of thousands of digits.
    return int(digits) if len(digits) <= MAX_INTEGER_BITS else float(digits)
