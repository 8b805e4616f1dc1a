"""What the scheduled tasks found when they last ran: kept for operators and metrics."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from psycopg.types.json import Jsonb

from ledger.database import Database, run

KEPT: Final = 1000
"""Runs kept of each task."""

_RECORD: Final = """
    INSERT INTO scheduled_runs (task, started_at, seconds, figures)
    VALUES (%(task)b::text, %(started_at)b, %(seconds)b::float8, %(figures)b)
"""

_FORGET: Final = """
    DELETE FROM scheduled_runs
    WHERE id IN (
        SELECT id
        FROM scheduled_runs
        WHERE task = %(task)b::text
        ORDER BY started_at DESC, id DESC
        OFFSET %(kept)b
    )
"""

_LATEST: Final = """
    SELECT task, started_at, seconds, figures
    FROM scheduled_runs
    WHERE task = %(task)b::text
    ORDER BY started_at DESC, id DESC
    LIMIT 1
"""


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a task: when it began, how long it took, and what it says of itself."""

    task: str
    started_at: datetime
    seconds: float
    figures: dict[str, Any]


def record(
    database: Database,
    task: str,
    started_at: datetime,
    seconds: float,
    figures: Mapping[str, Any],
) -> None:
    """Keep what a run found, and forget the oldest runs of the task beyond `KEPT`.

    Args:
        database: the ledger.
        task: the name of the task.
        started_at: when the run began.
        seconds: how long it took.
        figures: what it found; anything that JSON can hold.

    Raises:
        LedgerUnavailable: PostgreSQL does not answer.
    """
    with database.transaction() as connection:
        run(
            connection,
            _RECORD,
            task=task,
            started_at=started_at,
            seconds=seconds,
            figures=Jsonb(dict(figures)),
        )
        run(connection, _FORGET, task=task, kept=KEPT)


def latest(database: Database, task: str) -> Run | None:
    """The run of a task that began last, or None if none is known.

    Raises:
        LedgerUnavailable: PostgreSQL does not answer.
    """
    with database.snapshot() as connection:
        row = run(connection, _LATEST, task=task).one_or_none()
    return Run(*row) if row else None
