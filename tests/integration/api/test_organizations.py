"""Organizations and their members over HTTP (contract.md §4, rows 15 to 17)."""

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from ledger.reconcile import reconcile
from schema.plans import PlanName
from schema.scopes import Scope
from tests.integration.api.answers import Json, refused
from tests.integration.api.conftest import MEMBERS, Callers, Headers
from tests.integration.ledger.world import World

PATH = "/api/v1/org-billing/organizations"
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def org_id(api_world: World) -> UUID:
    return api_world.organization(members=MEMBERS)


def members_of(api_world: World, org_id: UUID) -> list[tuple[Any, ...]]:
    return api_world.rows(f"organization_members WHERE org_id = '{org_id}'", "user_id", "role")


# The list of organizations


def test_a_user_lists_their_own(api: httpx.Client, api_world: World, callers: Callers) -> None:
    user = f"user-{uuid4()}"
    mine = api_world.organization(members={user: "admin", "ben": "member"})
    tried = api_world.organization(members={user: "member"}, is_test=True)
    api_world.organization(members={"ben": "admin"})
    answer = api.get(PATH, headers=callers.user(user))
    assert answer.status_code == 200
    assert answer.headers["X-Total-Count"] == "2"
    listed = {item["id"]: item for item in answer.json()}
    assert list(listed) == [str(i) for i in sorted((mine, tried), key=lambda i: f"org-{i}")]
    first = listed[str(mine)]
    assert datetime.fromisoformat(first.pop("created_at")).tzinfo is not None
    assert first == {
        "id": str(mine),
        "name": f"org-{mine}",
        "display_name": "An organization",
        "status": "active",
        "role": "admin",
        "max_seats": 10,
        "member_count": 2,
        "is_test": False,
        "timezone": "UTC",
    }
    assert (listed[str(tried)]["role"], listed[str(tried)]["is_test"]) == ("member", True)


def test_the_system_admin_lists_all(
    api: httpx.Client, api_world: World, org_id: UUID, callers: Callers
) -> None:
    boss = f"root-{uuid4()}"
    own = api_world.organization(members={boss: "member"})
    number = len(api_world.rows("organizations", "id"))
    answer = api.get(f"{PATH}?limit=500", headers=callers.system_admin(boss))
    assert answer.headers["X-Total-Count"] == str(number)
    roles = {item["id"]: item["role"] for item in answer.json()}
    assert (roles[str(org_id)], roles[str(own)]) == (None, "member")


def test_the_list_is_paged(api: httpx.Client, api_world: World, callers: Callers) -> None:
    user = f"user-{uuid4()}"
    ids = [api_world.organization(members={user: "member"}) for _ in range(5)]
    ordered = sorted(map(str, ids))
    pages = [
        api.get(f"{PATH}?limit=2&offset={offset}", headers=callers.user(user))
        for offset in (0, 2, 4, 6)
    ]
    assert [[item["id"] for item in page.json()] for page in pages] == [
        ordered[:2],
        ordered[2:4],
        ordered[4:],
        [],
    ]
    assert {page.headers["X-Total-Count"] for page in pages} == {"5"}


def test_services_and_strangers_list_nothing(api: httpx.Client, callers: Callers) -> None:
    refused(api.get(PATH, headers=callers.service(*Scope)), 403, "forbidden")
    refused(api.get(PATH), 401, "not_authenticated")
    assert api.get(PATH, headers=callers.user(f"nobody-{uuid4()}")).json() == []


# Test organizations


def document(**others: object) -> Json:
    return {
        "org_name": f"acme-{uuid4()}",
        "display_name": "Acme",
        "subscription_plan": "hybrid",
        "initial_credits": 1000,
        "test_users": [
            {"email": "ana@acme.example", "allocated_credits": 600, "role": "admin"},
            {"email": "ben@acme.example", "user_id": "kc-17"},
        ],
    } | others


def test_the_system_admin_makes_a_test_organization(
    api: httpx.Client, api_world: World, root: Headers
) -> None:
    asked = document()
    answer = api.post(PATH, json=asked, headers=root)
    assert answer.status_code == 200
    made = answer.json()
    org_id = UUID(made.pop("org_id"))
    assert made == {
        "org_name": asked["org_name"],
        "display_name": "Acme",
        "subscription_plan": "hybrid",
        "monthly_price": 99.0,
        "total_credits": 1000,
        "available_credits": 400,
        "users": [
            {
                "user_id": "ana@acme.example",
                "email": "ana@acme.example",
                "role": "admin",
                "allocated_credits": 600,
            },
            {
                "user_id": "kc-17",
                "email": "ben@acme.example",
                "role": "member",
                "allocated_credits": 0,
            },
        ],
    }
    assert api_world.pool(org_id) == (1000, 600, 0)
    assert api_world.rows(f"organizations WHERE id = '{org_id}'", "is_test") == [(True,)]


def test_nobody_else_makes_one(
    api: httpx.Client, api_world: World, ada: Headers, callers: Callers
) -> None:
    before = api_world.rows("organizations", "id")
    refused(api.post(PATH, json=document(), headers=ada), 403, "forbidden")
    refused(api.post(PATH, json=document(), headers=callers.service(*Scope)), 403, "forbidden")
    assert api_world.rows("organizations", "id") == before


def test_a_name_is_taken_once(api: httpx.Client, root: Headers) -> None:
    asked = document()
    assert api.post(PATH, json=asked, headers=root).status_code == 200
    refused(api.post(PATH, json=asked, headers=root), 409, "organization_exists")
    keyed = root | {"Idempotency-Key": f"key-{uuid4()}"}
    refused(api.post(PATH, json=asked, headers=keyed), 409, "organization_exists")


def test_a_key_makes_one_organization_from_many_threads(
    api: httpx.Client, api_world: World, root: Headers
) -> None:
    headers = root | {"Idempotency-Key": f"make-{uuid4()}"}
    asked = document()

    def ask(_: int) -> httpx.Response:
        return api.post(PATH, json=asked, headers=headers)

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, range(20)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.text for answer in answers}) == 1
    org_id = UUID(answers[0].json()["org_id"])
    assert api_world.pool(org_id) == (1000, 600, 0)

    other = api.post(PATH, json=asked | {"initial_credits": 1001}, headers=headers)
    assert refused(other, 422, "invalid_request")["fields"] == ["Idempotency-Key"]
    assert reconcile(api_world.database).is_clean


def test_a_refused_call_leaves_its_key_free(api: httpx.Client, root: Headers) -> None:
    taken = document()
    assert api.post(PATH, json=taken, headers=root).status_code == 200
    headers = root | {"Idempotency-Key": f"make-{uuid4()}"}
    refused(api.post(PATH, json=taken, headers=headers), 409, "organization_exists")
    assert api.post(PATH, json=document(), headers=headers).status_code == 200


@pytest.mark.parametrize(
    "change",
    [
        {"initial_credits": 599},
        {"initial_credits": -1},
        {"initial_credits": 2**63},
        {"initial_credits": 2**53 + 1},
        {"org_name": " "},
        {"org_name": "x" * 201},
        {"org_name": "nul\0"},
        {"org_name": "half \ud800"},
        {"display_name": "nul\0"},
        {"subscription_plan": "gold"},
        {"timezone": "Mars/Olympus"},
        {"timezone": "nul\0"},
        {"anchor": "9999-12-31T23:59:59Z"},
        {"anchor": "0001-01-01T00:00:00+14:00"},
        {"anchor": "2026-01-01T00:00:00"},
        {"colour": "red"},
        {"test_users": [{"email": "nul\0@x.example"}]},
        {"test_users": [{"email": "a@x.example", "user_id": ""}]},
        {"test_users": [{"email": "a@x.example", "user_id": "u" * 256}]},
        {"test_users": [{"email": "a@x.example", "allocated_credits": 2**63}]},
        {"test_users": [{"email": "a@x.example"}, {"email": "a@x.example"}]},
        {"test_users": [{"email": f"{n}@x.example"} for n in range(501)]},
    ],
)
def test_a_bad_document_is_refused(api: httpx.Client, root: Headers, change: Json) -> None:
    body = json.dumps(document(**change))  # escaped, so that half a pair arrives
    refused(api.post(PATH, content=body, headers=root | JSON), 422, "invalid_request")


# Members


def test_members_see_each_other(
    api: httpx.Client, api_world: World, org_id: UUID, ada: Headers, ben: Headers, root: Headers
) -> None:
    api_world.sql.execute(
        "UPDATE organization_members SET email = %s, name = %s WHERE org_id = %s AND user_id = %s",
        ("ada@example.com", "Ada", org_id, "ada"),
    )
    answers = [api.get(f"{PATH}/{org_id}/members", headers=who) for who in (ada, ben, root)]
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.text for answer in answers}) == 1
    listed = answers[0].json()
    assert all(datetime.fromisoformat(member.pop("created_at")).tzinfo for member in listed)
    assert listed == [
        {"user_id": "ada", "role": "admin", "email": "ada@example.com", "name": "Ada"},
        {"user_id": "ben", "role": "member", "email": None, "name": None},
    ]
    part = api.get(f"{PATH}/{org_id}/members?limit=1&offset=1", headers=ben)
    assert [member["user_id"] for member in part.json()] == ["ben"]
    assert part.headers["X-Total-Count"] == "2"


def test_who_may_not_see_members(
    api: httpx.Client, org_id: UUID, eve: Headers, root: Headers
) -> None:
    hidden = refused(api.get(f"{PATH}/{org_id}/members", headers=eve), 404, "not_found")
    assert hidden["message"] == f"no organization {org_id}"
    nowhere = uuid4()
    absent = refused(api.get(f"{PATH}/{nowhere}/members", headers=root), 404, "not_found")
    assert absent["message"] == f"no organization {nowhere}"


def test_an_admin_adds_a_member(api: httpx.Client, org_id: UUID, ada: Headers) -> None:
    asked = {"user_id": "cem", "role": "admin", "email": "cem@example.com", "name": "Cem"}
    answer = api.post(f"{PATH}/{org_id}/members", json=asked, headers=ada)
    assert answer.status_code == 200
    added = answer.json()
    assert datetime.fromisoformat(added["created_at"]).tzinfo
    assert added == asked | {"created_at": added["created_at"]}
    assert added in api.get(f"{PATH}/{org_id}/members", headers=ada).json()


def test_a_new_member_is_no_admin_unless_asked(
    api: httpx.Client, org_id: UUID, ada: Headers
) -> None:
    added = api.post(f"{PATH}/{org_id}/members", json={"user_id": "cem"}, headers=ada).json()
    assert (added["role"], added["email"], added["name"]) == ("member", None, None)


def test_who_may_not_add_members(
    api: httpx.Client, api_world: World, org_id: UUID, ben: Headers, eve: Headers, root: Headers
) -> None:
    path, body = f"{PATH}/{org_id}/members", {"user_id": "cem"}
    refused(api.post(path, json=body, headers=ben), 403, "forbidden")
    refused(api.post(path, json=body, headers=eve), 404, "not_found")
    refused(api.post(f"{PATH}/{uuid4()}/members", json=body, headers=root), 404, "not_found")
    assert members_of(api_world, org_id) == [("ada", "admin"), ("ben", "member")]
    assert api.post(path, json=body, headers=root).status_code == 200


def test_a_member_is_added_once(api: httpx.Client, org_id: UUID, ada: Headers) -> None:
    again = {"user_id": "ben", "role": "admin"}
    answer = api.post(f"{PATH}/{org_id}/members", json=again, headers=ada)
    refused(answer, 409, "member_exists")


def test_seats_run_out_exactly_also_under_a_rush(
    api: httpx.Client, api_world: World, org_id: UUID, ada: Headers
) -> None:
    def add(number: int) -> int:
        body = {"user_id": f"user-{number}"}
        return api.post(f"{PATH}/{org_id}/members", json=body, headers=ada).status_code

    with ThreadPoolExecutor(20) as pool:
        statuses = list(pool.map(add, range(20)))
    assert sorted(statuses) == [200] * 8 + [409] * 12
    assert len(members_of(api_world, org_id)) == 10
    full = api.post(f"{PATH}/{org_id}/members", json={"user_id": "cem"}, headers=ada)
    refused(full, 409, "no_seat_left")
    present = api.post(f"{PATH}/{org_id}/members", json={"user_id": "ben"}, headers=ada)
    refused(present, 409, "member_exists")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("user_id", ""),
        ("user_id", "u" * 256),
        ("user_id", "nul\0"),
        ("user_id", "half \ud800"),
        ("role", "owner"),
        ("email", "nobody"),
        ("email", "a b@example.com"),
        ("email", "a@b@example.com"),
        ("email", "a@example.com\n"),
        ("email", "x" * 310 + "@example.com"),
        ("email", "nul\0@example.com"),
        ("name", ""),
        ("name", "n" * 256),
        ("name", "nul\0"),
        ("seat", 7),
    ],
)
def test_a_member_that_cannot_be_is_refused(
    api: httpx.Client, org_id: UUID, ada: Headers, field: str, value: object
) -> None:
    body = json.dumps({"user_id": "cem"} | {field: value})  # escaped, so that half a pair arrives
    answer = api.post(f"{PATH}/{org_id}/members", content=body, headers=ada | JSON)
    assert refused(answer, 422, "invalid_request")["fields"] == [field]


def test_a_member_leaves_and_their_credits_return(
    api: httpx.Client, api_world: World, ada: Headers, callers: Callers
) -> None:
    org_id = api_world.organization(
        plan=PlanName.PLATFORM, pool=1000, allocations={"ben": 400}, members=MEMBERS
    )
    api_world.deduct(org_id, "r-1", 30, user_id="ben")
    answer = api.delete(f"{PATH}/{org_id}/members/ben", headers=ada)
    assert answer.status_code == 200
    assert (answer.json()["user_id"], answer.json()["role"]) == ("ben", "member")
    assert members_of(api_world, org_id) == [("ada", "admin")]
    assert api_world.pool(org_id) == (1000, 30, 30)
    where = f"user_credit_allocations WHERE org_id = '{org_id}'"
    assert api_world.rows(where, "user_id", "is_active") == [("ben", False)]
    refused(api.get(f"{PATH}/{org_id}/members", headers=callers.user("ben")), 404, "not_found")
    gone = api.delete(f"{PATH}/{org_id}/members/ben", headers=ada)
    refused(gone, 404, "not_found")
    assert reconcile(api_world.database).is_clean


def test_a_member_whose_id_has_a_slash_leaves(
    api: httpx.Client, api_world: World, org_id: UUID, ada: Headers
) -> None:
    api_world.join(org_id, "team/zoe")
    answer = api.delete(f"{PATH}/{org_id}/members/team/zoe", headers=ada)
    assert (answer.status_code, answer.json()["user_id"]) == (200, "team/zoe")


def test_who_does_not_belong_keeps_their_credits(
    api: httpx.Client, api_world: World, ada: Headers
) -> None:
    """Credits may have been allocated from SQL to somebody who is no member."""
    org_id = api_world.organization(pool=100, allocations={"zoe": 40}, members=MEMBERS)
    api_world.leave(org_id, "zoe")
    refused(api.delete(f"{PATH}/{org_id}/members/zoe", headers=ada), 404, "not_found")
    assert api_world.pool(org_id) == (100, 40, 0)


def test_the_last_admin_stays(
    api: httpx.Client, api_world: World, ada: Headers, root: Headers
) -> None:
    org_id = api_world.organization(pool=100, allocations={"ada": 40}, members=MEMBERS)
    for headers in (ada, root):
        answer = api.delete(f"{PATH}/{org_id}/members/ada", headers=headers)
        assert "last admin" in refused(answer, 409, "conflict")["message"]
    assert api_world.allocations(org_id) == {"ada": (40, 0)}
    assert api.delete(f"{PATH}/{org_id}/members/ben", headers=ada).status_code == 200


def test_who_may_not_remove_members(
    api: httpx.Client, api_world: World, org_id: UUID, ben: Headers, eve: Headers, root: Headers
) -> None:
    refused(api.delete(f"{PATH}/{org_id}/members/ada", headers=ben), 403, "forbidden")
    refused(api.delete(f"{PATH}/{org_id}/members/ben", headers=eve), 404, "not_found")
    refused(api.delete(f"{PATH}/{uuid4()}/members/ben", headers=root), 404, "not_found")
    refused(api.delete(f"{PATH}/{org_id}/members/nul%00", headers=root), 422, "invalid_request")
    assert members_of(api_world, org_id) == [("ada", "admin"), ("ben", "member")]
