"""The usage streams as the ledger's consumer group sees them: read, acknowledge, inspect."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, cast

from redis import Redis
from redis.exceptions import ResponseError

from ledger.decisions import Entry
from schema.errors import ConfigurationError
from schema.settings import Settings
from schema.wire import CONSUMER, EVENT_FIELD, GROUP, stream_name

REDIS_TIMEOUT_SECONDS: Final = 5.0

_FIELD: Final = EVENT_FIELD.encode()

RawEntry = tuple[bytes, Sequence[bytes] | None]


def connect(settings: Settings) -> "Redis":
    """A client for the usage streams.

    Entries come back as flat field lists, since a mapping would hide a field that is there twice.
    """
    url = settings.redis_url.get_secret_value()
    if not url:
        raise ConfigurationError("no queue: set METERING_REDIS_URL, or start one: 'metering up'")
    client = Redis.from_url(
        url,
        protocol=2,
        socket_timeout=REDIS_TIMEOUT_SECONDS,
        socket_connect_timeout=REDIS_TIMEOUT_SECONDS,
        health_check_interval=30,
    )
    client.set_response_callback("XREADGROUP", _flat_entries)
    return client


def _flat_entries(response: Any, **_: object) -> list[RawEntry]:  # noqa: ANN401
    return [(entry[0], entry[1]) for entry in response[0][1]] if response else []


@dataclass(frozen=True, slots=True)
class StreamState:
    """What one shard's stream holds right now."""

    shard: int
    depth: int
    """Entries on the stream: waiting and being applied."""
    pending: int
    """Entries read by a drain and not acknowledged yet."""
    oldest_seconds: float | None
    """Age of the oldest entry, by the clock of Redis; None for an empty stream."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class UsageStream:
    """One shard's stream, read as the only consumer of the group `ledger`."""

    def __init__(self, client: "Redis", shard: int) -> None:
        self._client = client
        self.shard = shard
        self.name = stream_name(shard)

    def read_pending(self, count: int) -> list[Entry]:
        """Entries that an earlier drain read and did not live to acknowledge, oldest first."""
        return self._read(count, "0")

    def read_new(self, count: int) -> list[Entry]:
        """Entries that no drain has read yet, oldest first; does not wait for any."""
        return self._read(count, ">")

    def acknowledge(self, entries: Iterable[Entry]) -> None:
        """Forget entries whose outcome the ledger has committed."""
        ids = [entry.entry_id for entry in entries if entry.entry_id is not None]
        self._forget(ids)

    def _forget(self, ids: Sequence[str]) -> None:
        with self._client.pipeline(transaction=True) as pipeline:
            pipeline.xack(self.name, GROUP, *ids)
            pipeline.xdel(self.name, *ids)
            pipeline.execute()

    def _read(self, count: int, after: str) -> list[Entry]:
        try:
            reply = self._client.xreadgroup(GROUP, CONSUMER, {self.name: after}, count=count)
        except ResponseError as error:
            if not str(error).startswith("NOGROUP"):
                raise
            self._create_group()
            return self._read(count, after)
        raw = cast("list[RawEntry]", reply)
        deleted = [entry_id.decode() for entry_id, fields in raw if fields is None]
        if deleted:  # somebody removed them from the stream; nothing is left to apply
            self._forget(deleted)
        return [self._entry(entry_id, fields) for entry_id, fields in raw if fields is not None]

    def _create_group(self) -> None:
        try:
            self._client.xgroup_create(self.name, GROUP, id="0", mkstream=True)
        except ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise

    def _entry(self, entry_id: bytes, fields: Sequence[bytes]) -> Entry:
        if len(fields) == 2 and fields[0] == _FIELD:  # noqa: PLR2004 - name, value
            return Entry(fields[1], self.name, entry_id.decode())
        texts = [field.decode("utf-8", "backslashreplace") for field in fields]
        pairs = [*zip(texts[::2], texts[1::2], strict=True)]
        names = ", ".join(name[:100] for name, _ in pairs[:10])
        fault = f"an entry has exactly one field, '{EVENT_FIELD}'; this one has: {names}"
        return Entry(json.dumps(pairs).encode(), self.name, entry_id.decode(), fault)


def inspect(client: "Redis", shards: int) -> list[StreamState]:
    """Depth, pending entries and oldest age of every shard, in two round trips."""
    seconds, microseconds = client.time()
    now = seconds + microseconds / 1e6
    with client.pipeline(transaction=False) as pipeline:
        for shard in range(shards):
            pipeline.xlen(stream_name(shard))
            pipeline.xpending(stream_name(shard), GROUP)
            pipeline.xrange(stream_name(shard), count=1)
        replies = iter(pipeline.execute(raise_on_error=False))
    return [_state(shard, now, replies) for shard in range(shards)]


def _state(shard: int, now: float, replies: Iterator[Any]) -> StreamState:
    depth, pending, oldest = next(replies), next(replies), next(replies)
    for reply in (depth, oldest):
        if isinstance(reply, Exception):
            raise reply
    age = None
    if oldest:
        added = int(oldest[0][0].split(b"-")[0]) / 1000
        age = max(0.0, round(now - added, 3))
    # Without a group yet nothing is pending.
    waiting = 0 if isinstance(pending, ResponseError) else int(pending["pending"])
    return StreamState(shard, int(depth), waiting, age)


def total_depth(client: "Redis", shards: int) -> int:
    """How many entries all streams hold together."""
    with client.pipeline(transaction=False) as pipeline:
        for shard in range(shards):
            pipeline.xlen(stream_name(shard))
        return sum(pipeline.execute())
