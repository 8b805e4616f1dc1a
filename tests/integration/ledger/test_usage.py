"""Usage reports: what counts, when, for whom, and by the calendar of the organization."""

from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest

from ledger import corrections, usage
from ledger.database import Database
from ledger.usage import Dimension, Selection, UserUsage
from schema.errors import InvalidRequest, NotFound
from schema.plans import PlanName
from tests.integration.ledger.world import NOW, World, event, open_world

DAY = timedelta(days=1)
SINCE = NOW - 30 * DAY


@pytest.fixture
def world(database: Database, database_url: str) -> Iterator[World]:
    with open_world(database, database_url) as opened:
        yield opened


@pytest.fixture
def org_id(world: World) -> UUID:
    return world.organization(
        plan=PlanName.PLATFORM, pool=100_000, allocations={"ada": 10_000, "bob": 10_000}
    )


def use(world: World, org_id: UUID, *fields: dict[str, Any], now: datetime = NOW) -> None:
    """Charge one event for each set of fields."""
    events = [event(org_id, f"r-{n}", **fields) for n, fields in enumerate(fields)]
    assert world.apply(*events, now=now).charged == len(events)


def told_apart(
    world: World, selection: Selection, *dimensions: Dimension
) -> list[tuple[object, ...]]:
    names = [usage.field_of(dimension) for dimension in dimensions]
    return [
        (*(getattr(group, name) for name in names), group.total_credits)
        for group in usage.groups(world.database, selection, dimensions)
    ]


def test_credits_are_summed_up_by_service_and_user(world: World, org_id: UUID) -> None:
    use(
        world,
        org_id,
        {},
        {"service_type": "valuation", "api_cost": "0.04"},
        {"service_type": "valuation", "user_id": "bob"},
        {"service_type": "llm", "user_id": "bob"},
    )
    found = usage.summary(world.database, Selection(org_id, SINCE))
    assert (found.total_credits, found.user_count, found.groups) == (190, 2, None)
    assert list(found.services.items()) == [
        ("valuation", 150), ("llm", 30), ("contact_lookup", 10),
    ]  # fmt: skip
    assert found.top_users == [
        UserUsage(user_id="bob", total_credits=105, request_count=2),
        UserUsage(user_id="ada", total_credits=85, request_count=2),
    ]


def test_nothing_used_is_nothing(world: World, org_id: UUID) -> None:
    found = usage.summary(world.database, Selection(org_id, SINCE), [Dimension.DAY])
    assert (found.total_credits, found.user_count, found.services) == (0, 0, {})
    assert (found.top_users, found.groups) == ([], [])


def test_an_unknown_organization_is_not_found(world: World) -> None:
    nowhere = Selection(UUID(int=1), SINCE)
    with pytest.raises(NotFound):
        usage.summary(world.database, nowhere)
    with pytest.raises(NotFound):
        usage.groups(world.database, nowhere, [Dimension.SERVICE])


def test_other_organizations_do_not_count(world: World, org_id: UUID) -> None:
    use(world, world.organization(pool=100, allocations={"ada": 100}), {})
    assert usage.summary(world.database, Selection(org_id, SINCE)).total_credits == 0
    assert told_apart(world, Selection(org_id, SINCE), Dimension.SERVICE) == []


def test_the_ten_who_used_most_are_named_and_all_are_counted(world: World) -> None:
    users = [f"user-{n:02}" for n in range(12)]
    org_id = world.organization(pool=100_000, allocations=dict.fromkeys(users, 1000))
    use(
        world,
        org_id,
        *(
            {"user_id": user, "service_type": "x", "credits": max(n, 2)}
            for n, user in enumerate(users)
        ),
    )
    found = usage.summary(world.database, Selection(org_id, SINCE))
    assert found.user_count == 12
    named = [user.user_id for user in found.top_users]
    assert named == [*reversed(users[3:]), "user-00"]


def test_a_span_has_its_start_and_not_its_end(world: World, org_id: UUID) -> None:
    moments = (NOW - DAY - timedelta(microseconds=1), NOW - DAY, NOW - timedelta(microseconds=1))
    use(world, org_id, *({"occurred_at": moment} for moment in (*moments, NOW)))
    inside = Selection(org_id, NOW - DAY, NOW)
    assert usage.summary(world.database, inside).total_credits == 20
    assert told_apart(world, inside, Dimension.SERVICE) == [("contact_lookup", 20)]


def test_without_an_end_what_is_dated_ahead_counts(world: World, org_id: UUID) -> None:
    use(world, org_id, {"occurred_at": NOW + timedelta(minutes=4)})
    assert usage.summary(world.database, Selection(org_id, SINCE)).total_credits == 10
    assert told_apart(world, Selection(org_id, SINCE), Dimension.SERVICE)


def test_one_user_or_one_service_can_be_looked_at(world: World, org_id: UUID) -> None:
    use(world, org_id, {}, {"user_id": "bob"}, {"user_id": "bob", "service_type": "llm"})
    for selection, credits in (
        (Selection(org_id, SINCE, user_id="bob"), 40),
        (Selection(org_id, SINCE, service_type="contact_lookup"), 20),
        (Selection(org_id, SINCE, user_id="bob", service_type="contact_lookup"), 10),
    ):
        found = usage.summary(world.database, selection, [Dimension.SERVICE])
        assert found.total_credits == credits
        assert found.groups is not None
        assert sum(group.total_credits for group in found.groups) == credits


def test_a_correction_counts_in_credits_and_not_as_a_request(world: World, org_id: UUID) -> None:
    use(world, org_id, {"service_type": "valuation", "occurred_at": NOW - DAY}, {})
    corrections.refund(world.database, org_id, "r-0", 25, actor="root", reason="late", now=NOW)
    found = usage.summary(world.database, Selection(org_id, SINCE), [Dimension.DAY])
    assert (found.total_credits, found.services["valuation"]) == (60, 50)
    assert found.top_users == [UserUsage(user_id="ada", total_credits=60, request_count=2)]
    assert found.groups is not None
    assert [(group.day, group.total_credits, group.request_count) for group in found.groups] == [
        (date(2026, 3, 14), 50, 1), (date(2026, 3, 15), 10, 1),
    ]  # fmt: skip


def test_groups_tell_cost_and_markup(world: World, org_id: UUID) -> None:
    use(world, org_id, {"api_cost": "0.04"}, {"api_cost": "0.000001"}, {})
    (group,) = usage.groups(world.database, Selection(org_id, SINCE), [Dimension.USER])
    assert (group.user_id, group.service, group.day) == ("ada", None, None)
    assert (group.request_count, group.total_cost) == (3, Decimal("0.060002"))


@pytest.mark.parametrize(
    ("dimensions", "expected"),
    [
        ([Dimension.SERVICE], [("contact_lookup", 30), ("llm", 30)]),
        ([Dimension.USER], [("ada", 50), ("bob", 10)]),
        ([Dimension.WEEK], [(date(2026, 3, 2), 10), (date(2026, 3, 9), 50)]),
        ([Dimension.MONTH], [(date(2026, 3, 1), 60)]),
        (
            [Dimension.SERVICE, Dimension.USER],
            [("contact_lookup", "ada", 20), ("contact_lookup", "bob", 10), ("llm", "ada", 30)],
        ),
        (
            [Dimension.USER, Dimension.SERVICE],
            [("ada", "contact_lookup", 20), ("ada", "llm", 30), ("bob", "contact_lookup", 10)],
        ),
        (
            [Dimension.DAY, Dimension.USER],
            [
                (date(2026, 3, 8), "bob", 10),
                (date(2026, 3, 9), "ada", 10),
                (date(2026, 3, 15), "ada", 40),
            ],
        ),
        (
            [Dimension.MONTH, Dimension.WEEK, Dimension.DAY],
            [
                (date(2026, 3, 1), date(2026, 3, 2), date(2026, 3, 8), 10),
                (date(2026, 3, 1), date(2026, 3, 9), date(2026, 3, 9), 10),
                (date(2026, 3, 1), date(2026, 3, 9), date(2026, 3, 15), 40),
            ],
        ),
    ],
)
def test_groups_come_in_the_order_of_their_dimensions(
    world: World,
    org_id: UUID,
    dimensions: Sequence[Dimension],
    expected: list[tuple[object, ...]],
) -> None:
    sunday, monday = datetime(2026, 3, 8, 23, tzinfo=UTC), datetime(2026, 3, 9, 1, tzinfo=UTC)
    use(
        world,
        org_id,
        {},
        {"service_type": "llm"},
        {"user_id": "bob", "occurred_at": sunday},
        {"occurred_at": monday},
    )
    assert told_apart(world, Selection(org_id, SINCE), *dimensions) == expected


def test_days_are_those_of_the_organization_when_clocks_change(world: World, org_id: UUID) -> None:
    """On 8 March 2026 New York goes from UTC-5 to UTC-4 at 07:00 UTC: the day has 23 hours."""
    world.sql.execute("UPDATE organizations SET timezone = 'America/New_York'")
    moments = (
        datetime(2026, 3, 8, 4, 59, 59, tzinfo=UTC),
        datetime(2026, 3, 8, 5, tzinfo=UTC),
        datetime(2026, 3, 9, 3, 59, 59, tzinfo=UTC),
        datetime(2026, 3, 9, 4, tzinfo=UTC),
        datetime(2026, 3, 1, 4, 59, 59, tzinfo=UTC),
    )
    use(world, org_id, *({"occurred_at": moment} for moment in moments))
    selection = Selection(org_id, SINCE)
    assert told_apart(world, selection, Dimension.DAY) == [
        (date(2026, 2, 28), 10),
        (date(2026, 3, 7), 10),
        (date(2026, 3, 8), 20),
        (date(2026, 3, 9), 10),
    ]
    assert told_apart(world, selection, Dimension.WEEK) == [
        (date(2026, 2, 23), 10), (date(2026, 3, 2), 30), (date(2026, 3, 9), 10),
    ]  # fmt: skip
    assert told_apart(world, selection, Dimension.MONTH) == [
        (date(2026, 2, 1), 10), (date(2026, 3, 1), 40),
    ]  # fmt: skip


def test_an_hour_that_comes_twice_belongs_to_one_day(world: World, org_id: UUID) -> None:
    """On 2 November 2025 New York goes from UTC-4 to UTC-5 at 06:00 UTC: the day has 25 hours."""
    world.sql.execute("UPDATE organizations SET timezone = 'America/New_York'")
    now = datetime(2025, 11, 10, tzinfo=UTC)
    moments = [datetime(2025, 11, 2, hour, 30, tzinfo=UTC) for hour in (3, 4, 5, 6)]
    moments.append(datetime(2025, 11, 3, 4, 30, tzinfo=UTC))
    use(world, org_id, *({"occurred_at": moment} for moment in moments), now=now)
    assert told_apart(world, Selection(org_id, now - 30 * DAY), Dimension.DAY) == [
        (date(2025, 11, 1), 10), (date(2025, 11, 2), 40),
    ]  # fmt: skip


def test_more_groups_than_one_answer_holds_are_refused(
    world: World, org_id: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "MAX_GROUPS", 2)
    use(world, org_id, {}, {"service_type": "llm"})
    selection = Selection(org_id, SINCE)
    assert len(told_apart(world, selection, Dimension.SERVICE)) == 2
    use_more = event(org_id, "r-9", service_type="valuation")
    world.apply(use_more)
    with pytest.raises(InvalidRequest, match="more than 2 groups"):
        told_apart(world, selection, Dimension.SERVICE)
