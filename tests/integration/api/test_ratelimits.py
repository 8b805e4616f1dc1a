"""Rate limits: exactly so many requests a minute, from however many clients and processes."""

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from uuid import uuid4

import httpx
import pytest
from limits import RateLimitItem, RateLimitItemPerDay, RateLimitItemPerSecond
from limits.aio.storage import RedisStorage
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr
from redis import Redis
from redis.asyncio import ConnectionPool
from structlog.testing import capture_logs

from api import breaker, windows
from api.app import create_app
from api.breaker import Breaker
from api.ratelimits import KEY_PREFIX, Policy, policy_of
from api.windows import LeasedWindow, MovingWindow, Standing, Window
from ops.servers import EmbeddedPostgres, EmbeddedValkey, wait_until
from schema.scopes import Scope
from schema.settings import Settings
from tests.conftest import server_directory
from tests.integration.api.answers import refused
from tests.integration.api.conftest import Callers, Headers, serving

BILLING = "/api/v1/org-billing"
NOWHERE = f"{BILLING}/there-is-nothing-here"
PRECHECK = "/api/v1/precheck"
LIMIT_HEADERS = {"x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset"}
READS = 100
WRITES = 20
GATE = 150


@pytest.fixture(scope="module")
def limited(api_settings: Settings) -> Settings:
    """Settings with the contract's limits, and a gate small enough to be run against its own."""
    update = {
        "read_limit_per_minute": READS,
        "write_limit_per_minute": WRITES,
        "gate_limit_per_minute": GATE,
    }
    return api_settings.model_copy(update=update)


@pytest.fixture(scope="module")
def clients(limited: Settings) -> Iterator[list[httpx.Client]]:
    """Clients of two apps that share one Redis."""
    with ExitStack() as stack:
        yield [stack.enter_context(serving(create_app(limited))) for _ in range(2)]


@pytest.fixture
def somebody(callers: Callers) -> Headers:
    """A user who has not sent anything yet."""
    return callers.user(f"user-{uuid4().hex}")


def in_parallel(send: Callable[[int], httpx.Response], number: int) -> list[httpx.Response]:
    with ThreadPoolExecutor(16) as threads:
        return list(threads.map(send, range(number)))


def statuses(answers: list[httpx.Response]) -> Counter[int]:
    return Counter(answer.status_code for answer in answers)


@pytest.mark.parametrize(
    ("method", "path", "policy"),
    [
        ("GET", BILLING, Policy.READ),
        ("HEAD", f"{BILLING}/credits/1", Policy.READ),
        ("POST", f"{BILLING}/credits/1/add", Policy.WRITE),
        ("PUT", f"{BILLING}/subscriptions/1/upgrade", Policy.WRITE),
        ("DELETE", f"{BILLING}/subscriptions/1", Policy.WRITE),
        ("PROPFIND", f"{BILLING}/subscriptions/1", Policy.WRITE),
        ("POST", f"{BILLING}/credits/1/deduct", Policy.INGEST),
        ("GET", f"{BILLING}/credits/1/deduct", Policy.READ),
        ("POST", f"{BILLING}/credits/1/2/deduct", Policy.WRITE),
        ("POST", f"{BILLING}/credits/1/deduct/", Policy.WRITE),
        ("POST", PRECHECK, Policy.GATE),
        ("DELETE", f"{PRECHECK}/r-1", Policy.GATE),
        ("POST", f"{PRECHECK}s", Policy.OPS),
        ("POST", "/api/v1/usage/events", Policy.INGEST),
        ("GET", "/api/v1/usage/requests/r-1", Policy.OPS),
        ("GET", "/api/v1/ops/queues", Policy.OPS),
        ("GET", f"{BILLING}s", Policy.OPS),
    ],
)
def test_what_is_counted_together(method: str, path: str, policy: Policy) -> None:
    assert policy_of(method, path) is policy


def test_exactly_as_many_reads_and_writes_pass_from_parallel_clients(
    clients: list[httpx.Client], somebody: Headers, callers: Callers
) -> None:
    def send(number: int) -> httpx.Response:
        method = "POST" if number % 3 == 0 else "GET"
        return clients[number % 2].request(method, NOWHERE, headers=somebody)

    answers = in_parallel(send, 240)
    by_method = {
        method: statuses([answer for answer in answers if answer.request.method == method])
        for method in ("GET", "POST")
    }
    assert by_method == {
        "GET": Counter({404: READS, 429: 160 - READS}),
        "POST": Counter({404: WRITES, 429: 80 - WRITES}),
    }
    somebody_else = callers.user(f"user-{uuid4().hex}")
    for client in clients:
        refused(client.get(NOWHERE, headers=somebody_else), 404, "not_found")
        refused(client.post(NOWHERE, headers=somebody_else), 404, "not_found")


def test_headers_tell_where_the_caller_stands(
    clients: list[httpx.Client], somebody: Headers
) -> None:
    for number in range(1, WRITES + 1):
        answer = clients[number % 2].post(NOWHERE, headers=somebody)
        assert answer.headers["X-RateLimit-Limit"] == str(WRITES)
        assert answer.headers["X-RateLimit-Remaining"] == str(WRITES - number)
        assert 0 < int(answer.headers["X-RateLimit-Reset"]) - time.time() <= 61
        assert "Retry-After" not in answer.headers
    over = clients[0].post(NOWHERE, headers=somebody)
    detail = refused(over, 429, "rate_limit_exceeded")
    assert over.headers["X-RateLimit-Remaining"] == "0"
    assert over.headers["Retry-After"] == str(detail["retry_after"])
    until_reset = int(over.headers["X-RateLimit-Reset"]) - time.time()
    assert 1 <= detail["retry_after"] <= 60
    assert abs(until_reset - detail["retry_after"]) < 2


def test_answers_of_every_kind_count_and_say_so(
    clients: list[httpx.Client], callers: Callers
) -> None:
    service = callers.service(Scope.USAGE_WRITE)
    client = clients[0]
    json = service | {"Content-Type": "application/json"}
    may = callers.service(Scope.PRECHECK) | {"Content-Type": "application/json"}
    answers = [
        client.post(PRECHECK, headers=json, content=b"{}"),  # lacks the scope
        client.get(PRECHECK, headers=json),
        client.get(f"{PRECHECK}/nothing/here", headers=json),
        client.post(PRECHECK, headers=may, content=b"{"),
        client.post(PRECHECK, headers=may, content=b" " * 100_000),
    ]
    assert [answer.status_code for answer in answers] == [403, 405, 404, 422, 413]
    assert all(answer.headers["X-RateLimit-Limit"] == str(GATE) for answer in answers)
    assert all(int(answer.headers["X-RateLimit-Remaining"]) < GATE for answer in answers)


def test_preflights_and_strangers_are_not_counted(
    clients: list[httpx.Client], somebody: Headers
) -> None:
    client = clients[0]
    preflight = {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "POST"}
    for _ in range(WRITES + 1):
        answer = client.options(NOWHERE, headers=somebody | preflight)
        assert answer.status_code == 200
        assert not LIMIT_HEADERS & answer.headers.keys()
        stranger = client.post(NOWHERE)
        refused(stranger, 401, "not_authenticated")
        assert not LIMIT_HEADERS & stranger.headers.keys()
    assert client.get("/livez", headers=somebody).status_code == 200
    counted = client.post(NOWHERE, headers=somebody)
    assert counted.headers["X-RateLimit-Remaining"] == str(WRITES - 1)


def test_the_limit_comes_before_rights_and_input(
    clients: list[httpx.Client], callers: Callers
) -> None:
    service = callers.service(Scope.USAGE_WRITE) | {"Content-Type": "application/json"}
    answers = in_parallel(
        lambda number: clients[number % 2].post(PRECHECK, headers=service, content=b"{"),
        3 * GATE,  # more than two minutes' worth, should one end meanwhile
    )
    assert set(statuses(answers)) == {403, 429}


def test_the_gate_never_lets_more_pass_than_its_limit(
    clients: list[httpx.Client], callers: Callers
) -> None:
    service = callers.service(Scope.PRECHECK)
    answers = in_parallel(
        lambda number: clients[number % 2].get(PRECHECK, headers=service),
        3 * GATE,  # more than two minutes' worth, should one end meanwhile
    )
    passed = Counter(
        answer.headers["X-RateLimit-Reset"] for answer in answers if answer.status_code == 405
    )
    over = Counter(
        answer.headers["X-RateLimit-Reset"] for answer in answers if answer.status_code == 429
    )
    assert max(passed.values()) <= GATE
    assert all(passed[window] == GATE for window in over)
    assert over


@asynccontextmanager
async def storage_of(redis_url: str) -> AsyncIterator[RedisStorage]:
    pool: ConnectionPool = ConnectionPool.from_url(redis_url, protocol=2)
    try:
        yield RedisStorage(
            "async+redis://",
            implementation="redispy",
            key_prefix=KEY_PREFIX,
            connection_pool=pool,  # type: ignore[arg-type]
        )
    finally:
        await pool.aclose()


async def passes_within(window: Window, seconds: float) -> list[tuple[float, Standing]]:
    """When requests passed of one identity that sends without a pause, and its standing then."""
    passed = []
    deadline = time.time() + seconds
    while (now := time.time()) < deadline:
        standing = await window.count("ada")
        if standing.passed:
            passed.append((now, standing))
    return passed


def test_a_moving_window_holds_in_any_stretch_of_time(redis_url: str) -> None:
    async def sent() -> list[float]:
        async with storage_of(redis_url) as storage:
            window = MovingWindow(RateLimitItemPerSecond(5), storage, Breaker())
            return [at for at, _ in await passes_within(window, 3.2)]

    passed = asyncio.run(sent())
    assert len(passed) >= 15
    # `passed` is when a request was about to be counted, so two may seem a little closer.
    sixths = zip(passed, passed[5:], strict=False)
    assert min(later - first for first, later in sixths) > 0.98


def test_a_leased_window_ends_with_what_is_held(redis_url: str) -> None:
    async def sent() -> list[float]:
        async with storage_of(redis_url) as storage:
            item = RateLimitItemPerSecond(20)
            processes = [LeasedWindow(item, storage, Breaker()) for _ in range(2)]
            both = await asyncio.gather(*(passes_within(window, 3.2) for window in processes))
            return [standing.reset_at for one in both for _, standing in one]

    by_window = Counter(asyncio.run(sent()))
    assert len(by_window) >= 4
    assert max(by_window.values()) == 20
    assert sorted(by_window.values())[-3:] == [20, 20, 20]  # the last may have been cut short


def leased_by(redis_url: str, item: RateLimitItem, numbers: list[int]) -> tuple[list[int], int]:
    """How many of so many requests pass in each of several processes, and what they took."""

    async def sent() -> list[int]:
        async with storage_of(redis_url) as storage:
            processes = [LeasedWindow(item, storage, Breaker()) for _ in numbers]
            asked = [
                [window.count("ada") for _ in range(number)]
                for window, number in zip(processes, numbers, strict=True)
            ]
            answered = await asyncio.gather(*(asyncio.gather(*counts) for counts in asked))
            return [sum(standing.passed for standing in standings) for standings in answered]

    passed = asyncio.run(sent())
    with Redis.from_url(redis_url) as redis:
        (key,) = redis.keys(f"{KEY_PREFIX}:*")
        return passed, int(redis.get(key) or 0)


def test_processes_share_a_limit_to_the_last_hit(redis_url: str) -> None:
    passed, _ = leased_by(redis_url, RateLimitItemPerDay(7_100), [5_000, 5_000])
    assert sum(passed) == 7_100


def test_requests_that_wait_take_one_portion_for_all(redis_url: str) -> None:
    passed, taken = leased_by(redis_url, RateLimitItemPerDay(100_000), [100])
    assert passed == [100]
    assert taken == 100


def test_a_process_keeps_leases_of_so_many_identities(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "MOST_IDENTITIES", 2)

    async def sent() -> list[Standing]:
        async with storage_of(redis_url) as storage:
            window = LeasedWindow(RateLimitItemPerDay(5_000), storage, Breaker())
            return [await window.count(identity) for identity in ("a", "b", "a", "c", "a")]

    remaining = [standing.remaining for standing in asyncio.run(sent())]
    # The portion of five that the first held went with it when the third came.
    assert remaining == [4_999, 4_999, 4_998, 4_999, 4_994]


@pytest.fixture
def valkey() -> Iterator[EmbeddedValkey]:
    """A server of the test's own, to be stopped."""
    with server_directory() as directory:
        server = EmbeddedValkey(directory / "valkey")
        server.prepare()
        server.start()
        try:
            server.wait_ready()
            yield server
        finally:
            server.stop()


@pytest.fixture
def alone(limited: Settings, valkey: EmbeddedValkey) -> Iterator[httpx.Client]:
    """A client of an app on that server."""
    settings = limited.model_copy(update={"redis_url": SecretStr(valkey.url)})
    with serving(create_app(settings)) as client:
        yield client


def unchecked(client: httpx.Client) -> dict[str, float]:
    answer = client.get("/metrics").raise_for_status()
    return {
        sample.labels["policy"]: sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
        if sample.name == "metering_rate_limit_unchecked_total"
    }


def is_counted(client: httpx.Client, headers: Headers) -> bool:
    return client.get(NOWHERE, headers=headers).headers.keys() >= LIMIT_HEADERS


def test_without_redis_reads_and_the_gate_go_on_until_it_is_back(
    alone: httpx.Client,
    valkey: EmbeddedValkey,
    somebody: Headers,
    callers: Callers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(breaker, "RETRY_SECONDS", 0.0)  # every request tries, and none logs it
    service = callers.service(Scope.PRECHECK)
    assert is_counted(alone, somebody)
    valkey.stop()
    with capture_logs() as logs:
        for _ in range(READS + 1):
            answer = alone.get(NOWHERE, headers=somebody)
            refused(answer, 404, "not_found")
            assert not LIMIT_HEADERS & answer.headers.keys()
        assert alone.get(PRECHECK, headers=service).status_code == 405
        assert alone.get("/api/v1/ops/nothing", headers=somebody).status_code == 404
        for path in (NOWHERE, f"{BILLING}/credits/{uuid4()}/deduct", "/api/v1/usage/events"):
            answer = alone.post(path, headers=somebody)
            detail = refused(answer, 503, "unavailable")
            assert int(answer.headers["Retry-After"]) == detail["retry_after"] >= 1
        assert unchecked(alone) == {
            "read": READS + 1,
            "write": 0,
            "gate": 1,
            "ingest": 0,
            "ops": 1,
        }
        valkey.start()
        valkey.wait_ready()
        wait_until(lambda: is_counted(alone, somebody), "the count of requests", 10)
    refused(alone.post(NOWHERE, headers=somebody), 404, "not_found")
    assert alone.get(PRECHECK, headers=service).headers.keys() >= LIMIT_HEADERS
    told = [entry["event"] for entry in logs if "counted" in entry["event"]]
    assert told == [
        "requests cannot be counted: Redis does not answer",
        "requests are counted again: Redis answers",
    ]


def test_a_redis_that_hangs_costs_no_request_much_time(
    alone: httpx.Client, valkey: EmbeddedValkey, somebody: Headers
) -> None:
    assert is_counted(alone, somebody)
    assert valkey.child is not None
    assert valkey.child.pid is not None
    os.kill(valkey.child.pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        for _ in range(100):
            assert not is_counted(alone, somebody)
        assert time.monotonic() - started < 4
    finally:
        os.kill(valkey.child.pid, signal.SIGCONT)
    wait_until(lambda: is_counted(alone, somebody), "the count of requests", 10)


def test_an_event_loop_that_is_kept_busy_is_no_outage(redis_url: str) -> None:
    async def sent() -> Standing:
        async with storage_of(redis_url) as storage:
            window = MovingWindow(RateLimitItemPerDay(5), storage, Breaker())
            await window.count("ada")
            counted = asyncio.create_task(window.count("ada"))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            time.sleep(0.15)  # noqa: ASYNC251 - this is what is tested
            return await counted

    assert asyncio.run(sent()).remaining == 3


def test_keys_stay_below_their_prefix_and_go_by_themselves(
    clients: list[httpx.Client],
    somebody: Headers,
    servers: tuple[EmbeddedPostgres, EmbeddedValkey],
) -> None:
    with Redis.from_url(servers[1].url) as redis:
        before = set(redis.keys())
        clients[0].get(NOWHERE, headers=somebody)
        clients[0].get(PRECHECK, headers=somebody)
        made = set(redis.keys()) - before
        assert len(made) == 2
        assert all(key.startswith(b"metering:limits:") for key in made)
        assert all(0 < redis.ttl(key) <= 120 for key in made)
