"""What became of requests: their rows, and the dead letters written for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from ledger.database import Database, run

SETTLED: Final = frozenset({"charged", "dead", "discarded"})
"""The states in which a further event of the same request changes nothing."""

_STATES: Final = """
    SELECT request_id, state, credits, reason
    FROM usage_requests
    WHERE org_id = %(org_id)b AND request_id = ANY(%(request_ids)b::text[])
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
