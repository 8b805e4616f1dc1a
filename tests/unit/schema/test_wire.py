"""The names and the sharding that foreign clients rely on (contract.md §1)."""

from collections import Counter
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schema import wire


@pytest.mark.parametrize(
    ("org_id", "checksum"),
    [
        ("00000000-0000-0000-0000-000000000000", 0xECBB4B55),
        ("ffffffff-ffff-ffff-ffff-ffffffffffff", 0x3FB3C61A),
        ("6f9b2a50-94d1-4f0e-8a37-0d5a4c1a7e11", 0xE5DE87A4),
        ("31323334-3536-3738-3930-313233343536", 0x1E5FCDB7),  # "1234567890123456"
    ],
)
@pytest.mark.parametrize("shards", [1, 7, 16, 1024])
def test_a_shard_is_the_crc_32_of_the_sixteen_bytes(
    org_id: str, checksum: int, shards: int
) -> None:
    assert wire.shard_of(UUID(org_id), shards) == checksum % shards


@given(st.uuids(), st.integers(1, 1024))
def test_every_organization_has_a_shard(org_id: UUID, shards: int) -> None:
    assert 0 <= wire.shard_of(org_id, shards) < shards


def test_organizations_spread_over_all_shards() -> None:
    spread = Counter(wire.shard_of(UUID(int=number), 16) for number in range(1600))
    assert set(spread) == set(range(16))
    assert max(spread.values()) < 200


def test_the_stream_and_its_group_are_the_contract() -> None:
    assert wire.stream_name(0) == "metering:usage:0"
    assert wire.stream_name(15) == "metering:usage:15"
    assert (wire.EVENT_FIELD, wire.GROUP, wire.CONSUMER) == ("event", "ledger", "drain")


def test_the_tasks_and_their_queue_are_the_contract() -> None:
    names = (wire.TASK_DRAIN, wire.TASK_SWEEP, wire.CELERY_QUEUE)
    assert names == ("usage.drain", "usage.sweep", "metering")


def test_streams_and_wake_keys_of_all_shards_differ() -> None:
    names = {name(shard) for shard in range(1024) for name in (wire.stream_name, wire.wake_key)}
    assert len(names) == 2048
