"""The end of a process: what it has begun is answered, and then it goes, within its time."""

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest

from ops.servers import LOOPBACK, wait_until
from ops.stack import DRAIN_SECONDS
from schema.scopes import Scope
from schema.settings import Settings
from tests.integration.api.answers import Json, refused
from tests.integration.api.conftest import Callers, Headers
from tests.integration.api.processes import ApiProcess, api_process
from tests.integration.ledger.world import World

PRECHECK = "/api/v1/precheck"


@pytest.fixture
def org_id(api_world: World) -> UUID:
    """An organization in which Ada has more credits than she will hold."""
    return api_world.organization(
        pool=1_000_000, allocations={"ada": 1_000_000}, members={"ada": "member"}
    )


@pytest.fixture
def service(callers: Callers) -> Headers:
    return callers.service(Scope.PRECHECK, Scope.DEDUCT)


def operation(org_id: UUID, request_id: str) -> Json:
    return {"org_id": str(org_id), "user_id": "ada", "credits": 1, "request_id": request_id}


@dataclass(frozen=True)
class Waiting:
    """A request that waits in a running process until `release` lets it go on."""

    running: ApiProcess
    release: Callable[[], None]
    answered: Future[httpx.Response]


@pytest.fixture
def start_waiting(
    api_settings: Settings,
    api_database_url: str,
    service: Headers,
    tmp_path: Path,
) -> Iterator[Callable[..., Waiting]]:
    """Starts a process with these settings, and a request in it that waits for a lock."""
    with ExitStack() as stack:

        def start(path: str, body: Json, **others: object) -> Waiting:
            log = tmp_path / "api.log"
            running = stack.enter_context(api_process(api_settings, log, **others))
            holder = stack.enter_context(psycopg.connect(api_database_url))
            watcher = stack.enter_context(psycopg.connect(api_database_url, autocommit=True))
            threads = stack.enter_context(ThreadPoolExecutor(1))
            stack.callback(holder.rollback)
            holder.execute("LOCK TABLE user_credit_allocations IN EXCLUSIVE MODE")
            answered = threads.submit(
                httpx.post, running.url + path, json=body, headers=service, timeout=30
            )
            wait_until(lambda: somebody_waits(watcher), "the request", 10)
            return Waiting(running, holder.rollback, answered)

        yield start


def somebody_waits(connection: psycopg.Connection) -> bool:
    found = connection.execute(
        """
        SELECT FROM pg_stat_activity
        WHERE application_name LIKE 'metering %' AND wait_event_type = 'Lock'
            AND datname = current_database()
        """
    )
    return found.rowcount > 0


def refuses_connections(running: ApiProcess) -> bool:
    try:
        socket.create_connection((LOOPBACK, running.port), timeout=2).close()
    except ConnectionRefusedError:
        return True
    return False


def test_a_request_under_way_is_answered_and_no_other_begins(
    start_waiting: Callable[..., Waiting], org_id: UUID
) -> None:
    waiting = start_waiting(PRECHECK, operation(org_id, "r-1"))
    running = waiting.running
    with httpx.Client(base_url=running.url) as idle:
        idle.get("/livez").raise_for_status()
        running.process.send_signal(signal.SIGTERM)
        wait_until(lambda: refuses_connections(running), "the end of new connections", 10)
        with pytest.raises(httpx.TransportError):
            idle.get("/livez")
    assert running.process.poll() is None
    waiting.release()
    answer = waiting.answered.result(20)
    assert answer.status_code == 200
    assert answer.json()["held_credits"] == 1
    assert answer.headers["Connection"] == "close"
    assert running.process.wait(DRAIN_SECONDS) == -signal.SIGTERM


def test_a_request_that_takes_too_long_is_told_so_and_the_process_ends(
    start_waiting: Callable[..., Waiting], org_id: UUID
) -> None:
    charge = {"user_id": "ada", "credits": 1, "request_id": "r-1"}
    path = f"/api/v1/org-billing/credits/{org_id}/deduct"
    waiting = start_waiting(path, charge, api_statement_timeout_seconds=DRAIN_SECONDS + 2)
    waiting.running.process.send_signal(signal.SIGTERM)
    waiting.running.process.wait(DRAIN_SECONDS + 5)
    refused(waiting.answered.result(20), 503, "unavailable")


def test_under_load_everything_that_is_done_is_answered(
    api_settings: Settings,
    api_world: World,
    org_id: UUID,
    service: Headers,
    tmp_path: Path,
) -> None:
    """Clients with a new connection per request: what the ledger holds, they were told of."""
    told: set[str] = set()
    unexpected: list[httpx.Response] = []

    def ask_until_nobody_listens() -> None:
        with httpx.Client(
            base_url=running.url, headers=service | {"Connection": "close"}, timeout=30
        ) as client:
            while not refuses_connections(running):
                request_id = uuid4().hex
                with suppress(httpx.TransportError):
                    answer = client.post(PRECHECK, json=operation(org_id, request_id))
                    if answer.status_code == 200:
                        told.add(request_id)
                    else:
                        unexpected.append(answer)

    with api_process(api_settings, tmp_path / "api.log") as running:
        clients = [threading.Thread(target=ask_until_nobody_listens) for _ in range(12)]
        for client in clients:
            client.start()
        deadline = time.monotonic() + 30
        while len(told) < 200:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(DRAIN_SECONDS + 2) == -signal.SIGTERM
        for client in clients:
            client.join(20)
    held = {
        row[0] for row in api_world.rows(f"usage_requests WHERE org_id = '{org_id}'", "request_id")
    }
    assert held == told
    assert unexpected == []
