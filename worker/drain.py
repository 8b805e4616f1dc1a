"""Drain one shard: read a batch, apply it, commit, acknowledge; again until a slice is used up.

Never the other way round: an entry leaves the stream only after its outcome is committed, so a
crash at any instant repeats work and loses nothing (design decisions D2, D3, D6).
"""

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import structlog
from redis import Redis
from sqlalchemy import Connection

from ledger import deadletters
from ledger.apply import apply_batch
from ledger.clock import utc_now
from ledger.database import Database, is_outage, run, sqlstate
from ledger.decisions import Entry, Outcome
from schema.settings import Settings
from schema.wire import DRAIN_LOCK_CLASS
from worker.stream import UsageStream

log = structlog.get_logger(__name__)

MAX_PORTION_BYTES: Final = 16 * 1024 * 1024
"""Most payload that goes to PostgreSQL in one transaction."""

_INSTALLATION_FAULTS: Final = ("0A", "28", "3D", "3F", "42", "XX")
"""Classes of SQLSTATE that speak of the installation: missing tables, rights, functions, bugs."""

# The lock lives on the session that commits. The idle timeout ends the session of a frozen
# process, and with it both its lock and its chance to commit.
_LOCK: Final = """
    SELECT
        pg_try_advisory_lock(%(lock_class)s, %(shard)s),
        set_config('idle_session_timeout', %(idle_timeout)s, false)
"""
_UNLOCK: Final = """
    SELECT
        pg_advisory_unlock(%(lock_class)s, %(shard)s),
        set_config('idle_session_timeout', '0', false)
"""


@dataclass(slots=True)
class Slice:
    """What one drain did with its slice of time."""

    outcome: Outcome = field(default_factory=Outcome)
    batches: int = 0
    more: bool = False
    """Whether the stream still held entries when the time was up."""
    busy: bool = False
    """Whether another worker held the shard, so that nothing was done."""


class Drain:
    """Applies the events of one shard at a time to the ledger."""

    def __init__(self, settings: Settings, database: Database, client: "Redis") -> None:
        self._settings = settings
        self._database = database
        self._client = client

    def run(self, shard: int) -> Slice:
        """Drain `shard` until it is empty or the slice is over.

        Raises:
            LedgerUnavailable: PostgreSQL went away; what was not committed is still pending.
            redis.RedisError: Redis went away; what was committed is recognized next time.
        """
        done = Slice()
        with (
            _collection_paused(),
            self._database.session() as connection,
            self._holding(connection, shard) as held,
        ):
            if not held:
                done.busy = True
                return done
            stream = UsageStream(self._client, shard)
            deadline = time.monotonic() + self._settings.drain_slice_seconds
            for entries in self._batches(stream):
                self._apply(connection, stream, entries, done)
                if time.monotonic() >= deadline:
                    done.more = True
                    return done
        return done

    @contextmanager
    def _holding(self, connection: Connection, shard: int) -> Iterator[bool]:
        key = {"lock_class": DRAIN_LOCK_CLASS, "shard": shard}
        idle_timeout = f"{self._settings.drain_idle_seconds}s"
        with connection.begin():
            held: bool = run(connection, _LOCK, idle_timeout=idle_timeout, **key).scalar_one()
        try:
            yield held
        finally:
            try:
                if held:
                    with connection.begin():
                        run(connection, _UNLOCK, **key)
            except Exception:
                connection.invalidate()  # the server frees the lock of a closed session
                raise

    def _batches(self, stream: UsageStream) -> Iterator[list[Entry]]:
        count = self._settings.drain_batch_events
        while entries := stream.read_pending(count):
            yield entries
        while entries := stream.read_new(count):
            yield entries

    def _apply(
        self, connection: Connection, stream: UsageStream, entries: list[Entry], done: Slice
    ) -> None:
        for portion in _portions(entries):
            started = time.perf_counter()
            outcome = apply_or_isolate(connection, portion)
            stream.acknowledge(portion)
            done.outcome.add(outcome)
            done.batches += 1
            log.info(
                "batch applied",
                shard=stream.shard,
                events=len(portion),
                charged=outcome.charged,
                duplicates=outcome.duplicates,
                dead=dict(outcome.dead),
                credits=outcome.credits,
                milliseconds=round((time.perf_counter() - started) * 1000, 1),
            )


@contextmanager
def _collection_paused() -> Iterator[None]:
    """No cycle collection during a slice: batches make many objects and no cycles."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _portions(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    portion: list[Entry] = []
    size = 0
    for entry in entries:
        if portion and size + len(entry.payload) > MAX_PORTION_BYTES:
            yield portion
            portion, size = [], 0
        portion.append(entry)
        size += len(entry.payload)
    yield portion


def apply_or_isolate(connection: Connection, entries: Sequence[Entry]) -> Outcome:
    """Apply a batch; if it fails for an unforeseen reason, find the culprits and apply the rest.

    The batch is halved until each culprit is alone, and the culprits become dead letters
    `unprocessable`. If every single entry of a larger batch fails, the fault is ours and not
    theirs: nothing is dead-lettered and the error is raised, so that the entries stay pending.
    """
    culprits: list[tuple[Entry, Exception]] = []
    outcome = _halve(connection, entries, culprits)
    if len(culprits) == len(entries) > 1:
        raise culprits[0][1]
    for entry, error in culprits:
        log.error("event unprocessable", entry_id=entry.entry_id, error=repr(error))
        deadletters.bury_unprocessable(connection, entry, error, utc_now())
        outcome.dead["unprocessable"] += 1
    return outcome


def _halve(
    connection: Connection, entries: Sequence[Entry], culprits: list[tuple[Entry, Exception]]
) -> Outcome:
    try:
        return _apply_twice(connection, entries)
    except Exception as error:
        if is_outage(error) or _is_installation_fault(error):
            raise
        if len(entries) == 1:
            culprits.append((entries[0], error))
            return Outcome()
        log.warning("batch failed, halving it", events=len(entries), error=repr(error)[:500])
    middle = len(entries) // 2
    outcome = _halve(connection, entries[:middle], culprits)
    outcome.add(_halve(connection, entries[middle:], culprits))
    return outcome


def _is_installation_fault(error: Exception) -> bool:
    """Whether PostgreSQL is not as we need it; nothing may be dead-lettered for that."""
    return (sqlstate(error) or "").startswith(_INSTALLATION_FAULTS)


def _apply_twice(connection: Connection, entries: Sequence[Entry]) -> Outcome:
    try:
        return apply_batch(connection, entries, utc_now())
    except Exception as error:
        # A lone event gets a second chance: it may have met a direct SQL call of its request id.
        if len(entries) > 1 or is_outage(error):
            raise
        return apply_batch(connection, entries, utc_now())
