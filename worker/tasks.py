"""The Celery tasks: a few lines each, over `worker.drain` and `worker.stream`."""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from typing import Any, Final

import stamina
import structlog
from redis.exceptions import RedisError

from ledger import allocations, debts, holds, resets, runs, subscriptions
from ledger.clock import utc_now
from ledger.database import Database
from ledger.reconcile import reconcile as reconcile_ledger
from schema.errors import LedgerUnavailable
from schema.settings import Settings, load_settings
from schema.wire import (
    TASK_DRAIN,
    TASK_EXPIRE_HOLDS,
    TASK_RECONCILE,
    TASK_RESET_DUE,
    TASK_ROLL_OVER,
    TASK_SETTLE,
    TASK_SWEEP,
    TOKEN_EXPIRES_SECONDS,
    wake_key,
)
from worker.app import SWEEP_SECONDS, app
from worker.drain import Drain
from worker.stream import connect, inspect

log = structlog.get_logger(__name__)

AWAY: Final = (LedgerUnavailable, RedisError)
WAKE_MILLISECONDS: Final = int(SWEEP_SECONDS * 900)
"""For how long a woken shard is not woken again; just short of a sweep, so that none is missed."""


@cache
def _settings() -> Settings:
    return load_settings()


@cache
def _database() -> Database:
    """This process's database; made after the fork, so that no connection is shared."""
    return Database.of(_settings(), pool_size=1, application_name="metering worker")


@cache
def _drain() -> Drain:
    return Drain(_settings(), _database(), connect(_settings()))


@app.task(name=TASK_DRAIN)
def drain(shard: int) -> None:
    """Apply what waits on one shard, and come back for more."""
    settings = _settings()
    try:
        for attempt in stamina.retry_context(
            on=AWAY, attempts=None, timeout=settings.outage_wait_seconds, wait_max=1.0
        ):
            with attempt:
                done = _drain().run(shard)
    except AWAY as error:
        log.warning("drain gave way to an outage", shard=shard, error=str(error)[:500])
        return
    if done.more:
        drain.apply_async((shard,), expires=TOKEN_EXPIRES_SECONDS)


@app.task(name=TASK_SWEEP)
def sweep() -> None:
    """Wake every shard that holds entries, whoever may have lost a token.

    The order is random, so that under overload no shard is always the last in line.
    """
    settings = _settings()
    try:
        with connect(settings) as client:
            waiting = [state.shard for state in inspect(client, settings.shards) if state.depth]
            random.shuffle(waiting)
            for shard in waiting:
                if client.set(wake_key(shard), 1, nx=True, px=WAKE_MILLISECONDS):
                    drain.apply_async((shard,), expires=TOKEN_EXPIRES_SECONDS)
    except RedisError as error:
        log.warning("sweep found Redis away", error=str(error)[:500])


@app.task(name=TASK_EXPIRE_HOLDS)
def expire_holds() -> None:
    """Give back the credits of holds whose time is over."""
    with _put_off_by_outages(TASK_EXPIRE_HOLDS):
        expired = holds.expire(_database(), utc_now())
        if expired:
            log.warning("holds expired without an event", holds=expired)


@app.task(name=TASK_SETTLE)
def settle() -> None:
    """Charge the debts for which credits have come."""
    with _put_off_by_outages(TASK_SETTLE):
        settled = debts.settle(_database(), utc_now())
        if settled.debts:
            log.info("debts settled", debts=settled.debts, credits=settled.credits)


@app.task(name=TASK_RESET_DUE)
def reset_due() -> None:
    """Refresh the pools and reset the allocations that are due, then take unused credits home."""
    with _put_off_by_outages(TASK_RESET_DUE), _recorded(TASK_RESET_DUE) as figures:
        now = utc_now()
        report = resets.reset_due(_database(), now)
        returned = allocations.return_unused(_database(), now)
        figures.update(asdict(report), deactivated_returned=returned)
        if not report.allocations_reset:
            # What the last resets lacked is news until the next ones.
            before = runs.latest(_database(), TASK_RESET_DUE)
            figures["credits_short"] = before.figures["credits_short"] if before else 0
        if report.credits_short:
            log.warning("pools could not cover their resets", **asdict(report))


@app.task(name=TASK_ROLL_OVER)
def roll_over() -> None:
    """Begin the billing periods that are due, end trials and subscriptions."""
    with _put_off_by_outages(TASK_ROLL_OVER):
        done = subscriptions.roll_over(_database(), utc_now())
        if done != subscriptions.RollOver():
            log.info("subscriptions rolled over", **asdict(done))


@app.task(name=TASK_RECONCILE)
def reconcile() -> None:
    """Prove the books, and leave what was found for the metrics."""
    with _put_off_by_outages(TASK_RECONCILE), _recorded(TASK_RECONCILE) as figures:
        report = reconcile_ledger(_database())
        figures.update(report.as_figures())
        for drift in report.drifts:
            log.error("drift", **asdict(drift))


@contextmanager
def _put_off_by_outages(task: str) -> Iterator[None]:
    """Leave the work to the next start by beat if PostgreSQL is away."""
    try:
        yield
    except LedgerUnavailable as error:
        log.warning("task put off by an outage", task=task, error=str(error)[:500])


@contextmanager
def _recorded(task: str) -> Iterator[dict[str, Any]]:
    """Leave the figures of a run where metrics and operators find them."""
    started_at, started = utc_now(), time.monotonic()
    figures: dict[str, Any] = {}
    yield figures
    runs.record(_database(), task, started_at, time.monotonic() - started, figures)
