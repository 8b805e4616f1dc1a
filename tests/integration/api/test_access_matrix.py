"""Who may call what: every operation of the OpenAPI document against every kind of caller.

`RULES` is the contract, written by hand. An operation that is not in it fails, and so does one
whose document says something else, and so does every single answer that does not agree.
"""

import hmac
import time
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from json import dumps
from typing import Any, Final
from uuid import UUID

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives import serialization

from api.access import GRANTS
from ledger import servicetokens
from ledger.clock import utc_now
from ledger.database import Database
from schema.plans import PlanName
from schema.scopes import Scope
from tests.integration.api.conftest import Callers, Headers
from tests.integration.api.issuer import Issuer, Key
from tests.integration.ledger.world import World

Operation = tuple[str, str]
BASE: Final = "/api/v1/org-billing"

PUBLIC: Final = frozenset({"public"})
USER: Final = frozenset({"user"})
MEMBER: Final = frozenset({"member"})
ADMIN: Final = frozenset({"admin"})
SYSTEM: Final = frozenset({"system_admin"})
OPS_READ: Final = frozenset({"service:ops:read", "system_admin"})
OPS_WRITE: Final = frozenset({"service:ops:write", "system_admin"})
GATE: Final = frozenset({"service:precheck", "user"})

RULES: Final[dict[Operation, frozenset[str]]] = {
    ("post", f"{BASE}/subscriptions"): ADMIN,
    ("get", f"{BASE}/subscriptions/{{org_id}}"): MEMBER,
    ("put", f"{BASE}/subscriptions/{{org_id}}/upgrade"): ADMIN,
    ("get", f"{BASE}/subscriptions"): USER,
    ("delete", f"{BASE}/subscriptions/{{org_id}}"): ADMIN,
    ("get", f"{BASE}/credits/{{org_id}}"): MEMBER,
    ("post", f"{BASE}/credits/{{org_id}}/add"): ADMIN,
    ("post", f"{BASE}/credits/{{org_id}}/allocate"): ADMIN,
    ("get", f"{BASE}/credits/{{org_id}}/allocations"): MEMBER,
    ("get", f"{BASE}/credits/{{org_id}}/allocations/{{user_id}}"): MEMBER,
    ("post", f"{BASE}/credits/{{org_id}}/deduct"): frozenset({"service:deduct"}),
    ("get", f"{BASE}/credits/{{org_id}}/usage"): MEMBER,
    ("get", f"{BASE}/billing/user"): USER,
    ("get", f"{BASE}/billing/org/{{org_id}}"): ADMIN,
    ("get", f"{BASE}/billing/system"): SYSTEM,
    ("get", f"{BASE}/organizations"): USER,
    ("post", f"{BASE}/organizations"): SYSTEM,
    ("get", f"{BASE}/organizations/{{org_id}}/members"): MEMBER,
    ("post", f"{BASE}/organizations/{{org_id}}/members"): ADMIN,
    ("delete", f"{BASE}/organizations/{{org_id}}/members/{{user_id}}"): ADMIN,
    ("get", f"{BASE}/billing/{{org_id}}/history"): ADMIN,
    ("post", "/api/v1/precheck"): GATE,
    ("delete", "/api/v1/precheck/{request_id}"): GATE,
    ("post", "/api/v1/usage/events"): frozenset({"service:usage:write"}),
    ("get", "/api/v1/usage/requests/{request_id}"): frozenset({"service", "admin"}),
    ("get", "/api/v1/ops/queues"): OPS_READ,
    ("get", "/api/v1/ops/dead-letters"): OPS_READ,
    ("get", "/api/v1/ops/dead-letters/summary"): OPS_READ,
    ("get", "/api/v1/ops/dead-letters/{letter_id}"): OPS_READ,
    ("get", "/api/v1/ops/holds"): OPS_READ,
    ("get", "/api/v1/ops/resets"): OPS_READ,
    ("get", "/api/v1/ops/resets/preview"): OPS_READ,
    ("post", "/api/v1/ops/resets/run"): OPS_WRITE,
    ("get", "/api/v1/ops/reconcile"): OPS_READ,
    ("post", "/api/v1/ops/reconcile"): OPS_WRITE,
    ("get", "/livez"): PUBLIC,
    ("get", "/readyz"): PUBLIC,
    ("get", "/metrics"): PUBLIC,
}

ROLES_OF: Final = {
    "outsider": frozenset({"user"}),
    "member": frozenset({"user", "member"}),
    "admin": frozenset({"user", "member", "admin"}),
    "system_admin": frozenset({"user", "member", "admin", "system_admin"}),
    **{f"service:{scope}": frozenset({"service", f"service:{scope}"}) for scope in Scope},
}
UNKNOWN: Final = (
    "anonymous",
    "expired",
    "not_yet_valid",
    "wrong_issuer",
    "wrong_audience",
    "wrong_key",
    "wrong_algorithm",
    "none_algorithm",
    "refresh_token",
    "unknown_token",
    "expired_token",
    "revoked_token",
)
CALLERS: Final = (*ROLES_OF, *UNKNOWN)


@dataclass(frozen=True)
class Scene:
    """A running API, its organization, and the headers of everybody."""

    client: httpx.Client
    org_id: UUID
    headers: dict[str, Headers]


@pytest.fixture(scope="module")
def scene(
    api: httpx.Client, callers: Callers, issuer: Issuer, api_world: World, api_database: Database
) -> Scene:
    roles = {"member": "member", "admin": "admin"}
    org_id = api_world.organization(
        plan=PlanName.PLATFORM, pool=1000, allocations={"member": 100, "admin": 100}, members=roles
    )
    api_world.organization(members={"outsider": "admin"})
    known = {role: callers.user(role) for role in ("outsider", "member", "admin")}
    known["system_admin"] = callers.system_admin("system_admin")
    known |= {f"service:{scope}": callers.service(scope) for scope in Scope}
    return Scene(api, org_id, known | dict(_unknown(issuer, api_database)))


def _unknown(issuer: Issuer, database: Database) -> Iterator[tuple[str, Headers]]:
    """Headers of those who are nobody, each for one reason; all of them claim to be the admin."""
    now = int(time.time())
    claims = issuer.claims("admin", system_admin=True)
    public = issuer.keys[0].private.public_key()
    pem = public.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    key_id = {"kid": issuer.keys[0].id}
    sessions = {
        "expired": issuer.sign(claims | {"iat": now - 900, "exp": now - 600}),
        "not_yet_valid": issuer.sign(claims | {"nbf": now + 600}),
        "wrong_issuer": issuer.sign(claims | {"iss": "https://evil.example/realms/loopnet"}),
        "wrong_audience": issuer.sign(claims | {"azp": "another-client"}),
        "wrong_key": issuer.sign(claims, Key(), headers=key_id),
        "wrong_algorithm": _signed_with_public_key(claims, pem, key_id),
        "none_algorithm": jwt.encode(claims, "", "none", key_id),
        "refresh_token": issuer.sign(claims | {"typ": "Refresh"}),
    }
    yield "anonymous", {}
    for name, session in sessions.items():
        yield name, {"Cookie": f"session_token={session}"}
    for name, text in _dead_tokens(database).items():
        yield name, {"Authorization": f"Bearer {text}"}


def _signed_with_public_key(claims: dict[str, Any], pem: bytes, head: dict[str, str]) -> str:
    """HS256 with the issuer's public key as its secret, which PyJWT itself refuses to make."""

    def part(document: object) -> bytes:
        return urlsafe_b64encode(dumps(document).encode()).rstrip(b"=")

    signed = part({"alg": "HS256", "typ": "JWT", **head}) + b"." + part(claims)
    signature = urlsafe_b64encode(hmac.new(pem, signed, sha256).digest()).rstrip(b"=")
    return (signed + b"." + signature).decode()


def _dead_tokens(database: Database) -> dict[str, str]:
    now = utc_now()
    past = now - timedelta(days=2)
    expired, _ = servicetokens.create(
        database, "expired", tuple(Scope), actor="t", expires_at=now - timedelta(days=1), now=past
    )
    revoked, _ = servicetokens.create(database, "revoked", tuple(Scope), actor="t", now=past)
    servicetokens.revoke(database, "revoked", now=now)
    return {
        "unknown_token": servicetokens.new_text(),
        "expired_token": expired,
        "revoked_token": revoked,
    }


PARAMETERS: Final = {"user_id": "member", "request_id": "r-1", "letter_id": "1"}
SPECIAL_PARAMETERS: Final = {
    # The member whom the others are is not to be removed.
    ("delete", f"{BASE}/organizations/{{org_id}}/members/{{user_id}}"): {"user_id": "ghost"},
}


def url_of(operation: Operation, org_id: UUID) -> str:
    values = PARAMETERS | SPECIAL_PARAMETERS.get(operation, {}) | {"org_id": str(org_id)}
    return operation[1].format_map(values)


def body_of(operation: Operation, org_id: UUID, caller: str) -> dict[str, Any] | None:
    """What has to be said for a request to be about the organization."""
    match operation:
        case ("post", "/api/v1/precheck"):
            user_id = "member" if caller.startswith("service") else caller
            return {"org_id": str(org_id), "user_id": user_id, "credits": 1, "hold": False}
        case ("post", path) if path.endswith("/subscriptions"):
            return {"org_id": str(org_id), "subscription_plan": "byok"}
        case ("post", _):
            return {}
        case _:
            return None


def ask(scene: Scene, operation: Operation, caller: str) -> httpx.Response:
    return scene.client.request(
        operation[0].upper(),
        url_of(operation, scene.org_id),
        params={"org_id": str(scene.org_id)},
        json=body_of(operation, scene.org_id, caller),
        headers=scene.headers[caller],
    )


def expected(operation: Operation, caller: str) -> str:
    """`in`, or the code of the refusal."""
    rule = RULES[operation]
    if rule == PUBLIC:
        return "in"
    if caller in UNKNOWN:
        return "not_authenticated"
    if operation == ("post", "/api/v1/precheck") and caller in ("outsider", "system_admin"):
        # They may ask for themselves; and they are no members.
        return "not_found" if caller == "outsider" else "no_organization"
    if rule & ROLES_OF[caller]:
        return "in"
    if caller == "outsider" and rule & {"member", "admin"}:
        return "not_found"
    return "forbidden"


REFUSALS: Final = {
    "not_authenticated": 401,
    "forbidden": 403,
    "no_organization": 403,
    "not_found": 404,
}


def outcome(answer: httpx.Response, org_id: UUID) -> str:
    """`in` if the caller got past authorization, whatever came of the request then."""
    if answer.headers["Content-Type"] != "application/json" or answer.is_success:
        return "in"
    detail = answer.json()["detail"]
    refused = answer.status_code in (401, 403) or detail["message"] == f"no organization {org_id}"
    if refused:
        assert answer.status_code == REFUSALS[detail["error"]]
        return str(detail["error"])
    return "in"


def test_the_document_has_the_operations_of_the_contract(api: httpx.Client) -> None:
    document = api.get("/openapi.json").json()
    found = {
        (method, path): frozenset(operation.get(GRANTS, PUBLIC))
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    }
    assert found == RULES


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("operation", RULES, ids=" ".join)
def test_each_caller_gets_in_or_not(scene: Scene, operation: Operation, caller: str) -> None:
    answer = ask(scene, operation, caller)
    assert answer.status_code < 500, answer.text
    assert outcome(answer, scene.org_id) == expected(operation, caller), answer.text


@pytest.mark.parametrize(
    "operation", [op for op in RULES if op[1].startswith("/api/")], ids=" ".join
)
def test_an_unseen_organization_is_as_good_as_none(scene: Scene, operation: Operation) -> None:
    """Whatever an outsider asks about, the answer does not tell whether it is there."""
    nowhere = UUID(int=4711)
    seen = ask(scene, operation, "outsider")
    none = ask(Scene(scene.client, nowhere, scene.headers), operation, "outsider")
    assert seen.status_code == none.status_code
    if not seen.is_success:
        details = (seen.json()["detail"], none.json()["detail"])
        told = [{k: str(v) for k, v in detail.items() if k != "request_id"} for detail in details]
        shown = {k: v.replace(str(scene.org_id), str(nowhere)) for k, v in told[0].items()}
        assert shown == told[1]
