"""A whole stack as its users start it, and the command as they type it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ops.servers import free_port, wait_until
from ops.stackfile import FILE_NAME, StackFile
from tests.conftest import server_directory


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


Metering = Callable[..., Finished]


def clean_environment(**settings: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("METERING_")} | settings


def run_metering(*arguments: str, cwd: Path) -> Finished:
    command = [sys.executable, "-m", "ops.cli", *arguments]
    done = subprocess.run(
        command, cwd=cwd, env=clean_environment(), capture_output=True, text=True, check=False
    )
    return Finished(done.returncode, done.stdout, done.stderr)


@contextmanager
def stack_process(cwd: Path, *options: str, **settings: str) -> Iterator["subprocess.Popen[str]"]:
    """`metering up` in `cwd`, ready; stopped at the end unless it has ended already."""
    command = [sys.executable, "-m", "ops.cli", "up", "--port", str(free_port()), *options]
    log = cwd / "up.log"
    with log.open("a") as output:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=clean_environment(**settings),
            stdout=output,
            stderr=output,
            text=True,
        )
    try:

        def ready() -> bool:
            assert process.poll() is None, log.read_text()
            stack = StackFile.read(cwd / ".metering")
            return stack is not None and stack.pids.get("supervisor") == process.pid

        wait_until(ready, "metering up", 60)
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(60)


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """The directory from which the user works; `.metering/` is made in it."""
    with server_directory() as directory:
        yield directory


@pytest.fixture
def new_home() -> Iterator[Path]:
    """A directory of the test's own, without a stack."""
    with server_directory() as directory:
        yield directory


@pytest.fixture(scope="module")
def stack(home: Path) -> Iterator[StackFile]:
    """A stack that the tests of one module share."""
    with stack_process(home):
        found = StackFile.read(home / ".metering")
        assert found is not None, FILE_NAME
        yield found


@pytest.fixture
def metering(home: Path, stack: StackFile) -> Metering:  # noqa: ARG001 - must be running
    """The `metering` command against the running stack."""

    def call(*arguments: str) -> Finished:
        return run_metering(*arguments, cwd=home)

    return call


def organization_document(name: str, users: Sequence[tuple[str, int]], credits: int) -> str:
    return json.dumps(
        {
            "org_name": name,
            "display_name": name.title(),
            "subscription_plan": "platform",
            "initial_credits": credits,
            "test_users": [{"email": e, "allocated_credits": c} for e, c in users],
        }
    )
