"""How many pre-checks a second the API answers, and how evenly.

All cases run in one go, over HTTP, on one uvicorn process each:

- `empty`: a FastAPI endpoint with the same body that asks nobody;
- `connecting`: a new database connection per check, as people would write it;
- `check`: the pre-check as advice (`hold: false`);
- `hold`: the pre-check that sets credits aside;
- `draining`: the same as `hold`, while workers apply 5,000 events a second.

Every round compares its cases with each other; the median of the rounds counts.
"""

import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

import httpx

from benchmarks.bench import USERS, Bench, running_bench, running_worker
from benchmarks.load import Load, Target, apply_load, post
from ledger import servicetokens
from ledger.clock import utc_now
from ledger.database import run
from ops.servers import LOOPBACK, free_port, wait_until
from schema.scopes import Scope
from schema.wire import CELERY_QUEUE, TASK_SWEEP

PATH: Final = "/api/v1/precheck"
DRAIN_WORKERS: Final = 2
READY_SECONDS: Final = 60.0
GOALS: Final = {
    "check_to_empty": 0.45,
    "check_to_connecting": 8.0,
    "hold_to_empty": 0.22,
    "hold_to_connecting": 5.0,
    "hold_p99_to_p50": 4.0,
    "draining_p99_to_p50": 4.0,
}
"""At least; the last two at most."""
CASES: Final = ("empty", "connecting", "check", "hold", "draining")


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure."""

    seconds: float
    connections: int
    rounds: int


@dataclass(slots=True)
class Figures:
    """The loads of each case, one per round."""

    loads: dict[str, list[Load]] = field(default_factory=lambda: {case: [] for case in CASES})
    drained_per_second: list[float] = field(default_factory=list)

    def rows(self) -> list[tuple[str, int, float, float]]:
        """Case, requests per second, and the p50 and p99 of an answer in milliseconds."""
        return [
            (case, round(_median(loads, _rate)), _median(loads, _p50), _median(loads, _p99))
            for case, loads in self.loads.items()
        ]

    def ratios(self) -> list[tuple[str, float, float]]:
        """Name, value and goal of each ratio."""
        loads = self.loads
        reached = {
            f"{ours}_to_{theirs}": statistics.median(
                _rate(one) / _rate(other)
                for one, other in zip(loads[ours], loads[theirs], strict=True)
            )
            for ours in ("check", "hold")
            for theirs in ("empty", "connecting")
        }
        for case in ("hold", "draining"):
            reached[f"{case}_p99_to_p50"] = _median(loads[case], lambda one: _p99(one) / _p50(one))
        return [(name, round(reached[name], 3), goal) for name, goal in GOALS.items()]

    def as_document(self) -> dict[str, Any]:
        """The figures for programs."""
        return {
            case: {"per_second": rate, "p50_ms": p50, "p99_ms": p99}
            for case, rate, p50, p99 in self.rows()
        } | {
            "failures": {case: sum(one.failures for one in self.loads[case]) for case in CASES},
            "drained_per_second": round(statistics.median(self.drained_per_second)),
            "ratios": {name: value for name, value, _ in self.ratios()},
            "goals": GOALS,
        }


def _median(loads: Sequence[Load], of: Callable[[Load], float]) -> float:
    return round(statistics.median(map(of, loads)), 2)


def _rate(load: Load) -> float:
    return load.per_second


def _p50(load: Load) -> float:
    return statistics.median(load.seconds) * 1000


def _p99(load: Load) -> float:
    return statistics.quantiles(load.seconds, n=100)[98] * 1000


def measure(plan: Plan, tell: Callable[[str], None]) -> Figures:
    """Run every case `plan.rounds` times."""
    figures = Figures()
    with (
        running_bench(DRAIN_WORKERS) as bench,
        _serving(bench, "httptools", "benchmarks.gateapps:app") as others,
        _serving(bench, "api.protocol:Protocol", "--factory", "api.app:create") as ours,
    ):
        targets = _targets(bench, others, ours)
        for number in range(1, plan.rounds + 1):
            for case in ("empty", "connecting", "check", "hold"):
                tell(f"round {number} of {plan.rounds}: {case}")
                figures.loads[case].append(_load(targets[case], plan))
            tell(f"round {number} of {plan.rounds}: draining")
            with running_worker(bench, "worker.app"), _events_flowing(bench) as drained:
                figures.loads["draining"].append(_load(targets["hold"], plan))
                figures.drained_per_second.append(drained())
    return figures


def _load(target: Target, plan: Plan) -> Load:
    apply_load(target, connections=plan.connections, seconds=min(1.0, plan.seconds))  # warm up
    return apply_load(target, connections=plan.connections, seconds=plan.seconds)


@contextmanager
def _serving(bench: Bench, http: str, *app: str) -> Iterator[str]:
    """One uvicorn process as in production; its address."""
    url = f"http://{LOOPBACK}:{free_port()}"
    command = [
        *(sys.executable, "-m", "uvicorn", *app, "--host", LOOPBACK),
        *("--port", str(urlsplit(url).port), "--loop", "uvloop", "--ws", "none"),
        *("--http", http),
        *("--no-access-log", "--log-level", "warning"),
    ]
    environment = {**bench.environment, "METERING_GATE_LIMIT_PER_MINUTE": "100000000"}
    with (bench.directory / "uvicorn.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        wait_until(lambda: _answers(url), "uvicorn", READY_SECONDS)
        yield url
    finally:
        process.terminate()
        process.wait(READY_SECONDS)


def _answers(url: str) -> bool:
    try:
        httpx.get(f"{url}/livez", timeout=2)
    except httpx.HTTPError:
        return False
    return True


def _targets(bench: Bench, others: str, ours: str) -> Mapping[str, Target]:
    token, _ = servicetokens.create(
        bench.database, "benchmark", [Scope.PRECHECK], actor="benchmark", now=utc_now()
    )
    bodies = [
        {"org_id": str(org_id), "user_id": f"user-{n}", "service_type": "contact_lookup"}
        for n in range(1, USERS + 1, 10)
        for org_id in bench.organizations
    ]
    cases = {
        "empty": (others, "/empty", True),
        "connecting": (others, "/connecting", True),
        "check": (ours, PATH, False),
        "hold": (ours, PATH, True),
    }
    return {case: _target(*where, bodies, token) for case, where in cases.items()}


def _target(
    url: str, path: str, hold: bool, bodies: Sequence[Mapping[str, str]], token: str
) -> Target:
    address = urlsplit(url)
    assert address.hostname is not None  # noqa: S101 - we made it
    assert address.port is not None  # noqa: S101 - we made it
    requests = [
        post(
            path,
            address.netloc,
            json.dumps({**body, "hold": hold}).encode(),
            f"Authorization: Bearer {token}",
        )
        for body in bodies
    ]
    return Target(address.hostname, address.port, requests)


@contextmanager
def _events_flowing(bench: Bench) -> Iterator[Callable[[], float]]:
    """Emit 5,000 events a second; what is called tells how many were applied a second so far."""
    over = threading.Event()
    emitter = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.emitter", *map(str, bench.organizations)],
        env=bench.environment,
    )
    sweeper = threading.Thread(target=_sweep, args=(bench, over))
    sweeper.start()
    try:
        before = _charged(bench)
        wait_until(lambda: _charged(bench) > before, "the first event", READY_SECONDS)
        already, started = _charged(bench), time.perf_counter()
        yield lambda: (_charged(bench) - already) / (time.perf_counter() - started)
    finally:
        over.set()
        sweeper.join()
        emitter.terminate()
        emitter.wait(READY_SECONDS)


def _sweep(bench: Bench, over: threading.Event) -> None:
    """Play beat: a sweep each second, as in production."""
    while not over.wait(1.0):
        bench.celery.send_task(TASK_SWEEP, queue=CELERY_QUEUE, expires=2)


def _charged(bench: Bench) -> int:
    with bench.database.snapshot() as connection:
        count: int = run(
            connection, "SELECT count(*) FROM usage_requests WHERE state = 'charged'"
        ).scalar_one()
        return count
