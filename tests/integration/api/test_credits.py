"""Pools, allocations and direct charges over HTTP (contract.md §4, rows 6 to 10)."""

import json
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote
from uuid import UUID, uuid4

import httpx
import pytest

from api.app import create_app
from ledger import holds
from ledger.clock import utc_now
from ledger.gate import Operation
from ledger.pools import MAX_CREDITS
from ledger.reconcile import reconcile
from schema.plans import PlanName
from schema.scopes import Scope
from schema.settings import CreditPurchases, Settings
from tests.integration.api.answers import Json, refused
from tests.integration.api.conftest import Callers, Headers, serving
from tests.integration.ledger.world import World, event

BASE = "/api/v1/org-billing/credits"
NOWHERE = UUID(int=1)
REPETITIONS = 200


@pytest.fixture(autouse=True)
def _books_stay_true(api_world: World) -> Iterator[None]:
    yield
    assert reconcile(api_world.database).drifts == []


@pytest.fixture
def org_id(api_world: World) -> UUID:
    return api_world.organization(
        plan=PlanName.PLATFORM,
        pool=1000,
        allocations={"ada": 100},
        members={"ada": "member", "bob": "member", "root-of-org": "admin"},
    )


@pytest.fixture(scope="module")
def ada(callers: Callers) -> Headers:
    return callers.user("ada")


@pytest.fixture(scope="module")
def admin(callers: Callers) -> Headers:
    return callers.user("root-of-org")


@pytest.fixture(scope="module")
def root(callers: Callers) -> Headers:
    return callers.system_admin()


@pytest.fixture(scope="module")
def service(callers: Callers) -> Headers:
    return callers.service(Scope.DEDUCT)


def moment(text: str) -> datetime:
    found = datetime.fromisoformat(text)
    assert found.utcoffset() == timedelta(0)
    return found


def at_once(
    number: int, api: httpx.Client, ask: Callable[[httpx.Client], httpx.Response]
) -> list[httpx.Response]:
    """What so many clients are answered that ask at the same time."""
    start = threading.Barrier(number)
    answers: list[httpx.Response] = []

    def act() -> None:
        with httpx.Client(base_url=api.base_url, timeout=60) as client:
            start.wait(60)
            answers.append(ask(client))

    threads = [threading.Thread(target=act) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return answers


def test_a_pool_is_answered_whole(
    api: httpx.Client, org_id: UUID, ada: Headers, api_world: World
) -> None:
    api_world.sql.execute(
        "SELECT add_credits_to_pool(%s, 500, 12.5)",
        (org_id,),
    )
    answer = api.get(f"{BASE}/{org_id}", headers=ada)
    assert answer.status_code == 200
    pool = answer.json()
    assert UUID(pool.pop("id"))
    assert pool == {
        "org_id": str(org_id),
        "org_name": f"org-{org_id}",
        "total_credits": 1500,
        "allocated_credits": 100,
        "used_credits": 0,
        "available_credits": 1400,
        "monthly_refresh_amount": 0,
        "last_refresh_date": None,
        "next_refresh_date": None,
        "allow_overage": False,
        "overage_limit": 0,
        "overage_rate": 0.0,
        "overage_credits": 0,
        "overage_billed_credits": 0,
        "lifetime_purchased_credits": 1500,
        "lifetime_spent_amount": 12.5,
    }


def test_an_organization_without_a_pool_has_none(
    api: httpx.Client, api_world: World, ada: Headers
) -> None:
    org_id = api_world.organization(members={"ada": "member"})
    detail = refused(api.get(f"{BASE}/{org_id}", headers=ada), 404, "not_found")
    assert "no credit pool" in detail["message"]


def test_what_cannot_be_seen_is_not_found(
    api: httpx.Client, org_id: UUID, callers: Callers
) -> None:
    """An organization of others is answered as one that does not exist."""
    eve = callers.user("eve")
    for id_ in (org_id, NOWHERE):
        for method, path in (
            ("GET", f"{BASE}/{id_}"),
            ("POST", f"{BASE}/{id_}/add?credits=1"),
            ("POST", f"{BASE}/{id_}/allocate"),
            ("GET", f"{BASE}/{id_}/allocations"),
            ("GET", f"{BASE}/{id_}/allocations/eve"),
        ):
            detail = refused(api.request(method, path, headers=eve), 404, "not_found")
            assert detail["message"] == f"no organization {id_}"


def test_members_move_no_credits(api: httpx.Client, org_id: UUID, ada: Headers) -> None:
    for path in ("add?credits=1", "allocate"):
        refused(api.post(f"{BASE}/{org_id}/{path}", headers=ada), 403, "forbidden")


def test_system_admins_may_do_everything_users_may(
    api: httpx.Client, org_id: UUID, root: Headers
) -> None:
    url = f"{BASE}/{org_id}"
    body = {"user_id": "bob", "allocated_credits": 5}
    assert api.get(url, headers=root).is_success
    assert api.post(f"{url}/add", params={"credits": 1}, headers=root).is_success
    assert api.post(f"{url}/allocate", json=body, headers=root).is_success
    assert len(api.get(f"{url}/allocations", headers=root).json()) == 2
    assert api.get(f"{url}/allocations/ada", headers=root).is_success
    detail = refused(api.get(f"{BASE}/{NOWHERE}", headers=root), 404, "not_found")
    assert str(NOWHERE) in detail["message"]
    for method, path in (("POST", "add?credits=1"), ("GET", "allocations")):
        refused(api.request(method, f"{BASE}/{NOWHERE}/{path}", headers=root), 404, "not_found")


def test_services_deduct_and_do_nothing_else(
    api: httpx.Client, org_id: UUID, service: Headers, callers: Callers
) -> None:
    for method, path in (
        ("GET", ""), ("POST", "/add?credits=1"), ("POST", "/allocate"), ("GET", "/allocations"),
    ):  # fmt: skip
        answer = api.request(method, f"{BASE}/{org_id}{path}", headers=service)
        refused(answer, 403, "forbidden")
    other = callers.service(*(scope for scope in Scope if scope is not Scope.DEDUCT))
    detail = refused(api.post(f"{BASE}/{org_id}/deduct", headers=other), 403, "forbidden")
    assert "deduct" in detail["message"]


def test_people_do_not_deduct(
    api: httpx.Client, org_id: UUID, admin: Headers, root: Headers
) -> None:
    for user in (admin, root):
        refused(api.post(f"{BASE}/{org_id}/deduct", headers=user), 403, "forbidden")


def add(
    api: httpx.Client, org_id: UUID, user: Headers, key: str | None = None, **params: Any
) -> httpx.Response:
    headers = user | ({"Idempotency-Key": key} if key else {})
    return api.post(f"{BASE}/{org_id}/add", params=params, headers=headers)


def test_credits_without_an_amount_are_granted(
    api: httpx.Client, org_id: UUID, admin: Headers, api_world: World
) -> None:
    answer = add(api, org_id, admin, credits=500)
    assert answer.status_code == 200
    assert answer.json() == {
        "success": True,
        "message": "Added 500 credits.",
        "total_credits": 1500,
        "available_credits": 1400,
    }
    where = f"credit_transactions WHERE org_id = '{org_id}' AND actor = 'root-of-org'"
    assert api_world.rows(where, "kind", "credits", "amount") == [("grant", 500, 0)]


def test_credits_with_an_amount_are_bought(
    api: httpx.Client, org_id: UUID, admin: Headers, api_world: World
) -> None:
    add(api, org_id, admin, credits=500, purchase_amount="10.25").raise_for_status()
    pool = api.get(f"{BASE}/{org_id}", headers=admin).json()
    assert (pool["lifetime_purchased_credits"], pool["lifetime_spent_amount"]) == (1500, 10.25)
    where = f"org_billing_history WHERE org_id = '{org_id}'"
    ((kind, amount),) = api_world.rows(where, "event_type", "amount")
    assert (kind, float(amount)) == ("credit_purchase", 10.25)


def test_the_first_credits_make_the_pool(
    api: httpx.Client, api_world: World, admin: Headers
) -> None:
    org_id = api_world.organization(members={"root-of-org": "admin"})
    assert add(api, org_id, admin, credits=7).json()["total_credits"] == 7


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({}, "credits"),
        ({"credits": 0}, "credits"),
        ({"credits": -1}, "credits"),
        ({"credits": "1.5"}, "credits"),
        ({"credits": MAX_CREDITS + 1}, "credits"),
        ({"credits": MAX_CREDITS}, "credits"),  # the pool has some already
        ({"credits": 2**64}, "credits"),
        ({"credits": 1, "purchase_amount": "-0.01"}, "purchase_amount"),
        ({"credits": 1, "purchase_amount": "0.001"}, "purchase_amount"),
        ({"credits": 1, "purchase_amount": "1e12"}, "purchase_amount"),
        ({"credits": 1, "purchase_amount": "NaN"}, "purchase_amount"),
        ({"credits": 1, "purchase_amount": "Infinity"}, "purchase_amount"),
    ],
)
def test_what_cannot_be_added_names_the_field(
    api: httpx.Client, org_id: UUID, admin: Headers, params: Json, field: str
) -> None:
    detail = refused(add(api, org_id, admin, **params), 422, "invalid_request")
    assert detail["fields"] == [field]


def test_one_key_adds_once(api: httpx.Client, org_id: UUID, admin: Headers) -> None:
    first = add(api, org_id, admin, "k", credits=10)
    assert first.json()["total_credits"] == 1010
    add(api, org_id, admin, credits=5)
    assert add(api, org_id, admin, "k", credits=10).json() == first.json()
    assert add(api, org_id, admin, "k", credits=10, purchase_amount="0.00").is_success
    for other in ({"credits": 11}, {"credits": 10, "purchase_amount": "1"}):
        detail = refused(add(api, org_id, admin, "k", **other), 422, "invalid_request")
        assert detail["fields"] == ["Idempotency-Key"]
    refused(add(api, org_id, admin, "k" * 256, credits=1), 422, "invalid_request")
    assert add(api, org_id, admin, "other", credits=10).json()["total_credits"] == 1025


def test_200_at_once_with_one_key_move_credits_once(
    api: httpx.Client, org_id: UUID, admin: Headers, api_world: World
) -> None:
    answers = at_once(
        REPETITIONS, api, lambda client: add(client, org_id, admin, "once", credits=10)
    )
    assert len(answers) == REPETITIONS
    assert {answer.status_code for answer in answers} == {200}
    assert all(answer.json() == answers[0].json() for answer in answers)
    assert api_world.pool(org_id)[0] == 1010
    where = f"credit_transactions WHERE org_id = '{org_id}' AND actor = 'root-of-org'"
    assert api_world.rows(where, "credits") == [(10,)]


def test_purchases_can_be_left_to_the_system_admin(
    api_settings: Settings, org_id: UUID, admin: Headers, root: Headers, ada: Headers
) -> None:
    settings = api_settings.model_copy(update={"credit_purchases": CreditPurchases.SYSTEM})
    with serving(create_app(settings)) as api:
        detail = refused(add(api, org_id, admin, credits=1), 403, "forbidden")
        assert "system admin" in detail["message"]
        refused(add(api, org_id, admin), 403, "forbidden")  # before its input is looked at
        refused(add(api, org_id, ada, credits=1), 403, "forbidden")
        assert add(api, org_id, root, credits=1).json()["total_credits"] == 1001


def allocate(
    api: httpx.Client, org_id: UUID, user: Headers, key: str | None = None, **body: Any
) -> httpx.Response:
    headers = user | ({"Idempotency-Key": key} if key else {})
    usual = {"user_id": "bob", "allocated_credits": 50}
    content = json.dumps(usual | body)  # in ASCII: httpx would refuse halves of surrogate pairs
    headers |= {"Content-Type": "application/json"}
    return api.post(f"{BASE}/{org_id}/allocate", content=content, headers=headers)


def test_an_allocation_is_answered_whole(
    api: httpx.Client, org_id: UUID, admin: Headers, api_world: World
) -> None:
    api_world.sql.execute(
        "UPDATE organization_members SET email = 'bob@acme.example', name = 'Bob'"
        " WHERE org_id = %s AND user_id = 'bob'",
        (org_id,),
    )
    before = datetime.now(UTC)
    answer = allocate(api, org_id, admin, notes="for March")
    assert answer.status_code == 200
    found = answer.json()
    assert UUID(found.pop("id"))
    start, end = moment(found.pop("last_reset_date")), moment(found.pop("next_reset_date"))
    assert moment(found.pop("created_at")) == start >= before
    assert timedelta(days=28) <= end - start <= timedelta(days=31)
    assert found == {
        "org_id": str(org_id),
        "user_id": "bob",
        "user_email": "bob@acme.example",
        "user_name": "Bob",
        "allocated_credits": 50,
        "used_credits": 0,
        "remaining_credits": 50,
        "held_credits": 0,
        "allowance_credits": 50,
        "reset_period": "monthly",
        "is_active": True,
    }
    where = f"user_credit_allocations WHERE org_id = '{org_id}' AND user_id = 'bob'"
    assert api_world.rows(where, "allocated_by", "notes") == [("root-of-org", "for March")]
    assert api_world.pool(org_id) == (1000, 150, 0)


def test_more_credits_keep_the_rhythm_unless_told(
    api: httpx.Client, org_id: UUID, admin: Headers
) -> None:
    first = allocate(api, org_id, admin, reset_period="weekly").json()
    more = allocate(api, org_id, admin).json()
    assert (more["allocated_credits"], more["reset_period"]) == (100, "weekly")
    assert more["next_reset_date"] == first["next_reset_date"]
    never = allocate(api, org_id, admin, reset_period="never").json()
    assert (never["reset_period"], never["next_reset_date"]) == ("never", None)


def test_who_is_no_member_is_not_allocated_to(
    api: httpx.Client, org_id: UUID, admin: Headers
) -> None:
    answer = allocate(api, org_id, admin, user_id="stranger")
    refused(answer, 403, "not_a_member")
    assert len(api.get(f"{BASE}/{org_id}/allocations", headers=admin).json()) == 1


def test_the_pool_gives_what_it_has(api: httpx.Client, org_id: UUID, admin: Headers) -> None:
    detail = refused(
        allocate(api, org_id, admin, allocated_credits=901), 402, "insufficient_credits"
    )
    assert (detail["required"], detail["remaining"]) == (901, 900)
    assert allocate(api, org_id, admin, allocated_credits=900).is_success


def test_without_a_pool_there_is_nothing_to_allocate(
    api: httpx.Client, api_world: World, admin: Headers
) -> None:
    org_id = api_world.organization(members={"root-of-org": "admin", "bob": "member"})
    refused(allocate(api, org_id, admin), 404, "not_found")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"user_id": ""}, "user_id"),
        ({"user_id": "x" * 256}, "user_id"),
        ({"user_id": "x\0"}, "user_id"),
        ({"user_id": "x\ud800"}, "user_id"),
        ({"user_id": 7}, "user_id"),
        ({"allocated_credits": 0}, "allocated_credits"),
        ({"allocated_credits": 1.5}, "allocated_credits"),
        ({"allocated_credits": "50"}, "allocated_credits"),
        ({"allocated_credits": MAX_CREDITS + 1}, "allocated_credits"),
        ({"reset_period": "hourly"}, "reset_period"),
        ({"notes": "x" * 2001}, "notes"),
        ({"notes": "x\0"}, "notes"),
        ({"notes": "x\udfff"}, "notes"),
        ({"note": "misspelt"}, "note"),
    ],
)
def test_what_cannot_be_allocated_names_the_field(
    api: httpx.Client, org_id: UUID, admin: Headers, body: Json, field: str
) -> None:
    detail = refused(allocate(api, org_id, admin, **body), 422, "invalid_request")
    assert detail["fields"] == [field]


def test_one_key_allocates_once(api: httpx.Client, org_id: UUID, admin: Headers) -> None:
    first = allocate(api, org_id, admin, "k").json()
    assert allocate(api, org_id, admin, "k").json() == first
    refused(allocate(api, org_id, admin, "k", allocated_credits=51), 422, "invalid_request")
    found = api.get(f"{BASE}/{org_id}/allocations/bob", headers=admin).json()
    assert found == first


def test_admins_see_all_allocations_by_pages(
    api: httpx.Client, org_id: UUID, admin: Headers
) -> None:
    allocate(api, org_id, admin)
    url = f"{BASE}/{org_id}/allocations"
    answer = api.get(url, headers=admin)
    assert [found["user_id"] for found in answer.json()] == ["ada", "bob"]
    assert answer.headers["X-Total-Count"] == "2"
    assert set(answer.json()[0]) == {
        "id", "org_id", "user_id", "user_email", "user_name", "allocated_credits", "used_credits",
        "remaining_credits", "held_credits", "allowance_credits", "reset_period",
        "last_reset_date", "next_reset_date", "is_active", "created_at",
    }  # fmt: skip

    second = api.get(url, params={"limit": 1, "offset": 1}, headers=admin)
    assert [found["user_id"] for found in second.json()] == ["bob"]
    assert second.headers["X-Total-Count"] == "2"
    for params in ({"limit": 0}, {"limit": 501}, {"offset": -1}, {"offset": 1_000_001}):
        refused(api.get(url, params=params, headers=admin), 422, "invalid_request")


def test_members_see_their_own_allocation(
    api: httpx.Client, org_id: UUID, admin: Headers, ada: Headers
) -> None:
    allocate(api, org_id, admin)
    url = f"{BASE}/{org_id}/allocations"
    answer = api.get(url, headers=ada)
    assert [found["user_id"] for found in answer.json()] == ["ada"]
    assert answer.headers["X-Total-Count"] == "1"
    assert api.get(f"{url}/ada", headers=ada).json() == answer.json()[0]
    refused(api.get(f"{url}/bob", headers=ada), 403, "forbidden")
    refused(api.get(f"{url}/stranger", headers=ada), 403, "forbidden")
    assert api.get(f"{url}/bob", headers=admin).json()["allocated_credits"] == 50


def test_who_has_no_allocation_is_told_so(
    api: httpx.Client, org_id: UUID, callers: Callers, admin: Headers
) -> None:
    url = f"{BASE}/{org_id}/allocations"
    bob = callers.user("bob")
    assert api.get(url, headers=bob).json() == []
    refused(api.get(f"{url}/bob", headers=bob), 403, "no_allocation")
    refused(api.get(f"{url}/stranger", headers=admin), 403, "no_allocation")


@pytest.mark.parametrize(
    "user_id", ["f:realm/ada", "a/b/", "ada@example.com", "100%", "%2F", "two words", "åsa?#"]
)
def test_any_user_id_has_a_place_in_the_path(
    api: httpx.Client, api_world: World, user_id: str, callers: Callers
) -> None:
    org_id = api_world.organization(
        pool=100, allocations={user_id: 10}, members={user_id: "member"}
    )
    url = f"{BASE}/{org_id}/allocations/{quote(user_id, safe='')}"
    assert api.get(url, headers=callers.user(user_id)).json()["user_id"] == user_id
    assert api.get(url, headers=callers.system_admin()).json()["user_id"] == user_id


def test_no_user_id_is_too_long_or_unheard_of_for_an_answer(
    api: httpx.Client, org_id: UUID, admin: Headers
) -> None:
    for user_id in ("", "x" * 256, "%00"):
        answer = api.get(f"{BASE}/{org_id}/allocations/{user_id}", headers=admin)
        assert refused(answer, 422, "invalid_request")["fields"] == ["user_id"]


def deduct(api: httpx.Client, org_id: UUID, service: Headers, **body: Any) -> httpx.Response:
    """A contact lookup (10 credits) of ada, unless the body says otherwise."""
    usual = {"user_id": "ada", "service_type": "contact_lookup", "request_id": "r-1"}
    body = {name: value for name, value in (usual | body).items() if value is not None}
    return api.post(f"{BASE}/{org_id}/deduct", json=body, headers=service)


def test_a_deduction_answers_what_it_cost(
    api: httpx.Client, org_id: UUID, service: Headers, api_world: World
) -> None:
    answer = deduct(
        api,
        org_id,
        service,
        service_type="company_enrichment",
        variant="full",
        service_name="LoopNet Company Enrichment v2",
        metadata={"company_id": "c-1", "nested": {"password": "x"}},
        api_cost=0.04,
        key_source="managed",
    )
    assert answer.status_code == 200
    assert answer.json() == {
        "outcome": "charged",
        "request_id": "r-1",
        "credits_used": 100,
        "remaining_credits": 0,
    }
    row = api_world.row(f"credit_usage_attribution WHERE org_id = '{org_id}'")
    assert (row["service_name"], row["variant"], row["source"]) == (
        "LoopNet Company Enrichment v2", "full", "api",
    )  # fmt: skip
    assert row["request_metadata"] == {"company_id": "c-1", "nested": {}}
    assert (float(row["api_cost"]), float(row["total_cost"])) == (0.04, 0.06)


def test_credits_alone_are_charged_as_stated(
    api: httpx.Client, org_id: UUID, service: Headers
) -> None:
    answer = deduct(api, org_id, service, service_type=None, credits=25)
    assert (answer.json()["credits_used"], answer.json()["remaining_credits"]) == (25, 75)


def test_a_repetition_is_a_duplicate(api: httpx.Client, org_id: UUID, service: Headers) -> None:
    deduct(api, org_id, service)
    deduct(api, org_id, service, request_id="r-2")
    again = deduct(api, org_id, service)
    assert again.status_code == 200
    assert again.json() == {
        "outcome": "duplicate",
        "request_id": "r-1",
        "credits_used": 10,
        "remaining_credits": 80,
    }
    refused(deduct(api, org_id, service, service_type="valuation"), 409, "request_id_conflict")


def test_a_request_is_charged_once_in_either_order(
    api: httpx.Client, org_id: UUID, service: Headers, api_world: World
) -> None:
    now = utc_now()
    late = event(org_id, "r-1", occurred_at=now.isoformat())
    early = event(org_id, "r-2", occurred_at=now.isoformat())
    deduct(api, org_id, service)
    assert api_world.apply(late, early, now=now).duplicates == 1
    again = deduct(api, org_id, service, request_id="r-2").json()
    assert (again["outcome"], again["remaining_credits"]) == ("duplicate", 80)


def test_a_hold_is_settled(
    api: httpx.Client, org_id: UUID, service: Headers, api_world: World
) -> None:
    for request_id in ("r-1", "r-2"):
        holds.place(
            api_world.database,
            org_id,
            "ada",
            Operation(credits=40),
            request_id,
            timedelta(minutes=5),
            utc_now(),
        )
    answer = deduct(api, org_id, service, service_type=None, credits=30).json()
    assert (answer["credits_used"], answer["remaining_credits"]) == (30, 30)
    detail = refused(
        deduct(api, org_id, service, request_id="r-3", service_type="valuation"),
        402,
        "insufficient_credits",
    )
    assert (detail["required"], detail["remaining"]) == (75, 30)


def test_credits_run_dry_and_nothing_is_set_aside(
    api: httpx.Client, org_id: UUID, service: Headers, api_world: World
) -> None:
    outcomes = [deduct(api, org_id, service, request_id=f"r-{n}").json() for n in range(10)]
    assert [outcome["remaining_credits"] for outcome in outcomes] == [*range(90, -1, -10)]
    detail = refused(deduct(api, org_id, service, request_id="r-10"), 402, "insufficient_credits")
    assert (detail["required"], detail["remaining"]) == (10, 0)
    assert api_world.rows(f"dead_letters WHERE org_id = '{org_id}'", "id") == []

    api_world.allocate(org_id, "ada", 10)
    assert deduct(api, org_id, service, request_id="r-10").json()["outcome"] == "charged"


def test_who_is_charged_is_a_member_with_credits_of_an_organization(
    api: httpx.Client, org_id: UUID, service: Headers
) -> None:
    refused(deduct(api, org_id, service, user_id="bob"), 403, "no_allocation")
    refused(deduct(api, org_id, service, user_id="stranger"), 403, "not_a_member")
    detail = refused(deduct(api, NOWHERE, service), 404, "not_found")
    assert detail["message"] == f"no organization {NOWHERE}"


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ({"user_id": None}, ["user_id"]),
        ({"user_id": "x\0"}, ["user_id"]),
        ({"request_id": None}, ["request_id"]),
        ({"request_id": "with space"}, ["request_id"]),
        ({"request_id": "x" * 256}, ["request_id"]),
        ({"service_type": None}, ["service_type", "credits"]),
        ({"service_type": "unheard_of"}, ["service_type", "credits"]),
        ({"credits": 9}, ["credits"]),
        ({"credits": 0}, ["credits"]),
        ({"credits": 1_000_001}, ["credits"]),
        ({"quantity": 0}, ["quantity"]),
        ({"quantity": "1e13"}, ["quantity"]),
        ({"quantity": True}, ["quantity"]),
        ({"variant": "x" * 101}, ["variant"]),
        ({"service_name": "x" * 201}, ["service_name"]),
        ({"metadata": {"x": "y" * 8192}}, ["metadata"]),
        ({"metadata": {"x": "\0"}}, ["metadata"]),
        ({"metadata": [1]}, ["metadata"]),
        ({"api_cost": -1}, ["api_cost"]),
        ({"api_cost": "0.0000001"}, ["api_cost"]),
        ({"key_source": "stolen"}, ["key_source"]),
        ({"occurred_at": "2020-01-01T00:00:00Z"}, ["occurred_at"]),
        ({"occurred_at": "2999-01-01T00:00:00Z"}, ["occurred_at"]),
        ({"occurred_at": "2026-01-01T00:00:00"}, ["occurred_at"]),
        ({"occurred_at": 1_770_000_000}, ["occurred_at"]),
        ({"quantty": 2}, ["quantty"]),
    ],
)
def test_what_cannot_be_deducted_names_the_field(
    api: httpx.Client, org_id: UUID, service: Headers, body: Json, fields: list[str]
) -> None:
    usual = {"user_id": "ada", "service_type": "contact_lookup", "request_id": "r-1"}
    sent = {name: value for name, value in (usual | body).items() if value is not None}
    answer = api.post(f"{BASE}/{org_id}/deduct", json=sent, headers=service)
    assert refused(answer, 422, "invalid_request")["fields"] == fields


def test_one_key_is_one_deduction(api: httpx.Client, org_id: UUID, service: Headers) -> None:
    keyed = service | {"Idempotency-Key": "k"}
    first = deduct(api, org_id, keyed).json()
    assert deduct(api, org_id, keyed).json() == first
    refused(deduct(api, org_id, keyed, request_id="r-2"), 422, "invalid_request")


def test_concurrent_deductions_never_overspend(
    api: httpx.Client, org_id: UUID, service: Headers
) -> None:
    answers = at_once(
        16, api, lambda client: deduct(client, org_id, service, request_id=uuid4().hex)
    )
    statuses = [answer.status_code for answer in answers]
    assert sorted(statuses) == [200] * 10 + [402] * 6
