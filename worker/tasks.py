"""The Celery tasks: a few lines each, over `worker.drain` and `worker.stream`."""

import random
from functools import cache
from typing import Final

import stamina
import structlog
from redis.exceptions import RedisError

from ledger import holds
from ledger.clock import utc_now
from ledger.database import Database
from schema.errors import LedgerUnavailable
from schema.settings import Settings, load_settings
from schema.wire import TASK_DRAIN, TASK_EXPIRE_HOLDS, TASK_SWEEP, TOKEN_EXPIRES_SECONDS, wake_key
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
    try:
        expired = holds.expire(_database(), utc_now())
    except LedgerUnavailable as error:
        log.warning("holds not expired", error=str(error)[:500])
        return
    if expired:
        log.warning("holds expired without an event", holds=expired)
