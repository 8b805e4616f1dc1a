"""The realm file: Keycloak, set up with it, gives sessions that the API's settings accept."""

import json
from pathlib import Path
from typing import Any
from uuid import UUID

from api.sessions import ALGORITHM, SYSTEM_ADMIN
from schema.settings import load_settings

REALM: dict[str, Any] = json.loads(
    (Path(__file__).parents[3] / "deploy" / "keycloak-realm.json").read_text("utf-8")
)
(CLIENT,) = REALM["clients"]
ROLES = {role["name"] for role in REALM["roles"]["realm"]}


def test_its_name_is_the_one_that_the_guide_gives() -> None:
    guide = (Path(__file__).parents[3] / "deploy" / "README.md").read_text("utf-8")
    assert REALM["enabled"] is True
    assert f"/realms/{REALM['realm']}`" in guide


def test_its_tokens_are_signed_as_sessions_must_be() -> None:
    assert REALM["defaultSignatureAlgorithm"] == ALGORITHM
    assert CLIENT["attributes"]["access.token.signed.response.alg"] == ALGORITHM
    assert 60 <= REALM["accessTokenLifespan"] <= 900


def test_its_tokens_are_for_the_audience_of_the_settings() -> None:
    audience = load_settings().oidc_audience
    assert CLIENT["clientId"] == audience  # azp
    (mapper,) = CLIENT["protocolMappers"]
    assert mapper["protocolMapper"] == "oidc-audience-mapper"
    assert mapper["config"]["included.client.audience"] == audience
    assert mapper["config"]["access.token.claim"] == "true"


def test_browsers_log_in_with_a_code_and_its_proof_only() -> None:
    assert CLIENT["publicClient"] is True
    assert CLIENT["standardFlowEnabled"] is True
    assert CLIENT["attributes"]["pkce.code.challenge.method"] == "S256"
    for flow in ("implicitFlowEnabled", "directAccessGrantsEnabled", "serviceAccountsEnabled"):
        assert CLIENT[flow] is False
    assert "secret" not in CLIENT
    for address in (*CLIENT["redirectUris"], *CLIENT["webOrigins"]):
        assert address.startswith("http://localhost:")


def test_the_system_admin_is_a_role_of_the_realm() -> None:
    assert {"user", SYSTEM_ADMIN} == ROLES
    roles = {user["username"]: set(user["realmRoles"]) for user in REALM["users"]}
    assert roles == {"ada": {"user"}, "root": {"user", SYSTEM_ADMIN}}


def test_nobody_is_a_system_admin_until_somebody_says_so() -> None:
    enabled = {user["username"]: user["enabled"] for user in REALM["users"]}
    assert enabled == {"ada": True, "root": False}


def test_passwords_of_the_sample_users_must_be_changed() -> None:
    for user in REALM["users"]:
        assert UUID(user["id"])
        assert [credential["temporary"] for credential in user["credentials"]] == [True]
