"""Billing over HTTP: a user's page, an organization's, the system's, and the history."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from psycopg.types.json import Jsonb
from sqlalchemy import Engine, event

from schema.plans import PlanName
from schema.scopes import Scope
from tests.integration.api.answers import Json, refused
from tests.integration.api.conftest import MEMBERS, Callers, Headers
from tests.integration.ledger.world import World

PATH = "/api/v1/org-billing/billing"


@contextmanager
def statements_counted() -> Iterator[list[str]]:
    """The statements that are sent to PostgreSQL meanwhile, by whatever engine."""
    sent: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        sent.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        event.remove(Engine, "before_cursor_execute", note)


def statements_of(api: httpx.Client, path: str, headers: Headers) -> int:
    api.get(path, headers=headers)  # the first answer may have to open a connection
    with statements_counted() as sent:
        assert api.get(path, headers=headers).status_code == 200
    return len(sent)


def insert(api_world: World, table: str, values: Json) -> None:
    """One row, whose other columns have their defaults."""
    columns, places = ", ".join(values), ", ".join(["%s"] * len(values))
    api_world.sql.execute(
        f"INSERT INTO {table} ({columns}) VALUES ({places})".encode(), list(values.values())
    )


def age(api_world: World, org_id: UUID, request_id: str, days: int) -> None:
    """Let a charge have occurred so many days ago."""
    with api_world.sql.transaction():
        api_world.sql.execute("SET LOCAL session_replication_role = replica")
        api_world.sql.execute(
            """
            UPDATE credit_usage_attribution SET occurred_at = now() - make_interval(days => %s)
            WHERE org_id = %s AND request_id = %s
            """,
            (days, org_id, request_id),
        )


# A user's page


def test_a_user_sees_their_organizations(
    api: httpx.Client, api_world: World, callers: Callers
) -> None:
    user = f"user-{uuid4()}"
    busy = api_world.organization(
        plan=PlanName.HYBRID,
        pool=1000,
        allocations={user: 300, "ben": 300},
        members={user: "admin", "ben": "member"},
    )
    idle = api_world.organization(members={user: "member"})
    former = api_world.organization(pool=100, allocations={user: 50})
    ended = api_world.organization(members={user: "member"})
    api_world.subscribe(ended, PlanName.BYOK, "canceled")
    api_world.deduct(busy, "r-1", 30, user_id=user)
    api_world.deduct(busy, "r-2", 20, user_id=user)
    api_world.deduct(busy, "old", 7, user_id=user)
    age(api_world, busy, "old", 31)
    api_world.deduct(busy, "of-ben", 10, user_id="ben")
    api_world.deduct(former, "r-1", 5, user_id=user)
    api_world.leave(former, user)

    answer = api.get(f"{PATH}/user", headers=callers.user(user))
    assert answer.status_code == 200
    page = answer.json()
    nothing: Json = {
        "role": "member",
        "subscription_plan": None,
        "monthly_price": None,
        "allocated_credits": 0,
        "used_credits": 0,
        "remaining_credits": 0,
    }
    expected: list[Json] = [
        {
            "org_id": str(busy),
            "org_name": f"org-{busy}",
            "role": "admin",
            "subscription_plan": "hybrid",
            "monthly_price": 99.0,
            "allocated_credits": 300,
            "used_credits": 57,
            "remaining_credits": 243,
        },
        nothing | {"org_id": str(idle), "org_name": f"org-{idle}"},
        nothing | {"org_id": str(ended), "org_name": f"org-{ended}"},
    ]
    assert page == {
        "user_id": user,
        "user_email": f"{user}@example.com",
        "organizations": sorted(expected, key=lambda item: item["org_name"]),
        "total_usage_last_30_days": {
            "total_credits_used": 50,
            "org_count": 1,
            "request_count": 2,
        },
    }


def test_a_user_without_organizations_sees_an_empty_page(
    api: httpx.Client, callers: Callers
) -> None:
    page = api.get(f"{PATH}/user", headers=callers.user(f"nobody-{uuid4()}")).json()
    assert page["organizations"] == []
    assert page["total_usage_last_30_days"] == {
        "total_credits_used": 0,
        "org_count": 0,
        "request_count": 0,
    }


def test_a_system_admin_sees_only_their_own(
    api: httpx.Client, api_world: World, callers: Callers
) -> None:
    api_world.organization(members=MEMBERS)
    page = api.get(f"{PATH}/user", headers=callers.system_admin(f"root-{uuid4()}")).json()
    assert page["organizations"] == []


def test_services_have_no_page(api: httpx.Client, callers: Callers) -> None:
    refused(api.get(f"{PATH}/user", headers=callers.service(*Scope)), 403, "forbidden")
    refused(api.get(f"{PATH}/user"), 401, "not_authenticated")


# An organization's page


def test_an_admin_sees_the_organization(
    api: httpx.Client, api_world: World, ada: Headers, root: Headers
) -> None:
    org_id = api_world.organization(
        plan=PlanName.PLATFORM, pool=1000, allocations={"ben": 300, "cem": 100}, members=MEMBERS
    )
    api_world.deduct(org_id, "r-1", 30, user_id="ben")
    api_world.deduct(org_id, "r-2", 20, user_id="cem")
    api_world.deduct(org_id, "r-3", 10, user_id="cem")
    api_world.deduct(org_id, "old", 7, user_id="ben")
    age(api_world, org_id, "old", 31)
    answer = api.get(f"{PATH}/org/{org_id}", headers=ada)
    assert answer.status_code == 200
    assert api.get(f"{PATH}/org/{org_id}", headers=root).json() == answer.json()
    page = answer.json()
    pool, allocations = page.pop("credit_pool"), page.pop("user_allocations")
    period_end = page["subscription"].pop("current_period_end")
    assert datetime.fromisoformat(period_end) > datetime.now(UTC)
    assert page == {
        "organization": {
            "id": str(org_id),
            "name": f"org-{org_id}",
            "display_name": "An organization",
            "max_seats": 10,
            "status": "active",
        },
        "subscription": {"plan": "platform", "monthly_price": 50.0, "status": "active"},
        "usage_stats_30_days": {
            "total_credits_used": 60,
            "active_users": 2,
            "total_requests": 3,
        },
    }
    assert UUID(pool.pop("id"))
    assert pool == {
        "org_id": str(org_id),
        "org_name": f"org-{org_id}",
        "total_credits": 1000,
        "allocated_credits": 400,
        "used_credits": 67,
        "available_credits": 600,
        "monthly_refresh_amount": 0,
        "last_refresh_date": None,
        "next_refresh_date": None,
        "allow_overage": False,
        "overage_limit": 0,
        "overage_rate": 0.0,
        "overage_credits": 0,
        "overage_billed_credits": 0,
        "lifetime_purchased_credits": pool["lifetime_purchased_credits"],
        "lifetime_spent_amount": 0.0,
    }
    assert [(one["user_id"], one["remaining_credits"]) for one in allocations] == [
        ("ben", 263),
        ("cem", 70),
    ]
    assert {"id", "org_id", "user_email", "user_name", "reset_period", "is_active"} <= set(
        allocations[0]
    )


def test_an_organization_that_has_nothing_yet(
    api: httpx.Client, api_world: World, ada: Headers
) -> None:
    org_id = api_world.organization(members=MEMBERS)
    page = api.get(f"{PATH}/org/{org_id}", headers=ada).json()
    assert (page["subscription"], page["credit_pool"], page["user_allocations"]) == (None, None, [])
    assert page["usage_stats_30_days"] == {
        "total_credits_used": 0,
        "active_users": 0,
        "total_requests": 0,
    }


def test_who_may_not_see_the_organization(
    api: httpx.Client, api_world: World, ben: Headers, eve: Headers, root: Headers
) -> None:
    org_id, nowhere = api_world.organization(members=MEMBERS), uuid4()
    refused(api.get(f"{PATH}/org/{org_id}", headers=ben), 403, "forbidden")
    hidden = refused(api.get(f"{PATH}/org/{org_id}", headers=eve), 404, "not_found")
    absent = refused(api.get(f"{PATH}/org/{nowhere}", headers=root), 404, "not_found")
    assert hidden["message"] == f"no organization {org_id}"
    assert absent["message"] == f"no organization {nowhere}"
    refused(api.get(f"{PATH}/org/acme", headers=eve), 422, "invalid_request")


# The system's page


def revenue_of(page: Json) -> tuple[Decimal, int, dict[str, tuple[int, Decimal]]]:
    """MRR, paying subscriptions, and number and MRR by plan."""
    metrics = page["revenue_metrics"]
    shares = {
        share["plan"]: (share["count"], Decimal(str(share["mrr"])))
        for share in page["subscription_distribution"]
    }
    return Decimal(str(metrics["total_mrr"])), metrics["active_subscriptions"], shares


@pytest.fixture
def quiet(api_world: World) -> None:
    """No subscription of an earlier test is live."""
    api_world.sql.execute("UPDATE organization_subscriptions SET status = 'canceled'")


def subscribe(api_world: World, price: str, *, is_test: bool = False, **columns: object) -> UUID:
    """A platform subscription of an organization of its own."""
    org_id = api_world.organization(is_test=is_test)
    values = {"subscription_plan": "platform", "monthly_price": price, "org_id": org_id} | columns
    insert(api_world, "organization_subscriptions", values)
    return org_id


@pytest.mark.usefixtures("quiet")
def test_the_system_admin_sees_all_organizations(
    api: httpx.Client, api_world: World, root: Headers
) -> None:
    org_id = api_world.organization(
        plan=PlanName.HYBRID, pool=1000, allocations={"ben": 300}, members=MEMBERS
    )
    api_world.sql.execute("SELECT add_credits_to_pool(%s, 500, 12.5)", (org_id,))
    api_world.deduct(org_id, "r-1", 30, user_id="ben")
    bare = api_world.organization()
    page = api.get(f"{PATH}/system", headers=root).json()
    listed = {item["org_id"]: item for item in page["organizations"]}
    assert len(listed) == len(api_world.rows("organizations", "id"))
    assert list(listed) == [
        item["org_id"] for item in sorted(listed.values(), key=lambda item: item["org_name"])
    ]
    assert listed[str(org_id)] == {
        "org_id": str(org_id),
        "org_name": f"org-{org_id}",
        "is_test": False,
        "subscription_plan": "hybrid",
        "monthly_price": 99.0,
        "subscription_status": "active",
        "total_credits": 1500,
        "used_credits": 30,
        "member_count": 2,
        "lifetime_spent": 12.5,
    }
    assert listed[str(bare)] == {
        "org_id": str(bare),
        "org_name": f"org-{bare}",
        "is_test": False,
        "subscription_plan": None,
        "monthly_price": None,
        "subscription_status": None,
        "total_credits": 0,
        "used_credits": 0,
        "member_count": 0,
        "lifetime_spent": 0.0,
    }
    assert page["revenue_metrics"] == {
        "total_mrr": 99.0,
        "total_arr": 1188.0,
        "active_subscriptions": 1,
    }
    assert page["subscription_distribution"] == [{"plan": "hybrid", "count": 1, "mrr": 99.0}]


@pytest.mark.usefixtures("quiet")
def test_revenue_is_what_is_really_billed(
    api: httpx.Client, api_world: World, root: Headers
) -> None:
    subscribe(api_world, "50")
    subscribe(api_world, "40.10", billing_cycle="yearly")
    subscribe(api_world, "10", status="past_due")
    subscribe(api_world, "30", subscription_plan="byok", cancel_at_period_end=True)
    for status in ("trialing", "paused", "canceled"):
        subscribe(api_world, "1000", status=status)
    tried = subscribe(api_world, "1000", is_test=True)
    page = api.get(f"{PATH}/system", headers=root).json()
    shares = {"byok": (1, Decimal(30)), "platform": (3, Decimal("100.1"))}
    assert revenue_of(page) == (Decimal("130.1"), 4, shares)
    assert page["revenue_metrics"]["total_arr"] == 1561.2
    assert [share["plan"] for share in page["subscription_distribution"]] == ["byok", "platform"]
    listed = {item["org_id"]: item for item in page["organizations"]}
    assert (listed[str(tried)]["is_test"], listed[str(tried)]["monthly_price"]) == (True, 1000)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    ("days", "mrr"), [(None, "70"), (7, "304.37"), (365, "5.84"), (3660, "0.58"), (30, "71.02")]
)
def test_a_custom_cycle_counts_as_an_average_month(
    api: httpx.Client, api_world: World, root: Headers, days: int | None, mrr: str
) -> None:
    """70 dollars every so many days; 365.2425 days are a year."""
    subscribe(api_world, "70", billing_cycle="custom", cycle_days=days)
    assert revenue_of(api.get(f"{PATH}/system", headers=root).json())[0] == Decimal(mrr)


def test_nobody_else_sees_the_system(api: httpx.Client, ada: Headers, callers: Callers) -> None:
    refused(api.get(f"{PATH}/system", headers=ada), 403, "forbidden")
    refused(api.get(f"{PATH}/system", headers=callers.service(*Scope)), 403, "forbidden")


# The history


def record(api_world: World, org_id: UUID, **columns: Any) -> UUID:
    entry_id = uuid4()
    values = {"id": entry_id, "org_id": org_id, "event_type": "invoice_created"} | columns
    insert(api_world, "org_billing_history", values)
    return entry_id


def day(number: int) -> datetime:
    return datetime(2026, 3, number, tzinfo=UTC)


def test_an_admin_reads_the_history(api: httpx.Client, api_world: World, ada: Headers) -> None:
    org_id = api_world.organization(members=MEMBERS)
    older = record(api_world, org_id, created_at=day(1), event_type="credit_purchase", amount=12.5)
    record(api_world, api_world.organization())
    newer = record(
        api_world,
        org_id,
        created_at=day(2),
        amount=Decimal("50.25"),
        payment_status="paid",
        payment_method="card",
        paid_at=day(3),
        period_start=day(2),
        period_end=day(9),
        event_metadata=Jsonb({"plan": "platform"}),
        notes="by hand",
    )
    answer = api.get(f"{PATH}/{org_id}/history", headers=ada)
    assert answer.status_code == 200
    assert answer.headers["X-Total-Count"] == "2"
    first, second = answer.json()
    assert first == {
        "id": str(newer),
        "org_id": str(org_id),
        "subscription_id": None,
        "event_type": "invoice_created",
        "amount": 50.25,
        "currency": "USD",
        "payment_status": "paid",
        "payment_method": "card",
        "paid_at": "2026-03-03T00:00:00Z",
        "period_start": "2026-03-02T00:00:00Z",
        "period_end": "2026-03-09T00:00:00Z",
        "event_metadata": {"plan": "platform"},
        "notes": "by hand",
        "created_at": "2026-03-02T00:00:00Z",
    }
    assert (second["id"], second["amount"], second["event_metadata"]) == (str(older), 12.5, {})


@pytest.mark.parametrize(
    ("query", "days", "total"),
    [
        ("", [5, 4, 3, 2, 1], 5),
        ("?limit=2", [5, 4], 5),
        ("?limit=2&offset=4", [1], 5),
        ("?offset=5", [], 5),
        ("?event_type=invoice_paid", [4, 2], 2),
        ("?from=2026-03-03T00:00:00Z", [5, 4, 3], 3),
        ("?to=2026-03-03T00:00:00Z", [2, 1], 2),
        ("?from=2026-03-02T02:00:00%2B02:00&to=2026-03-04T00:00:00Z", [3, 2], 2),
        ("?from=2026-03-03T00:00:00Z&event_type=invoice_paid&limit=1", [4], 1),
        ("?from=2026-03-04T00:00:00Z&to=2026-03-01T00:00:00Z", [], 0),
        ("?from=0002-01-01T00:00:00%2B00:00&to=9998-12-30T23:59:59%2B00:00", [5, 4, 3, 2, 1], 5),
        ("?event_type=credit_refund", [], 0),
    ],
)
def test_the_history_is_filtered_and_paged(
    api: httpx.Client, api_world: World, ada: Headers, query: str, days: list[int], total: int
) -> None:
    org_id = api_world.organization(members=MEMBERS)
    for number in range(1, 6):
        kind = "invoice_created" if number % 2 else "invoice_paid"
        record(api_world, org_id, created_at=day(number), event_type=kind)
    answer = api.get(f"{PATH}/{org_id}/history{query}", headers=ada)
    assert answer.status_code == 200, answer.text
    found = [datetime.fromisoformat(entry["created_at"]).day for entry in answer.json()]
    assert (found, answer.headers["X-Total-Count"]) == (days, str(total))


def test_periods_that_were_caught_up_on_at_once_are_in_order(
    api: httpx.Client, api_world: World, ada: Headers
) -> None:
    org_id = api_world.organization(members=MEMBERS)
    numbers = [3, 1, 5, 2, 4]
    for number in numbers:
        start, end = day(number), day(number + 1)
        record(api_world, org_id, created_at=day(9), period_start=start, period_end=end)
    record(api_world, org_id, created_at=day(9))
    seen: list[str | None] = []
    for offset in range(6):
        page = api.get(f"{PATH}/{org_id}/history?limit=1&offset={offset}", headers=ada).json()
        seen += [entry["period_start"] for entry in page]
    assert seen == [f"2026-03-0{number}T00:00:00Z" for number in (5, 4, 3, 2, 1)] + [None]


def test_the_history_knows_every_event_of_the_table(
    api: httpx.Client, api_world: World, ada: Headers
) -> None:
    org_id = api_world.organization(members=MEMBERS)
    ((rule,),) = api_world.rows(
        "pg_constraint WHERE conname = 'org_billing_history_event_type_check'",
        "pg_get_constraintdef(oid)",
    )
    kinds = rule.split("'")[1::2]
    assert len(kinds) > 1
    for kind in kinds:
        record(api_world, org_id, event_type=kind)
    answer = api.get(f"{PATH}/{org_id}/history", headers=ada)
    assert sorted(entry["event_type"] for entry in answer.json()) == sorted(kinds)


@pytest.mark.parametrize(
    "query",
    [
        "event_type=party",
        "from=yesterday",
        "from=1767225600",
        "from=2026-03-03T00:00:00",
        "to=2026-13-01T00:00:00Z",
        "limit=0",
    ],
)
def test_a_query_that_cannot_be_is_refused(
    api: httpx.Client, api_world: World, ada: Headers, query: str
) -> None:
    org_id = api_world.organization(members=MEMBERS)
    answer = api.get(f"{PATH}/{org_id}/history?{query}", headers=ada)
    assert refused(answer, 422, "invalid_request")["fields"] == [query.partition("=")[0]]


def test_who_may_not_read_the_history(
    api: httpx.Client, api_world: World, ben: Headers, eve: Headers, root: Headers
) -> None:
    org_id, nowhere = api_world.organization(members=MEMBERS), uuid4()
    refused(api.get(f"{PATH}/{org_id}/history", headers=ben), 403, "forbidden")
    refused(api.get(f"{PATH}/{org_id}/history", headers=eve), 404, "not_found")
    absent = refused(api.get(f"{PATH}/{nowhere}/history", headers=root), 404, "not_found")
    assert absent["message"] == f"no organization {nowhere}"
    assert api.get(f"{PATH}/{org_id}/history", headers=root).json() == []


# However much there is


@pytest.mark.parametrize(
    "path",
    [
        "billing/user",
        "billing/org/{org_id}",
        "billing/system",
        "billing/{org_id}/history",
        "organizations",
        "organizations/{org_id}/members",
        "subscriptions",
    ],
)
def test_more_rows_need_no_more_statements(
    api: httpx.Client, api_world: World, callers: Callers, path: str
) -> None:
    user = f"root-{uuid4()}"
    headers = callers.system_admin(user)
    org_id = api_world.organization(
        plan=PlanName.BYOK, pool=100, allocations={user: 1}, members={user: "admin"}
    )
    url = f"/api/v1/org-billing/{path.format(org_id=org_id)}"
    few = statements_of(api, url, headers)
    for number in range(6):
        api_world.organization(
            plan=PlanName.BYOK, pool=100, allocations={user: 1}, members={user: "admin"}
        )
        api_world.allocate(org_id, f"user-{number}", 1)
        api_world.sql.execute(
            "INSERT INTO organization_members (org_id, user_id) VALUES (%s, %s)"
            " ON CONFLICT DO NOTHING",
            (org_id, f"user-{number}"),
        )
        record(api_world, org_id)
    assert 0 < statements_of(api, url, headers) == few
