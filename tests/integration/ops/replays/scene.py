"""Organizations, files and a draining worker for the tests of replays."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from threading import Event, Thread
from typing import Any, Final
from uuid import UUID

from redis.exceptions import RedisError
from structlog.testing import capture_logs

from ledger.database import Database, run
from ops.replays.mappingfile import load_preset
from ops.replays.replay import Order, Replay
from ops.replays.report import Report
from schema.errors import LedgerUnavailable
from schema.settings import Settings
from worker import stream
from worker.drain import Drain

DEADLINE_SECONDS: Final = 30.0
PRESET: Final = load_preset("azure-llm")
REQUESTS: Final = "SELECT count(*) FROM usage_requests"


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
