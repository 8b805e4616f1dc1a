"""Real servers for every test: one PostgreSQL and one Valkey per run, a fresh database per test."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

import psycopg
import pytest
from redis import Redis

import migrations
from ledger.database import Database
from ops.servers import EmbeddedPostgres, EmbeddedValkey, embedded_servers
from schema.settings import PREFIX, Settings, load_settings
from worker import stream

TEMPLATE = "metering_template"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--chaos-events",
        type=int,
        default=5000,
        help="events that the chaos tests replay",
    )


@pytest.fixture(scope="session", autouse=True)
def _clean_environment() -> Iterator[None]:
    """No setting of the developer's shell reaches a test."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(PREFIX):
                patch.delenv(name)
        yield


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_works() -> None:
    """A run in the background inherits that Ctrl-C is ignored; programs under test must not."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def server_directory() -> Iterator[Path]:
    """A directory for servers to live in.

    Not one of pytest's own: their root is closed to other users again by every run that starts,
    and root starts PostgreSQL as another user.
    """
    with TemporaryDirectory(prefix="metering-test-") as name:
        yield Path(name)


@pytest.fixture(scope="session")
def servers() -> Iterator[tuple[EmbeddedPostgres, EmbeddedValkey]]:
    """The embedded servers, started once."""
    with server_directory() as directory, embedded_servers(directory) as (postgres, valkey):
        postgres.ensure_database(TEMPLATE)
        migrations.upgrade(postgres.url_of(TEMPLATE))
        yield postgres, valkey


@pytest.fixture
def empty_database_url(servers: tuple[EmbeddedPostgres, EmbeddedValkey]) -> Iterator[str]:
    """A database without any table."""
    postgres, _ = servers
    name = f"empty_{uuid4().hex}"
    postgres.ensure_database(name)
    yield postgres.url_of(name)
    _drop(postgres, name)


@pytest.fixture
def database_url(servers: tuple[EmbeddedPostgres, EmbeddedValkey]) -> Iterator[str]:
    """A migrated database of the test's own."""
    postgres, _ = servers
    name = f"test_{uuid4().hex}"
    with psycopg.connect(postgres.url_of("postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
    yield postgres.url_of(name)
    _drop(postgres, name)


def _drop(postgres: EmbeddedPostgres, name: str) -> None:
    with psycopg.connect(postgres.url_of("postgres"), autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """The ledger's view of `database_url`."""
    opened = Database(database_url)
    yield opened
    opened.close()


@pytest.fixture
def redis_url(servers: tuple[EmbeddedPostgres, EmbeddedValkey]) -> str:
    """An empty Valkey."""
    _, valkey = servers
    with Redis.from_url(valkey.url) as client:
        client.flushall()
    return valkey.url


@pytest.fixture
def settings(database_url: str, redis_url: str, tmp_path: Path) -> Settings:
    """Settings that point at the test's own database and Valkey."""
    return load_settings(database_url=database_url, redis_url=redis_url, data_dir=tmp_path)


@pytest.fixture
def redis(settings: Settings) -> Iterator[Redis]:
    """A client as the worker uses it."""
    with stream.connect(settings) as client:
        yield client
