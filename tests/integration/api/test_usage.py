"""The usage report over HTTP (contract.md §4, row 11)."""

import csv
import io
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import httpx
import pytest

from ledger.clock import utc_now
from schema.plans import PlanName
from schema.scopes import Scope
from tests.integration.api.answers import Json, refused
from tests.integration.api.conftest import Callers, Headers
from tests.integration.ledger.world import World, event

TOP_KEYS = {
    "org_id", "total_credits_used", "user_count", "service_breakdown", "top_users",
    "date_range_start", "date_range_end",
}  # fmt: skip
DAY = timedelta(days=1)
FIRST = datetime(2026, 3, 8, 4, 30, tzinfo=UTC)
"""23:30 of the day before in New York, half an hour before the day with 23 hours begins."""
MARCH = {"from": "2026-03-01T00:00:00Z", "to": "2026-04-01T00:00:00Z"}


@pytest.fixture(scope="module")
def ada(callers: Callers) -> Headers:
    return callers.user("ada")


@pytest.fixture
def org_id(api_world: World) -> UUID:
    """Used in March: 10 credits of ada's, then 75 of bob's, then 10 of ada's on 8 March at noon."""
    org_id = organization(api_world, "ada", "bob")
    use(api_world, org_id, FIRST)
    use(api_world, org_id, FIRST + timedelta(hours=1), user_id="bob", service_type="valuation")
    use(api_world, org_id, FIRST + timedelta(hours=12), api_cost="0.04")
    return org_id


def organization(world: World, *users: str) -> UUID:
    org_id = world.organization(
        plan=PlanName.PLATFORM,
        pool=100_000,
        allocations=dict.fromkeys(users, 1000),
        members=dict.fromkeys(users, "member"),
    )
    world.sql.execute(
        "UPDATE organizations SET timezone = 'America/New_York' WHERE id = %s", (org_id,)
    )
    return org_id


def use(world: World, org_id: UUID, moment: datetime, **fields: Any) -> None:
    charged = event(
        org_id, f"r-{moment.isoformat()}".replace("+", "_"), occurred_at=moment, **fields
    )
    assert world.apply(charged, now=moment).charged == 1


def asked(api: httpx.Client, org_id: UUID, caller: Headers, **params: Any) -> httpx.Response:
    url = f"/api/v1/org-billing/credits/{org_id}/usage"
    if "since" in params:
        params["from"] = params.pop("since")
    return api.get(url, params=params, headers=caller)


def test_the_report_is_answered_whole(api: httpx.Client, org_id: UUID, ada: Headers) -> None:
    answer = asked(api, org_id, ada, **MARCH)
    assert answer.status_code == 200
    assert answer.json() == {
        "org_id": str(org_id),
        "total_credits_used": 95,
        "user_count": 2,
        "service_breakdown": {"valuation": 75, "contact_lookup": 20},
        "top_users": [
            {"user_id": "bob", "total_credits": 75, "request_count": 1},
            {"user_id": "ada", "total_credits": 20, "request_count": 2},
        ],
        "date_range_start": "2026-03-01T00:00:00Z",
        "date_range_end": "2026-04-01T00:00:00Z",
    }


def test_the_last_thirty_days_are_meant_unless_told(
    api: httpx.Client, api_world: World, ada: Headers
) -> None:
    org_id = organization(api_world, "ada")
    now = utc_now()
    for age in (timedelta(0), 29 * DAY, 31 * DAY, 364 * DAY):
        use(api_world, org_id, now - age)
    usual = asked(api, org_id, ada).json()
    assert usual["total_credits_used"] == 20
    start = datetime.fromisoformat(usual["date_range_start"])
    end = datetime.fromisoformat(usual["date_range_end"])
    assert end - start == 30 * DAY
    assert now <= end <= utc_now()
    for days, credits in ((1, 10), (30, 20), (32, 30), (365, 40)):
        assert asked(api, org_id, ada, days=days).json()["total_credits_used"] == credits


def test_an_end_without_a_start_counts_days_back_from_it(
    api: httpx.Client, org_id: UUID, ada: Headers
) -> None:
    found = asked(api, org_id, ada, to="2026-03-09T00:00:00Z", days=1).json()
    assert found["date_range_start"] == "2026-03-08T00:00:00Z"
    assert found["total_credits_used"] == 95


def test_a_start_without_an_end_lasts_until_now(
    api: httpx.Client, api_world: World, ada: Headers
) -> None:
    org_id = organization(api_world, "ada")
    now = utc_now()
    use(api_world, org_id, now)
    found = asked(api, org_id, ada, since=(now - DAY).isoformat(), days=300).json()
    assert found["total_credits_used"] == 10
    assert datetime.fromisoformat(found["date_range_start"]) == now - DAY
    assert datetime.fromisoformat(found["date_range_end"]) >= now


def test_the_end_is_not_included(api: httpx.Client, org_id: UUID, ada: Headers) -> None:
    until = {"since": "2026-03-08T05:30:00+00:00"}
    last = (FIRST + timedelta(hours=12)).isoformat()
    assert asked(api, org_id, ada, **until, to=last).json()["total_credits_used"] == 75
    # an offset of its own
    until = {"since": "2026-03-08T01:30:00-04:00"}
    assert (
        asked(api, org_id, ada, **until, to="2026-03-31T00:00:00Z").json()["date_range_start"]
        == "2026-03-08T05:30:00Z"
    )


@pytest.mark.parametrize(
    ("params", "fields"),
    [
        ({"days": 0}, ["days"]),
        ({"days": 366}, ["days"]),
        ({"days": "all"}, ["days"]),
        ({"from": "2026-03-01"}, ["from"]),
        ({"from": "2026-03-01T00:00:00"}, ["from"]),
        ({"from": "1770000000"}, ["from"]),
        ({"to": "0001-01-01T00:00:00Z"}, ["to"]),
        ({"to": "9999-12-31T00:00:00Z"}, ["to"]),
        ({"from": "2026-03-01T00:00:00Z", "to": "2026-03-01T00:00:00Z"}, ["from", "to"]),
        ({"from": "2999-03-01T00:00:00Z"}, ["from", "to"]),
        ({"from": "2025-03-01T00:00:00Z", "to": "2026-03-02T00:00:01Z"}, ["from", "to"]),
        ({"user_id": ""}, ["user_id"]),
        ({"user_id": "x" * 256}, ["user_id"]),
        ({"user_id": "x\0"}, ["user_id"]),
        ({"service_type": "x" * 101}, ["service_type"]),
        ({"group_by": "hour"}, ["group_by"]),
        ({"group_by": ""}, ["group_by"]),
        ({"group_by": "day,"}, ["group_by"]),
        ({"format": "xml"}, ["format"]),
    ],
)
def test_what_cannot_be_asked_names_the_field(
    api: httpx.Client, org_id: UUID, ada: Headers, params: Json, fields: list[str]
) -> None:
    detail = refused(asked(api, org_id, ada, **params), 422, "invalid_request")
    assert detail["fields"] == fields


def test_the_longest_spans_are_answered(api: httpx.Client, org_id: UUID, ada: Headers) -> None:
    leap = {"from": "2025-03-01T00:00:00Z", "to": "2026-03-02T00:00:00Z"}
    for params in (leap, {"to": "9998-12-31T00:00:00Z"}, {"to": "0002-01-01T00:00:00Z"}):
        assert asked(api, org_id, ada, **params).is_success


def test_one_user_or_service_can_be_looked_at(
    api: httpx.Client, org_id: UUID, ada: Headers
) -> None:
    found = asked(api, org_id, ada, **MARCH, user_id="bob").json()
    assert (found["total_credits_used"], found["user_count"]) == (75, 1)
    found = asked(api, org_id, ada, **MARCH, service_type="contact_lookup").json()
    assert found["service_breakdown"] == {"contact_lookup": 20}


def test_groups_name_what_they_are_grouped_by(
    api: httpx.Client, org_id: UUID, ada: Headers
) -> None:
    found = asked(api, org_id, ada, **MARCH, group_by="day,service").json()
    assert set(found) == TOP_KEYS | {"groups"}
    assert found["groups"] == [
        {
            "day": "2026-03-07",
            "service": "contact_lookup",
            "total_credits": 10,
            "request_count": 1,
            "total_cost": 0.0,
        },
        {
            "day": "2026-03-08",
            "service": "contact_lookup",
            "total_credits": 10,
            "request_count": 1,
            "total_cost": 0.06,
        },
        {
            "day": "2026-03-08",
            "service": "valuation",
            "total_credits": 75,
            "request_count": 1,
            "total_cost": 0.0,
        },
    ]
    by_week = asked(api, org_id, ada, **MARCH, group_by="week").json()["groups"]
    assert [group["week"] for group in by_week] == ["2026-03-02"]
    by_month = asked(api, org_id, ada, **MARCH, group_by=["month", "user,user"]).json()["groups"]
    assert [(group["month"], group["user_id"]) for group in by_month] == [
        ("2026-03-01", "ada"), ("2026-03-01", "bob"),
    ]  # fmt: skip


def test_nothing_used_has_no_groups(api: httpx.Client, org_id: UUID, ada: Headers) -> None:
    past = {"from": "2020-01-01T00:00:00Z", "to": "2020-02-01T00:00:00Z"}
    found = asked(api, org_id, ada, **past, group_by="day").json()
    assert (found["groups"], found["service_breakdown"], found["top_users"]) == ([], {}, [])


def lines(answer: httpx.Response) -> list[list[str]]:
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "text/csv; charset=utf-8"
    return list(csv.reader(io.StringIO(answer.text, newline="")))


def test_csv_has_a_line_per_service(api: httpx.Client, org_id: UUID, ada: Headers) -> None:
    answer = asked(api, org_id, ada, **MARCH, format="csv")
    assert lines(answer) == [
        ["service", "total_credits", "request_count", "total_cost"],
        ["contact_lookup", "20", "2", "0.060000"],
        ["valuation", "75", "1", "0.000000"],
    ]
    assert answer.headers["Content-Disposition"] == (
        f'attachment; filename="usage-{org_id}-20260301-20260401.csv"'
    )


def test_csv_has_a_line_per_group(api: httpx.Client, org_id: UUID, ada: Headers) -> None:
    answer = asked(api, org_id, ada, **MARCH, format="csv", group_by="user,day")
    assert lines(answer) == [
        ["user_id", "day", "total_credits", "request_count", "total_cost"],
        ["ada", "2026-03-07", "10", "1", "0.000000"],
        ["ada", "2026-03-08", "10", "1", "0.060000"],
        ["bob", "2026-03-08", "75", "1", "0.000000"],
    ]


def test_csv_of_nothing_has_its_columns(api: httpx.Client, org_id: UUID, ada: Headers) -> None:
    past = {"from": "2020-01-01T00:00:00Z", "to": "2020-02-01T00:00:00Z"}
    assert len(lines(asked(api, org_id, ada, **past, format="csv"))) == 1


def test_csv_runs_no_formulas(api: httpx.Client, api_world: World, ada: Headers) -> None:
    users = ["=1+1", "+1", "-1", "@A1", "\t=1", "\r=1", 'quo"te, and\nline', "ada"]
    org_id = organization(api_world, *users)
    for number, user in enumerate(users):
        use(api_world, org_id, FIRST + timedelta(minutes=number), user_id=user)
    answer = asked(api, org_id, ada, **MARCH, format="csv", group_by="user")
    expected = {f"'{user}" for user in users[:6]} | set(users[6:])
    assert {line[0] for line in lines(answer)[1:]} == expected


def test_members_see_all_and_others_nothing(
    api: httpx.Client, org_id: UUID, callers: Callers
) -> None:
    for caller in (callers.user("bob"), callers.system_admin()):
        assert asked(api, org_id, caller, **MARCH).json()["total_credits_used"] == 95
    for org in (org_id, UUID(int=1)):
        for params in ({}, {"days": "bad"}):
            detail = refused(asked(api, org, callers.user("eve"), **params), 404, "not_found")
            assert detail["message"] == f"no organization {org}"
    for params in ({}, {"format": "csv"}):
        refused(asked(api, UUID(int=1), callers.system_admin(), **params), 404, "not_found")
    refused(asked(api, org_id, callers.service(*Scope)), 403, "forbidden")
