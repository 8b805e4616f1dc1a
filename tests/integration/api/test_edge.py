"""The edge: headers on every answer, bodies that are too long, and clients that speak no HTTP."""

import json
import logging
import socket
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import httpx
import pytest
import structlog
from anyio import to_thread
from fastapi import APIRouter
from pydantic import SecretStr
from starlette.responses import PlainTextResponse
from structlog.testing import capture_logs

from api.app import create_app
from api.protocol import MAX_HEAD_BYTES
from ops.servers import LOOPBACK, free_port
from schema.scopes import Scope
from schema.settings import Environment, Settings
from tests.integration.api.answers import Json, refused
from tests.integration.api.conftest import Callers, Headers, serving
from tests.integration.api.processes import ApiProcess, api_process

PRECHECK = "/api/v1/precheck"
EVENTS = "/api/v1/usage/events"
BODY_LIMIT = 2_000
EVENTS_LIMIT = 5_000
ALWAYS = {
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}

routes = APIRouter()
log = structlog.get_logger(__name__)


@routes.post("/own/bodies")
async def own_body(body: dict[str, Any]) -> int:
    return len(json.dumps(body))


@routes.get("/own/headers")
async def own_headers() -> PlainTextResponse:
    headers = {"Cache-Control": "max-age=60", "Content-Security-Policy": "default-src 'self'"}
    return PlainTextResponse("fine", headers=headers)


@routes.get("/own/logs")
async def own_logs() -> None:
    log.info("from the loop")
    await to_thread.run_sync(lambda: log.info("from a thread"))
    logging.getLogger("some.library").warning("from a library")


@routes.get("/own/failure")
def own_failure() -> None:
    log.info("from a route in a thread")
    raise TypeError


@pytest.fixture(scope="module")
def edge_settings(api_settings: Settings) -> Settings:
    return api_settings.model_copy(
        update={"body_limit_bytes": BODY_LIMIT, "ingest_body_limit_bytes": EVENTS_LIMIT}
    )


@pytest.fixture(scope="module")
def client(edge_settings: Settings) -> Iterator[httpx.Client]:
    app = create_app(edge_settings)
    app.include_router(routes)
    with serving(app) as opened:
        yield opened


@pytest.fixture(scope="module")
def running(
    api_settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ApiProcess]:
    """The API with the very options of `metering up`."""
    with api_process(api_settings, tmp_path_factory.mktemp("edge") / "api.log") as process:
        yield process


def test_every_answer_has_security_headers(client: httpx.Client, callers: Callers) -> None:
    somebody = callers.user("ada")
    with capture_logs():
        failed = client.get("/own/failure")
    answers = [
        client.get("/livez"),
        client.get("/openapi.json"),
        client.get("/nowhere"),
        client.post("/livez"),
        failed,
        client.get(PRECHECK),
        client.get(PRECHECK, headers=somebody),
        client.post(PRECHECK, headers=somebody, content=b"{"),
        client.post(PRECHECK, headers=somebody, content=b" " * 3000),
        client.options(
            PRECHECK,
            headers={
                "Origin": "http://localhost:1",
                "Access-Control-Request-Method": "POST",
            },
        ),
    ]
    assert [answer.status_code for answer in answers] == [
        200, 200, 404, 405, 500, 401, 405, 422, 413, 200,
    ]  # fmt: skip
    for answer in answers:
        assert {name: answer.headers.get_list(name) for name in ALWAYS} == {
            name: [value] for name, value in ALWAYS.items()
        }
        assert "Strict-Transport-Security" not in answer.headers
        assert answer.headers.get_list("X-Request-ID")


def test_a_route_may_say_otherwise(client: httpx.Client) -> None:
    headers = client.get("/own/headers").headers
    assert headers.get_list("Cache-Control") == ["max-age=60"]
    assert headers.get_list("Content-Security-Policy") == ["default-src 'self'"]
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_in_production_browsers_are_told_to_insist_on_tls(edge_settings: Settings) -> None:
    update = {"env": Environment.PRODUCTION}
    with serving(create_app(edge_settings.model_copy(update=update))) as client:
        answer = client.get("/livez")
    assert answer.headers["Strict-Transport-Security"].startswith("max-age=")


@pytest.mark.parametrize("is_announced", [True, False])
def test_a_body_over_the_limit_is_refused(client: httpx.Client, *, is_announced: bool) -> None:
    def sent(length: int) -> httpx.Response:
        body = b'{"a": "%s"}' % (b"x" * (length - 9))
        content = body if is_announced else iter([body[:1000], body[1000:]])
        json_type = {"Content-Type": "application/json"}
        return client.post("/own/bodies", content=content, headers=json_type)

    refused(sent(BODY_LIMIT + 1), 413, "body_too_large")
    assert sent(BODY_LIMIT).json() == BODY_LIMIT


def test_usage_events_have_a_limit_of_their_own(edge_settings: Settings, callers: Callers) -> None:
    app = create_app(edge_settings)
    app.add_api_route(EVENTS, own_body, methods=["POST"])
    headers = callers.service(Scope.USAGE_WRITE) | {"Content-Type": "application/json"}
    with serving(app) as client:
        for length, status in ((EVENTS_LIMIT, 422), (EVENTS_LIMIT + 1, 413)):
            answer = client.post(EVENTS, content=b"x" * length, headers=headers)
            assert answer.status_code == status


def exchanged(running: ApiProcess, sent: bytes, *more: bytes) -> bytes:
    """What comes back until the server ends the connection."""
    answer = b""
    with socket.create_connection((LOOPBACK, running.port), timeout=20) as connection:
        for part in (sent, *more):
            connection.sendall(part)
        while part := connection.recv(65536):
            answer += part
    return answer


def received(connection: socket.socket) -> bytes:
    """One answer of a connection that may stay open."""
    answer = b""
    while not answer.endswith(b"}"):
        part = connection.recv(65536)
        assert part, answer
        answer += part
    return answer


def parsed(answer: bytes) -> tuple[int, Json]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def test_who_may_not_call_learns_so_before_the_body_comes(
    running: ApiProcess, callers: Callers
) -> None:
    body = b"Content-Type: application/json\r\nContent-Length: 20000000\r\n"
    mistaken = callers.service(Scope.DEDUCT)["Authorization"].encode()
    known = callers.service(Scope.PRECHECK)["Authorization"].encode()
    for header, status in (
        (b"", 401),
        (b"Authorization: %s\r\n" % mistaken, 403),
        (b"Authorization: %s\r\n" % known, 413),
    ):
        head = b"POST %s HTTP/1.1\r\nHost: x\r\n" % PRECHECK.encode() + body + header + b"\r\n"
        with socket.create_connection((LOOPBACK, running.port), timeout=20) as connection:
            connection.sendall(head)
            assert parsed(received(connection))[0] == status


def test_after_an_early_answer_the_rest_of_the_body_is_no_request(running: ApiProcess) -> None:
    smuggled = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
    length = 20_000_000
    body = smuggled * (length // len(smuggled)) + b" " * (length % len(smuggled))
    answer = exchanged(
        running,
        b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (PRECHECK.encode(), length),
        body,
        b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    )
    statuses = [int(part.split()[0]) for part in answer.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [401, 200]


def test_nobody_is_asked_for_a_body_that_is_too_long(running: ApiProcess, callers: Callers) -> None:
    known = callers.service(Scope.PRECHECK)["Authorization"].encode()
    head = (
        b"POST %s HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nConnection: close\r\n"
        b"Authorization: %s\r\nContent-Length: 20000000\r\n\r\n"
    )
    answer = exchanged(running, head % (PRECHECK.encode(), known))
    assert parsed(answer)[0] == 413


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"no http at all\r\n\r\n", 400),
        (b"FOO / HTTP/1.1\r\n", 400),
        (b"CONNECT x:80 HTTP/1.1\r\n", 400),
        (b"PRI * HTTP/2.0\r\n", 400),
        (b"GET / HTTP/1.9\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\n", 400),
        (b"GET /\x00 HTTP/1.1\r\n", 400),
        (b"GET http://x:99999/ HTTP/1.1\r\n", 400),
        (b"GET / HTTP/1.1\r\nX: \x00\r\n", 400),
        (b"GET / HTTP/1.1\r\nX : y\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: -1\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n", 400),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"GET //api/v1/precheck HTTP/1.1\r\n", 404),
        (b"GET //[ HTTP/1.1\r\n", 404),
        (b"OPTIONS * HTTP/1.1\r\n", 404),
        (b"GET /api/v1/x HTTP/1.1\r\n", 401),
        (b"GET /api%2Fv1%2Fprecheck HTTP/1.1\r\n", 401),
        (b"GET http://x/api/v1/x HTTP/1.1\r\n", 401),
        (b"GET /api/v1/x HTTP/1.0\r\n", 401),
        (b"TRACE /api/v1/x HTTP/1.1\r\n", 401),
        (b"GET /api/v1/x HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n", 401),
    ],
)
def test_strange_requests_are_refused_in_shape(
    running: ApiProcess, sent: bytes, status: int
) -> None:
    answer = exchanged(running, sent + b"Host: x\r\nConnection: close\r\n\r\n")
    found, document = parsed(answer)
    assert found == status
    assert set(document["detail"]) >= {"error", "message", "suggested_action", "request_id"}
    for name, value in ALWAYS.items():
        assert f"{name.lower()}: {value}".encode() in answer
    assert f"x-request-id: {document['detail']['request_id']}".encode() in answer
    assert b"\r\nserver:" not in answer


def test_headers_come_to_an_end(running: ApiProcess) -> None:
    for filler in (b"X: " + b"a" * MAX_HEAD_BYTES, b"X: a\r\n" * (MAX_HEAD_BYTES // 6)):
        with socket.create_connection((LOOPBACK, running.port), timeout=20) as connection:
            connection.sendall(b"GET /livez HTTP/1.1\r\n")
            connection.sendall(filler)
            assert parsed(received(connection))[0] == 431
    for length in (MAX_HEAD_BYTES // 2, 0):
        request = b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX: %s\r\n\r\n"
        assert parsed(exchanged(running, request % (b"a" * length)))[0] == 200


def test_trailers_come_to_an_end(running: ApiProcess) -> None:
    with socket.create_connection((LOOPBACK, running.port), timeout=20) as connection:
        connection.sendall(b"POST /livez HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert parsed(received(connection))[0] == 405
        connection.sendall(b"0\r\nX: " + b"a" * MAX_HEAD_BYTES)
        assert parsed(received(connection))[0] == 431


def test_every_line_that_is_logged_meanwhile_names_the_request(
    running: ApiProcess, client: httpx.Client
) -> None:
    with capture_logs(processors=[structlog.contextvars.merge_contextvars]) as logs:
        client.get("/own/logs", headers={"X-Request-ID": "r-1"})
        client.get("/own/failure", headers={"X-Request-ID": "r-2"})
    assert [(line["event"], line["http_request_id"]) for line in logs] == [
        ("from the loop", "r-1"),
        ("from a thread", "r-1"),
        ("request answered", "r-1"),
        ("from a route in a thread", "r-2"),
        ("unforeseen error", "r-2"),
        ("request answered", "r-2"),
    ]
    request_id = f"r-{uuid4()}"
    httpx.get(f"{running.url}/nowhere?secret=1", headers={"X-Request-ID": request_id})
    (line,) = (
        json.loads(line)
        for line in running.log.read_text("utf-8").splitlines()
        if request_id in line
    )
    assert line["http_request_id"] == request_id
    assert (line["method"], line["path"], line["status"]) == ("GET", "/nowhere", 404)
    assert "secret" not in str(line)


def test_good_answers_of_the_gate_and_of_probes_are_too_many_to_log(
    client: httpx.Client, callers: Callers, api_world: Any
) -> None:
    org_id = api_world.organization(pool=100, allocations={"ada": 100}, members={"ada": "member"})
    operation = {"org_id": str(org_id), "user_id": "ada", "credits": 1, "hold": False}
    service = callers.service(Scope.PRECHECK)
    with capture_logs() as logs:
        client.get("/livez").raise_for_status()
        client.post(PRECHECK, json=operation, headers=service).raise_for_status()
        refused(client.post(PRECHECK, json={}, headers=service), 422, "invalid_request")
    assert [(line["path"], line["status"]) for line in logs] == [(PRECHECK, 422)]


def test_without_postgresql_it_lives_and_is_not_ready(
    api_settings: Settings, callers: Callers
) -> None:
    away = SecretStr(f"postgresql://postgres@{LOOPBACK}:{free_port()}/metering")
    somebody: Headers = callers.user("ada")
    with serving(create_app(api_settings.model_copy(update={"database_url": away}))) as client:
        answer = client.get("/readyz")
        assert refused(answer, 503, "unavailable")["away"] == ["postgresql"]
        assert int(answer.headers["Retry-After"]) >= 1
        assert client.get("/livez").json() == {"status": "alive"}
        operation = {"org_id": str(uuid4()), "user_id": "ada", "credits": 1}
        answer = client.post(PRECHECK, json=operation, headers=somebody)
        refused(answer, 503, "unavailable")
        assert LOOPBACK not in answer.text


def test_without_redis_it_is_not_ready(api_settings: Settings) -> None:
    away = SecretStr(f"redis://{LOOPBACK}:{free_port()}/0")
    with serving(create_app(api_settings.model_copy(update={"redis_url": away}))) as client:
        assert refused(client.get("/readyz"), 503, "unavailable")["away"] == ["redis"]
        assert client.get("/livez").is_success


def test_servers_that_do_not_answer_are_found_out_quickly(api_settings: Settings) -> None:
    with socket.socket() as silent:
        silent.bind((LOOPBACK, 0))
        silent.listen()
        port = silent.getsockname()[1]
        hung = api_settings.model_copy(
            update={
                "database_url": SecretStr(f"postgresql://postgres@{LOOPBACK}:{port}/metering"),
                "redis_url": SecretStr(f"redis://{LOOPBACK}:{port}/0"),
            }
        )
        with serving(create_app(hung)) as client:
            answer = client.get("/readyz")
            assert refused(answer, 503, "unavailable")["away"] == ["postgresql", "redis"]
            assert answer.elapsed.total_seconds() < 4.5
