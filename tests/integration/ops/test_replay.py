"""Replays against real servers: every row is accounted for, and a second replay changes nothing."""

import gzip
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event, Thread
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
import typer
from redis import Redis
from redis.exceptions import RedisError
from structlog.testing import capture_logs
from typer.testing import CliRunner

from ledger import directory
from ledger.database import Database, run
from ops.commands.replay import replay
from ops.mapping import load_preset, parse_mapping
from ops.replay import RECOVERY_FACTOR, Order, Replay, Report, Rotation, Survey, Trace
from ops.servers import EmbeddedPostgres, EmbeddedValkey, free_port
from schema.errors import (
    ConfigurationError,
    LedgerUnavailable,
    NotFound,
    QueueUnavailable,
    Unavailable,
)
from schema.settings import Settings, load_settings
from worker import stream
from worker.drain import Drain

DEADLINE_SECONDS = 30.0
PLAIN = parse_mapping(
    """
    [event]
    service_type = { column = "service", default = "contact_lookup" }
    quantity = { column = "n", default = 1 }
    occurred_at = { column = "at", default = "2026-01-01T00:00:00Z" }
    """
)
NAMED = parse_mapping(
    """
    [event]
    request_id = { column = "id" }
    user_id = { column = "user" }
    service_type = "company_enrichment"
    variant = { column = "variant", optional = true }
    """
)
PRESET = load_preset("azure-llm")
COUNT = "SELECT count(*) FROM usage_requests"
UNCHANGING = (
    "usage_requests",
    "credit_usage_attribution",
    "dead_letters",
    "user_credit_allocations",
    "organization_credit_pools",
)

app = typer.Typer()
app.command()(replay)


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.01)


@contextmanager
def draining(settings: Settings, pause_seconds: float = 0.01) -> Iterator[None]:
    """A worker in a thread: drains all shards over and over, sitting out outages."""
    over = Event()

    def work() -> None:
        with stream.connect(settings) as client:
            drain = Drain(settings, database, client)
            while not over.wait(pause_seconds):
                for shard in range(settings.shards):
                    with suppress(LedgerUnavailable, RedisError):
                        drain.run(shard)

    worker = Thread(target=work, name="drain")
    with closing(Database.of(settings, pool_size=1)) as database, capture_logs():
        worker.start()
        try:
            yield
        finally:
            over.set()
            worker.join()


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


@pytest.fixture
def worker(settings: Settings) -> Iterator[None]:
    with draining(settings):
        yield


def organization(database: Database, name: str = "acme", **users: int) -> UUID:
    """A test organization whose users have these credits."""
    with database.transaction() as connection:
        org_id: UUID = run(
            connection,
            "INSERT INTO organizations (name, display_name, is_test) "
            "VALUES (%(name)s, %(name)s, true) RETURNING id",
            name=name,
        ).scalar_one()
        if users:
            total = sum(users.values())
            run(connection, "SELECT add_credits_to_pool(%(o)s, %(n)s)", o=org_id, n=total)
        for user, credits in users.items():
            run(
                connection,
                "SELECT allocate_credits_to_user(%(o)s, %(u)s, %(n)s)",
                o=org_id,
                u=user,
                n=credits,
            )
    return org_id


@pytest.fixture
def acme(database: Database) -> UUID:
    return organization(database, ana=30_000, ben=10_000)


def rows_of(database: Database) -> dict[str, list[Any]]:
    return {
        table: queried(database, f"SELECT * FROM {table} ORDER BY 1, 2") for table in UNCHANGING
    }


def queried(database: Database, sql: str) -> list[Any]:
    with database.snapshot() as connection:
        return [tuple(row) for row in connection.exec_driver_sql(sql)]


def csv_file(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return path


def trace(path: Path, rows: int = 40) -> Path:
    """A file in the format of the preset; every row costs ceil(15 x 0.1) = 2 credits."""
    first = datetime(2023, 11, 16, 18, 0, 0)  # noqa: DTZ001 - as in the trace
    lines = (f"{first + timedelta(minutes=n)}.1234567,60,40" for n in range(rows))
    return csv_file(path, "TIMESTAMP,ContextTokens,GeneratedTokens", *lines)


def replayed(settings: Settings, database: Database, order: Order) -> Report:
    return Replay(settings, database, order).run()


def figures(report: Report) -> dict[str, Any]:
    wanted = ("events", "charged", "duplicates", "dead", "missing", "invalid_rows", "credits")
    return {name: found for name, found in report.as_dict().items() if name in wanted and found}


@pytest.mark.usefixtures("worker")
def test_a_second_replay_finds_duplicates_and_changes_nothing(
    settings: Settings, database: Database, acme: UUID, tmp_path: Path
) -> None:
    order = Order(trace(tmp_path / "trace.csv", 1200), PRESET, acme)
    first = replayed(settings, database, order)
    assert figures(first) == {"events": 1200, "charged": 1200, "credits": 2400}
    assert first.seconds > 0
    assert first.events_per_second > 0
    before = rows_of(database)

    second = replayed(settings, database, order)
    assert figures(second) == {"events": 1200, "duplicates": 1200}
    assert rows_of(database) == before


@pytest.mark.usefixtures("worker")
def test_users_get_their_share_whatever_they_have_used(
    settings: Settings, database: Database, acme: UUID, tmp_path: Path
) -> None:
    replayed(settings, database, Order(trace(tmp_path / "a.csv"), PRESET, acme))
    by_user = "SELECT user_id, count(*) FROM usage_requests GROUP BY user_id ORDER BY user_id"
    assert queried(database, by_user) == [("ana", 30), ("ben", 10)]


@pytest.mark.usefixtures("worker")
def test_the_last_event_takes_place_now(
    settings: Settings, database: Database, acme: UUID, tmp_path: Path
) -> None:
    started = datetime.now(UTC)
    replayed(settings, database, Order(trace(tmp_path / "a.csv"), PRESET, acme))
    ((first, last),) = queried(
        database, "SELECT min(occurred_at), max(occurred_at) FROM usage_requests"
    )
    assert started <= last <= datetime.now(UTC)
    assert last - first == timedelta(minutes=39)


@pytest.mark.usefixtures("worker")
def test_times_may_be_kept(
    settings: Settings, database: Database, acme: UUID, tmp_path: Path
) -> None:
    order = Order(trace(tmp_path / "a.csv"), PRESET, acme, keep_times=True)
    assert figures(replayed(settings, database, order)) == {"events": 40, "dead": {"too_old": 40}}


@pytest.mark.usefixtures("worker")
def test_rows_that_are_no_events_are_reported_and_the_rest_is_charged(
    settings: Settings, database: Database, acme: UUID, tmp_path: Path
) -> None:
    file = csv_file(
        tmp_path / "mixed.csv",
        "service, n,at",
        "contact_lookup,2,",
        "contact_lookup,two,",
        "",
        "contact_lookup,3",
        "contact_lookup,-1,",
        "contact_lookup,1,noon",
        "contact_lookup,4,2026-01-01T00:00:00Z",
    )
    report = replayed(settings, database, Order(file, PLAIN, acme, user_id="ana"))
    assert figures(report) == {"events": 2, "charged": 2, "credits": 60, "invalid_rows": 4}
    assert [(row.line, row.reason) for row in report.invalid] == [
        (3, "quantity: 'two' is not a number"),
        (5, "the row has 2 fields, the header 3"),
        (6, "quantity: Input should be greater than 0"),
        (7, "occurred_at: 'noon' is not an ISO 8601 time"),
    ]
    assert not report.is_complete
    ids = queried(database, "SELECT request_id FROM usage_requests ORDER BY request_id")
    assert ids == [("mixed.csv:2",), ("mixed.csv:8",)]


@pytest.mark.usefixtures("worker")
def test_correcting_a_row_leaves_the_others_with_their_users(
    settings: Settings, database: Database, acme: UUID, tmp_path: Path
) -> None:
    lines = ["service,n,at", *["contact_lookup,1,"] * 9]
    broken = [*lines[:2], "contact_lookup,one,", "contact_lookup", *lines[4:]]
    order = Order(csv_file(tmp_path / "a.csv", *broken), PLAIN, acme)
    assert figures(replayed(settings, database, order)) == {
        "events": 7, "charged": 7, "credits": 70, "invalid_rows": 2,
    }  # fmt: skip
    csv_file(order.path, *lines)
    assert figures(replayed(settings, database, order)) == {
        "events": 9, "charged": 2, "duplicates": 7, "credits": 20,
    }  # fmt: skip


def test_a_strict_replay_sends_nothing_of_a_file_with_a_bad_row(
    settings: Settings, database: Database, acme: UUID, redis: Redis, tmp_path: Path
) -> None:
    file = csv_file(tmp_path / "a.csv", "service,n,at", "contact_lookup,1,", "contact_lookup,x,")
    with pytest.raises(ConfigurationError, match=r"line 3: quantity: 'x' is not.*nothing was sent"):
        replayed(settings, database, Order(file, PLAIN, acme, strict=True))
    assert stream.total_depth(redis, settings.shards) == 0


@pytest.mark.usefixtures("worker")
def test_conflicts_and_repetitions_within_a_file(
    settings: Settings, database: Database, acme: UUID, tmp_path: Path
) -> None:
    file = csv_file(
        tmp_path / "a.csv",
        "id,user,variant",
        "r1,ana,standard",
        "r1,ana,standard",
        "r1,ben,standard",
        "r1,ben,standard",
        "r2,ana,full",
    )
    order = Order(file, NAMED, acme)
    assert figures(replayed(settings, database, order)) == {
        "events": 5,
        "charged": 2,
        "duplicates": 2,
        "dead": {"request_id_conflict": 1},
        "credits": 150,
    }
    assert figures(replayed(settings, database, order)) == {"events": 5, "duplicates": 5}

    csv_file(file, "id,user,variant", "r1,ana,full", "r2,ana,full", "r3,ana,")
    assert figures(replayed(settings, database, order)) == {
        "events": 3,
        "charged": 1,
        "duplicates": 1,
        "dead": {"request_id_conflict": 1},
        "credits": 50,
    }


@pytest.mark.usefixtures("worker")
def test_a_repetition_after_the_first_was_charged_takes_nothing_from_the_count(
    settings: Settings, database: Database, acme: UUID, tmp_path: Path
) -> None:
    def wait(stage: str, done: int, _total: int | None) -> None:
        if stage == "sending" and done == 500:
            until(lambda: queried(database, COUNT) == [(500,)], "the drain")

    lines = [f"r{n % 500},ana,standard" for n in range(501)]
    order = Order(csv_file(tmp_path / "a.csv", "id,user,variant", *lines), NAMED, acme)
    report = Replay(settings, database, order, wait).run()
    assert figures(report) == {"events": 501, "charged": 500, "duplicates": 1, "credits": 25_000}


@pytest.mark.usefixtures("worker")
def test_dead_events_are_counted_by_reason_and_are_duplicates_next_time(
    settings: Settings, database: Database, tmp_path: Path
) -> None:
    org_id = organization(database, ana=70)
    file = csv_file(
        tmp_path / "a.csv",
        "id,user,variant",
        "r1,ana,standard",
        "r2,ana,standard",
        "r3,zoe,standard",
        "r4,ana,huge",
    )
    order = Order(file, NAMED, org_id)
    assert figures(replayed(settings, database, order)) == {
        "events": 4,
        "charged": 1,
        "dead": {"insufficient_credits": 1, "no_allocation": 1, "unknown_service": 1},
        "credits": 50,
    }
    assert figures(replayed(settings, database, order)) == {"events": 4, "duplicates": 4}


@pytest.mark.usefixtures("worker")
def test_rows_may_name_their_organizations(
    settings: Settings, database: Database, acme: UUID, tmp_path: Path
) -> None:
    other = organization(database, "other", zoe=1000)
    deserted = organization(database, "deserted")
    mapping = parse_mapping(
        '[event]\nservice_type = "valuation"\norg_id = { column = "org", optional = true }'
    )
    stranger = uuid4()
    file = csv_file(
        tmp_path / "a.csv", "org,x", f"{acme},", f"{other},", ",", "nobody,", f"{deserted},",
        f"{stranger},",
    )  # fmt: skip
    report = replayed(settings, database, Order(file, mapping))
    assert figures(report) == {"events": 2, "charged": 2, "credits": 150, "invalid_rows": 4}
    assert [row.reason for row in report.invalid] == [
        "org_id: the row names no organization",
        "org_id: 'nobody' is not a UUID",
        f"user_id: organization {deserted} has no active allocation",
        f"user_id: organization {stranger} has no active allocation",
    ]
    report = replayed(settings, database, Order(file, mapping, acme, user_id="ana"))
    assert figures(report) == {
        "events": 5,
        "charged": 1,
        "duplicates": 1,
        "dead": {"no_allocation": 1, "request_id_conflict": 1, "unknown_organization": 1},
        "invalid_rows": 1,
        "credits": 75,
    }


def test_an_organization_without_users_is_named_before_anything_is_sent(
    settings: Settings, database: Database, tmp_path: Path
) -> None:
    org_id = organization(database)
    with pytest.raises(ConfigurationError, match=f"organization {org_id} has no active allocation"):
        replayed(settings, database, Order(trace(tmp_path / "a.csv"), PRESET, org_id))


@pytest.mark.usefixtures("worker")
def test_a_file_with_a_header_only_has_no_events(
    settings: Settings, database: Database, acme: UUID, tmp_path: Path
) -> None:
    report = replayed(settings, database, Order(trace(tmp_path / "a.csv", 0), PRESET, acme))
    assert figures(report) == {}
    assert report.is_complete
    assert report.events_per_second == 0


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty: its first line must name the columns"),
        (gzip.compress(b""), "is empty: its first line must name the columns"),
        (b"\n\n", "is empty"),
        (b"a,b\n1,2\n", "missing column 'ContextTokens'; the file has: a, b"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "not utf-8 text after line 0"),
        (gzip.compress(b"TIMESTAMP,ContextTokens" * 99)[:-9], "the compressed file is damaged"),
        (b"\x1f\x8brubbish", "the compressed file is damaged"),
        (b'TIMESTAMP,ContextTokens,GeneratedTokens\n"2023', "not CSV: line 2: unexpected end of"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    file = tmp_path / "file.csv"
    file.write_bytes(content)
    with pytest.raises(ConfigurationError) as caught:
        list(Trace(file, PRESET).rows())
    assert problem in caught.value.message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"cannot read .*gone.csv: No such file"):
        list(Trace(tmp_path / "gone.csv", PRESET).rows())
    with pytest.raises(ConfigurationError, match="Is a directory"):
        list(Trace(tmp_path, PRESET).rows())


def test_rows_of_a_compressed_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "file.csv.gz"
    text = '\ufeffTIMESTAMP,ContextTokens,GeneratedTokens\n"a\nb",1,2\n\nc,3,4\n'
    file.write_bytes(gzip.compress(text.encode()))
    rows = [*Trace(file, PRESET).rows()]
    assert [(row.file, row.line, row.cells["TIMESTAMP"]) for row in rows] == [
        ("file.csv.gz", 3, "a\nb"),
        ("file.csv.gz", 5, "c"),
    ]


def test_a_file_that_spans_too_long_is_refused() -> None:
    now = datetime.now(UTC)
    first, last = (now - timedelta(days=200), 2), (now - timedelta(days=100), 9)
    with pytest.raises(ConfigurationError, match=r"span 100 days, from line 2 .* to line 9 "):
        Survey(8, first, last).shift_to(now)
    assert Survey(0).shift_to(now) == timedelta()


def test_the_rotation_is_smooth_and_fair() -> None:
    rotation = Rotation({"a": 5, "b": 1, "c": 1, "d": 0})
    assert "".join(rotation.next() for _ in range(14)) == "aabacaa" * 2
    even = Rotation({"a": 0, "b": 0})
    assert [even.next() for _ in range(4)] == ["a", "b", "a", "b"]


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
        until(lambda: queried(database, COUNT) == [(500,)], "the drain")
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


@pytest.fixture
def environment(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """What names the test's servers to a command."""
    monkeypatch.setenv("METERING_DATABASE_URL", settings.database_url.get_secret_value())
    monkeypatch.setenv("METERING_REDIS_URL", settings.redis_url.get_secret_value())


@pytest.mark.usefixtures("environment", "worker")
def test_the_command_prints_json_and_names_the_organization_it_took(
    database: Database, acme: UUID, tmp_path: Path
) -> None:
    newest = organization(database, "newest", zoe=1000)
    file = trace(tmp_path / "a.csv")
    result = CliRunner().invoke(app, [str(file), "--preset", "azure-llm", "--json"])
    assert result.exit_code == 0, result.stderr
    assert f"organization newest ({newest}), the newest test organization" in result.stderr
    printed = json.loads(result.stdout)
    assert printed.pop("seconds") > 0
    assert printed.pop("events_per_second") > 0
    assert printed == {
        "file": str(file),
        "org_id": str(newest),
        "events": 40,
        "charged": 40,
        "duplicates": 0,
        "dead": {},
        "missing": 0,
        "invalid_rows": 0,
        "first_invalid": [],
        "credits": 80,
    }
    result = CliRunner().invoke(app, [str(file), "--preset", "azure-llm", "--org", "acme"])
    assert result.exit_code == 0, result.stderr
    assert "Replay of" in result.stdout
    assert queried(database, f"SELECT count(*) FROM usage_requests WHERE org_id = '{acme}'") == [
        (40,)
    ]


@pytest.mark.usefixtures("environment", "worker", "acme")
def test_the_command_shows_bad_rows_and_exits_with_1(tmp_path: Path) -> None:
    mapping = tmp_path / "map.toml"
    mapping.write_text('[event]\nservice_type = "valuation"\nquantity = { column = "[n]" }\n')
    file = csv_file(tmp_path / "a.csv", "[n]", "1", *["x"] * 12)
    result = CliRunner().invoke(app, [str(file), "--map", str(mapping), "--user", "ana"])
    assert result.exit_code == 1
    assert "line 3: quantity: 'x' is not a number\n" in result.stderr
    assert "line 12: " in result.stderr
    assert "line 13: " not in result.stderr
    assert "… and 2 more rows" in result.stderr
    assert "invalid rows" in result.stdout


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "with either --map FILE.toml or --preset"),
        (["--preset", "azure-llm", "--map", "m.toml"], "with either --map FILE.toml or --preset"),
        (["--preset", "azure"], "no preset 'azure'"),
        (["--map", "gone.toml"], "cannot read gone.toml"),
        (["--preset", "azure-llm"], "make one with 'metering org create'"),
        (["--preset", "azure-llm", "--org", "nobody"], "no organization with the id or name 'nob"),
    ],
)
def test_the_command_says_what_it_lacks(tmp_path: Path, arguments: list[str], problem: str) -> None:
    result = CliRunner().invoke(app, [str(trace(tmp_path / "a.csv")), *arguments])
    assert result.exit_code == 2
    assert problem in result.stderr


@pytest.mark.usefixtures("environment", "acme")
def test_ctrl_c_ends_the_command_in_words(settings: Settings, redis: Redis, tmp_path: Path) -> None:
    program = "import typer; from ops.commands.replay import replay; typer.run(replay)"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(trace(tmp_path / "a.csv")), "--preset", "azure-llm"],
        cwd=Path(__file__).parents[3],
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        until(lambda: stream.total_depth(redis, settings.shards) == 40, "sending")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 130
    assert "interrupted: " in errors
    assert "Traceback" not in errors


def test_organizations_are_found_by_id_and_by_name(database: Database) -> None:
    assert directory.newest_test_organization(database) is None
    acme = organization(database, "acme", ben=1, ana=3)
    named_as_id = organization(database, str(uuid4()))
    misleading = organization(database, str(acme))
    assert directory.find_organization(database, "acme") == acme
    assert directory.find_organization(database, str(acme)) == acme
    assert directory.find_organization(database, str(named_as_id).upper()) == named_as_id
    newest = directory.newest_test_organization(database)
    assert newest is not None
    assert (newest.id, newest.name) == (misleading, str(acme))
    for unknown in ("ACME", "", str(uuid4())):
        with pytest.raises(NotFound, match=f"no organization with the id or name '{unknown}'"):
            directory.find_organization(database, unknown)
    assert [
        (one.user_id, one.allocated_credits) for one in directory.allocations_of(database, acme)
    ] == [
        ("ana", 3),
        ("ben", 1),
    ]
