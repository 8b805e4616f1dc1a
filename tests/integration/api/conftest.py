"""A running API with its issuer of sessions, and who calls it."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import httpx
import psycopg
import pytest
import uvicorn
from fastapi import FastAPI

from api.app import create_app
from ledger import servicetokens
from ledger.clock import utc_now
from ledger.database import Database
from ops.servers import LOOPBACK, EmbeddedPostgres, EmbeddedValkey
from schema.scopes import Scope
from schema.settings import Settings, load_settings
from tests.conftest import TEMPLATE
from tests.integration.api.issuer import AUDIENCE, Issuer, running_issuer
from tests.integration.ledger.world import World, open_world

Headers = dict[str, str]

MEMBERS = {"ada": "admin", "ben": "member"}
"""Those of an organization whose roles a test tries."""


@contextmanager
def serving(app: FastAPI, headers: Headers | None = None) -> Iterator[httpx.Client]:
    """A client of a server that runs the app as in production, in a thread of its own."""
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        config = uvicorn.Config(app, loop="uvloop", http="httptools", log_config=None)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            deadline = time.monotonic() + 20
            while not server.started:
                assert thread.is_alive()
                assert time.monotonic() < deadline
                time.sleep(0.01)
            url = f"http://{LOOPBACK}:{listener.getsockname()[1]}"
            with httpx.Client(base_url=url, headers=headers, timeout=20) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join(20)


class Callers:
    """Headers of requests by those whom the API knows."""

    def __init__(self, issuer: Issuer, database: Database) -> None:
        self._issuer = issuer
        self._database = database

    def user(self, user_id: str) -> Headers:
        """A user with a session."""
        return {"Cookie": f"session_token={self._issuer.session(user_id)}"}

    def system_admin(self, user_id: str = "root") -> Headers:
        """A user with the realm role."""
        return {"Cookie": f"session_token={self._issuer.session(user_id, system_admin=True)}"}

    def service(self, *scopes: Scope) -> Headers:
        """A service with a token of its own."""
        text, _ = servicetokens.create(
            self._database, f"service-{uuid4().hex}", scopes, actor="tests", now=utc_now()
        )
        return {"Authorization": f"Bearer {text}"}


@pytest.fixture(scope="session")
def issuer() -> Iterator[Issuer]:
    with running_issuer() as running:
        yield running


@pytest.fixture(scope="module")
def api_database_url(servers: tuple[EmbeddedPostgres, EmbeddedValkey]) -> Iterator[str]:
    """A migrated database that the tests of one module share; each makes its own organizations."""
    postgres, _ = servers
    name = f"api_{uuid4().hex}"
    with psycopg.connect(postgres.url_of("postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
        yield postgres.url_of(name)
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="module")
def api_database(api_database_url: str) -> Iterator[Database]:
    opened = Database(api_database_url)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def api_settings(
    api_database_url: str,
    servers: tuple[EmbeddedPostgres, EmbeddedValkey],
    issuer: Issuer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Settings:
    """Settings of an API whose limits do not get in the way of tests that share it."""
    _, valkey = servers
    data_dir: Path = tmp_path_factory.mktemp("api")
    return load_settings(
        database_url=api_database_url,
        redis_url=valkey.url,
        data_dir=data_dir,
        oidc_issuer=issuer.url,
        oidc_audience=AUDIENCE,
        read_limit_per_minute=1_000_000,
        write_limit_per_minute=1_000_000,
        ops_limit_per_minute=1_000_000,
    )


@pytest.fixture(scope="module")
def api(api_settings: Settings) -> Iterator[httpx.Client]:
    """A client of an API that runs; each request takes the headers of a caller."""
    with serving(create_app(api_settings)) as client:
        yield client


@pytest.fixture(scope="module")
def callers(issuer: Issuer, api_database: Database) -> Callers:
    return Callers(issuer, api_database)


@pytest.fixture(scope="module")
def api_world(api_database: Database, api_database_url: str) -> Iterator[World]:
    """The database of the API, to make organizations in and to look at."""
    with open_world(api_database, api_database_url) as world:
        yield world


@pytest.fixture
def ada(callers: Callers) -> Headers:
    """An admin of the organization."""
    return callers.user("ada")


@pytest.fixture
def ben(callers: Callers) -> Headers:
    """A member of it."""
    return callers.user("ben")


@pytest.fixture
def eve(callers: Callers) -> Headers:
    """Somebody else."""
    return callers.user("eve")


@pytest.fixture
def root(callers: Callers) -> Headers:
    return callers.system_admin()
