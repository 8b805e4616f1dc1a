"""Child processes of a stack: started, watched, started again when they crash, stopped in order."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil

LEFT_ALONE_SECONDS: Final = 30.0
"""How long a process that was stopped cleanly from outside stays down: somebody is at work."""
POLL_SECONDS: Final = 0.05
SERVERS: Final = frozenset({"postgres", "valkey-server"})
STACK_MARKER: Final = "LOOPNET_METERING_STACK"
"""Environment variable by which a stack recognizes its processes: its data directory."""
MAX_RESTART_DELAY_SECONDS: Final = 5.0
STEADY_SECONDS: Final = 10.0
"""After how long a process counts as started well."""


@dataclass(slots=True)
class Child:
    """One process, with the rule for when it may be started again."""

    name: str
    command: Sequence[str]
    log_path: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    stop_signal: signal.Signals = signal.SIGTERM
    stop_timeout_seconds: float = 10.0
    popen_options: Mapping[str, object] = field(default_factory=dict)
    is_back: Callable[[], bool] = lambda: False
    """Whether somebody else has started it meanwhile."""
    process: subprocess.Popen[bytes] | None = None
    _started_at: float = 0.0
    _down_since: float | None = None
    _crashes: int = 0
    _stop_by: float = 0.0

    @property
    def pid(self) -> int | None:
        """Its process id, while it runs."""
        return self.process.pid if self.process and self.process.poll() is None else None

    def start(self) -> None:
        """Start it in a session of its own, so that Ctrl-C reaches the stack alone."""
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                list(self.command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
                start_new_session=True,
                **self.popen_options,  # type: ignore[call-overload]
            )
        self._started_at = time.monotonic()
        self._down_since = None

    def watch(self) -> str | None:
        """Start it again if it is down and its time has come; returns what happened, if any."""
        if self.process is None or self.process.poll() is None:
            return None
        now = time.monotonic()
        if self._down_since is None:
            return self._note_end(now)
        if self.is_back():
            return None
        if now - self._down_since < self._delay():
            return None
        self.start()
        return f"{self.name} started again"

    def _note_end(self, now: float) -> str:
        assert self.process is not None  # noqa: S101 - the caller has looked
        self._down_since = now
        self._reap_orphans()
        if self.process.returncode == 0:
            return (
                f"{self.name} was stopped from outside; it is started again in "
                f"{LEFT_ALONE_SECONDS:.0f} s unless somebody does"
            )
        steady = now - self._started_at > STEADY_SECONDS
        self._crashes = 0 if steady else self._crashes + 1
        return f"{self.name} died with code {self.process.returncode}"

    def _delay(self) -> float:
        assert self.process is not None  # noqa: S101 - the caller has looked
        if self.process.returncode == 0:
            return LEFT_ALONE_SECONDS
        return min(self._crashes * 0.5, MAX_RESTART_DELAY_SECONDS)

    def _reap_orphans(self) -> None:
        """A worker killed with -9 leaves children behind; they share its process group."""
        assert self.process is not None  # noqa: S101 - the caller has looked
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def ask_to_stop(self) -> None:
        """Send its stop signal, if it runs; its time to stop begins now."""
        self._stop_by = time.monotonic() + self.stop_timeout_seconds
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(self.stop_signal)

    def wait_stopped(self) -> bool:
        """Wait for its end; kill it when its time is over. False if it had to be killed."""
        if self.process is None:
            return True
        try:
            self.process.wait(max(0.0, self._stop_by - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._reap_orphans()
            self.process.wait()
            return False
        self._reap_orphans()
        return True


def leftovers(directory: Path) -> list[psutil.Process]:
    """Processes that a stack on `directory` started and, being killed, could not stop."""
    found = {
        process.pid: process
        for process in psutil.process_iter()
        if process.pid != os.getpid() and _belongs(process, directory)
    }
    return [process for process in found.values() if _parent(process) not in found]


def _belongs(process: psutil.Process, directory: Path) -> bool:
    """Servers live in their data directory, and may overwrite the environment they were given."""
    with suppress(psutil.Error, OSError):
        if process.name() in SERVERS:
            return Path(process.cwd()).is_relative_to(directory)
        return process.environ().get(STACK_MARKER) == str(directory)
    return False


def _parent(process: psutil.Process) -> int | None:
    with suppress(psutil.Error):
        return process.ppid()
    return None


def end(processes: Sequence[psutil.Process], timeout_seconds: float = 20.0) -> None:
    """Stop processes that are nobody's children any more, gently first."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            fast_shutdown = process.name() == "postgres"
            process.send_signal(signal.SIGINT if fast_shutdown else signal.SIGTERM)
    alive = _still_alive(processes, timeout_seconds)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    _still_alive(alive, timeout_seconds)


def _still_alive(
    processes: Sequence[psutil.Process], timeout_seconds: float
) -> list[psutil.Process]:
    """Those that have not ended in time; one that its parent has yet to reap has ended."""
    deadline = time.monotonic() + timeout_seconds
    while alive := [process for process in processes if _is_alive(process)]:
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS)
    return alive


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
