"""The drain: what it reads, commits and acknowledges, and what it does when something breaks."""

import json
import multiprocessing
import threading
import time
from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from redis import Redis

from ledger.clock import utc_now
from ledger.database import Database
from ledger.decisions import Outcome
from schema.errors import LedgerUnavailable
from schema.settings import Settings
from schema.wire import CONSUMER, DRAIN_LOCK_CLASS, EVENT_FIELD, GROUP, shard_of, stream_name
from tests.integration.ledger.race import await_lock
from tests.integration.ledger.world import World, entry, event, open_world
from worker import stream
from worker.drain import Drain, Slice, apply_or_isolate
from worker.stream import UsageStream

MEGABYTE = 1024 * 1024


@pytest.fixture
def world(database: Database, database_url: str) -> Iterator[World]:
    with open_world(database, database_url) as opened:
        yield opened


@pytest.fixture
def org_id(world: World) -> UUID:
    return world.organization(pool=100_000, allocations={"ada": 50_000})


@pytest.fixture
def shard(org_id: UUID, settings: Settings) -> int:
    return shard_of(org_id, settings.shards)


class Queue:
    """A foreign client of one shard."""

    def __init__(self, client: "Redis", org_id: UUID, shard: int) -> None:
        self.client = client
        self.org_id = org_id
        self.name = stream_name(shard)

    def fields(self, request_id: str, **fields: Any) -> dict[str, Any]:
        usual = {
            "request_id": request_id,
            "org_id": str(self.org_id),
            "user_id": "ada",
            "service_type": "contact_lookup",
            "occurred_at": utc_now().isoformat(),
        }
        return usual | fields

    def add(self, request_id: str, **fields: Any) -> None:
        self.add_raw(json.dumps(self.fields(request_id, **fields)))

    def add_raw(self, payload: str | bytes) -> None:
        self.client.xadd(self.name, {EVENT_FIELD: payload})

    def pending(self) -> int:
        return int(self.client.xpending(self.name, GROUP)["pending"])

    def depth(self) -> int:
        return int(self.client.xlen(self.name))


@pytest.fixture
def queue(redis: "Redis", org_id: UUID, shard: int) -> Queue:
    return Queue(redis, org_id, shard)


def drain(settings: Settings, database: Database, redis: "Redis", shard: int) -> Slice:
    return Drain(settings, database, redis).run(shard)


def test_events_are_charged_and_leave_the_stream(
    settings: Settings, database: Database, redis: "Redis", shard: int, queue: Queue, world: World
) -> None:
    for number in range(25):
        queue.add(f"r-{number}")
    done = drain(settings, database, redis, shard)
    assert done.outcome.charged == 25
    assert (queue.depth(), queue.pending()) == (0, 0)
    assert world.allocations(queue.org_id)["ada"] == (50_000, 250)


def test_entries_of_a_crashed_drain_come_first(
    settings: Settings, database: Database, redis: "Redis", shard: int, queue: Queue, world: World
) -> None:
    queue.add("read-before-the-crash")
    UsageStream(redis, shard).read_new(10)
    assert queue.pending() == 1
    queue.add("after")
    drain(settings, database, redis, shard)
    charged = world.rows("credit_usage_attribution", "id", "request_id")
    assert [request_id for _, request_id in charged] == ["read-before-the-crash", "after"]
    assert (queue.depth(), queue.pending()) == (0, 0)


def test_a_crash_between_commit_and_acknowledgement_charges_once(
    settings: Settings, database: Database, redis: "Redis", shard: int, queue: Queue, world: World
) -> None:
    queue.add("r-1")
    queue.add_raw("not JSON")
    UsageStream(redis, shard).read_new(10)
    kept: Any = redis.xrange(queue.name)
    drain(settings, database, redis, shard)
    before = world.contents()
    for entry_id, fields in kept:  # the same entries again, at the same places
        redis.xadd(f"{queue.name}:copy", fields, id=entry_id)
    redis.rename(f"{queue.name}:copy", queue.name)
    redis.xgroup_create(queue.name, GROUP, id="0")
    done = drain(settings, database, redis, shard)
    assert done.outcome.events == 2
    assert world.contents() == before
    assert queue.depth() == 0


def test_a_held_shard_is_left_alone(
    settings: Settings,
    database: Database,
    database_url: str,
    redis: "Redis",
    shard: int,
    queue: Queue,
) -> None:
    queue.add("r-1")
    with psycopg.connect(database_url, autocommit=True) as holder:
        holder.execute("SELECT pg_advisory_lock(%s, %s)", (DRAIN_LOCK_CLASS, shard))
        done = drain(settings, database, redis, shard)
        assert done.busy
        assert queue.depth() == 1
        holder.execute("SELECT pg_advisory_unlock_all()")
    assert drain(settings, database, redis, shard).outcome.charged == 1


def test_the_lock_is_released_at_the_end(
    settings: Settings, database: Database, redis: "Redis", shard: int, world: World
) -> None:
    drain(settings, database, redis, shard)
    held = world.sql.execute("SELECT count(*) AS n FROM pg_locks WHERE locktype = 'advisory'")
    assert held.fetchone() == {"n": 0}


def _hold(settings: Settings, shard: int, held: Any) -> None:
    database = Database.of(settings)
    with stream.connect(settings) as client, database.session() as connection:
        chosen = Drain(settings, database, client)
        with chosen._holding(connection, shard):  # noqa: SLF001 - frozen exactly there
            held.set()
            threading.Event().wait()


def test_a_frozen_holder_loses_its_shard(
    settings: Settings, database: Database, redis: "Redis", shard: int, queue: Queue
) -> None:
    impatient = settings.model_copy(update={"drain_idle_seconds": 1})
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    holder = context.Process(target=_hold, args=(impatient, shard, held), daemon=True)
    holder.start()
    try:
        assert held.wait(30)
        queue.add("r-1")
        deadline = time.monotonic() + 20
        while drain(settings, database, redis, shard).busy:
            assert time.monotonic() < deadline
        assert queue.depth() == 0
    finally:
        holder.kill()
        holder.join()


def test_a_slice_ends_and_says_that_there_is_more(
    settings: Settings, database: Database, redis: "Redis", shard: int, queue: Queue
) -> None:
    hurried = settings.model_copy(update={"drain_slice_seconds": 0.0, "drain_batch_events": 10})
    for number in range(30):
        queue.add(f"r-{number}")
    done = drain(hurried, database, redis, shard)
    assert done.more
    assert done.outcome.charged == 10
    assert queue.depth() == 20


def test_deleted_entries_do_not_stay_pending(
    settings: Settings, database: Database, redis: "Redis", shard: int, queue: Queue
) -> None:
    queue.add("r-1")
    (entry,) = UsageStream(redis, shard).read_new(10)
    redis.xdel(queue.name, str(entry.entry_id))
    assert drain(settings, database, redis, shard).outcome.events == 0
    assert queue.pending() == 0


BROKEN = {
    "not JSON": (b"not JSON", "malformed"),
    "binary": (b"\x00\xff\xfe", "malformed"),
    "array": (b"[]", "malformed"),
    "key twice": (b'{"request_id": "a", "request_id": "b"}', "malformed"),
    "ten megabytes": (b'"' + b"x" * 10 * MEGABYTE + b'"', "malformed"),
    "empty": (b"{}", "invalid"),
}
BROKEN_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "wrong type": ({"user_id": 5}, "invalid"),
    "NUL": ({"user_id": "a\0b"}, "invalid"),
    "ten megabytes of metadata": ({"metadata": {"a": "x" * 10 * MEGABYTE}}, "invalid"),
    "negative": ({"quantity": -1}, "invalid"),
    "NaN": ({"quantity": float("nan")}, "malformed"),
    "NaN in words": ({"quantity": "NaN"}, "invalid"),
    "long id": ({"request_id": "x" * 300}, "invalid"),
    "long user": ({"user_id": "x" * 300}, "invalid"),
    "1970": ({"occurred_at": "1970-01-01T00:00:00Z"}, "too_old"),
    "tomorrow": ({"occurred_at": "2999-01-01T00:00:00Z"}, "in_the_future"),
    "unknown organization": ({"org_id": str(uuid4())}, "unknown_organization"),
    "unknown user": ({"user_id": "nobody"}, "no_allocation"),
    "unknown service": ({"service_type": "teleportation"}, "unknown_service"),
    "wrong price": ({"credits": 11}, "price_mismatch"),
    "too much": ({"service_type": "bulk_export", "quantity": 20_000}, "insufficient_credits"),
    "misspelt": ({"quantitty": 5}, "invalid"),
}


@pytest.mark.parametrize("case", [*BROKEN, *BROKEN_FIELDS])
def test_each_bad_entry_is_one_dead_letter_and_its_neighbours_are_charged(
    settings: Settings,
    database: Database,
    redis: "Redis",
    shard: int,
    queue: Queue,
    world: World,
    case: str,
) -> None:
    if case in BROKEN:
        payload, reason = BROKEN[case]
    else:
        fields, reason = BROKEN_FIELDS[case]
        payload = json.dumps(queue.fields("bad") | fields).encode()
    queue.add("before")
    queue.add_raw(payload)
    queue.add("after")
    done = drain(settings, database, redis, shard)
    assert done.outcome.charged == 2
    letter = world.row("dead_letters")
    assert letter["reason"] == reason
    assert letter["payload"] == payload
    assert letter["detail"]
    assert (letter["stream"], letter["state"]) == (queue.name, "open")
    assert queue.depth() == 0


@pytest.mark.parametrize(
    "fields",
    [
        ("event", "{}", "event", "{}"),
        ("event", "{}", "token", "t"),
        ("usage", "{}"),
        (b"\xff\x00", b"\xfe"),
    ],
)
def test_an_entry_has_exactly_one_field(
    settings: Settings,
    database: Database,
    redis: "Redis",
    shard: int,
    queue: Queue,
    world: World,
    fields: tuple[str | bytes, ...],
) -> None:
    add: Any = redis.execute_command
    add("XADD", queue.name, "*", *fields)
    drain(settings, database, redis, shard)
    letter = world.row("dead_letters")
    assert letter["reason"] == "malformed"
    assert "exactly one field" in letter["detail"]
    assert len(json.loads(letter["payload"])) == len(fields) // 2


def test_large_entries_are_applied_in_portions(
    settings: Settings, database: Database, redis: "Redis", shard: int, queue: Queue
) -> None:
    for _ in range(3):
        queue.add_raw(b"x" * 9 * MEGABYTE)
    done = drain(settings, database, redis, shard)
    assert done.outcome.dead["malformed"] == 3
    assert done.batches == 3


def poison(world: World, condition: str) -> None:
    """Make PostgreSQL refuse some attributions for a reason that nobody foresaw."""
    world.sql.execute(
        f"""
        CREATE FUNCTION refuse_poison() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF {condition} THEN RAISE EXCEPTION 'poison'; END IF;
            RETURN new;
        END $$;
        CREATE TRIGGER poison BEFORE INSERT ON credit_usage_attribution
        FOR EACH ROW EXECUTE FUNCTION refuse_poison();
        """.encode()
    )


def test_poison_is_isolated(
    settings: Settings, database: Database, redis: "Redis", shard: int, queue: Queue, world: World
) -> None:
    poison(world, "new.request_id = 'r-7'")
    for number in range(20):
        queue.add(f"r-{number}")
    done = drain(settings, database, redis, shard)
    assert done.outcome.charged == 19
    letter = world.row("dead_letters")
    assert (letter["reason"], letter["request_id"]) == ("unprocessable", "r-7")
    assert "poison" in letter["detail"]
    assert (queue.depth(), queue.pending()) == (0, 0)
    assert world.allocations(queue.org_id)["ada"] == (50_000, 190)


def test_a_fault_of_every_event_is_a_fault_of_ours(
    settings: Settings, database: Database, redis: "Redis", shard: int, queue: Queue, world: World
) -> None:
    poison(world, "true")
    for number in range(5):
        queue.add(f"r-{number}")
    with pytest.raises(psycopg.errors.RaiseException):
        drain(settings, database, redis, shard)
    assert world.rows("dead_letters", "id") == []
    assert queue.pending() == 5
    world.sql.execute("DROP TRIGGER poison ON credit_usage_attribution")
    assert drain(settings, database, redis, shard).outcome.charged == 5


def test_a_broken_installation_buries_nothing(
    settings: Settings, database: Database, redis: "Redis", shard: int, queue: Queue, world: World
) -> None:
    queue.add("r-1")
    world.sql.execute("ALTER TABLE credit_usage_attribution RENAME TO elsewhere")
    with pytest.raises(LedgerUnavailable, match="migrations upgrade"):
        drain(settings, database, redis, shard)
    world.sql.execute("ALTER TABLE elsewhere RENAME TO credit_usage_attribution")
    assert world.rows("dead_letters", "id") == []
    assert drain(settings, database, redis, shard).outcome.charged == 1


def test_without_postgresql_everything_stays(
    settings: Settings, redis: "Redis", shard: int, queue: Queue
) -> None:
    queue.add("r-1")
    nowhere = Database("postgresql://nobody@127.0.0.1:1/nothing")
    with pytest.raises(LedgerUnavailable):
        drain(settings, nowhere, redis, shard)
    assert queue.depth() == 1


def test_inspection_counts_what_waits(
    settings: Settings, redis: "Redis", shard: int, queue: Queue
) -> None:
    for number in range(3):
        queue.add(f"r-{number}")
    UsageStream(redis, shard).read_new(2)
    states = stream.inspect(redis, settings.shards)
    assert [state.shard for state in states] == list(range(settings.shards))
    ours = states[shard]
    assert (ours.depth, ours.pending) == (3, 2)
    assert ours.oldest_seconds is not None
    assert 0 <= ours.oldest_seconds < 60
    assert sum(state.depth for state in states) == stream.total_depth(redis, settings.shards) == 3


def test_the_group_reads_under_its_contracted_names(
    redis: "Redis", shard: int, queue: Queue
) -> None:
    queue.add("r-1")
    UsageStream(redis, shard).read_new(1)
    (pending,) = redis.xpending_range(queue.name, "ledger", "-", "+", 10)
    assert pending["consumer"] == CONSUMER.encode() == b"drain"


def test_an_event_that_dies_leaves_a_hold_alone_that_came_meanwhile(
    world: World, database_url: str
) -> None:
    """Ada's event cannot be paid, and its request id is just being given to Bob by a gate."""
    org_id = world.organization(pool=1000, allocations={"ada": 5, "bob": 100})
    outcomes: list[Outcome] = []

    def drain() -> None:
        with world.database.session() as connection:
            outcomes.append(
                apply_or_isolate(
                    connection, [entry(event(org_id, "r-1", occurred_at=utc_now().isoformat()))]
                )
            )

    drainer = threading.Thread(target=drain)
    with psycopg.connect(database_url) as gate:
        gate.execute(
            "SELECT place_hold(%s, 'bob', 'contact_lookup', NULL, 1, NULL, 'r-1', '1 h', now())",
            (org_id,),
        )
        drainer.start()
        await_lock(world)
    drainer.join(30)
    assert outcomes[0].dead == {"request_id_conflict": 1}
    assert world.rows("usage_requests", "user_id", "state") == [("bob", "held")]
