"""Names and rules that several processes and foreign clients share (contract.md §1)."""

from typing import Final
from uuid import UUID
from zlib import crc32

EVENT_FIELD: Final = "event"
"""The single field of a stream entry; its value is the event as JSON."""

GROUP: Final = "ledger"
"""Consumer group of every usage stream."""

CONSUMER: Final = "drain"
"""The one consumer of the group, so that a successor finds a crashed drain's entries as its own."""

CELERY_QUEUE: Final = "metering"
TASK_DRAIN: Final = "usage.drain"
TASK_SWEEP: Final = "usage.sweep"
TASK_EXPIRE_HOLDS: Final = "credits.expire_holds"
TASK_SETTLE: Final = "credits.settle"
TASK_RESET_DUE: Final = "credits.reset_due"
TASK_ROLL_OVER: Final = "billing.roll_over"
TASK_RECONCILE: Final = "ledger.reconcile"

TOKEN_EXPIRES_SECONDS: Final = 10
"""After how long a wake-up token is worthless: the sweep has sent others by then."""

STREAM_PREFIX: Final = "metering:usage:"

DRAIN_LOCK_CLASS: Final = 0x4D455445
"""First key of the PostgreSQL advisory lock of a shard ("METE"); the second is the shard."""


def stream_name(shard: int) -> str:
    """The Redis stream that carries the events of one shard."""
    return f"{STREAM_PREFIX}{shard}"


def wake_key(shard: int) -> str:
    """The Redis key that keeps a shard from being woken more than once a second."""
    return f"metering:wake:{shard}"


def shard_of(org_id: UUID, shards: int) -> int:
    """The shard of an organization: CRC-32 of its 16 id bytes, modulo the number of shards."""
    return crc32(org_id.bytes) % shards
