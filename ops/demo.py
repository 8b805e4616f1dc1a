"""The demonstration: a day of LoopNet in seconds, with everything going wrong that can."""

import json
import os
import random
import signal
import time
from collections import defaultdict
from contextlib import closing
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID, uuid4

import httpx
from redis import Redis

from ledger import reports
from ledger.database import Database
from ledger.holds import DEFAULT_SECONDS
from ledger.organizations import (
    CreatedOrganization,
    TestOrganization,
    TestUser,
    create_test_organization,
)
from ledger.reconcile import Report, reconcile
from ops.monthend import MonthEnd, end_month, poorest
from ops.simulate import Operation, operations
from ops.stack import Stack, Tell
from producers import UsageProducer
from schema.errors import Unavailable
from schema.plans import PlanName
from schema.settings import Settings
from schema.wire import EVENT_FIELD, shard_of, stream_name
from worker import stream

PRECHECK: Final = "/api/v1/precheck"
OPERATIONS: Final = 600
SECONDS_PER_OPERATION: Final = 0.012
DUPLICATE_RATE: Final = 0.04
LOST_AFTER_SECONDS: Final = 2
DRAIN_TIMEOUT_SECONDS: Final = 60.0
POLL_SECONDS: Final = 0.1

ORGANIZATION: Final = TestOrganization(
    org_name="harbor-realty",
    display_name="Harbor Realty Partners",
    subscription_plan=PlanName.PLATFORM,
    initial_credits=60_000,
    test_users=[
        TestUser(email="ana@harbor.example", allocated_credits=30_000, role="admin"),
        TestUser(email="ben@harbor.example", allocated_credits=25_000),
        TestUser(email="cleo@harbor.example", allocated_credits=500),
    ],
)


@dataclass(slots=True)
class Tally:
    """What LoopNet did and saw, to be held against what the ledger says."""

    operations: int = 0
    denied: int = 0
    failed: int = 0
    succeeded: int = 0
    sent_twice: int = 0
    lost: int = 0
    malformed: int = 0
    reported: set[str] = field(default_factory=set)


@dataclass(slots=True)
class Story:
    """The result of a demonstration."""

    organization: CreatedOrganization
    tally: Tally
    seconds_to_drain: float
    balances: reports.Rows
    by_service: reports.Rows
    dead_letters: reports.Rows
    month_end: MonthEnd
    report: Report
    accounted: bool
    """Whether every reported request ended as charged or dead, and none was charged twice."""

    @property
    def is_sound(self) -> bool:
        """Whether everything came out as promised."""
        return self.report.is_clean and self.accounted


def run_demo(stack: Stack, settings: Settings, token: str, tell: Tell) -> Story:
    """Play the demonstration on a running stack."""
    database = Database.of(settings, pool_size=2)
    tell("making an organization with three users")
    organization = create_test_organization(database, ORGANIZATION, actor="demo")
    tally = Tally()
    with (
        stack.watched(),
        UsageProducer(settings) as producer,
        stream.connect(settings) as client,
        closing(Gate(stack.file.api_url, token, organization.org_id)) as gate,
    ):
        tell(f"simulating {OPERATIONS} operations: hold, run, report or release")
        users = [user.user_id for user in organization.users]
        _lose_operation(users[0], gate, tally)
        started = time.monotonic()
        for number, operation in enumerate(operations(users, OPERATIONS)):
            if number == OPERATIONS // 2:
                _kill_worker(stack, tell)
            _keep_pace(started, number)
            _play(operation, organization.org_id, gate, producer, tally)
        _forget_to_ask(organization, producer, tally)
        _send_rubbish(client, organization.org_id, settings.shards, tally)
        tell("waiting for the queue to run dry")
        seconds = _wait_for_drain(client, settings.shards)
    return _story(database, organization, tally, seconds, tell)


def _story(
    database: Database, organization: CreatedOrganization, tally: Tally, seconds: float, tell: Tell
) -> Story:
    org_id = organization.org_id
    return Story(
        organization=organization,
        tally=tally,
        seconds_to_drain=seconds,
        balances=reports.balances(database, org_id),
        by_service=reports.usage_by_service(database, org_id),
        dead_letters=reports.dead_letters_by_reason(database, org_id),
        month_end=end_month(database, organization, tell),
        report=reconcile(database),
        accounted=_accounted(reports.outcomes(database, org_id), tally),
    )


def _accounted(outcomes: dict[str, str], tally: Tally) -> bool:
    """Reported requests are charged or dead; of the others, holds were released or ran out."""
    by_state: defaultdict[str, set[str]] = defaultdict(set)
    for name, state in outcomes.items():
        by_state[state].add(name)
    settled = by_state.pop("charged", set()) | by_state.pop("dead", set())
    unsettled = {state: len(names) for state, names in by_state.items()}
    return settled == tally.reported and unsettled == {
        "released": tally.failed,
        "expired": tally.lost,
    }


class Gate:
    """LoopNet's side of the pre-check: ask before each operation, release after a failure."""

    def __init__(self, api_url: str, token: str, org_id: UUID) -> None:
        headers = {"Authorization": f"Bearer {token}"}
        self._client = httpx.Client(base_url=api_url, headers=headers)
        self._org_id = str(org_id)

    def allows(self, operation: Operation, seconds: int = DEFAULT_SECONDS) -> bool:
        """Whether the operation may run; its credits are then held, for so many seconds."""
        body = {
            "org_id": self._org_id,
            "user_id": operation.user_id,
            "service_type": operation.kind.service_type,
            "variant": operation.kind.variant,
            "quantity": str(operation.quantity),
            "request_id": operation.request_id,
            "hold_ttl_seconds": seconds,
        }
        answer = self._client.post(PRECHECK, json=body)
        if answer.status_code not in (httpx.codes.OK, httpx.codes.PAYMENT_REQUIRED):
            raise Unavailable(f"the gate answered {answer.status_code}: {answer.text}")
        return answer.is_success

    def release(self, operation: Operation) -> None:
        """Give the held credits back."""
        path = f"{PRECHECK}/{operation.request_id}"
        self._client.delete(path, params={"org_id": self._org_id}).raise_for_status()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


def _play(
    operation: Operation,
    org_id: UUID,
    gate: Gate,
    producer: UsageProducer,
    tally: Tally,
) -> None:
    tally.operations += 1
    if not gate.allows(operation):
        tally.denied += 1
        return
    if not operation.succeeds:
        gate.release(operation)
        tally.failed += 1
        return
    tally.succeeded += 1
    event = operation.event(org_id)
    producer.emit(event)
    tally.reported.add(event.request_id)
    if random.random() < DUPLICATE_RATE:  # noqa: S311 - a simulation
        producer.emit(event)
        tally.sent_twice += 1


def _keep_pace(started: float, number: int) -> None:
    """Spread the operations evenly, so that the ledger keeps up and the gate sees users run out."""
    ahead = started + number * SECONDS_PER_OPERATION - time.monotonic()
    if ahead > 0:
        time.sleep(ahead)


def _lose_operation(user_id: str, gate: Gate, tally: Tally) -> None:
    """An operation is allowed, and then neither reported nor released."""
    (operation,) = operations([user_id], 1, seed=3)
    gate.allows(operation, LOST_AFTER_SECONDS)
    tally.operations += 1
    tally.lost += 1


def _forget_to_ask(
    organization: CreatedOrganization, producer: UsageProducer, tally: Tally
) -> None:
    """Some operations run without a pre-check by a user who has run out."""
    for operation in operations([poorest(organization).user_id], 20, seed=11):
        event = operation.event(organization.org_id)
        producer.emit(event)
        tally.operations += 1
        tally.succeeded += 1
        tally.reported.add(event.request_id)


def _send_rubbish(client: "Redis", org_id: UUID, shards: int, tally: Tally) -> None:
    """What a broken foreign client might write straight to the stream."""
    name = stream_name(shard_of(org_id, shards))
    sound = {
        "request_id": f"op-{uuid4()}",
        "org_id": str(org_id),
        "user_id": "ana@harbor.example",
        "service_type": "valuation",
        "occurred_at": "2026-01-01T00:00:00Z",
    }
    rubbish = (
        "this is not JSON",
        json.dumps(sound | {"quantity": -3}),
        json.dumps(sound | {"user_id": ""}),
        '{"request_id": "a", "request_id": "b"}',
    )
    for text in rubbish:
        client.xadd(name, {EVENT_FIELD: text})
        tally.malformed += 1


def _kill_worker(stack: Stack, tell: Tell) -> None:
    pid = stack.child("worker").pid
    if pid is not None:
        tell(f"kill -9 {pid} (the worker)")
        os.kill(pid, signal.SIGKILL)


def _wait_for_drain(client: "Redis", shards: int) -> float:
    started = time.monotonic()
    while stream.total_depth(client, shards):
        if time.monotonic() - started > DRAIN_TIMEOUT_SECONDS:
            raise Unavailable("the queue did not run dry; see worker.log")
        time.sleep(POLL_SECONDS)
    return time.monotonic() - started
