"""Every event is charged once, whatever dies meanwhile: workers, PostgreSQL, Valkey."""

import csv
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest

from ledger.database import Database
from ledger.reconcile import reconcile
from ops.processes import Child
from ops.servers import free_port, wait_until
from ops.stack import Stack
from ops.stackfile import target_settings
from schema.settings import Settings, load_settings
from tests.acceptance.conftest import Finished, organization_document, run_metering
from worker import stream

pytestmark = [pytest.mark.acceptance, pytest.mark.chaos, pytest.mark.timeout(600)]

OUTAGE_SECONDS = 3.0


@pytest.fixture(scope="module")
def running(home: Path) -> Iterator[tuple[Stack, Path]]:
    settings = load_settings(data_dir=home / ".metering")
    stack = Stack(settings, workers=2, port=free_port(), tell=print)
    with pytest.MonkeyPatch.context() as patch:
        # Small batches, so that a kill finds one in the act.
        patch.setenv("METERING_DRAIN_BATCH_EVENTS", "100")
        with stack.running(), stack.watched():
            yield stack, home


@pytest.fixture
def events(request: pytest.FixtureRequest) -> int:
    number: int = request.config.getoption("--chaos-events")
    return number


class Replay(Thread):
    """`metering replay` of a file, in the background."""

    def __init__(self, home: Path, name: str, events: int) -> None:
        super().__init__()
        self._home = home
        self._name = name
        self.expected_credits = self._write(events)
        self.events = events
        self.finished: Finished | None = None

    def _write(self, events: int) -> int:
        chance = random.Random(1)
        credits = 0
        with (self._home / f"{self._name}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["TIMESTAMP", "ContextTokens", "GeneratedTokens"])
            for number in range(events):
                tokens = chance.randint(1, 3000)
                rows.writerow([f"2023-11-16 18:15:{number % 60:02}.6805900", tokens, 5])
                credits += -(-(tokens + 5) * 15 // 1000)
        return credits

    def run(self) -> None:
        document = self._home / f"{self._name}.json"
        document.write_text(organization_document(self._name, [("u@x.example", 10**8)], 10**8))
        created = run_metering("org", "create", "-f", str(document), "--json", cwd=self._home)
        assert created.code == 0, created.err
        self.finished = run_metering(
            "replay", f"{self._name}.csv", "--preset", "azure-llm", "--org", self._name, "--json",
            cwd=self._home,
        )  # fmt: skip

    def assert_exact(self) -> None:
        self.join(500)
        assert self.finished is not None, "the replay did not end"
        assert self.finished.code == 0, self.finished.err
        result = self.finished.document
        figures = {key: result[key] for key in ("events", "charged", "duplicates", "credits")}
        assert figures == {
            "events": self.events,
            "charged": self.events,
            "duplicates": 0,
            "credits": self.expected_credits,
        }


def celery_processes(stack: Stack) -> list[psutil.Process]:
    parents = [pid for name in ("worker", "beat") if (pid := stack.child(name).pid)]
    found = []
    for pid in parents:
        parent = psutil.Process(pid)
        found += [parent, *parent.children(recursive=True)]
    return found


def wait_for_batch(home: Path) -> None:
    """Return while a batch has been read from a stream and is not acknowledged yet."""
    settings = settings_of(home)
    deadline = time.monotonic() + 60
    with stream.connect(settings) as client:
        while not any(state.pending for state in stream.inspect(client, settings.shards)):
            assert time.monotonic() < deadline, "no batch was caught in the act"


def settings_of(home: Path) -> Settings:
    return target_settings(home / ".metering")


def assert_reconciled(home: Path) -> None:
    database = Database.of(settings_of(home))
    report = reconcile(database)
    database.close()
    assert report.is_clean, report.drifts


def test_celery_killed_three_times(running: tuple[Stack, Path], events: int) -> None:
    stack, home = running
    replay = Replay(home, "killed-workers", events)
    replay.start()
    for _ in range(3):
        wait_for_batch(home)
        for process in celery_processes(stack):
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        assert any(state.depth for state in states(home)), "too few events for three kills"
    replay.assert_exact()
    assert_reconciled(home)


def states(home: Path) -> list[stream.StreamState]:
    settings = settings_of(home)
    with stream.connect(settings) as client:
        return stream.inspect(client, settings.shards)


@pytest.mark.parametrize("server", ["postgres", "valkey"])
def test_server_stopped_for_a_while(running: tuple[Stack, Path], events: int, server: str) -> None:
    stack, home = running
    replay = Replay(home, f"stopped-{server}", events)
    replay.start()
    wait_for_batch(home)
    child = stack.child(server)
    child.ask_to_stop()
    child.wait_stopped()
    back_at = time.monotonic() + OUTAGE_SECONDS
    wait_until(lambda: time.monotonic() > back_at, "the outage", 60)
    child.start()
    replay.assert_exact()
    assert_reconciled(home)


def test_valkey_killed(running: tuple[Stack, Path], events: int) -> None:
    """What Valkey had acknowledged survives its death in the append-only file."""
    stack, home = running
    replay = Replay(home, "killed-valkey", events)
    replay.start()
    wait_for_batch(home)
    child: Child = stack.child("valkey")
    pid: Any = child.pid
    os.kill(pid, signal.SIGKILL)
    replay.assert_exact()
    assert_reconciled(home)
