"""Dead letters: events that could not be applied, kept whole with their reason (D6)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final
from uuid import UUID

from sqlalchemy import Connection

from ledger.database import Database, run
from ledger.decisions import Death, Entry
from ledger.pages import Page, Window
from schema.errors import DeadReason, NotFound
from schema.events import clues_in
from schema.metadata import without_secrets

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

_LETTER: Final = """
    SELECT
        id, reason, detail, org_id, request_id, user_id, service_type, credits, occurred_at, state,
        created_at, resolved_at, stream, entry_id
"""

_MATCHING: Final = """
    FROM dead_letters
    WHERE (%(state)b::text IS NULL OR state = %(state)b)
        AND (%(reason)b::text IS NULL OR reason = %(reason)b)
        AND (%(org_id)b::uuid IS NULL OR org_id = %(org_id)b)
        AND (%(user_id)b::text IS NULL OR user_id = %(user_id)b)
        AND (%(request_id)b::text IS NULL OR request_id = %(request_id)b)
        AND (%(since)b::timestamptz IS NULL OR created_at >= %(since)b)
        AND (%(until)b::timestamptz IS NULL OR created_at < %(until)b)
"""

_COUNT: Final = f"""
    SELECT count(*)
    {_MATCHING}
"""

# Every letter has a higher id than those before it, whatever the clocks of the workers say.
_PAGE: Final = f"""
    {_LETTER}
    {_MATCHING}
    ORDER BY id DESC
    LIMIT %(limit)b OFFSET %(offset)b
"""

_ONE: Final = f"""
    {_LETTER}, payload
    FROM dead_letters
    WHERE id = %(id)b
"""


class LetterState(StrEnum):
    """Where a dead letter stands."""

    OPEN = "open"
    CHARGED = "charged"
    """Its event was charged after all."""
    DISCARDED = "discarded"


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An event that could not be applied; what could not be told of it is None."""

    id: int
    reason: str
    detail: str
    org_id: UUID | None
    request_id: str | None
    user_id: str | None
    service_type: str | None
    credits: int | None
    occurred_at: datetime | None
    state: str
    created_at: datetime
    resolved_at: datetime | None
    stream: str | None
    entry_id: str | None


@dataclass(frozen=True, slots=True)
class OpenedLetter(DeadLetter):
    """A dead letter with its event as it was sent, less the secrets in it."""

    payload: str


@dataclass(frozen=True, slots=True)
class Sought:
    """Which dead letters to list: those that are all of this, as far as it is given."""

    state: LetterState | None = None
    reason: DeadReason | None = None
    org_id: UUID | None = None
    user_id: str | None = None
    request_id: str | None = None
    since: datetime | None = None
    """Written at this time or later."""
    until: datetime | None = None
    """Written before this time."""


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
        return dict(run(connection, _OPEN_BY_REASON).all())


def page(database: Database, sought: Sought, window: Window) -> Page[DeadLetter]:
    """A part of the dead letters that match, the latest first.

    Raises:
        LedgerUnavailable: PostgreSQL does not answer.
    """
    with database.snapshot() as connection:
        total: int = run(connection, _COUNT, **asdict(sought)).scalar_one()
        rows = run(connection, _PAGE, **asdict(sought), **asdict(window))
        return Page([DeadLetter(*row) for row in rows.fetchall()], total)


def one(database: Database, letter_id: int) -> OpenedLetter:
    r"""One dead letter with its payload as text: what is no UTF-8 is shown as `\x…`.

    Secrets are removed as from metadata, if the payload is JSON; from what is not, nothing can
    be removed.

    Raises:
        NotFound: there is no such letter.
        LedgerUnavailable: PostgreSQL does not answer.
    """
    with database.snapshot() as connection:
        row = run(connection, _ONE, id=letter_id).mappings().one_or_none()
    if row is None:
        raise NotFound(f"no dead letter {letter_id}")
    payload = row["payload"].decode("utf-8", "backslashreplace")
    return OpenedLetter(**{**row, "payload": without_secrets(payload)})


def _storable(text: str) -> str:
    text = text.replace("\0", "\\0")[:MAX_DETAIL_CHARACTERS]
    return text.encode("utf-8", "backslashreplace").decode()
