"""Usage event, version 1: fields, rules, JSON form and fingerprint (contract.md §1)."""

from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from hashlib import sha256
from typing import Annotated, Any, Final
from uuid import UUID

import jiter
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    StrictInt,
    ValidationError,
)
from pydantic_core import ErrorDetails

from schema.errors import InvalidEvent, MalformedEvent
from schema.metadata import clean_metadata
from schema.plans import KeySource

REQUEST_ID_PATTERN: Final = r"\A[A-Za-z0-9_.:\-]{1,255}\z"
_NO_NUL_PATTERN: Final = r"\A[^\x00]*\z"
_PATTERNS_IN_WORDS: Final = {
    REQUEST_ID_PATTERN: "must be 1 to 255 of the characters A-Z a-z 0-9 . _ : -",
    _NO_NUL_PATTERN: "must not contain a NUL character",
}
MAX_CREDITS: Final = 1_000_000
UNNAMED_SERVICE: Final = "unspecified"
"""The service of a request that states its credits and says nothing else."""
MAX_QUANTITY: Final = Decimal(10**12)
_EARLIEST: Final = datetime(2, 1, 1, tzinfo=UTC)
_LATEST: Final = datetime(9998, 12, 31, tzinfo=UTC)
"""Times beyond these cannot be told in every time zone."""


def _iso_8601(value: object) -> object:
    """Refuse epoch numbers, which the datetime parser would otherwise take."""
    if isinstance(value, datetime) or (isinstance(value, str) and "-" in value[1:]):
        return value
    raise ValueError("must be an ISO 8601 date and time with a UTC offset")


def not_boolean(value: object) -> object:
    """Refuse true and false, which would otherwise be taken for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


RequestId = Annotated[str, Field(pattern=REQUEST_ID_PATTERN)]
UserId = Annotated[str, Field(min_length=1, max_length=255, pattern=_NO_NUL_PATTERN)]
Name = Annotated[str, Field(min_length=1, max_length=100, pattern=_NO_NUL_PATTERN)]
Variant = Annotated[str, Field(max_length=100, pattern=_NO_NUL_PATTERN)]
Quantity = Annotated[
    Decimal,
    Field(gt=0, le=MAX_QUANTITY, max_digits=38, allow_inf_nan=False),
    BeforeValidator(not_boolean),
]
Credits = Annotated[StrictInt, Field(ge=1, le=MAX_CREDITS)]
ServiceName = Annotated[str, Field(max_length=200, pattern=_NO_NUL_PATTERN)]
ApiCost = Annotated[
    Decimal,
    Field(ge=0, max_digits=14, decimal_places=6, allow_inf_nan=False),
    BeforeValidator(not_boolean),
]
Moment = Annotated[AwareDatetime, Field(ge=_EARLIEST, le=_LATEST), BeforeValidator(_iso_8601)]
Metadata = Annotated[dict[str, JsonValue], AfterValidator(clean_metadata)]
"""Field types of events and of the requests that precede them; texts are fit for PostgreSQL."""


class UsageEvent(BaseModel):
    """One successful operation, to be charged once.

    Times carry a UTC offset, credits are whole, `api_cost` is in USD. Unknown fields are refused,
    so that a misspelt `quantity` is never charged as 1. Secrets are removed from `metadata`.

    Raises:
        InvalidEvent: from `UsageEvent.of` and `parse_event`, naming each field and its rule.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    request_id: RequestId
    org_id: UUID
    user_id: UserId
    service_type: Name
    service_name: ServiceName | None = None
    variant: Variant | None = None
    quantity: Quantity = Decimal(1)
    credits: Credits | None = None
    api_cost: ApiCost | None = None
    key_source: KeySource = KeySource.MANAGED
    occurred_at: Moment
    metadata: Metadata = Field(default_factory=dict)
    source: Name = "loopnet"
    traceparent: Annotated[str, Field(max_length=255, pattern=_NO_NUL_PATTERN)] | None = None

    @classmethod
    def of(cls, /, **fields: Any) -> "UsageEvent":  # noqa: ANN401 - the fields are checked here
        """Build an event, or raise `InvalidEvent` naming what is wrong."""
        return _validated(fields)

    def to_json(self) -> bytes:
        """The event as it travels on the stream; defaults are left out."""
        return self.model_dump_json(exclude_defaults=True).encode()


def _validated(fields: object) -> "UsageEvent":
    try:
        return UsageEvent.model_validate(fields)
    except ValidationError as error:
        raise _invalid(error) from None
    except RecursionError:
        raise InvalidEvent("metadata: is nested too deeply", fields=["metadata"]) from None


def _invalid(error: ValidationError) -> InvalidEvent:
    problems: dict[str, str] = {}
    for item in error.errors(include_url=False, include_input=False):
        field = str(item["loc"][0])[:100] if item["loc"] else "event"
        problems.setdefault(field, _in_words(item))
    message = "; ".join(f"{field}: {problem}" for field, problem in problems.items())
    return InvalidEvent(message, fields=list(problems))


def _in_words(item: ErrorDetails) -> str:
    match item:
        case {"type": "string_pattern_mismatch", "ctx": {"pattern": pattern}}:
            return _PATTERNS_IN_WORDS[pattern]
        case {"type": "extra_forbidden"}:
            return "is not a field of a usage event"
        case _:
            return item["msg"].removeprefix("Value error, ")


def parse_event(payload: bytes) -> UsageEvent:
    """Read one event from the JSON of a stream entry.

    Raises:
        MalformedEvent: it is not JSON, not an object, or names a key twice.
        InvalidEvent: a field breaks its rule.
    """
    return _validated(parse_object(payload))


def parse_object(payload: bytes) -> dict[str, Any]:
    """Read one JSON object, as strictly as events are read.

    Raises:
        MalformedEvent: it is not JSON, not an object, or names a key twice.
    """
    try:
        document = jiter.from_json(
            payload, allow_inf_nan=False, cache_mode="keys", catch_duplicate_keys=True
        )
    except (ValueError, RecursionError) as error:
        raise MalformedEvent(f"not a JSON document: {error}") from None
    if not isinstance(document, dict):
        raise MalformedEvent("not a JSON object")
    return document


@dataclass(frozen=True, slots=True)
class Clues:
    """What can be told of an event that could not be read, to find it by."""

    org_id: UUID | None = None
    request_id: str | None = None
    user_id: str | None = None
    service_type: str | None = None


class _Request(BaseModel):
    request_id: RequestId


class _Organization(BaseModel):
    org_id: UUID


class _User(BaseModel):
    user_id: UserId


class _Service(BaseModel):
    service_type: Name


def clues_in(payload: bytes) -> Clues:
    """Whatever of organization, request, user and service a broken event still tells."""
    try:
        document = jiter.from_json(payload)
    except (ValueError, RecursionError):
        return Clues()
    if not isinstance(document, dict):
        return Clues()
    found: dict[str, Any] = {}
    for model in (_Request, _Organization, _User, _Service):
        try:
            found |= model.model_validate(document).model_dump()
        except ValidationError:
            continue
    return Clues(**found)


def fingerprint(user_id: str, service_type: str, credits: int | None) -> bytes:
    """What makes two reports of one request id the same request (design decision D4).

    SHA-256, first 16 bytes, of user, service and credits as priced; `deduct_credits()` computes
    the same in SQL. Lengths are written out, so that no two triples share one text.
    """
    text = f"{credits or ''}:{len(service_type)}:{service_type}{user_id}"
    return sha256(text.encode()).digest()[:16]
