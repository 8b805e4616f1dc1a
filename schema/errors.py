"""The one error tree. Each error carries its code, HTTP status and what to do about it.

The API renders it, the command line prints it, the worker dead-letters by it::

    MeteringError
    ├── InvalidRequest            422  invalid_request
    │   └── EventError                 an event that can never be applied
    │       ├── MalformedEvent         not JSON, or not one object
    │       └── InvalidEvent           a field breaks its rule
    ├── NotAuthenticated          401  not_authenticated
    ├── InsufficientCredits       402  insufficient_credits
    ├── Forbidden                 403  forbidden
    │   ├── NoAllocation          403  no_allocation
    │   ├── NotAMember            403  not_a_member
    │   └── NoOrganization        403  no_organization
    ├── NotFound                  404  not_found
    ├── MethodNotAllowed          405  method_not_allowed
    ├── Conflict                  409  conflict
    │   ├── RequestIdConflict     409  request_id_conflict
    │   ├── SubscriptionExists    409  subscription_exists
    │   ├── OrganizationExists    409  organization_exists
    │   ├── MemberExists          409  member_exists
    │   └── NoSeatLeft            409  no_seat_left
    ├── BodyTooLarge              413  body_too_large
    ├── UnsupportedMediaType      415  unsupported_media_type
    ├── RateLimitExceeded         429  rate_limit_exceeded
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
    suggested_action = (
        "Log in for a session (cookie 'session_token'), or send a service token as "
        "'Authorization: Bearer …'."
    )


class InsufficientCredits(MeteringError):
    """The user has an allocation, and it is too small."""

    code = "insufficient_credits"
    status = 402
    suggested_action = "Ask an organization admin to allocate more credits."


class Forbidden(MeteringError):
    """The caller is known, and may not do this."""

    code = "forbidden"
    status = 403
    suggested_action = "Ask somebody who has the role or scope that this needs."


class NoAllocation(Forbidden):
    """The user has no active allocation in this organization."""

    code = "no_allocation"
    suggested_action = "Ask an organization admin to allocate credits to this user."


class NotAMember(Forbidden):
    """The user does not belong to the organization whose credits are to be spent."""

    code = "not_a_member"
    suggested_action = "Choose an organization of this user, or have an admin add them to this one."


class NoOrganization(Forbidden):
    """The user belongs to no organization at all."""

    code = "no_organization"
    suggested_action = "Have an organization admin add this user to their organization."


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


class RequestIdConflict(Conflict):
    """The request id stands for another request, or for one that has ended."""

    code = "request_id_conflict"
    suggested_action = "Give every operation a request id of its own."


class SubscriptionExists(Conflict):
    """The organization has a live subscription already."""

    code = "subscription_exists"
    suggested_action = "Change the plan of the live subscription, or cancel it first."


class OrganizationExists(Conflict):
    """The name of an organization is taken."""

    code = "organization_exists"
    suggested_action = "Choose another name."


class MemberExists(Conflict):
    """The user belongs to the organization already."""

    code = "member_exists"
    suggested_action = "Look the member up in the list of members."


class NoSeatLeft(Conflict):
    """The organization has as many members as it has seats."""

    code = "no_seat_left"
    suggested_action = "Raise the organization's max_seats, or remove a member."


class UnsupportedMediaType(MeteringError):
    """The request body is of a kind that this path does not read."""

    code = "unsupported_media_type"
    status = 415
    suggested_action = "Send the body as one of the media types that the API document names."


class RateLimitExceeded(MeteringError):
    """The caller sent more requests in a minute than they may; `retry_after` is in seconds."""

    code = "rate_limit_exceeded"
    status = 429
    suggested_action = "Wait as many seconds as Retry-After says, then go on more slowly."


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
