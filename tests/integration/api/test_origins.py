"""Pages of which origins may read answers, and have something done for their visitors."""

from collections.abc import Iterator

import httpx
import pytest

from api.app import create_app
from schema.scopes import Scope
from schema.settings import Environment, Settings
from tests.integration.api.conftest import Callers, serving

NOWHERE = "/api/v1/nothing"
LET_IN = 404
LISTED = (
    "https://app.example.com",
    "https://*.loopnet.example",
    "https://odd.example:8443",
    "https://Usual.example:443",
    "http://any.example:*",
)

ALLOWED = [
    "https://app.example.com",
    "https://a.loopnet.example",
    "https://a.b-c.loopnet.example",
    "https://odd.example:8443",
    "https://usual.example",
    "http://any.example",
    "http://any.example:3000",
]
LOCAL = ["http://localhost", "http://localhost:3000"]
OTHERS = [
    "null",
    "",
    "https://evil.example",
    "http://app.example.com",
    "https://app.example.com:8443",
    "https://app.example.com.evil.com",
    "https://app.example.com@evil.com",
    "https://app.example.com/",
    "https://appXexample.com",
    "https://evil-app.example.com",
    "https://loopnet.example",
    "https://evil-loopnet.example",
    "https://loopnet.example.evil.com",
    "https://evil.com/.loopnet.example",
    "https://evil.com#.loopnet.example",
    "https://evil.com:1@a.loopnet.example",
    "https://.loopnet.example",
    "https://a..loopnet.example",
    "https://a.loopnet.example:444",
    "http://a.loopnet.example",
    "https://odd.example",
    "http://any.example:x",
    "http://any.example:3000.evil.com",
    "https://localhost",
    "http://localhost.evil.com",
    "http://localhost:3000.evil.com",
    "http://evil.localhost",
    "http://127.0.0.1:3000",
    "http://[",
    "http://",
    "file://",
]


@pytest.fixture(scope="module", params=list(Environment))
def environment(request: pytest.FixtureRequest) -> Environment:
    where: Environment = request.param
    return where


@pytest.fixture(scope="module")
def api(api_settings: Settings, environment: Environment) -> Iterator[httpx.Client]:
    changes = {"cors_origins": LISTED, "env": environment}
    with serving(create_app(api_settings.model_copy(update=changes))) as client:
        yield client


def origins(environment: Environment) -> tuple[list[str], list[str]]:
    """Those that are allowed, and all others."""
    if environment is Environment.DEVELOPMENT:
        return ALLOWED + LOCAL, OTHERS
    return ALLOWED, OTHERS + LOCAL


def asked(api: httpx.Client, origin: str, headers: dict[str, str]) -> httpx.Response:
    return api.post(NOWHERE, headers=headers | {"Origin": origin})


def test_allowed_pages_act_for_their_visitors_and_others_do_not(
    api: httpx.Client, callers: Callers, environment: Environment
) -> None:
    ada = callers.user("ada")
    allowed, others = origins(environment)
    for origin in allowed:
        answer = asked(api, origin, ada)
        assert answer.status_code == LET_IN, origin
        assert answer.headers["Access-Control-Allow-Origin"] == origin
        assert answer.headers["Access-Control-Allow-Credentials"] == "true"
        assert "Origin" in answer.headers["Vary"]
    for origin in others:
        answer = asked(api, origin, ada)
        assert answer.status_code == 403, origin
        assert answer.json()["detail"]["error"] == "forbidden"
        assert "Access-Control-Allow-Origin" not in answer.headers


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_whatever_changes_something_is_refused(
    api: httpx.Client, callers: Callers, method: str
) -> None:
    headers = callers.user("ada") | {"Origin": "https://evil.example"}
    assert api.request(method, NOWHERE, headers=headers).status_code == 403
    assert api.request(method, NOWHERE, headers=callers.user("ada")).status_code == LET_IN


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_others_may_ask_and_not_read_the_answer(
    api: httpx.Client, callers: Callers, method: str
) -> None:
    headers = callers.user("ada") | {"Origin": "https://evil.example"}
    answer = api.request(method, NOWHERE, headers=headers)
    assert answer.status_code == LET_IN
    assert "Access-Control-Allow-Origin" not in answer.headers


def test_services_are_no_browsers(api: httpx.Client, callers: Callers) -> None:
    service = callers.service(Scope.PRECHECK)
    assert asked(api, "https://evil.example", service).status_code == LET_IN


def test_a_page_of_this_server_is_its_own(api: httpx.Client, callers: Callers) -> None:
    ada = callers.user("ada")
    host = api.base_url.netloc.decode()
    assert asked(api, f"http://{host}", ada).status_code == LET_IN
    assert asked(api, f"https://{host}", ada).status_code == LET_IN  # a proxy ends its TLS
    assert asked(api, f"http://{host}1", ada).status_code == 403
    assert asked(api, f"ftp://{host}", ada).status_code == 403
    assert asked(api, "null", ada | {"Host": ""}).status_code == 403
    assert asked(api, "http://", ada | {"Host": ""}).status_code == 403


def test_who_is_not_known_is_refused_before_their_page_is(api: httpx.Client) -> None:
    assert asked(api, "https://evil.example", {}).status_code == 401
    answer = asked(api, "https://app.example.com", {})
    assert answer.status_code == 401
    assert answer.headers["Access-Control-Allow-Origin"] == "https://app.example.com"


def preflight(api: httpx.Client, origin: str) -> httpx.Response:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type, idempotency-key, x-request-id",
    }
    return api.options("/api/v1/precheck", headers=headers)


def test_a_preflight_needs_no_session(api: httpx.Client, environment: Environment) -> None:
    allowed, others = origins(environment)
    for origin in allowed:
        answer = preflight(api, origin)
        assert answer.status_code == 200, origin
        assert answer.headers["Access-Control-Allow-Origin"] == origin
        assert answer.headers["Access-Control-Allow-Credentials"] == "true"
        assert "POST" in answer.headers["Access-Control-Allow-Methods"]
    for origin in others:
        answer = preflight(api, origin)
        assert answer.status_code == 400, origin
        assert "Access-Control-Allow-Origin" not in answer.headers


def test_asking_for_options_otherwise_needs_one(api: httpx.Client) -> None:
    headers = {"Origin": "https://app.example.com"}
    assert api.options("/api/v1/precheck", headers=headers).status_code == 401
