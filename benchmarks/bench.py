"""What benchmarks of the pipeline run on: servers, organizations, events, workers."""

import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from uuid import UUID, uuid4

from celery import Celery
from redis import Redis

import migrations
from benchmarks.organizations import make_organizations
from ledger.database import Database
from ops.servers import embedded_servers, wait_until
from schema.settings import Settings, load_settings
from worker import stream

USERS: Final = 100
"""Of each organization, named `user-1` and so on."""
ORGANIZATIONS: Final = 100
CREDITS_EACH: Final = 10_000_000


@dataclass(frozen=True, slots=True)
class Bench:
    """The servers of one run, and where its events go."""

    settings: Settings
    database: Database
    client: "Redis"
    celery: Celery
    organizations: Sequence[UUID]
    directory: Path
    workers: int

    @property
    def environment(self) -> Mapping[str, str]:
        """Of processes that work on it."""
        return os.environ | {
            "METERING_DATABASE_URL": self.settings.database_url.get_secret_value(),
            "METERING_REDIS_URL": self.settings.redis_url.get_secret_value(),
        }


@contextmanager
def running_bench(workers: int) -> Iterator[Bench]:
    """A bench of its own, gone at the end of the block."""
    with tempfile.TemporaryDirectory(prefix="metering-bench-") as name:
        directory = Path(name)
        with embedded_servers(directory) as (postgres, valkey):
            postgres.ensure_database()
            migrations.upgrade(postgres.url)
            settings = load_settings(database_url=postgres.url, redis_url=valkey.url)
            database = Database.of(settings)
            with (
                stream.connect(settings) as client,
                Celery(broker=valkey.url, set_as_current=False) as celery,
            ):
                organizations = make_organizations(
                    database, ORGANIZATIONS, users=USERS, credits_each=CREDITS_EACH
                )
                yield Bench(settings, database, client, celery, organizations, directory, workers)
            database.close()


def make_events(organizations: Sequence[UUID], count: int) -> list[tuple[UUID, dict[str, Any]]]:
    """Events of random users, each with its organization."""
    now = datetime.now(UTC).isoformat()
    made = []
    for _ in range(count):
        org_id = random.choice(organizations)
        event = {
            "request_id": f"req-{uuid4()}",
            "org_id": str(org_id),
            "user_id": f"user-{random.randint(1, USERS)}",
            "service_type": "llm",
            "variant": "claude-sonnet",
            "quantity": f"{random.randint(1, 4000) / 1000:.3f}",
            "api_cost": "0.0042",
            "occurred_at": now,
            "metadata": {"operation": "summarize", "company_id": "c-4711", "cache_hit": False},
        }
        made.append((org_id, event))
    return made


@contextmanager
def running_worker(bench: Bench, app: str, *options: str) -> Iterator[None]:
    """A Celery worker, ready, for the length of a block."""
    command = [
        *(sys.executable, "-m", "celery", "-A", app, "worker", "-l", "INFO"),
        *("--concurrency", str(bench.workers), "--without-gossip", "--without-mingle"),
        *options,
    ]
    log_path = bench.directory / f"{app}.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=bench.environment)
    try:
        wait_until(lambda: b"ready." in log_path.read_bytes(), "the worker", 60)
        yield
    finally:
        process.terminate()
        process.wait(60)
