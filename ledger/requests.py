"""What became of requests: their rows, and the dead letters written for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from pydantic import BaseModel, ConfigDict

from ledger.database import Database, run
from schema.errors import NotFound

SETTLED: Final = frozenset({"charged", "dead", "discarded"})
"""The states in which a further event of the same request changes nothing."""

_STATES: Final = """
    SELECT request_id, state, credits, reason
    FROM usage_requests
    WHERE org_id = %(org_id)b AND request_id = ANY(%(request_ids)b::text[])
"""

# The letter of the request itself; other reports that took its id have fingerprints of their own.
# A direct call that settles a hold dates its attribution by itself, and the request by the hold.
_REQUEST: Final = """
    SELECT
        r.request_id, r.org_id, r.user_id, r.service_type, r.state, r.credits, r.held_credits,
        r.hold_expires_at, r.reason,
        (
            SELECT d.detail
            FROM dead_letters d
            WHERE d.org_id = r.org_id AND d.request_id = r.request_id
                AND d.fingerprint = r.fingerprint
                AND r.state IN ('dead', 'discarded')
        ) AS detail,
        r.occurred_at, r.created_at, r.settled_at,
        (
            SELECT sum(u.credits_used)::bigint
            FROM credit_usage_attribution u
            WHERE u.org_id = r.org_id AND u.request_id = r.request_id
                AND u.occurred_at IN (r.occurred_at, r.settled_at)
        ) AS credits_used
    FROM usage_requests r
    WHERE r.org_id = %(org_id)b AND r.request_id = %(request_id)b::text
"""

# Every letter written after the call has a higher id, whatever the clocks of the workers say.
_LATEST_LETTER: Final = """
    SELECT coalesce(max(id), 0) FROM dead_letters
"""

_LETTERS_AFTER: Final = """
    SELECT request_id, reason
    FROM dead_letters
    WHERE id > %(mark)b AND org_id = %(org_id)b AND request_id = ANY(%(request_ids)b::text[])
    ORDER BY id
"""


@dataclass(frozen=True, slots=True)
class RequestState:
    """Where one request stands; `credits` is None for a request without a price."""

    state: str
    credits: int | None
    reason: str | None
    """Why it is dead or discarded, where it is."""

    @property
    def is_settled(self) -> bool:
        """Whether a further event of this request would change nothing."""
        return self.state in SETTLED


class Request(BaseModel):
    """One request from its hold to its end; all figures are credits."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    request_id: str
    org_id: UUID
    user_id: str
    service_type: str
    state: str
    """`held`, `charged`, `released`, `expired`, `dead` or `discarded`."""
    credits: int | None
    """What it costs as priced; None for one without a price."""
    held_credits: int | None
    """What its hold sets or has set aside; None if it never had one."""
    hold_expires_at: datetime | None
    reason: str | None
    """Why it is dead or discarded, where it is."""
    detail: str | None
    """The same in words."""
    occurred_at: datetime
    created_at: datetime
    settled_at: datetime | None
    """When it was charged, died, was released or expired."""
    credits_used: int | None
    """What it is charged after all corrections; None if it never was."""


def get(database: Database, org_id: UUID, request_id: str) -> Request:
    """Where a request stands.

    Raises:
        NotFound: the organization has no such request.
        LedgerUnavailable: PostgreSQL does not answer.
    """
    with database.snapshot() as connection:
        row = (
            run(connection, _REQUEST, org_id=org_id, request_id=request_id).mappings().one_or_none()
        )
    if row is None:
        raise NotFound(f"no request {request_id} in organization {org_id}")
    return Request.model_validate(dict(row))


def states(database: Database, org_id: UUID, request_ids: Sequence[str]) -> dict[str, RequestState]:
    """The state of each of an organization's requests that the ledger knows, by request id.

    Raises:
        LedgerUnavailable: PostgreSQL does not answer.
    """
    with database.snapshot() as connection:
        rows = run(connection, _STATES, org_id=org_id, request_ids=list(request_ids))
        return {request_id: RequestState(*row) for request_id, *row in rows}


def latest_dead_letter(database: Database) -> int:
    """A mark to give to `dead_letters_after`, to see what is written from now on.

    Raises:
        LedgerUnavailable: PostgreSQL does not answer.
    """
    with database.snapshot() as connection:
        mark: int = run(connection, _LATEST_LETTER).scalar_one()
        return mark


def dead_letters_after(
    database: Database, mark: int, org_id: UUID, request_ids: Sequence[str]
) -> list[tuple[str, str]]:
    """Request id and reason of each dead letter about these requests written since the mark.

    Raises:
        LedgerUnavailable: PostgreSQL does not answer.
    """
    with database.snapshot() as connection:
        rows = run(
            connection, _LETTERS_AFTER, mark=mark, org_id=org_id, request_ids=list(request_ids)
        )
        return [(request_id, reason) for request_id, reason in rows]
