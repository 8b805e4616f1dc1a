"""The gate over HTTP: a real server, a real ledger, every status of the contract."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from api.app import create_app
from ledger.database import Database
from ops.servers import LOOPBACK, free_port
from schema.scopes import Scope
from schema.settings import Settings
from tests.integration.api.answers import Json, refused
from tests.integration.api.conftest import Callers, Headers, serving
from tests.integration.api.issuer import Issuer
from tests.integration.ledger.world import World

PRECHECK = "/api/v1/precheck"


@pytest.fixture(scope="module")
def headers(callers: Callers) -> Headers:
    """Those of a service that may ask the gate."""
    return callers.service(Scope.PRECHECK)


@pytest.fixture(scope="module")
def client(api: httpx.Client, headers: Headers) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=api.base_url, headers=headers, timeout=20) as opened:
        yield opened


@pytest.fixture
def org_id(api_database_url: str) -> UUID:
    """An organization whose user u1 has 60 credits, 10 of them held, and u2 an inactive 60."""
    org_id = uuid4()
    with psycopg.connect(api_database_url) as connection:
        connection.execute(
            "INSERT INTO organizations (id, name, display_name) VALUES (%s, %s, 'Acme')",
            (org_id, str(org_id)),
        )
        for user, held, active in (("u1", 10, True), ("u2", 0, False)):
            connection.execute(
                "INSERT INTO organization_members (org_id, user_id) VALUES (%s, %s)",
                (org_id, user),
            )
            connection.execute(
                """
                INSERT INTO user_credit_allocations
                    (org_id, user_id, allocated_credits, used_credits, held_credits, is_active)
                VALUES (%s, %s, 100, 40, %s, %s)
                """,
                (org_id, user, held, active),
            )
    return org_id


def asked(org_id: UUID, **fields: object) -> Json:
    """Advice on a company enrichment, unless `fields` say otherwise."""
    usual = {"org_id": str(org_id), "user_id": "u1", "service_type": "company_enrichment"}
    return usual | {"hold": False} | fields


def test_an_operation_that_is_covered_is_allowed(client: httpx.Client, org_id: UUID) -> None:
    answer = client.post(PRECHECK, json=asked(org_id, request_id="op:1.a-b_c"))
    assert answer.status_code == 200
    assert answer.json() == {
        "allowed": True,
        "request_id": "op:1.a-b_c",
        "credits": 50,
        "remaining_credits": 50,
        "hold": False,
        "held_credits": 0,
        "expires_at": None,
    }


def test_advice_holds_nothing(client: httpx.Client, org_id: UUID, api_database_url: str) -> None:
    answer = client.post(PRECHECK, json=asked(org_id)).raise_for_status().json()
    assert (answer["hold"], answer["held_credits"], answer["expires_at"]) == (False, 0, None)
    with psycopg.connect(api_database_url) as connection:
        assert connection.execute("SELECT FROM usage_requests").rowcount == 0


def test_a_hold_is_the_default_and_counts_for_others(client: httpx.Client, org_id: UUID) -> None:
    body = asked(org_id, request_id="op-1", hold_ttl_seconds=60)
    del body["hold"]
    answer = client.post(PRECHECK, json=body).raise_for_status().json()
    assert answer["hold"] is True
    assert (answer["credits"], answer["held_credits"], answer["remaining_credits"]) == (50, 50, 50)
    left = datetime.fromisoformat(answer["expires_at"]) - datetime.now(UTC)
    assert timedelta(seconds=30) < left <= timedelta(seconds=60)
    again = client.post(PRECHECK, json=body).raise_for_status().json()
    assert again == answer
    detail = refused(client.post(PRECHECK, json=asked(org_id)), 402, "insufficient_credits")
    assert (detail["required"], detail["remaining"]) == (50, 0)


def test_a_released_hold_is_free_again(client: httpx.Client, org_id: UUID) -> None:
    client.post(PRECHECK, json=asked(org_id, hold=True, request_id="op-1")).raise_for_status()
    for _ in range(2):
        answer = client.delete(f"{PRECHECK}/op-1", params={"org_id": str(org_id)})
        assert answer.json() == {"released": True, "request_id": "op-1"}
    assert client.post(PRECHECK, json=asked(org_id)).status_code == 200


def test_a_request_id_stands_for_one_operation(client: httpx.Client, org_id: UUID) -> None:
    client.post(PRECHECK, json=asked(org_id, hold=True, request_id="op-1")).raise_for_status()
    other = asked(org_id, hold=True, request_id="op-1", service_type="contact_lookup")
    refused(client.post(PRECHECK, json=other), 409, "request_id_conflict")


def test_only_what_is_held_can_be_released(
    client: httpx.Client, org_id: UUID, api_database_url: str
) -> None:
    unknown = client.delete(f"{PRECHECK}/nothing", params={"org_id": str(org_id)})
    refused(unknown, 404, "not_found")
    with psycopg.connect(api_database_url, autocommit=True) as connection:
        connection.execute("SELECT deduct_credits(%s, 'u1', 10, 'x', NULL, 'charged-1')", (org_id,))
    charged = client.delete(f"{PRECHECK}/charged-1", params={"org_id": str(org_id)})
    refused(charged, 409, "conflict")
    refused(client.delete(f"{PRECHECK}/op-1"), 422, "invalid_request")


def test_a_request_id_is_made_where_none_is_given(client: httpx.Client, org_id: UUID) -> None:
    made = [client.post(PRECHECK, json=asked(org_id)).json()["request_id"] for _ in range(2)]
    assert made[0] != made[1]
    assert all(UUID(request_id) for request_id in made)


@pytest.mark.parametrize(
    ("operation", "credits"),
    [
        ({"service_type": "company_enrichment", "variant": "standard"}, 50),
        ({"service_type": "contact_lookup", "quantity": 5}, 50),
        ({"service_type": "property_search", "quantity": "0.7"}, 3),
        ({"service_type": "embeddings", "quantity": 1.5}, 1),
        ({"service_type": "contact_lookup", "credits": 10}, 10),
        ({"service_type": "not in the book", "credits": 7}, 7),
        ({"service_type": None, "credits": 50}, 50),
    ],
)
def test_operations_are_priced_by_the_book(
    client: httpx.Client, org_id: UUID, operation: Json, credits: int
) -> None:
    answer = client.post(PRECHECK, json=asked(org_id) | operation)
    assert answer.json().get("credits") == credits, answer.text


def test_one_credit_too_many_is_402_with_the_figures(client: httpx.Client, org_id: UUID) -> None:
    assert client.post(PRECHECK, json=asked(org_id, service_type=None, credits=50)).is_success
    answer = client.post(PRECHECK, json=asked(org_id, service_type=None, credits=51))
    detail = refused(answer, 402, "insufficient_credits")
    assert (detail["required"], detail["remaining"]) == (51, 50)


@pytest.mark.parametrize("hold", [True, False])
@pytest.mark.parametrize(
    ("user", "code"), [("u2", "no_allocation"), ("somebody else", "not_a_member")]
)
def test_a_user_who_has_nothing_to_spend_is_403(
    client: httpx.Client, org_id: UUID, user: str, code: str, hold: bool
) -> None:
    refused(client.post(PRECHECK, json=asked(org_id, user_id=user, hold=hold)), 403, code)


@pytest.mark.parametrize("hold", [True, False])
def test_a_suspended_organization_spends_nothing(
    client: httpx.Client, org_id: UUID, api_world: World, hold: bool
) -> None:
    api_world.sql.execute("UPDATE organizations SET status = 'suspended' WHERE id = %s", (org_id,))
    refused(client.post(PRECHECK, json=asked(org_id, hold=hold)), 403, "forbidden")


@pytest.mark.parametrize("hold", [True, False])
def test_users_ask_for_themselves(
    api: httpx.Client, callers: Callers, org_id: UUID, hold: bool
) -> None:
    body = asked(org_id, hold=hold)
    assert api.post(PRECHECK, json=body, headers=callers.user("u1")).is_success
    for other in (callers.user("u2"), callers.system_admin()):
        refused(api.post(PRECHECK, json=body, headers=other), 403, "forbidden")


@pytest.mark.parametrize("hold", [True, False])
def test_to_outsiders_an_organization_is_none(
    api: httpx.Client, callers: Callers, api_world: World, org_id: UUID, hold: bool
) -> None:
    api_world.organization(members={"outsider": "member"})
    headers = callers.user("outsider")
    details = []
    for asked_about in (org_id, uuid4()):
        body = asked(asked_about, user_id="outsider", hold=hold)
        answer = api.post(PRECHECK, json=body, headers=headers)
        detail = refused(answer, 404, "not_found")
        details.append(detail["message"].replace(str(asked_about), "it"))
    assert details[0] == details[1]
    for asked_about in (org_id, uuid4()):
        body = asked(asked_about, user_id="nobody", hold=hold)
        answer = api.post(PRECHECK, json=body, headers=callers.user("nobody"))
        refused(answer, 403, "no_organization")


def test_users_release_their_own_holds_only(
    api: httpx.Client, callers: Callers, org_id: UUID
) -> None:
    mine = callers.user("u1")
    api.post(PRECHECK, json=asked(org_id, hold=True, request_id="mine"), headers=mine)
    path, params = f"{PRECHECK}/mine", {"org_id": str(org_id)}
    refused(api.delete(path, params=params, headers=callers.user("u2")), 404, "not_found")
    refused(api.delete(path, params=params, headers=callers.system_admin()), 404, "not_found")
    assert api.delete(path, params=params, headers=mine).is_success


def test_an_unknown_organization_is_404(client: httpx.Client, org_id: UUID) -> None:
    assert uuid4() != org_id
    refused(client.post(PRECHECK, json=asked(uuid4())), 404, "not_found")


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ({"service_type": "unheard_of"}, ["service_type", "credits"]),
        ({"service_type": "llm", "variant": "gpt-1"}, ["service_type", "credits"]),
        ({"service_type": None}, ["service_type", "credits"]),
        ({"credits": 49}, ["credits"]),
        ({"quantity": 10**12, "service_type": "market_analysis"}, None),
        ({"quantity": str(10**12), "service_type": "market_analysis", "credits": 9}, ["credits"]),
        ({"quantity": 0}, ["quantity"]),
        ({"quantity": True}, ["quantity"]),
        ({"quantity": "NaN"}, ["quantity"]),
        ({"credits": 0}, ["credits"]),
        ({"credits": 1.0}, ["credits"]),
        ({"credits": 1_000_001}, ["credits"]),
        ({"org_id": "not an id", "user_id": ""}, ["org_id", "user_id"]),
        ({"user_id": "nul\0"}, ["user_id"]),
        ({"user_id": "x" * 256}, ["user_id"]),
        ({"user_id": "\ud800"}, ["body"]),
        ({"request_id": "with space"}, ["request_id"]),
        ({"request_id": "x" * 256}, ["request_id"]),
        ({"hold_ttl_seconds": 0}, ["hold_ttl_seconds"]),
        ({"quantitty": 2}, ["quantitty"]),
    ],
)
def test_what_breaks_a_rule_is_422_with_the_fields(
    client: httpx.Client, org_id: UUID, change: Json, fields: list[str] | None
) -> None:
    content = json.dumps(asked(org_id) | change)
    answer = client.post(PRECHECK, content=content, headers={"Content-Type": "application/json"})
    if fields is None:  # 150 credits x 10^12 is a price, and nobody's allocation
        assert refused(answer, 402, "insufficient_credits")["required"] == 150 * 10**12
        return
    assert refused(answer, 422, "invalid_request")["fields"] == fields


def test_a_price_beyond_what_one_request_can_cost_is_422(
    client: httpx.Client, org_id: UUID, api_database_url: str
) -> None:
    with psycopg.connect(api_database_url) as connection:
        connection.execute(
            """
            INSERT INTO service_prices
                (service_type, credits, unit, position, effective_from)
            VALUES ('moon_shot', 100000, 'request', 100, now() - interval '1 day')
            """
        )
    for hold in (True, False):
        body = asked(org_id, service_type="moon_shot", quantity=10**12, hold=hold)
        answer = client.post(PRECHECK, json=body)
        assert refused(answer, 422, "invalid_request")["fields"] == ["quantity"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 60_000,
        b'{"\\ud800": 1}',
        b'{"credits": ' + b"9" * 5000 + b"}",
    ],
)
def test_a_body_that_cannot_be_read_is_422(client: httpx.Client, content: bytes) -> None:
    answer = client.post(PRECHECK, content=content, headers={"Content-Type": "application/json"})
    assert refused(answer, 422, "invalid_request")["fields"]


def test_a_body_of_another_content_type_is_422(client: httpx.Client, org_id: UUID) -> None:
    answer = client.post(
        PRECHECK, content=json.dumps(asked(org_id)), headers={"Content-Type": "text/plain"}
    )
    assert refused(answer, 422, "invalid_request")["fields"] == ["body"]


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_over_the_limit_is_413(
    client: httpx.Client, api_settings: Settings, announced: bool
) -> None:
    body = b" " * (api_settings.body_limit_bytes + 1)
    content = body if announced else iter([body[:1000], body[1000:]])
    answer = client.post(PRECHECK, content=content, headers={"Content-Type": "application/json"})
    refused(answer, 413, "body_too_large")
    largest = client.post(PRECHECK, content=body[1:], headers={"Content-Type": "application/json"})
    refused(largest, 422, "invalid_request")


@pytest.mark.parametrize("content", [b"{", b" " * 20_000_000])
def test_without_credentials_it_is_401_before_the_body_is_read(
    api: httpx.Client, content: bytes
) -> None:
    answer = api.post(PRECHECK, content=content, headers={"Content-Type": "application/json"})
    refused(answer, 401, "not_authenticated")
    assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_unknown_paths_and_methods_are_answered_in_shape(client: httpx.Client) -> None:
    refused(client.get("/nowhere"), 404, "not_found")
    refused(client.get(PRECHECK + "/"), 404, "not_found")
    answer = client.get(PRECHECK)
    refused(answer, 405, "method_not_allowed")
    assert answer.headers["Allow"] == "POST"


@pytest.mark.parametrize("given", ["a", "A-z.0_9:", "x" * 128])
def test_a_harmless_x_request_id_is_kept(client: httpx.Client, given: str) -> None:
    for path in ("/livez", "/nowhere", PRECHECK):
        answer = client.get(path, headers={"X-Request-ID": given})
        assert answer.headers["X-Request-ID"] == given


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", 'a"b', "ä", "a/b"])
def test_any_other_x_request_id_is_replaced(client: httpx.Client, given: str) -> None:
    answer = client.get("/livez", headers={b"X-Request-ID": given.encode()})
    assert UUID(answer.headers["X-Request-ID"])


def test_an_unforeseen_error_is_500_and_tells_nothing(
    api_settings: Settings, database: Database, database_url: str, issuer: Issuer
) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute(
            """
            CREATE OR REPLACE FUNCTION price_of(
                p_service_type varchar, p_variant varchar, p_at timestamptz
            ) RETURNS numeric
            LANGUAGE plpgsql AS $$ BEGIN RAISE 'secret'; END $$
            """
        )
    broken = api_settings.model_copy(update={"database_url": SecretStr(database_url)})
    headers = Callers(issuer, database).service(Scope.PRECHECK) | {"X-Request-ID": "lost"}
    with serving(create_app(broken)) as client, capture_logs() as logs:
        answer = client.post(PRECHECK, json=asked(uuid4()), headers=headers)
        assert refused(answer, 500, "internal_error")["request_id"] == "lost"
        assert "secret" not in answer.text
        assert client.get("/livez").is_success
    (logged,) = (entry for entry in logs if entry["log_level"] == "error")
    assert isinstance(logged["exc_info"], psycopg.errors.RaiseException)


def test_connections_that_were_cut_while_idle_are_replaced(
    client: httpx.Client, org_id: UUID, api_world: World
) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: client.post(PRECHECK, json=asked(org_id)), range(40)))
    assert all(answer.is_success for answer in answers)
    cut = api_world.sql.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = 'metering gate' AND datname = current_database()"
    )
    assert cut.rowcount > 1
    answer = client.post(PRECHECK, json=asked(org_id, hold=True))
    assert answer.is_success, answer.text


def test_health_needs_no_token(api: httpx.Client) -> None:
    assert api.get("/livez").json() == {"status": "alive"}
    assert api.get("/readyz").json() == {"status": "ready"}


def test_without_redis_it_still_gates(
    api_settings: Settings, org_id: UUID, headers: Headers
) -> None:
    away = SecretStr(f"redis://{LOOPBACK}:{free_port()}/0")
    with serving(create_app(api_settings.model_copy(update={"redis_url": away}))) as client:
        assert client.post(PRECHECK, json=asked(org_id), headers=headers).is_success


def test_the_openapi_document_names_the_gate(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    post = document["paths"][PRECHECK]["post"]
    assert {"200", "401", "402", "403", "404", "413", "422", "503"} <= post["responses"].keys()
    assert post["security"] == [{"service token": []}, {"session": []}]
    refused_as = post["responses"]["422"]["content"]["application/json"]["schema"]["$ref"]
    assert refused_as.endswith("/Problem")
