"""Errors: whatever goes wrong is answered in the shape of the contract, and tells nothing else."""

import json
import threading
from collections.abc import Iterator

import httpx
import psycopg
import pytest
from fastapi import APIRouter
from structlog.testing import capture_logs

from api.app import create_app
from api.resources import CONNECTION_SECONDS, PROBE_THREADS, REQUEST_THREADS, LedgerDatabase
from ledger.database import run
from schema.scopes import Scope
from schema.settings import Settings
from tests.integration.api.answers import refused
from tests.integration.api.conftest import Callers, Headers, serving

PRECHECK = "/api/v1/precheck"
BROKEN = "/api/v1/ops/broken"
SLOW = "/api/v1/ops/slow"
LOCKED = "/api/v1/ops/locked"

routes = APIRouter()


@routes.get(BROKEN)
def broken() -> None:
    raise TypeError("the secret is /etc/passwd")


@routes.get(SLOW)
def slow(database: LedgerDatabase) -> None:
    with database.transaction() as connection:
        run(connection, "SELECT pg_sleep(60)")


@routes.get(LOCKED)
def locked(database: LedgerDatabase) -> None:
    with database.transaction() as connection:
        run(connection, "SET LOCAL lock_timeout = '200ms'")
        run(connection, "LOCK TABLE organizations")


@pytest.fixture(scope="module")
def client(api_settings: Settings) -> Iterator[httpx.Client]:
    """A client of an app whose statements end soon, with routes that go wrong."""
    app = create_app(api_settings.model_copy(update={"api_statement_timeout_seconds": 0.5}))
    app.include_router(routes)
    with serving(app) as opened:
        yield opened


@pytest.fixture
def somebody(callers: Callers) -> Headers:
    return callers.user("ada")


def test_paths_and_methods_that_there_are_not(client: httpx.Client, somebody: Headers) -> None:
    refused(client.get("/nowhere"), 404, "not_found")
    refused(client.get("/api/v1/nowhere", headers=somebody), 404, "not_found")
    refused(client.get(f"{PRECHECK}/", headers=somebody), 404, "not_found")
    answer = client.get(PRECHECK, headers=somebody)
    refused(answer, 405, "method_not_allowed")
    assert answer.headers["Allow"] == "POST"


def test_strangers_do_not_learn_what_there_is(client: httpx.Client) -> None:
    for method in ("GET", "POST", "PATCH", "OPTIONS", "TRACE", "PROPFIND", "HEAD"):
        for path in ("/api/", "/api/v1/nowhere", PRECHECK, BROKEN, "/api/%2e%2e/livez"):
            answer = client.request(method, path)
            assert answer.status_code == 401, (method, path)
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            assert "Allow" not in answer.headers


def test_allow_names_the_methods_of_all_routes_of_a_path(api_settings: Settings) -> None:
    app = create_app(api_settings)
    router = APIRouter(prefix="/things")
    router.add_api_route("/{name}", broken, methods=["PUT"])
    app.include_router(router)
    app.add_api_route("/things/{name}", broken, methods=["DELETE"])
    app.add_api_route("/things/one", broken, methods=["GET"])
    with serving(app) as client:
        answer = client.post("/things/one")
        refused(answer, 405, "method_not_allowed")
        assert answer.headers["Allow"] == "GET, PUT, DELETE"
        assert client.post("/things/two").headers["Allow"] == "PUT, DELETE"


def test_what_is_asked_for_by_head_has_no_body(client: httpx.Client, somebody: Headers) -> None:
    for path in ("/nowhere", "/livez", "/api/v1/nowhere", PRECHECK):
        answer = client.head(path, headers=somebody)
        assert answer.status_code in {404, 405}
        assert answer.content == b""
        assert client.get("/livez").is_success


@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        (b"{", "application/json"),
        (b"\xff\xfe", "application/json"),
        (b"[" * 60_000, "application/json"),
        (b'{"credits": ' + b"9" * 5000 + b"}", "application/json"),
        (b'{"\\ud800": 1}', "application/json"),
        (b"{}", "text/plain"),
        (b"{}", ""),
        (b"{}", '; charset="'),
        (b"", "application/json"),
    ],
)
def test_a_body_that_cannot_be_read_names_fields(
    client: httpx.Client, callers: Callers, content: bytes, content_type: str
) -> None:
    headers = callers.service(Scope.PRECHECK) | {"Content-Type": content_type}
    answer = client.post(PRECHECK, content=content, headers=headers)
    assert refused(answer, 422, "invalid_request")["fields"]


@pytest.mark.parametrize("query", ["%ff", "%00", "%zz", "%", "a&org_id=b", "", "\u00e4", "%ed%a0"])
def test_a_query_that_cannot_be_read_names_the_field(
    client: httpx.Client, callers: Callers, query: str
) -> None:
    answer = client.delete(
        f"{PRECHECK}/r-1?&&=&x&org_id={query}", headers=callers.service(Scope.PRECHECK)
    )
    assert refused(answer, 422, "invalid_request")["fields"] == ["org_id"]


@pytest.mark.parametrize("name", ["%ff", "%00", "%ed%a0%80", "a%20b", "x" * 256, "%F0%9F%92%A9"])
def test_a_path_that_cannot_be_read_names_the_field(
    client: httpx.Client, callers: Callers, name: str
) -> None:
    answer = client.delete(
        f"{PRECHECK}/{name}",
        params={"org_id": "00000000-0000-0000-0000-000000000000"},
        headers=callers.service(Scope.PRECHECK),
    )
    assert refused(answer, 422, "invalid_request")["fields"] == ["request_id"]


def test_an_unforeseen_error_tells_its_id_and_nothing_else(
    client: httpx.Client, somebody: Headers
) -> None:
    with capture_logs() as logs:
        answer = client.get(BROKEN, headers=somebody | {"X-Request-ID": "lost-1"})
    assert refused(answer, 500, "internal_error")["request_id"] == "lost-1"
    assert "secret" not in answer.text
    assert "X-RateLimit-Remaining" in answer.headers
    (logged,) = (entry for entry in logs if entry["log_level"] == "error")
    assert isinstance(logged["exc_info"], TypeError)
    assert client.get("/livez").is_success


@pytest.mark.parametrize("path", [SLOW, LOCKED])
def test_a_statement_that_takes_too_long_is_unavailable(
    client: httpx.Client, somebody: Headers, api_database_url: str, path: str
) -> None:
    with psycopg.connect(api_database_url) as connection:
        connection.execute("LOCK TABLE organizations IN ROW EXCLUSIVE MODE")
        answer = client.get(path, headers=somebody)
    detail = refused(answer, 503, "unavailable")
    assert answer.headers["Retry-After"] == str(detail["retry_after"])
    assert "statement" not in answer.text.lower()


def test_a_request_does_not_wait_for_a_connection_forever(
    api_settings: Settings, somebody: Headers
) -> None:
    taken = REQUEST_THREADS + PROBE_THREADS
    app = create_app(api_settings)
    app.include_router(routes)
    release = threading.Event()

    def keep_one() -> None:
        with app.state.resources.database.session():
            ready.release()
            release.wait(20)

    ready = threading.Semaphore(0)
    with serving(app) as client:
        keepers = [threading.Thread(target=keep_one) for _ in range(taken)]
        try:
            for keeper in keepers:
                keeper.start()
            assert all(ready.acquire(timeout=20) for _ in keepers)
            answer = client.get(SLOW, headers=somebody)
        finally:
            release.set()
            for keeper in keepers:
                keeper.join()
    refused(answer, 503, "unavailable")
    assert answer.elapsed.total_seconds() < CONNECTION_SECONDS + 2


def test_a_disallowed_preflight_has_the_shape_of_errors(client: httpx.Client) -> None:
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "GET"}
    answer = client.options(PRECHECK, headers=headers)
    refused(answer, 400, "invalid_request")
    assert "Access-Control-Allow-Origin" not in answer.headers


def test_an_id_of_somebody_elses_making_is_kept_if_harmless(client: httpx.Client) -> None:
    for given, is_kept in {
        b"a": True,
        b"A-z.0_9:" * 16: True,
        b"x" * 129: False,
        b"a b": False,
        b'a"b': False,
        "ä".encode(): False,
        b"": False,
    }.items():
        for path in ("/livez", "/nowhere", PRECHECK):
            answer = client.get(path, headers={b"X-Request-ID": given})
            assert (answer.headers["X-Request-ID"].encode() == given) is is_kept
            assert len(answer.headers.get_list("X-Request-ID")) == 1
            assert json.dumps(answer.headers["X-Request-ID"])
