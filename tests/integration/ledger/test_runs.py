"""Runs of scheduled tasks: the latest is found, and the oldest are forgotten."""

from datetime import timedelta

import psycopg

from ledger import runs
from ledger.database import Database
from tests.integration.ledger.world import NOW

HOUR = timedelta(hours=1)


def test_the_latest_run_of_a_task_is_found(database: Database) -> None:
    figures = {"drifts": {"pools.used": 2}, "organizations": 3}
    runs.record(database, "proof", NOW, 1.5, figures)
    runs.record(database, "proof", NOW - HOUR, 2.5, {})
    runs.record(database, "other", NOW + HOUR, 3.5, {})
    assert runs.latest(database, "proof") == runs.Run("proof", NOW, 1.5, figures)


def test_of_two_runs_at_a_time_the_last_recorded_counts(database: Database) -> None:
    for seconds in (1, 2):
        runs.record(database, "proof", NOW, seconds, {})
    found = runs.latest(database, "proof")
    assert found is not None
    assert found.seconds == 2


def test_a_task_that_never_ran_has_no_latest_run(database: Database) -> None:
    runs.record(database, "other", NOW, 1, {})
    assert runs.latest(database, "proof") is None


def test_the_oldest_runs_are_forgotten_task_by_task(database: Database, database_url: str) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute(
            """
            INSERT INTO scheduled_runs (task, started_at, seconds, figures)
            SELECT task, %s - n * interval '1 minute', 1, '{}'
            FROM generate_series(1, %s) n, unnest(ARRAY['proof', 'other']) task
            """,
            (NOW, runs.KEPT + 5),
        )
    runs.record(database, "proof", NOW, 1, {})
    with psycopg.connect(database_url) as connection:
        found = connection.execute(
            "SELECT task, count(*), min(started_at) FROM scheduled_runs GROUP BY task ORDER BY task"
        ).fetchall()
    assert found == [
        ("other", runs.KEPT + 5, NOW - timedelta(minutes=runs.KEPT + 5)),
        ("proof", runs.KEPT, NOW - timedelta(minutes=runs.KEPT - 1)),
    ]
