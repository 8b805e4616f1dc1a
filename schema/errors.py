"""The one error tree. Each error carries its code, HTTP status and what to do about it.

The API renders it, the command line prints it, the worker dead-letters by it::

    MeteringError
    ├── InvalidRequest            422  invalid_request
    │   └── EventError                 an event that can never be applied
    │       ├── MalformedEvent         not JSON, or not one object
    │       └── InvalidEvent           a field breaks its rule
    ├── NotAuthenticated          401  not_authenticated
    ├── InsufficientCredits       402  insufficient_credits
    ├── NoAllocation              403  no_allocation
    ├── NotFound                  404  not_found
    ├── MethodNotAllowed          405  method_not_allowed
    ├── Conflict                  409  conflict
    ├── BodyTooLarge              413  body_too_large
    ├── Unavailable               503  unavailable
    │   ├── LedgerUnavailable          PostgreSQL is away
    │   └── QueueUnavailable           Redis is away
    └── ConfigurationError             settings, files or processes are not as needed
"""

from enum import StrEnum
from typing import ClassVar


class DeadReason(StrEnum):
    """Why an event could not be applied (design decision D6)."""

    MALFORMED = "malformed"
    INVALID = "invalid"
    UNKNOWN_ORGANIZATION = "unknown_organization"
    NO_ALLOCATION = "no_allocation"
    INSUFFICIENT_CREDITS = "insufficient_credits"
    REQUEST_ID_CONFLICT = "request_id_conflict"
    UNKNOWN_SERVICE = "unknown_service"
    PRICE_MISMATCH = "price_mismatch"
    TOO_OLD = "too_old"
    IN_THE_FUTURE = "in_the_future"
    UNPROCESSABLE = "unprocessable"


class MeteringError(Exception):
    """Root of all errors this project raises on purpose."""

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500
    suggested_action: ClassVar[str] = "Report this with the request id."

    def __init__(self, message: str, **details: object) -> None:
        super().__init__(message)
        self.message = message
        self.details = details
        """What helps the caller: `required`, `remaining`, `retry_after`, `fields` …"""

    def as_detail(self) -> dict[str, object]:
        """The error in the shape of contract.md §4."""
        return {
            "error": self.code,
            "message": self.message,
            "suggested_action": self.suggested_action,
            **self.details,
        }


class InvalidRequest(MeteringError):
    """The caller sent something that breaks the contract."""

    code = "invalid_request"
    status = 422
    suggested_action = "Correct the named fields and send the request again."


class EventError(InvalidRequest):
    """A usage event that can never be applied as it is."""

    reason: ClassVar[DeadReason] = DeadReason.UNPROCESSABLE


class MalformedEvent(EventError):
    """The entry is not one JSON object."""

    reason = DeadReason.MALFORMED


class InvalidEvent(EventError):
    """The event is an object, and a field breaks its rule."""

    reason = DeadReason.INVALID


class NotAuthenticated(MeteringError):
    """No credentials, or bad ones."""

    code = "not_authenticated"
    status = 401
    suggested_action = "Send a valid service token as 'Authorization: Bearer …'."


class InsufficientCredits(MeteringError):
    """The user has an allocation, and it is too small."""

    code = "insufficient_credits"
    status = 402
    suggested_action = "Ask an organization admin to allocate more credits."


class NoAllocation(MeteringError):
    """The user has no active allocation in this organization."""

    code = "no_allocation"
    status = 403
    suggested_action = "Ask an organization admin to allocate credits to this user."


class NotFound(MeteringError):
    """What was named does not exist, or the caller may not see it."""

    code = "not_found"
    status = 404
    suggested_action = "Check the id."


class MethodNotAllowed(MeteringError):
    """The path exists, and not for this method."""

    code = "method_not_allowed"
    status = 405
    suggested_action = "Use a method that the Allow header names."


class BodyTooLarge(MeteringError):
    """The request body is longer than the API reads."""

    code = "body_too_large"
    status = 413
    suggested_action = "Send less at a time."


class Conflict(MeteringError):
    """The request contradicts what is already there."""

    code = "conflict"
    status = 409
    suggested_action = "Look at the existing object and decide which one is right."


class Unavailable(MeteringError):
    """A dependency is away; the same request may succeed later."""

    code = "unavailable"
    status = 503
    suggested_action = "Try again shortly."


class LedgerUnavailable(Unavailable):
    """PostgreSQL does not answer."""


class QueueUnavailable(Unavailable):
    """Redis does not answer."""

    suggested_action = "Send the event again: a second copy of one request id is never charged."


class ConfigurationError(MeteringError):
    """Settings, files or processes are not as this command needs them."""

    code = "configuration"
    suggested_action = "Correct the setting or file that the message names."
