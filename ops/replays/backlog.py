"""The backlog of a replay: entries of its own that wait on the streams."""

from dataclasses import dataclass, field
from uuid import UUID

from redis import Redis
from redis.exceptions import RedisError

from schema.wire import shard_of, stream_name

Position = tuple[int, int]
"""Where an entry stands on its stream: milliseconds and sequence number of its id."""


@dataclass(slots=True)
class Ahead:
    """What still waits on the shards that hold entries of ours."""

    heads: dict[int, Position] = field(default_factory=dict)
    """The first entry of each; it changes as entries are applied."""
    depth: int = 0
    """Entries on them, those of others included."""


class Backlog:
    """Knows the last entry of ours on each shard, and so whether some still wait there."""

    def __init__(self, shards: int) -> None:
        self._shards = shards
        self._last: dict[int, Position] = {}

    def add(self, org_id: UUID, entry_id: str) -> None:
        """Note an entry just sent, in the order of sending."""
        self._last[shard_of(org_id, self._shards)] = _position(entry_id)

    def ahead(self, client: Redis) -> Ahead | None:
        """What is still to be applied, or None if Redis is away."""
        try:
            with client.pipeline(transaction=False) as pipeline:
                for shard in self._last:
                    pipeline.xlen(stream_name(shard))
                    pipeline.xrange(stream_name(shard), count=1)
                replies = pipeline.execute()
        except RedisError:
            return None
        ahead = Ahead()
        for (shard, last), depth, first in zip(
            self._last.items(), replies[::2], replies[1::2], strict=True
        ):
            if first and (head := _position(first[0][0].decode())) <= last:
                ahead.heads[shard] = head
                ahead.depth += depth
        return ahead


def _position(entry_id: str) -> Position:
    milliseconds, _, sequence = entry_id.partition("-")
    return int(milliseconds), int(sequence)
