"""Service tokens over HTTP: who is let in, where, for how long, and that no log tells them."""

import asyncio
import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from http import HTTPStatus
from typing import Any, Final
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from api import servicetokens as api_servicetokens
from api.app import create_app
from api.callers import Service
from api.servicetokens import REMEMBERED_SECONDS, ServiceTokens
from ledger import servicetokens
from ledger.clock import clock_replaced, utc_now
from ledger.database import Database
from ops.servers import LOOPBACK, free_port
from schema.errors import LedgerUnavailable, NotAuthenticated
from schema.scopes import Scope
from schema.settings import Settings
from tests.integration.api.conftest import Callers, Headers, serving
from tests.integration.ledger.race import await_lock
from tests.integration.ledger.world import World

NOWHERE: Final = "/api/v1/nowhere"
"""A path that is not there: 404 for whoever is let in, 401 for everybody else."""
PRECHECK: Final = "/api/v1/precheck"
HOUR: Final = timedelta(hours=1)


class Seconds:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def seconds() -> Seconds:
    return Seconds()


@pytest.fixture(scope="module")
def api(api_settings: Settings, seconds: Seconds) -> Iterator[httpx.Client]:
    """An API that remembers tokens by a clock of the test's."""
    app = create_app(api_settings)
    with serving(app) as client:
        resources = app.state.resources
        tokens = ServiceTokens(resources.database, monotonic=seconds)
        app.state.resources = replace(resources, service_tokens=tokens)
        yield client


@pytest.fixture(scope="module")
def org_id(api_world: World) -> UUID:
    return api_world.organization(
        pool=10_000, allocations={"ada": 10_000}, members={"ada": "member"}
    )


def bearer(text: str, scheme: str = "Bearer") -> Headers:
    return {"Authorization": f"{scheme} {text}"}


def made(database: Database, name: str = "", **fields: Any) -> str:
    usual: dict[str, Any] = {"scopes": [Scope.PRECHECK], "actor": "tests", "now": utc_now()}
    text, _ = servicetokens.create(database, name or f"s-{uuid4().hex}", **usual | fields)
    return text


def status(api: httpx.Client, headers: Headers) -> int:
    return api.get(NOWHERE, headers=headers).status_code


def error(answer: httpx.Response) -> tuple[int, str, str]:
    detail = answer.json()["detail"]
    return answer.status_code, detail["error"], detail["message"]


def test_a_valid_token_is_let_in(api: httpx.Client, api_database: Database) -> None:
    text = made(api_database)
    for scheme in ("Bearer", "bearer", "BEARER", "bEaReR"):
        assert status(api, bearer(text, scheme)) == HTTPStatus.NOT_FOUND


def test_a_token_that_is_not_valid_is_refused(api: httpx.Client, api_database: Database) -> None:
    name = f"s-{uuid4().hex}"
    revoked = made(api_database, name)
    servicetokens.revoke(api_database, name, now=utc_now())
    expired = made(api_database, now=utc_now() - 2 * HOUR, expires_at=utc_now() - HOUR)
    valid = made(api_database)
    for text in (
        revoked,
        expired,
        servicetokens.new_text(),
        "lnm_",
        valid.removeprefix("lnm_"),
        valid[:-1],
        valid + "x",
        valid.swapcase(),
        f"{valid} {valid}",
        f'"{valid}"',
        "x" * 20_000,
    ):
        answer = api.get(NOWHERE, headers=bearer(text))
        assert error(answer) == (401, "not_authenticated", "The service token is not valid.")
        assert answer.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize("given", [b"Bearer lnm_\xe9\xff" + b"x" * 41, b"Bearer", b"\xff", b""])
def test_what_is_no_text_is_no_token(api: httpx.Client, given: bytes) -> None:
    answer = api.get(NOWHERE, headers={b"Authorization": given})
    assert error(answer)[:2] == (401, "not_authenticated")


@pytest.mark.parametrize("scheme", ["Basic", "Token", "Bearer:", "Bearerr"])
def test_another_scheme_is_refused(api: httpx.Client, api_database: Database, scheme: str) -> None:
    answer = api.get(NOWHERE, headers=bearer(made(api_database), scheme))
    assert error(answer) == (
        401,
        "not_authenticated",
        "Authorization must be 'Bearer' and a service token.",
    )


def test_a_revoked_token_is_good_for_five_seconds_more(
    api: httpx.Client, api_database: Database, seconds: Seconds
) -> None:
    name = f"s-{uuid4().hex}"
    headers = bearer(made(api_database, name))
    assert status(api, headers) == HTTPStatus.NOT_FOUND
    servicetokens.revoke(api_database, name, now=utc_now())
    seconds.now += REMEMBERED_SECONDS - 0.001
    assert status(api, headers) == HTTPStatus.NOT_FOUND
    seconds.now += 0.001
    assert status(api, headers) == HTTPStatus.UNAUTHORIZED
    assert REMEMBERED_SECONDS <= 5


def test_a_token_that_expires_ends_at_once(api: httpx.Client, api_database: Database) -> None:
    end = utc_now() + HOUR
    headers = bearer(made(api_database, expires_at=end))
    assert status(api, headers) == HTTPStatus.NOT_FOUND
    with clock_replaced(lambda: end):
        assert status(api, headers) == HTTPStatus.UNAUTHORIZED


def test_a_stranger_is_remembered_as_one(
    api: httpx.Client, api_database: Database, seconds: Seconds
) -> None:
    text = servicetokens.new_text()
    assert status(api, bearer(text)) == HTTPStatus.UNAUTHORIZED
    servicetokens.register(
        api_database, f"s-{uuid4().hex}", text, [Scope.DEDUCT], actor="tests", now=utc_now()
    )
    assert status(api, bearer(text)) == HTTPStatus.UNAUTHORIZED
    seconds.now += REMEMBERED_SECONDS
    assert status(api, bearer(text)) == HTTPStatus.NOT_FOUND


@pytest.mark.parametrize("scope", Scope)
def test_a_scope_opens_the_gate_or_does_not(
    api: httpx.Client, callers: Callers, org_id: UUID, scope: Scope
) -> None:
    headers = callers.service(scope)
    asked = {"org_id": str(org_id), "user_id": "ada", "credits": 1, "request_id": f"r-{scope}"}
    placed = api.post(PRECHECK, json=asked, headers=headers)
    released = api.delete(f"{PRECHECK}/r-{scope}?org_id={org_id}", headers=headers)
    if scope is Scope.PRECHECK:
        assert (placed.status_code, released.status_code) == (200, 200), placed.text
    else:
        lacks = (403, "forbidden", "The service token lacks the scope precheck.")
        assert (error(placed), error(released)) == (lacks, lacks)


def test_one_scope_of_several_is_enough(api: httpx.Client, callers: Callers, org_id: UUID) -> None:
    asked = {"org_id": str(org_id), "user_id": "ada", "credits": 1, "hold": False}
    answer = api.post(PRECHECK, json=asked, headers=callers.service(*Scope))
    assert answer.status_code == HTTPStatus.OK, answer.text


def test_no_log_tells_a_token(
    api_settings: Settings,
    api: httpx.Client,
    api_database: Database,
    org_id: UUID,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    asked = {"org_id": str(org_id), "user_id": "ada", "credits": 1}
    good, narrow = made(api_database), made(api_database, scopes=[Scope.OPS_READ])
    unknown = servicetokens.new_text()
    closed = f"postgresql://nobody@{LOOPBACK}:{free_port()}/none"
    away = api_settings.model_copy(update={"database_url": SecretStr(closed)})
    with capture_logs() as logged, serving(create_app(away)) as without_database:
        answers = [
            client.post(PRECHECK, json=asked, headers=bearer(text)).status_code
            for client, text in (
                (api, good),
                (api, narrow),
                (api, unknown),
                (api, f" {good}"),
                (without_database, good),
            )
        ]
    assert answers == [200, 403, 401, 200, 503]
    assert [line["status"] for line in logged if line["event"] == "request answered"] == answers
    written = f"{logged} {caplog.text}"
    for text in (good, narrow, unknown):
        assert text.removeprefix("lnm_") not in written


@contextmanager
def tokens_locked(database_url: str) -> Iterator[None]:
    """Nobody can read the tokens meanwhile."""
    with psycopg.connect(database_url) as locking:
        locking.execute("LOCK TABLE service_tokens IN ACCESS EXCLUSIVE MODE")
        yield


@pytest.fixture
def asking(api_database_url: str) -> Iterator[Database]:
    """A database that waits a fifth of a second for an answer."""
    opened = Database(
        api_database_url,
        pool_size=8,
        statement_timeout_seconds=0.2,
        application_name="asking for tokens",
    )
    yield opened
    opened.close()


async def asked_of_a_locked_table(world: World) -> None:
    """Return once a question waits for the table."""
    await asyncio.get_running_loop().run_in_executor(None, await_lock, world)


def test_all_who_ask_at_once_are_answered_by_one_question(
    api_database: Database, api_database_url: str, api_world: World
) -> None:
    text = made(api_database)
    asking = Database(api_database_url, pool_size=8, application_name="asking at once")

    async def ask() -> list[Service]:
        tokens = ServiceTokens(asking)
        with tokens_locked(api_database_url):
            questions = [asyncio.create_task(tokens.service_of(text)) for _ in range(8)]
            await asked_of_a_locked_table(api_world)
        return await asyncio.gather(*questions)

    services = asyncio.run(ask())
    assert len(services) == 8
    assert len(set(services)) == 1
    connections = "pg_stat_activity WHERE application_name = 'asking at once'"
    assert len(api_world.rows(connections, "pid")) == 1
    asking.close()


def test_one_who_leaves_takes_the_answer_from_nobody(
    api_database: Database, api_database_url: str, api_world: World
) -> None:
    text = made(api_database)

    async def ask() -> Service:
        tokens = ServiceTokens(api_database)
        with tokens_locked(api_database_url):
            first = asyncio.create_task(tokens.service_of(text))
            second = asyncio.create_task(tokens.service_of(text))
            await asked_of_a_locked_table(api_world)
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
        return await second

    assert asyncio.run(ask()).scopes == {Scope.PRECHECK}


def test_an_answer_grows_old_while_it_is_waited_for(
    api_database: Database, api_database_url: str, api_world: World
) -> None:
    name = f"s-{uuid4().hex}"
    text = made(api_database, name)
    seconds = Seconds()

    async def ask() -> tuple[bool, bool]:
        tokens = ServiceTokens(api_database, monotonic=seconds)
        with tokens_locked(api_database_url):
            question = asyncio.create_task(is_let_in(tokens, text))
            await asked_of_a_locked_table(api_world)
            seconds.now += REMEMBERED_SECONDS
        first = await question
        servicetokens.revoke(api_database, name, now=utc_now())
        return first, await is_let_in(tokens, text)

    assert asyncio.run(ask()) == (True, False)


def test_a_question_that_fails_is_asked_again(
    api_database: Database, api_database_url: str, asking: Database
) -> None:
    text = made(api_database)

    async def ask() -> Service:
        tokens = ServiceTokens(asking)
        with tokens_locked(api_database_url):
            for _ in range(2):
                with pytest.raises(LedgerUnavailable):
                    await tokens.service_of(text)
        return await tokens.service_of(text)

    assert asyncio.run(ask()).scopes == {Scope.PRECHECK}


def test_a_failure_that_nobody_waits_for_is_not_complained_of(
    api_database: Database, api_database_url: str, asking: Database, api_world: World
) -> None:
    text = made(api_database)
    complaints: list[dict[str, Any]] = []

    async def ask() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, what: complaints.append(what))
        with tokens_locked(api_database_url):
            left = asyncio.create_task(ServiceTokens(asking).service_of(text))
            await asked_of_a_locked_table(api_world)
            left.cancel()
            this = asyncio.current_task()
            async with asyncio.timeout(20):
                await asyncio.wait([task for task in asyncio.all_tasks() if task is not this])
        assert left.cancelled()

    asyncio.run(ask())
    gc.collect()
    assert complaints == []


def test_no_more_is_remembered_than_there_is_room_for(
    api_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_servicetokens, "MOST_REMEMBERED", 2)
    names = [f"s-{uuid4().hex}" for _ in range(3)]
    texts = [made(api_database, name) for name in names]

    async def ask() -> list[bool]:
        tokens = ServiceTokens(api_database)
        for text in texts:
            await tokens.service_of(text)
        for name in names:
            servicetokens.revoke(api_database, name, now=utc_now())
        return [await is_let_in(tokens, text) for text in reversed(texts)]

    assert asyncio.run(ask()) == [True, True, False]


async def is_let_in(tokens: ServiceTokens, text: str) -> bool:
    try:
        await tokens.service_of(text)
    except NotAuthenticated:
        return False
    return True
