"""`metering status`: queues, dead letters and workers at a glance."""

from typing import Any, Final

from redis.exceptions import RedisError

from ledger import deadletters
from ledger.database import Database
from ops.output import AsJson, console, errors_reported, print_json, table
from ops.stackfile import DataDir, target_settings
from schema.errors import QueueUnavailable
from schema.settings import Settings
from worker import stream

PING_SECONDS: Final = 1.0


def status(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Show what waits on each shard, dead letters by reason, and the workers that answer."""
    with errors_reported(as_json=as_json):
        found = look(target_settings(data_dir))
        if as_json:
            print_json(found)
        else:
            _show(found)


def look(settings: Settings) -> dict[str, Any]:
    """The state of the pipeline.

    Raises:
        QueueUnavailable: Redis does not answer.
        LedgerUnavailable: PostgreSQL does not answer.
    """
    try:
        with stream.connect(settings) as client:
            shards = stream.inspect(client, settings.shards)
    except RedisError as error:
        raise QueueUnavailable(f"Redis does not answer: {error}") from None
    dead = deadletters.open_by_reason(Database.of(settings, pool_size=1))
    return {
        "depth": sum(shard.depth for shard in shards),
        "shards": [shard.as_dict() for shard in shards],
        "dead_letters": dead,
        "workers": _workers(settings),
    }


def _workers(settings: Settings) -> list[str]:
    from celery import Celery  # noqa: PLC0415 - slow to import, and only needed here

    with Celery(broker=settings.celery_broker_url, set_as_current=False) as app:
        answers = app.control.ping(timeout=PING_SECONDS)
    return sorted(name for answer in answers for name in answer)


def _show(found: dict[str, Any]) -> None:
    columns = ("shard", "depth", "pending", "oldest (s)")
    busy = [shard for shard in found["shards"] if shard["depth"]]
    rows = [(s["shard"], s["depth"], s["pending"], s["oldest_seconds"]) for s in busy]
    if rows:
        console.print(table(f"Waiting: {found['depth']:,} events", columns, rows))
    else:
        console.print(f"all {len(found['shards'])} shards are empty")
    if found["dead_letters"]:
        letters = found["dead_letters"].items()
        console.print(table("Open dead letters", ("reason", "events"), letters))
    else:
        console.print("no open dead letters")
    names = ", ".join(found["workers"])
    console.print(f"workers: {names}" if names else "[red]no worker answers[/]")
