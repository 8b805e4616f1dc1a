"""Replays while servers are away, slow or lose what they had, and replays that are interrupted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from uuid import UUID

import psycopg
import pytest
from redis import Redis

from ledger.database import Database
from ops.replays.replay import RECOVERY_FACTOR, Order, Replay
from ops.replays.report import Report
from ops.servers import EmbeddedPostgres, EmbeddedValkey, free_port
from schema.errors import QueueUnavailable, Unavailable
from schema.settings import Settings, load_settings
from tests.integration.ops.replays.scene import (
    DEADLINE_SECONDS,
    PRESET,
    REQUESTS,
    draining,
    figures,
    queried,
    replayed,
    trace,
    until,
)


@contextmanager
def in_background(act: Callable[[], Report]) -> Iterator[list[Report]]:
    """A replay in a thread; its report is there at the end of the block."""
    outcome: list[Report] = []
    thread = Thread(target=lambda: outcome.append(act()), name="replay")
    thread.start()
    yield outcome
    thread.join(DEADLINE_SECONDS)
    assert outcome, "the replay did not end well"


def changed(settings: Settings, **changes: object) -> Settings:
    """The same servers with other settings."""
    return load_settings(**(settings.model_dump(exclude_unset=True) | changes))


def test_events_that_the_queue_loses_are_missing(
    settings: Settings, database: Database, acme: UUID, redis: Redis, tmp_path: Path
) -> None:
    def lose(stage: str, done: int, total: int | None) -> None:
        if stage == "sending" and done == total:
            redis.flushall()

    order = Order(trace(tmp_path / "a.csv"), PRESET, acme)
    report = Replay(settings, database, order, lose).run()
    assert figures(report) == {"events": 40, "missing": 40}
    assert not report.is_complete


def test_an_interrupted_replay_knows_what_it_sent_and_can_be_repeated(
    settings: Settings, database: Database, acme: UUID, tmp_path: Path
) -> None:
    def interrupt(stage: str, done: int, _total: int | None) -> None:
        if stage == "sending" and done == 500:
            raise KeyboardInterrupt

    order = Order(trace(tmp_path / "a.csv", 1200), PRESET, acme)
    interrupted = Replay(settings, database, order, interrupt)
    with pytest.raises(KeyboardInterrupt):
        interrupted.run()
    assert interrupted.sent == 500
    with draining(settings):
        until(lambda: queried(database, REQUESTS) == [(500,)], "the drain")
        report = replayed(settings, database, order)
    assert figures(report) == {
        "events": 1200, "charged": 700, "duplicates": 500, "credits": 1400,
    }  # fmt: skip


def test_a_queue_that_stands_still_is_given_up(
    settings: Settings, database: Database, acme: UUID, tmp_path: Path
) -> None:
    order = Order(trace(tmp_path / "a.csv"), PRESET, acme, outage_seconds=0.4)
    with pytest.raises(Unavailable, match=r"nothing was applied .* 40 events were sent, 40 entr"):
        replayed(settings, database, order)


def test_a_slow_queue_is_waited_for_as_long_as_it_moves(
    settings: Settings, database: Database, acme: UUID, tmp_path: Path
) -> None:
    slow = changed(settings, drain_batch_events=10, drain_slice_seconds=0.001)
    order = Order(trace(tmp_path / "a.csv"), PRESET, acme, outage_seconds=1.6)
    with draining(slow, pause_seconds=0.6):
        report = replayed(settings, database, order)
    assert report.seconds > order.outage_seconds * RECOVERY_FACTOR
    assert report.charged == 40


def test_a_queue_that_stays_away_is_given_up(
    settings: Settings, database: Database, acme: UUID, tmp_path: Path
) -> None:
    nowhere = changed(settings, redis_url=f"redis://127.0.0.1:{free_port()}/0")
    order = Order(trace(tmp_path / "a.csv"), PRESET, acme, outage_seconds=0.4)
    with pytest.raises(QueueUnavailable, match=r"gave up after .* 0 events were sent: Redis does"):
        replayed(nowhere, database, order)


@pytest.mark.usefixtures("worker")
def test_an_outage_of_the_ledger_while_waiting_is_survived(
    servers: tuple[EmbeddedPostgres, EmbeddedValkey],
    settings: Settings,
    database: Database,
    acme: UUID,
    tmp_path: Path,
) -> None:
    name = settings.database_url.get_secret_value().rpartition("/")[2]
    waiting = Event()

    def administer(sql: str) -> None:
        with psycopg.connect(servers[0].url_of("postgres"), autocommit=True) as connection:
            connection.execute(sql.encode())

    def fail(stage: str, done: int, total: int | None) -> None:
        if stage == "sending" and done == total:
            administer(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
            administer(
                f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
            )
        elif stage == "applying":
            waiting.set()

    order = Order(trace(tmp_path / "a.csv", 1700), PRESET, acme)
    with in_background(Replay(settings, database, order, fail).run) as outcome:
        assert waiting.wait(DEADLINE_SECONDS)
        administer(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    assert figures(outcome[0]) == {"events": 1700, "charged": 1700, "credits": 3400}


def test_an_outage_of_the_queue_while_sending_is_survived(
    settings: Settings, database: Database, acme: UUID, tmp_path: Path
) -> None:
    valkey = EmbeddedValkey(tmp_path / "valkey")
    valkey.prepare()
    valkey.start()
    valkey.wait_ready()
    stopped = Event()

    def fail(stage: str, done: int, _total: int | None) -> None:
        if stage == "sending" and done == 500:
            valkey.stop()
            stopped.set()

    settings = changed(settings, redis_url=valkey.url)
    order = Order(trace(tmp_path / "a.csv", 1500), PRESET, acme)
    with draining(settings):
        with in_background(Replay(settings, database, order, fail).run) as outcome:
            assert stopped.wait(DEADLINE_SECONDS)
            valkey.start()
        valkey.stop()
    assert figures(outcome[0]) == {"events": 1500, "charged": 1500, "credits": 3000}
