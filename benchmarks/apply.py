"""How many events a second reach the ledger, against the obvious way and against the ceiling.

All cases run in one go on one pair of embedded servers, with the same number of worker processes:

- `baseline`: one Celery task per event, each calling `deduct_credits()`;
- `pipeline_hot`: this pipeline, all events of one organization;
- `pipeline_spread`: this pipeline, 100 organizations of 100 users;
- `ceiling`: the spread events straight into `ledger.apply`, without any queue.
"""

import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any, Final
from uuid import UUID

from benchmarks.baseline import QUEUE, TASK
from benchmarks.bench import ORGANIZATIONS, Bench, make_events, running_bench, running_worker
from ledger.apply import apply_batch
from ledger.clock import utc_now
from ledger.database import Database, run
from ledger.decisions import Entry
from ops.output import aside
from ops.servers import wait_until
from schema.wire import (
    CELERY_QUEUE,
    EVENT_FIELD,
    TASK_DRAIN,
    TASK_SWEEP,
    shard_of,
    stream_name,
)
from worker import stream

BATCH_EVENTS: Final = 1000
PATIENCE_SECONDS: Final = 300.0
GOALS: Final = {"spread_to_baseline": 40.0, "hot_to_baseline": 25.0, "spread_to_ceiling": 0.6}


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure."""

    events: int
    baseline_events: int
    workers: int
    rounds: int


@dataclass(slots=True)
class Figures:
    """Events per second of each case, one per round."""

    baseline: list[float] = field(default_factory=list)
    pipeline_hot: list[float] = field(default_factory=list)
    pipeline_spread: list[float] = field(default_factory=list)
    ceiling: list[float] = field(default_factory=list)

    def rates(self) -> list[tuple[str, int]]:
        """The median of each case."""
        cases = ("baseline", "pipeline_hot", "pipeline_spread", "ceiling")
        return [(case, round(statistics.median(getattr(self, case)))) for case in cases]

    def ratios(self) -> list[tuple[str, float, float]]:
        """Name, value and goal of each ratio."""
        rate = dict(self.rates())
        reached = {
            "spread_to_baseline": rate["pipeline_spread"] / rate["baseline"],
            "hot_to_baseline": rate["pipeline_hot"] / rate["baseline"],
            "spread_to_ceiling": rate["pipeline_spread"] / rate["ceiling"],
        }
        return [(name, round(value, 3), GOALS[name]) for name, value in reached.items()]

    def as_document(self) -> dict[str, Any]:
        """The figures for programs."""
        return dict(self.rates()) | {
            "ratios": {name: value for name, value, _ in self.ratios()},
            "goals": GOALS,
        }


def tell_aside(text: str) -> None:
    """Show progress beside the result."""
    aside.print(f"[dim]{text}[/]", highlight=False)


def measure(plan: Plan, tell: Callable[[str], None]) -> Figures:
    """Run every case `plan.rounds` times."""
    figures = Figures()
    with running_bench(plan.workers) as bench:
        for number in range(1, plan.rounds + 1):
            tell(f"round {number} of {plan.rounds}: baseline")
            figures.baseline.append(_baseline(bench, plan.baseline_events))
            for case, organizations in (
                ("pipeline_hot", bench.organizations[:1]),
                ("pipeline_spread", bench.organizations),
            ):
                tell(f"round {number} of {plan.rounds}: {case}")
                getattr(figures, case).append(_pipeline(bench, organizations, plan.events))
            tell(f"round {number} of {plan.rounds}: ceiling")
            figures.ceiling.append(_ceiling(bench, plan.events))
    return figures


def _baseline(bench: Bench, count: int) -> float:
    already = _charged(bench)
    with running_worker(bench, "benchmarks.baseline", "-Q", "idle"):
        for _, event in make_events(bench.organizations, count):
            bench.celery.send_task(TASK, (event | {"credits": 7},), queue=QUEUE)
        started = time.perf_counter()
        bench.celery.control.add_consumer(QUEUE)
        wait_until(lambda: _charged(bench) - already >= count, "the baseline", PATIENCE_SECONDS)
        return count / (time.perf_counter() - started)


def _charged(bench: Bench) -> int:
    with bench.database.snapshot() as connection:
        count: int = run(connection, "SELECT count(*) FROM usage_requests").scalar_one()
        return count


def _pipeline(bench: Bench, organizations: Sequence[UUID], count: int) -> float:
    with running_worker(bench, "worker.app"):
        with bench.client.pipeline(transaction=False) as pipeline:
            for org_id, event in make_events(organizations, count):
                name = stream_name(shard_of(org_id, bench.settings.shards))
                pipeline.xadd(name, {EVENT_FIELD: json.dumps(event)})
            pipeline.execute()
        started = time.perf_counter()
        for shard in range(bench.settings.shards):
            bench.celery.send_task(TASK_DRAIN, (shard,), queue=CELERY_QUEUE)
        _sweep_until_empty(bench)
        return count / (time.perf_counter() - started)


def _sweep_until_empty(bench: Bench) -> None:
    """Play beat: a sweep each second, as in production."""
    started = time.monotonic()
    sweeps = 0
    while stream.total_depth(bench.client, bench.settings.shards):
        elapsed = time.monotonic() - started
        if elapsed > PATIENCE_SECONDS:
            raise TimeoutError("the pipeline did not drain")
        if elapsed > sweeps:
            bench.celery.send_task(TASK_SWEEP, queue=CELERY_QUEUE, expires=2)
            sweeps += 1
        time.sleep(0.01)


def _ceiling(bench: Bench, count: int) -> float:
    """The same batches, made beforehand, in as many processes as there are workers."""
    share = -(-ORGANIZATIONS // bench.workers)
    url = bench.settings.database_url.get_secret_value()
    jobs = [
        _payloads(bench.organizations[start : start + share], count // bench.workers)
        for start in range(0, ORGANIZATIONS, share)
    ]
    with ProcessPoolExecutor(bench.workers, mp_context=get_context("spawn")) as processes:
        for waited in [processes.submit(_straight, url, [b""]) for _ in jobs]:
            waited.result()
        started = time.perf_counter()
        applied = [processes.submit(_straight, url, payloads) for payloads in jobs]
        total = sum(future.result() for future in applied)
        return total / (time.perf_counter() - started)


def _payloads(organizations: Sequence[UUID], count: int) -> list[bytes]:
    return [json.dumps(event).encode() for _, event in make_events(organizations, count)]


def _straight(url: str, payloads: Sequence[bytes]) -> int:
    database = Database(url, pool_size=1)
    entries = [Entry(payload) for payload in payloads]
    gc.disable()  # as the drain does
    charged = 0
    with database.session() as connection:
        for start in range(0, len(entries), BATCH_EVENTS):
            batch = entries[start : start + BATCH_EVENTS]
            charged += apply_batch(connection, batch, utc_now()).charged
    database.close()
    return charged
