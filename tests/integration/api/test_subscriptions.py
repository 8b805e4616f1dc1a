"""Subscriptions over HTTP: who may do what, every answer exactly, every refusal (rows 1 to 5)."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import httpx
import pytest

from schema.plans import PlanName
from schema.scopes import Scope
from tests.integration.api.answers import Json, refused
from tests.integration.api.conftest import MEMBERS, Callers, Headers
from tests.integration.ledger.world import World

PATH = "/api/v1/org-billing/subscriptions"


@pytest.fixture
def org_id(api_world: World) -> UUID:
    return api_world.organization(members=MEMBERS)


@pytest.fixture
def subscribed(api_world: World) -> UUID:
    return api_world.organization(members=MEMBERS, plan=PlanName.PLATFORM)


def terms(org_id: UUID, **others: object) -> Json:
    return {"org_id": str(org_id), "subscription_plan": "platform"} | others


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


# Creation


def test_an_admin_subscribes_an_organization(api: httpx.Client, org_id: UUID, ada: Headers) -> None:
    answer = api.post(PATH, json=terms(org_id), headers=ada)
    assert answer.status_code == 200
    made = answer.json()
    assert UUID(made.pop("id"))
    start, end = moment(made.pop("current_period_start")), moment(made.pop("current_period_end"))
    assert timedelta(days=28) <= end - start <= timedelta(days=31)
    assert abs(datetime.now(UTC) - start) < timedelta(minutes=1)
    assert moment(made.pop("created_at")) == start
    assert made == {
        "org_id": str(org_id),
        "org_name": f"org-{org_id}",
        "subscription_plan": "platform",
        "monthly_price": 50.0,
        "billing_cycle": "monthly",
        "status": "active",
        "trial_ends_at": None,
        "canceled_at": None,
        "cancel_at_period_end": False,
    }
    assert isinstance(made["monthly_price"], float)


def test_a_trial_and_a_cycle_of_ones_own(api: httpx.Client, org_id: UUID, ada: Headers) -> None:
    asked = terms(org_id, trial_days=14, billing_cycle="yearly", subscription_plan="hybrid")
    made = api.post(PATH, json=asked, headers=ada).json()
    assert (made["status"], made["billing_cycle"]) == ("trialing", "yearly")
    assert made["trial_ends_at"] == made["current_period_end"]
    lasts = moment(made["trial_ends_at"]) - moment(made["current_period_start"])
    assert lasts == timedelta(days=14)


def test_no_days_are_no_trial(api: httpx.Client, org_id: UUID, ada: Headers) -> None:
    made = api.post(PATH, json=terms(org_id, trial_days=0), headers=ada).json()
    assert (made["status"], made["trial_ends_at"]) == ("active", None)


def test_a_price_of_ones_own_needs_the_system_admin(
    api: httpx.Client, org_id: UUID, ada: Headers, root: Headers
) -> None:
    refused(api.post(PATH, json=terms(org_id, monthly_price=49.99), headers=ada), 403, "forbidden")
    made = api.post(PATH, json=terms(org_id, monthly_price=49.99), headers=root)
    assert made.json()["monthly_price"] == 49.99


def test_the_plans_price_may_be_said(api: httpx.Client, org_id: UUID, ada: Headers) -> None:
    made = api.post(PATH, json=terms(org_id, monthly_price=50), headers=ada)
    assert made.json()["monthly_price"] == 50


def test_a_second_subscription_is_refused(
    api: httpx.Client, subscribed: UUID, ada: Headers
) -> None:
    answer = api.post(PATH, json=terms(subscribed), headers=ada)
    refused(answer, 409, "subscription_exists")


def test_only_admins_of_the_organization_create(
    api: httpx.Client, org_id: UUID, ben: Headers, eve: Headers, root: Headers
) -> None:
    refused(api.post(PATH, json=terms(org_id), headers=ben), 403, "forbidden")
    hidden = refused(api.post(PATH, json=terms(org_id), headers=eve), 404, "not_found")
    nowhere = uuid4()
    absent = refused(api.post(PATH, json=terms(nowhere), headers=eve), 404, "not_found")
    known = refused(api.post(PATH, json=terms(nowhere), headers=root), 404, "not_found")
    assert hidden["message"] == f"no organization {org_id}"
    assert absent["message"] == known["message"] == f"no organization {nowhere}"


def test_the_body_decides_even_if_the_query_names_another(
    api: httpx.Client, api_world: World, org_id: UUID, ada: Headers
) -> None:
    other = api_world.organization()
    query = {"org_id": str(org_id)}
    answer = api.post(PATH, params=query, json=terms(other), headers=ada)
    assert refused(answer, 404, "not_found")["message"] == f"no organization {other}"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("subscription_plan", "gold"),
        ("monthly_price", -1),
        ("monthly_price", 0.001),
        ("monthly_price", 10**10),
        ("monthly_price", True),
        ("monthly_price", "NaN"),
        ("billing_cycle", "weekly"),
        ("trial_days", 366),
        ("trial_days", -1),
        ("trial_days", 10**30),
        ("trial_days", 1.5),
        ("cycle_days", 3),
        ("org_id", "acme"),
    ],
)
def test_terms_that_cannot_be_are_named(
    api: httpx.Client, org_id: UUID, root: Headers, field: str, value: object
) -> None:
    answer = api.post(PATH, json=terms(org_id) | {field: value}, headers=root)
    assert refused(answer, 422, "invalid_request")["fields"] == [field]


def test_a_key_subscribes_once_from_many_threads(
    api: httpx.Client, api_world: World, org_id: UUID, ada: Headers
) -> None:
    headers = ada | {"Idempotency-Key": "subscribe-1"}

    def ask(_: int) -> httpx.Response:
        return api.post(PATH, json=terms(org_id), headers=headers)

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, range(20)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.text for answer in answers}) == 1
    where = f"organization_subscriptions WHERE org_id = '{org_id}'"
    assert len(api_world.rows(where, "id")) == 1

    other = api.post(PATH, json=terms(org_id, subscription_plan="byok"), headers=headers)
    assert refused(other, 422, "invalid_request")["fields"] == ["Idempotency-Key"]
    again = api.post(PATH, json=terms(org_id), headers=ada | {"Idempotency-Key": "subscribe-2"})
    refused(again, 409, "subscription_exists")
    too_long = api.post(PATH, json=terms(org_id), headers=ada | {"Idempotency-Key": "k" * 256})
    refused(too_long, 422, "invalid_request")


# Reading


def test_members_read_it(
    api: httpx.Client, org_id: UUID, ada: Headers, ben: Headers, root: Headers
) -> None:
    made = api.post(PATH, json=terms(org_id), headers=ada).json()
    for headers in (ada, ben, root):
        answer = api.get(f"{PATH}/{org_id}", headers=headers)
        assert (answer.status_code, answer.json()) == (200, made)


def test_who_may_not_read_it(
    api: httpx.Client, subscribed: UUID, org_id: UUID, ben: Headers, eve: Headers, callers: Callers
) -> None:
    hidden = refused(api.get(f"{PATH}/{subscribed}", headers=eve), 404, "not_found")
    assert hidden["message"] == f"no organization {subscribed}"
    refused(api.get(f"{PATH}/{subscribed}", headers=callers.service(*Scope)), 403, "forbidden")
    refused(api.get(f"{PATH}/{subscribed}"), 401, "not_authenticated")
    never = refused(api.get(f"{PATH}/{org_id}", headers=ben), 404, "not_found")
    assert "no subscription" in never["message"]


# Changing the plan


def test_an_admin_changes_the_plan(api: httpx.Client, subscribed: UUID, ada: Headers) -> None:
    answer = api.put(f"{PATH}/{subscribed}/upgrade?new_plan=hybrid", headers=ada)
    assert answer.status_code == 200
    assert answer.json() == {
        "success": True,
        "message": "The plan is hybrid now; the next invoice is at $99.00 a month.",
        "old_plan": "platform",
        "new_plan": "hybrid",
        "old_price": 50.0,
        "new_price": 99.0,
    }
    assert api.get(f"{PATH}/{subscribed}", headers=ada).json()["subscription_plan"] == "hybrid"
    again = api.put(f"{PATH}/{subscribed}/upgrade?new_plan=hybrid", headers=ada)
    refused(again, 409, "conflict")


def test_who_may_not_change_the_plan(
    api: httpx.Client, subscribed: UUID, org_id: UUID, ada: Headers, ben: Headers, eve: Headers
) -> None:
    path = f"{PATH}/{subscribed}/upgrade"
    refused(api.put(f"{path}?new_plan=hybrid", headers=ben), 403, "forbidden")
    refused(api.put(f"{path}?new_plan=hybrid", headers=eve), 404, "not_found")
    refused(api.put(f"{path}?new_plan=gold", headers=ada), 422, "invalid_request")
    refused(api.put(path, headers=ada), 422, "invalid_request")
    unsubscribed = api.put(f"{PATH}/{org_id}/upgrade?new_plan=byok", headers=ada)
    refused(unsubscribed, 404, "not_found")


# The end


def test_it_runs_on_until_its_period_ends(
    api: httpx.Client, subscribed: UUID, ada: Headers
) -> None:
    answer = api.delete(f"{PATH}/{subscribed}", headers=ada)
    assert answer.status_code == 200
    asked = answer.json()
    assert (asked["status"], asked["cancel_at_period_end"]) == ("active", True)
    assert api.get(f"{PATH}/{subscribed}", headers=ada).json() == asked
    assert api.delete(f"{PATH}/{subscribed}", headers=ada).json() == asked


def test_it_ends_at_once_if_asked(
    api: httpx.Client, subscribed: UUID, ada: Headers, ben: Headers
) -> None:
    ended = api.delete(f"{PATH}/{subscribed}?at_period_end=false", headers=ada).json()
    assert ended["status"] == "canceled"
    assert ended["canceled_at"] is not None
    assert api.get(f"{PATH}/{subscribed}", headers=ben).json() == ended
    refused(api.delete(f"{PATH}/{subscribed}", headers=ada), 404, "not_found")
    assert api.post(PATH, json=terms(subscribed), headers=ada).status_code == 200


def test_who_may_not_end_it(
    api: httpx.Client, subscribed: UUID, ada: Headers, ben: Headers, eve: Headers
) -> None:
    refused(api.delete(f"{PATH}/{subscribed}", headers=ben), 403, "forbidden")
    refused(api.delete(f"{PATH}/{subscribed}", headers=eve), 404, "not_found")
    unclear = api.delete(f"{PATH}/{subscribed}?at_period_end=maybe", headers=ada)
    refused(unclear, 422, "invalid_request")


# The list


@pytest.fixture
def user() -> str:
    return f"user-{uuid4()}"


@pytest.fixture
def landscape(api_world: World, user: str) -> dict[str, UUID]:
    """Organizations of the user: with plans, one that ended, one that began again."""
    found = {
        plan.value: api_world.organization(plan=plan, members={user: "member"}) for plan in PlanName
    }
    found["ended"] = api_world.organization(members={user: "admin"})
    api_world.subscribe(found["ended"], PlanName.BYOK, "canceled")
    api_world.subscribe(found["platform"], PlanName.HYBRID, "canceled")
    found["never"] = api_world.organization(members={user: "admin"})
    found["foreign"] = api_world.organization(plan=PlanName.HYBRID)
    api_world.sql.execute(
        "UPDATE organization_subscriptions SET status = 'paused' WHERE org_id = %s",
        (found["hybrid"],),
    )
    for name, org_id in found.items():
        api_world.sql.execute(
            "UPDATE organizations SET name = %s WHERE id = %s", (f"{name} of {user}", org_id)
        )
    return found


def names(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [item["org_name"].partition(" ")[0] for item in answer.json()]


def test_a_user_lists_the_subscriptions_of_their_organizations(
    api: httpx.Client, landscape: dict[str, UUID], callers: Callers, user: str
) -> None:
    headers = callers.user(user)
    answer = api.get(PATH, headers=headers)
    assert names(answer) == ["byok", "ended", "hybrid", "platform"]
    assert answer.headers["X-Total-Count"] == "4"
    one = api.get(f"{PATH}/{landscape['platform']}", headers=headers).json()
    assert answer.json()[3] == one
    assert [item["status"] for item in answer.json()] == ["active", "canceled", "paused", "active"]


@pytest.mark.usefixtures("landscape")
@pytest.mark.parametrize(
    ("query", "found", "total"),
    [
        ("status=active", ["byok", "platform"], 2),
        ("status=canceled", ["ended"], 1),
        ("plan=hybrid", ["hybrid"], 1),
        ("plan=byok&status=canceled", ["ended"], 1),
        ("status=trialing", [], 0),
        ("limit=2", ["byok", "ended"], 4),
        ("limit=2&offset=1", ["ended", "hybrid"], 4),
        ("offset=3", ["platform"], 4),
        ("offset=4", [], 4),
    ],
)
def test_the_list_is_filtered_and_paged(
    api: httpx.Client,
    callers: Callers,
    user: str,
    query: str,
    found: list[str],
    total: int,
) -> None:
    answer = api.get(f"{PATH}?{query}", headers=callers.user(user))
    assert names(answer) == found
    assert answer.headers["X-Total-Count"] == str(total)


def test_the_system_admin_lists_all(
    api: httpx.Client, api_world: World, landscape: dict[str, UUID], root: Headers
) -> None:
    everything = len(api_world.rows("organization_subscriptions", "DISTINCT org_id"))
    answer = api.get(f"{PATH}?limit=500", headers=root)
    listed = {item["org_id"] for item in answer.json()}
    assert {str(landscape[name]) for name in ("byok", "foreign", "ended")} <= listed
    assert answer.headers["X-Total-Count"] == str(everything)


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=501",
        "offset=-1",
        "offset=1000001",
        "limit=x",
        "status=live",
        "plan=gold",
        "limit=" + "9" * 40,
    ],
)
def test_a_query_that_cannot_be_is_refused(api: httpx.Client, ada: Headers, query: str) -> None:
    answer = api.get(f"{PATH}?{query}", headers=ada)
    assert refused(answer, 422, "invalid_request")["fields"] == [query.partition("=")[0]]


def test_somebody_without_organizations_lists_nothing(api: httpx.Client, callers: Callers) -> None:
    answer = api.get(PATH, headers=callers.user(f"nobody-{uuid4()}"))
    assert (answer.json(), answer.headers["X-Total-Count"]) == ([], "0")
