"""The error tree: codes, statuses and the shape of contract.md §4."""

from collections.abc import Iterator

import pytest

from schema import errors
from schema.errors import (
    Conflict,
    DeadReason,
    EventError,
    InsufficientCredits,
    InvalidEvent,
    InvalidRequest,
    LedgerUnavailable,
    MalformedEvent,
    MeteringError,
    NoAllocation,
    NotAuthenticated,
    NotFound,
    QueueUnavailable,
    UnsupportedMediaType,
)


def tree(root: type[MeteringError]) -> Iterator[type[MeteringError]]:
    """The errors of this module below `root`, and itself."""
    yield root
    for child in root.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from tree(child)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (NotAuthenticated, 401, "not_authenticated"),
        (InsufficientCredits, 402, "insufficient_credits"),
        (NoAllocation, 403, "no_allocation"),
        (NotFound, 404, "not_found"),
        (Conflict, 409, "conflict"),
        (UnsupportedMediaType, 415, "unsupported_media_type"),
        (InvalidRequest, 422, "invalid_request"),
        (InvalidEvent, 422, "invalid_request"),
        (MalformedEvent, 422, "invalid_request"),
        (LedgerUnavailable, 503, "unavailable"),
        (QueueUnavailable, 503, "unavailable"),
    ],
)
def test_statuses_and_codes_are_the_contract(
    error: type[MeteringError], status: int, code: str
) -> None:
    assert (error.status, error.code) == (status, code)


def test_an_error_tells_what_is_wrong_what_to_do_and_what_helps() -> None:
    error = InsufficientCredits("5 available, 10 needed", required=10, remaining=5)
    assert str(error) == "5 available, 10 needed"
    assert error.as_detail() == {
        "error": "insufficient_credits",
        "message": "5 available, 10 needed",
        "suggested_action": "Ask an organization admin to allocate more credits.",
        "required": 10,
        "remaining": 5,
    }


@pytest.mark.parametrize("error", list(tree(MeteringError)), ids=lambda error: error.__name__)
def test_every_error_is_drawn_documented_and_says_what_to_do(error: type[MeteringError]) -> None:
    assert errors.__doc__ is not None
    assert error.__name__ in errors.__doc__
    assert error.__doc__
    assert error.suggested_action.endswith(".")
    assert 400 <= error.status <= 599


def test_the_reasons_of_death_are_the_design() -> None:
    assert {str(reason) for reason in DeadReason} == {
        "malformed",
        "invalid",
        "unknown_organization",
        "no_allocation",
        "insufficient_credits",
        "request_id_conflict",
        "unknown_service",
        "price_mismatch",
        "too_old",
        "in_the_future",
        "unprocessable",
    }


def test_an_event_error_knows_the_reason_of_the_death_it_causes() -> None:
    reasons = {error: error.reason for error in (EventError, MalformedEvent, InvalidEvent)}
    assert reasons == {
        EventError: DeadReason.UNPROCESSABLE,
        MalformedEvent: DeadReason.MALFORMED,
        InvalidEvent: DeadReason.INVALID,
    }
