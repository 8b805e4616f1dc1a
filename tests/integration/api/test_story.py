"""The story of LoopNet's integration guide, told over HTTP by those who live it."""

from typing import Any
from uuid import uuid4

import httpx

from schema.scopes import Scope
from tests.integration.api.conftest import Callers, Headers

BASE = "/api/v1/org-billing"
Json = dict[str, Any]


class Front:
    """LoopNet's front end of one user: whatever it asks succeeds, unless told otherwise."""

    def __init__(self, api: httpx.Client, headers: Headers) -> None:
        self._api = api
        self._headers = headers

    def get(self, path: str, **params: Any) -> Any:
        return self.ask("GET", path, params=params)

    def post(self, path: str, body: Json | None = None, **params: Any) -> Any:
        return self.ask("POST", path, json=body, params=params)

    def ask(self, method: str, path: str, status: int = 200, **content: Any) -> Any:
        answer = self._api.request(method, path, headers=self._headers, **content)
        assert answer.status_code == status, answer.text
        return answer.json()

    def refused(self, method: str, path: str, status: int, **content: Any) -> Json:
        detail: Json = self.ask(method, path, status, **content)["detail"]
        return detail


def test_a_day_at_loopnet(api: httpx.Client, callers: Callers) -> None:
    root = Front(api, callers.system_admin())
    ana, ben = (Front(api, callers.user(user)) for user in ("ana@acme.example", "ben@acme.example"))
    backend = Front(api, callers.service(Scope.PRECHECK, Scope.DEDUCT))
    acme, beta = (made(root, f"{name}-{uuid4().hex[:8]}", admin="ana@acme.example") for name in
                  ("acme", "beta"))  # fmt: skip

    # Log in, list organizations, choose one.
    found = {org["id"]: org for org in ana.get(f"{BASE}/organizations")}
    assert set(found) == {acme, beta}
    assert found[acme]["role"] == "admin"
    ana.post(
        f"{BASE}/credits/{acme}/allocate", {"user_id": "ana@acme.example", "allocated_credits": 120}
    )

    # Pre-check, run, deduct.
    operation = {"service_type": "company_enrichment", "variant": "full"}
    allowed = backend.post(
        "/api/v1/precheck", {"org_id": acme, "user_id": "ana@acme.example", **operation}
    )
    assert (allowed["credits"], allowed["remaining_credits"]) == (100, 120)
    charge = {"user_id": "ana@acme.example", "request_id": allowed["request_id"], **operation}
    charged = backend.post(f"{BASE}/credits/{acme}/deduct", charge)
    assert (charged["outcome"], charged["credits_used"], charged["remaining_credits"]) == (
        "charged", 100, 20,
    )  # fmt: skip
    again = backend.post(f"{BASE}/credits/{acme}/deduct", charge)
    assert (again["outcome"], again["credits_used"]) == ("duplicate", 100)

    # Usage by service.
    usage = ana.get(f"{BASE}/credits/{acme}/usage", days=30)
    assert usage["total_credits_used"] == 100
    assert usage["service_breakdown"] == {"company_enrichment": 100}
    assert usage["top_users"] == [
        {"user_id": "ana@acme.example", "total_credits": 100, "request_count": 1}
    ]

    # Dry: 402. A topped-up allocation helps.
    wanted = {"org_id": acme, "user_id": "ana@acme.example", **operation}
    dry = ana.refused("POST", "/api/v1/precheck", 402, json=wanted)
    assert (dry["error"], dry["required"], dry["remaining"]) == ("insufficient_credits", 100, 20)
    assert dry["suggested_action"]
    ana.post(
        f"{BASE}/credits/{acme}/allocate", {"user_id": "ana@acme.example", "allocated_credits": 80}
    )
    assert ana.post("/api/v1/precheck", wanted)["held_credits"] == 100

    # Without an allocation: 403. Somebody else's organization: none at all.
    ana.post(f"{BASE}/organizations/{acme}/members", {"user_id": "ben@acme.example"})
    lookup = {"org_id": acme, "user_id": "ben@acme.example", "service_type": "contact_lookup"}
    assert ben.refused("POST", "/api/v1/precheck", 403, json=lookup)["error"] == "no_allocation"
    ben.refused("POST", "/api/v1/precheck", 404, json=lookup | {"org_id": beta})

    # Switch the organization: other credits, other books.
    ana.post(
        f"{BASE}/credits/{beta}/allocate", {"user_id": "ana@acme.example", "allocated_credits": 7}
    )
    assert ana.get(f"{BASE}/credits/{beta}")["used_credits"] == 0
    mine = {org["org_id"]: org for org in ana.get(f"{BASE}/billing/user")["organizations"]}
    assert (mine[acme]["remaining_credits"], mine[beta]["remaining_credits"]) == (100, 7)


def made(root: Front, name: str, admin: str) -> str:
    """An organization with 1,000 credits and an admin, made as a system admin does it."""
    document = {
        "org_name": name,
        "display_name": name.title(),
        "subscription_plan": "platform",
        "initial_credits": 1000,
        "test_users": [{"email": admin, "role": "admin"}],
    }
    org_id: str = root.post(f"{BASE}/organizations", document)["org_id"]
    return org_id
