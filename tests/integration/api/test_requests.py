"""What became of a request, over HTTP (contract.md §4, row 22)."""

from datetime import timedelta
from uuid import UUID

import httpx
import pytest

from ledger import holds
from ledger.clock import utc_now
from ledger.gate import Operation
from schema.scopes import Scope
from tests.integration.api.answers import refused
from tests.integration.api.conftest import Callers, Headers
from tests.integration.ledger.world import NOW, World, event


@pytest.fixture
def org_id(api_world: World) -> UUID:
    return api_world.organization(
        pool=1000, allocations={"ada": 100}, members={"ada": "member", "chief": "admin"}
    )


def asked(
    api: httpx.Client, org_id: UUID | str, caller: Headers, request_id: str = "r-1"
) -> httpx.Response:
    url = f"/api/v1/usage/requests/{request_id}"
    return api.get(url, params={"org_id": str(org_id)}, headers=caller)


def test_a_charged_request_is_answered_whole(
    api: httpx.Client, org_id: UUID, callers: Callers, api_world: World
) -> None:
    api_world.apply(event(org_id))
    for caller in (callers.user("chief"), callers.system_admin(), callers.service(Scope.PRECHECK)):
        answer = asked(api, org_id, caller)
        assert answer.status_code == 200
        assert answer.json() == {
            "request_id": "r-1",
            "org_id": str(org_id),
            "user_id": "ada",
            "service_type": "contact_lookup",
            "state": "charged",
            "credits": 10,
            "held_credits": None,
            "hold_expires_at": None,
            "reason": None,
            "detail": None,
            "occurred_at": NOW.isoformat().replace("+00:00", "Z"),
            "created_at": NOW.isoformat().replace("+00:00", "Z"),
            "settled_at": NOW.isoformat().replace("+00:00", "Z"),
            "credits_used": 10,
        }


def test_a_held_and_a_dead_request(
    api: httpx.Client, org_id: UUID, callers: Callers, api_world: World
) -> None:
    now = utc_now()
    lasts = timedelta(minutes=5)
    holds.place(api_world.database, org_id, "ada", Operation("contact_lookup"), "r-1", lasts, now)
    api_world.apply(event(org_id, "r-2", service_type="unheard_of"))
    service = callers.service(Scope.USAGE_WRITE)
    held = asked(api, org_id, service).json()
    assert (held["state"], held["held_credits"], held["credits_used"]) == ("held", 10, None)
    dead = asked(api, org_id, service, "r-2").json()
    assert (dead["state"], dead["reason"]) == ("dead", "unknown_service")
    assert "unheard_of has no price" in dead["detail"]


def test_members_and_strangers_do_not_see_it(
    api: httpx.Client, org_id: UUID, callers: Callers, api_world: World
) -> None:
    api_world.apply(event(org_id))
    refused(asked(api, org_id, callers.user("ada")), 403, "forbidden")
    for org in (org_id, UUID(int=1)):
        detail = refused(asked(api, org, callers.user("eve")), 404, "not_found")
        assert detail["message"] == f"no organization {org}"


def test_an_unknown_request_is_not_found(
    api: httpx.Client, org_id: UUID, callers: Callers, api_world: World
) -> None:
    api_world.apply(event(org_id))
    service = callers.service(Scope.DEDUCT)
    detail = refused(asked(api, org_id, service, "r-2"), 404, "not_found")
    assert detail["message"] == f"no request r-2 in organization {org_id}"
    refused(asked(api, api_world.organization(), service), 404, "not_found")


def test_what_cannot_be_an_id_is_refused(api: httpx.Client, org_id: UUID, callers: Callers) -> None:
    service = callers.service(Scope.DEDUCT)
    for request_id in ("%20", "%00", "x" * 256):
        refused(asked(api, org_id, service, request_id), 422, "invalid_request")
    refused(asked(api, "nowhere", service), 422, "invalid_request")
    url = "/api/v1/usage/requests/r-1"
    assert refused(api.get(url, headers=service), 422, "invalid_request")["fields"] == ["org_id"]
