"""`metering up`: servers, migrations, workers, beat and API as one supervised whole."""

import fcntl
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import IO, Final

import httpx

import migrations
from ledger.database import Database
from ops import stacktoken
from ops.processes import STACK_MARKER, Child, end, leftovers
from ops.servers import LOOPBACK, EmbeddedPostgres, EmbeddedServer, EmbeddedValkey, wait_until
from ops.stackfile import FILE_NAME, StackFile
from schema.errors import ConfigurationError
from schema.settings import PREFIX, Environment, Settings

READY_TIMEOUT_SECONDS: Final = 60.0
WATCH_SECONDS: Final = 0.2
WORKER_LOG_LEVEL: Final = "INFO"
DRAIN_SECONDS: Final = 8
"""How long the API may answer what it has begun, within the time that a process has to stop."""

Tell = Callable[[str], None]


class Stack:
    """A running pipeline on one data directory.

    Crashed processes are started again at once. A server that somebody stopped cleanly is left
    alone for half a minute, so that it can be looked after, and then started again.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        workers: int,
        port: int,
        tell: Tell,
        over: threading.Event | None = None,
    ) -> None:
        self._settings = settings
        self._over = over or threading.Event()
        self._workers = workers
        self._port = port
        self._tell = tell
        self._servers: list[EmbeddedServer] = []
        self._children: list[Child] = []
        self.directory = settings.data_dir.resolve()
        self.file = StackFile("", "", "", f"http://{LOOPBACK}:{port}", settings.shards)

    @contextmanager
    def running(self) -> Iterator["Stack"]:
        """Start everything, and stop it all at the end of the block.

        Raises:
            KeyboardInterrupt: the event `over` was set while it was still starting.
            ConfigurationError: another stack runs on this directory, the port is taken, a server
                does not start, or the data directory belongs to another version.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        with _locked(self.directory):
            _end_leftovers(self.directory, self._tell)
            _require_free(self._port)
            try:
                self._start()
                yield self
            finally:
                self._stop()

    def watch(self) -> None:
        """Keep every process running until the event `over` is set."""
        while not self._over.wait(WATCH_SECONDS):
            happened = [text for child in self._children if (text := child.watch())]
            for text in happened:
                self._tell(text)
            if happened:
                self._write_file()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch in the background for the length of a block; the stack is over at its end."""
        watcher = threading.Thread(target=self.watch, name="watch")
        watcher.start()
        try:
            yield
        finally:
            self._over.set()
            watcher.join()

    def child(self, name: str) -> Child:
        """One of the processes: postgres, valkey, worker, beat or api."""
        return next(child for child in self._children if child.name == name)

    @property
    def service_token(self) -> str:
        """What services may present to the API of this stack; made on first use."""
        return stacktoken.kept_token(self.directory)

    @property
    def login_url(self) -> str | None:
        """Where people log in without a password; None where they have another issuer."""
        return f"{self.file.api_url}/dev/login" if _lets_anybody_in(self._settings) else None

    def _start(self) -> None:
        self.file.database_url = self._settings.database_url.get_secret_value()
        self.file.redis_url = self._settings.redis_url.get_secret_value()
        postgres = None if self.file.database_url else EmbeddedPostgres(self.directory / "postgres")
        valkey = None if self.file.redis_url else EmbeddedValkey(self.directory / "valkey")
        self._servers = [server for server in (postgres, valkey) if server]
        for server in self._servers:
            self._heed_the_end()
            self._tell(f"starting {server.name}")
            server.prepare()
            self._children.append(server.start())
        for server in self._servers:
            server.wait_ready(meanwhile=self._heed_the_end)
        if postgres:
            postgres.ensure_database()
            self.file.database_url = postgres.url
        if valkey:
            self.file.redis_url = valkey.url
        self.file.broker_url = self._settings.broker_url.get_secret_value() or self.file.redis_url
        self._heed_the_end()
        self._tell("migrating the database")
        migrations.upgrade(self.file.database_url)
        self._let_services_in()
        self._start_pipeline()

    def _let_services_in(self) -> None:
        database = Database(self.file.database_url, pool_size=1, role=self._settings.database_role)
        with closing(database):
            stacktoken.let_in(database, self.directory, self._tell)

    def _start_pipeline(self) -> None:
        self._tell(f"starting {self._workers} worker processes, beat and the API")
        environment = self._environment()
        for name, command in pipeline_commands(self._workers, self._port).items():
            log_path = self.directory / f"{name}.log"
            log_path.unlink(missing_ok=True)
            child = Child(name, command, log_path, environment)
            child.start()
            self._children.append(child)
        wait_until(self._is_ready, "the pipeline", READY_TIMEOUT_SECONDS)
        self._write_file()

    def _environment(self) -> dict[str, str]:
        return {
            STACK_MARKER: str(self.directory),
            f"{PREFIX}DATABASE_URL": self.file.database_url,
            f"{PREFIX}REDIS_URL": self.file.redis_url,
            f"{PREFIX}BROKER_URL": self.file.broker_url,
            f"{PREFIX}DATA_DIR": str(self.directory),
            f"{PREFIX}SHARDS": str(self._settings.shards),
            f"{PREFIX}DEV_ISSUER": str(_lets_anybody_in(self._settings)),
        }

    def _heed_the_end(self) -> None:
        """Break the start off between two steps: never between a process and its record."""
        if self._over.is_set():
            raise KeyboardInterrupt

    def _is_ready(self) -> bool:
        self._heed_the_end()
        for child in self._children:
            if child.pid is None:
                raise ConfigurationError(f"{child.name} ended; see {child.log_path}")
        worker_log = self.child("worker").log_path.read_bytes()
        return b"ready." in worker_log and _answers(f"{self.file.api_url}/readyz")

    def _write_file(self) -> None:
        pids = {child.name: child.pid for child in self._children}
        self.file.pids = {"supervisor": os.getpid()} | {k: v for k, v in pids.items() if v}
        self.file.write(self.directory)

    def _stop(self) -> None:
        servers = {server.name for server in self._servers}
        pipeline = [child for child in self._children if child.name not in servers]
        # Producers of work first, servers last; a worker finishes the batch in hand.
        for group in (pipeline, [c for c in self._children if c.name in servers]):
            for child in group:
                child.ask_to_stop()
            for child in group:
                if not child.wait_stopped():
                    self._tell(f"{child.name} did not stop in time and was killed")
        end(leftovers(self.directory))  # a server that somebody else has started again
        (self.directory / FILE_NAME).unlink(missing_ok=True)


def pipeline_commands(workers: int, port: int) -> dict[str, Sequence[str]]:
    """The commands of the pipeline's processes, as any process manager would run them."""
    python = [sys.executable, "-m"]
    celery = [*python, "celery", "-A", "worker.app"]
    return {
        "worker": [
            *celery,
            *("worker", "--concurrency", str(workers), "-n", "metering@%h"),
            *("--without-gossip", "--without-mingle", "-l", WORKER_LOG_LEVEL),
        ],
        "beat": [*celery, "beat", "--scheduler", "celery.beat:Scheduler", "-l", "INFO"],
        "api": [
            *python,
            *("uvicorn", "--factory", "api.app:create", "--host", LOOPBACK, "--port", str(port)),
            *("--loop", "uvloop", "--http", "api.protocol:Protocol", "--ws", "none"),
            *("--no-access-log", "--no-server-header"),
            # Longer than proxies and clients keep theirs, so that none finds it just closed.
            *("--timeout-keep-alive", "75"),
            *("--timeout-graceful-shutdown", str(DRAIN_SECONDS)),
        ],
    }


def _lets_anybody_in(settings: Settings) -> bool:
    """Whether the API is its own issuer of sessions: unless it is told, where there is no other."""
    if "dev_issuer" in settings.model_fields_set:
        return settings.dev_issuer
    return not settings.oidc_issuer and settings.env is not Environment.PRODUCTION


def _answers(url: str) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(url, timeout=2).is_success
    return False


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    lock: IO[str]
    with (directory / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            running = StackFile.read(directory)
            who = f" (process {running.pids.get('supervisor')})" if running else ""
            raise ConfigurationError(
                f"a stack is running on {directory} already{who}: stop it, or choose another "
                "directory with --data-dir"
            ) from None
        yield


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            raise ConfigurationError(
                f"port {port} is taken: choose another for the API with --port"
            ) from None


def _end_leftovers(directory: Path, tell: Tell) -> None:
    found = leftovers(directory)
    if found:
        tell(f"stopping {len(found)} processes that a killed stack left behind")
        end(found)
    (directory / FILE_NAME).unlink(missing_ok=True)
