"""Dead letters: events that could not be applied, kept whole with their reason (D6)."""

from collections.abc import Sequence
from datetime import datetime
from typing import Final

from sqlalchemy import Connection

from ledger.database import Database, run
from ledger.decisions import Death, Entry
from schema.errors import DeadReason
from schema.events import clues_in

MAX_DETAIL_CHARACTERS: Final = 2000

# A redelivered entry finds its letter here already; the first one stays.
_BURY: Final = """
    INSERT INTO dead_letters (
        reason, detail, org_id, request_id, user_id, service_type, credits, fingerprint,
        occurred_at, payload, stream, entry_id, created_at
    )
    SELECT *, %(now)b
    FROM unnest(
        %(reason)b::text[], %(detail)b::text[], %(org_id)b::uuid[], %(request_id)b::text[],
        %(user_id)b::text[], %(service_type)b::text[], %(credits)b::bigint[],
        %(fingerprint)b::bytea[], %(occurred_at)b::timestamptz[], %(payload)b::bytea[],
        %(stream)b::text[], %(entry_id)b::text[]
    )
    ON CONFLICT DO NOTHING
"""

_OPEN_BY_REASON: Final = """
    SELECT reason, count(*) FROM dead_letters WHERE state = 'open' GROUP BY reason ORDER BY reason
"""


def bury(connection: Connection, deaths: Sequence[Death], now: datetime) -> None:
    """Write one dead letter per death, in the transaction of the caller."""
    reports = [death.report for death in deaths]
    found = [death.report.event if death.report else death.clues for death in deaths]
    run(
        connection,
        _BURY,
        now=now,
        reason=[death.reason.value for death in deaths],
        detail=[_storable(death.detail) for death in deaths],
        org_id=[who.org_id for who in found],
        request_id=[who.request_id for who in found],
        user_id=[who.user_id for who in found],
        service_type=[who.service_type for who in found],
        credits=[report.credits if report else None for report in reports],
        fingerprint=[report.fingerprint if report else None for report in reports],
        occurred_at=[report.event.occurred_at if report else None for report in reports],
        payload=[death.entry.payload for death in deaths],
        stream=[death.entry.stream for death in deaths],
        entry_id=[death.entry.entry_id for death in deaths],
    )


def bury_unprocessable(
    connection: Connection, entry: Entry, error: Exception, now: datetime
) -> None:
    """Set aside one entry that nothing could be done with, in a transaction of its own.

    Only what cannot fail is written: the payload as it came, and the error.
    """
    detail = f"{type(error).__name__}: {error}"
    death = Death(entry, DeadReason.UNPROCESSABLE, detail, clues=clues_in(entry.payload))
    with connection.begin():
        bury(connection, [death], now)


def open_by_reason(database: Database) -> dict[str, int]:
    """How many dead letters are open, by reason."""
    with database.snapshot() as connection:
        return dict(run(connection, _OPEN_BY_REASON).tuples().all())


def _storable(text: str) -> str:
    text = text.replace("\0", "\\0")[:MAX_DETAIL_CHARACTERS]
    return text.encode("utf-8", "backslashreplace").decode()
