"""Replays against real servers: every row is accounted for, and a second replay changes nothing."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from redis import Redis

from ledger.database import Database
from ops.replays.mappingfile import parse_mapping
from ops.replays.replay import Order, Replay
from schema.errors import ConfigurationError
from schema.settings import Settings
from tests.integration.ops.replays.scene import (
    PRESET,
    REQUESTS,
    csv_file,
    figures,
    organization,
    queried,
    replayed,
    trace,
    until,
)
from worker import stream

PLAIN = parse_mapping(
    """
    [event]
    service_type = { column = "service", default = "contact_lookup" }
    quantity = { column = "n", default = 1 }
    occurred_at = { column = "at", default = "2026-01-01T00:00:00Z" }
    """
)
NAMED = parse_mapping(
    """
    [event]
    request_id = { column = "id" }
    user_id = { column = "user" }
    service_type = "company_enrichment"
    variant = { column = "variant", optional = true }
    """
)
UNCHANGING = (
    "usage_requests",
    "credit_usage_attribution",
    "dead_letters",
    "user_credit_allocations",
    "organization_credit_pools",
)


def rows_of(database: Database) -> dict[str, list[Any]]:
    return {
        table: queried(database, f"SELECT * FROM {table} ORDER BY 1, 2") for table in UNCHANGING
    }


@pytest.mark.usefixtures("worker")
def test_a_second_replay_finds_duplicates_and_changes_nothing(
    settings: Settings, database: Database, acme: UUID, tmp_path: Path
) -> None:
    order = Order(trace(tmp_path / "trace.csv", 1200), PRESET, acme)
    first = replayed(settings, database, order)
    assert figures(first) == {"events": 1200, "charged": 1200, "credits": 2400}
    assert first.seconds > 0
    assert first.events_per_second > 0
    before = rows_of(database)

    second = replayed(settings, database, order)
    assert figures(second) == {"events": 1200, "duplicates": 1200}
    assert rows_of(database) == before


@pytest.mark.usefixtures("worker")
def test_users_get_their_share_whatever_they_have_used(
    settings: Settings, database: Database, acme: UUID, tmp_path: Path
) -> None:
    replayed(settings, database, Order(trace(tmp_path / "a.csv"), PRESET, acme))
    by_user = "SELECT user_id, count(*) FROM usage_requests GROUP BY user_id ORDER BY user_id"
    assert queried(database, by_user) == [("ana", 30), ("ben", 10)]


@pytest.mark.usefixtures("worker")
def test_the_last_event_takes_place_now(
    settings: Settings, database: Database, acme: UUID, tmp_path: Path
) -> None:
    started = datetime.now(UTC)
    replayed(settings, database, Order(trace(tmp_path / "a.csv"), PRESET, acme))
    ((first, last),) = queried(
        database, "SELECT min(occurred_at), max(occurred_at) FROM usage_requests"
    )
    assert started <= last <= datetime.now(UTC)
    assert last - first == timedelta(minutes=39)


@pytest.mark.usefixtures("worker")
def test_times_may_be_kept(
    settings: Settings, database: Database, acme: UUID, tmp_path: Path
) -> None:
    order = Order(trace(tmp_path / "a.csv"), PRESET, acme, keep_times=True)
    assert figures(replayed(settings, database, order)) == {"events": 40, "dead": {"too_old": 40}}


@pytest.mark.usefixtures("worker")
def test_rows_that_are_no_events_are_reported_and_the_rest_is_charged(
    settings: Settings, database: Database, acme: UUID, tmp_path: Path
) -> None:
    file = csv_file(
        tmp_path / "mixed.csv",
        "service, n,at",
        "contact_lookup,2,",
        "contact_lookup,two,",
        "",
        "contact_lookup,3",
        "contact_lookup,-1,",
        "contact_lookup,1,noon",
        "contact_lookup,4,2026-01-01T00:00:00Z",
    )
    report = replayed(settings, database, Order(file, PLAIN, acme, user_id="ana"))
    assert figures(report) == {"events": 2, "charged": 2, "credits": 60, "invalid_rows": 4}
    assert [(row.line, row.reason) for row in report.invalid] == [
        (3, "quantity: 'two' is not a number"),
        (5, "the row has 2 fields, the header 3"),
        (6, "quantity: Input should be greater than 0"),
        (7, "occurred_at: 'noon' is not an ISO 8601 time"),
    ]
    assert not report.is_complete
    ids = queried(database, "SELECT request_id FROM usage_requests ORDER BY request_id")
    assert ids == [("mixed.csv:2",), ("mixed.csv:8",)]


@pytest.mark.usefixtures("worker")
def test_correcting_a_row_leaves_the_others_with_their_users(
    settings: Settings, database: Database, acme: UUID, tmp_path: Path
) -> None:
    lines = ["service,n,at", *["contact_lookup,1,"] * 9]
    broken = [*lines[:2], "contact_lookup,one,", "contact_lookup", *lines[4:]]
    order = Order(csv_file(tmp_path / "a.csv", *broken), PLAIN, acme)
    assert figures(replayed(settings, database, order)) == {
        "events": 7, "charged": 7, "credits": 70, "invalid_rows": 2,
    }  # fmt: skip
    csv_file(order.path, *lines)
    assert figures(replayed(settings, database, order)) == {
        "events": 9, "charged": 2, "duplicates": 7, "credits": 20,
    }  # fmt: skip


def test_a_strict_replay_sends_nothing_of_a_file_with_a_bad_row(
    settings: Settings, database: Database, acme: UUID, redis: Redis, tmp_path: Path
) -> None:
    file = csv_file(tmp_path / "a.csv", "service,n,at", "contact_lookup,1,", "contact_lookup,x,")
    with pytest.raises(ConfigurationError, match=r"line 3: quantity: 'x' is not.*nothing was sent"):
        replayed(settings, database, Order(file, PLAIN, acme, strict=True))
    assert stream.total_depth(redis, settings.shards) == 0


@pytest.mark.usefixtures("worker")
def test_conflicts_and_repetitions_within_a_file(
    settings: Settings, database: Database, acme: UUID, tmp_path: Path
) -> None:
    file = csv_file(
        tmp_path / "a.csv",
        "id,user,variant",
        "r1,ana,standard",
        "r1,ana,standard",
        "r1,ben,standard",
        "r1,ben,standard",
        "r2,ana,full",
    )
    order = Order(file, NAMED, acme)
    assert figures(replayed(settings, database, order)) == {
        "events": 5,
        "charged": 2,
        "duplicates": 2,
        "dead": {"request_id_conflict": 1},
        "credits": 150,
    }
    assert figures(replayed(settings, database, order)) == {"events": 5, "duplicates": 5}

    csv_file(file, "id,user,variant", "r1,ana,full", "r2,ana,full", "r3,ana,")
    assert figures(replayed(settings, database, order)) == {
        "events": 3,
        "charged": 1,
        "duplicates": 1,
        "dead": {"request_id_conflict": 1},
        "credits": 50,
    }


@pytest.mark.usefixtures("worker")
def test_a_repetition_after_the_first_was_charged_takes_nothing_from_the_count(
    settings: Settings, database: Database, acme: UUID, tmp_path: Path
) -> None:
    def wait(stage: str, done: int, _total: int | None) -> None:
        if stage == "sending" and done == 500:
            until(lambda: queried(database, REQUESTS) == [(500,)], "the drain")

    lines = [f"r{n % 500},ana,standard" for n in range(501)]
    order = Order(csv_file(tmp_path / "a.csv", "id,user,variant", *lines), NAMED, acme)
    report = Replay(settings, database, order, wait).run()
    assert figures(report) == {"events": 501, "charged": 500, "duplicates": 1, "credits": 25_000}


@pytest.mark.usefixtures("worker")
def test_dead_events_are_counted_by_reason_and_are_duplicates_next_time(
    settings: Settings, database: Database, tmp_path: Path
) -> None:
    org_id = organization(database, ana=70)
    file = csv_file(
        tmp_path / "a.csv",
        "id,user,variant",
        "r1,ana,standard",
        "r2,ana,standard",
        "r3,zoe,standard",
        "r4,ana,huge",
    )
    order = Order(file, NAMED, org_id)
    assert figures(replayed(settings, database, order)) == {
        "events": 4,
        "charged": 1,
        "dead": {"insufficient_credits": 1, "no_allocation": 1, "unknown_service": 1},
        "credits": 50,
    }
    assert figures(replayed(settings, database, order)) == {"events": 4, "duplicates": 4}


@pytest.mark.usefixtures("worker")
def test_rows_may_name_their_organizations(
    settings: Settings, database: Database, acme: UUID, tmp_path: Path
) -> None:
    other = organization(database, "other", zoe=1000)
    deserted = organization(database, "deserted")
    mapping = parse_mapping(
        '[event]\nservice_type = "valuation"\norg_id = { column = "org", optional = true }'
    )
    stranger = uuid4()
    file = csv_file(
        tmp_path / "a.csv", "org,x", f"{acme},", f"{other},", ",", "nobody,", f"{deserted},",
        f"{stranger},",
    )  # fmt: skip
    report = replayed(settings, database, Order(file, mapping))
    assert figures(report) == {"events": 2, "charged": 2, "credits": 150, "invalid_rows": 4}
    assert [row.reason for row in report.invalid] == [
        "org_id: the row names no organization",
        "org_id: 'nobody' is not a UUID",
        f"user_id: organization {deserted} has no active allocation",
        f"user_id: organization {stranger} has no active allocation",
    ]
    report = replayed(settings, database, Order(file, mapping, acme, user_id="ana"))
    assert figures(report) == {
        "events": 5,
        "charged": 1,
        "duplicates": 1,
        "dead": {"no_allocation": 1, "request_id_conflict": 1, "unknown_organization": 1},
        "invalid_rows": 1,
        "credits": 75,
    }


def test_an_organization_without_users_is_named_before_anything_is_sent(
    settings: Settings, database: Database, tmp_path: Path
) -> None:
    org_id = organization(database)
    with pytest.raises(ConfigurationError, match=f"organization {org_id} has no active allocation"):
        replayed(settings, database, Order(trace(tmp_path / "a.csv"), PRESET, org_id))


@pytest.mark.usefixtures("worker")
def test_a_file_with_a_header_only_has_no_events(
    settings: Settings, database: Database, acme: UUID, tmp_path: Path
) -> None:
    report = replayed(settings, database, Order(trace(tmp_path / "a.csv", 0), PRESET, acme))
    assert figures(report) == {}
    assert report.is_complete
    assert report.events_per_second == 0
