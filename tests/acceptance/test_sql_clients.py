"""Services that call the SQL functions over asyncpg, while the same requests come as events."""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from decimal import Decimal
from typing import Any, Final
from uuid import UUID, uuid4

import asyncpg
import pytest
from redis import Redis

from ledger.clock import utc_now
from ops.servers import wait_until
from ops.stackfile import StackFile
from producers.producer import UsageProducer
from schema.events import UsageEvent
from schema.settings import load_settings
from tests.acceptance.conftest import Metering
from worker.stream import total_depth

pytestmark = pytest.mark.acceptance

CONNECTIONS: Final = 8
USERS: Final = ("ana@x.example", "ben@x.example", "cem@x.example", "dia@x.example")
CREDITS_EACH: Final = 4000
REQUESTS: Final = 200
CREDITS: Final = 10
"""What a contact lookup costs by the price book, and what the direct calls say."""
SERVICE: Final = "contact_lookup"
PRICE: Final = Decimal("1.25")
"""USD that each service pays for the credits it adds."""

HAS: Final = "SELECT has_sufficient_credits($1, $2, $3)"
DEDUCT: Final = "SELECT deduct_credits($1, $2, $3, $4, $5, $6, $7)"
ADD: Final = "SELECT add_credits_to_pool($1, $2, $3)"
ALLOCATE: Final = "SELECT allocate_credits_to_user($1, $2, $3, $4)"

CHARGES: Final = """
    SELECT request_id, count(*), sum(credits_used)::bigint
    FROM credit_usage_attribution
    WHERE org_id = $1
    GROUP BY request_id
"""
STATES: Final = "SELECT DISTINCT state FROM usage_requests WHERE org_id = $1"
SOURCES: Final = "SELECT DISTINCT source FROM credit_usage_attribution WHERE org_id = $1"
BALANCES: Final = """
    SELECT DISTINCT allocated_credits, used_credits, remaining_credits, held_credits
    FROM user_credit_allocations
    WHERE org_id = $1
"""
POOL: Final = """
    SELECT total_credits, allocated_credits, used_credits, available_credits,
        lifetime_purchased_credits, lifetime_spent_amount
    FROM organization_credit_pools
    WHERE org_id = $1
"""
LETTERS: Final = "SELECT reason, detail FROM dead_letters WHERE org_id = $1"

Work = Callable[[asyncpg.Connection], Awaitable[None]]


class Services:
    """What eight services do at once, each over a connection of its own."""

    def __init__(self, stack: StackFile, org_id: UUID) -> None:
        self.url = stack.database_url
        self.org_id = org_id

    def each(self, work: Work) -> None:
        """Let all of them do the same at the same time."""
        asyncio.run(self._each(work))

    async def _each(self, work: Work) -> None:
        opened = [await asyncpg.connect(self.url) for _ in range(CONNECTIONS)]
        try:
            await asyncio.gather(*(work(connection) for connection in opened))
        finally:
            for connection in opened:
                await connection.close()

    def ask(self, question: Callable[[asyncpg.Connection], Awaitable[Any]]) -> Any:
        """What one of them finds out."""

        async def asked() -> Any:
            connection = await asyncpg.connect(self.url)
            try:
                return await question(connection)
            finally:
                await connection.close()

        return asyncio.run(asked())

    def one(self, sql: str, *arguments: object) -> Any:
        """The single value that a query answers."""
        return self.ask(lambda connection: connection.fetchval(sql, *arguments))

    async def deduct(self, connection: asyncpg.Connection, numbers: Sequence[int]) -> None:
        """Ask for each request whether it may run, and charge it."""
        for number in numbers:
            user = user_of(number)
            assert await connection.fetchval(HAS, self.org_id, user, CREDITS) is True
            done = await connection.fetchval(
                DEDUCT, self.org_id, user, CREDITS, SERVICE, "Lookup", f"r-{number}",
                json.dumps({"company_id": f"c-{number}"}),
            )  # fmt: skip
            assert done is True


def user_of(number: int) -> str:
    return USERS[number % len(USERS)]


@pytest.fixture
def services(stack: StackFile) -> Services:
    """Services of a new organization that has no credits yet."""
    org_id = uuid4()
    new = Services(stack, org_id)
    new.one(
        "INSERT INTO organizations (id, name, display_name) VALUES ($1, $2, $3)",
        *(org_id, f"o-{org_id}", "Called over SQL"),
    )
    return new


@pytest.fixture
def producer(stack: StackFile) -> Iterator[UsageProducer]:
    settings = load_settings(
        redis_url=stack.redis_url, broker_url=stack.broker_url, shards=stack.shards
    )
    with UsageProducer(settings) as opened:
        yield opened


def emit(producer: UsageProducer, org_id: UUID, numbers: Sequence[int]) -> None:
    now = utc_now().isoformat()
    producer.emit_many(
        UsageEvent.of(
            request_id=f"r-{number}",
            org_id=str(org_id),
            user_id=user_of(number),
            service_type=SERVICE,
            occurred_at=now,
        )
        for number in numbers
    )


def wait_until_drained(stack: StackFile) -> None:
    with Redis.from_url(stack.redis_url) as client:
        wait_until(lambda: total_depth(client, stack.shards) == 0, "an empty queue", 60)


def found(services: Services, sql: str) -> list[tuple[Any, ...]]:
    """The rows of a query about the organization, sorted."""
    rows = services.ask(lambda connection: connection.fetch(sql, services.org_id))
    return sorted(tuple(row) for row in rows)


def fund(services: Services) -> None:
    """All eight buy and hand out an eighth of the credits at once."""
    share = CREDITS_EACH // CONNECTIONS

    async def buy(connection: asyncpg.Connection) -> None:
        assert await connection.fetchval(ADD, services.org_id, share * len(USERS), PRICE) is True

    async def hand_out(connection: asyncpg.Connection) -> None:
        for user in random.sample(USERS, len(USERS)):
            done = await connection.fetchval(ALLOCATE, services.org_id, user, share, "boss")
            assert done is True

    services.each(buy)
    services.each(hand_out)


def test_requests_through_both_doors_at_once_are_charged_once(
    stack: StackFile, metering: Metering, services: Services, producer: UsageProducer
) -> None:
    fund(services)
    everything = range(REQUESTS)
    quarter = REQUESTS // 4
    # Each door is the first for some requests, and nobody knows which for those in between.
    services.each(lambda connection: services.deduct(connection, everything[:quarter]))
    emit(producer, services.org_id, everything[-quarter:])
    wait_until_drained(stack)

    async def call_and_emit(connection: asyncpg.Connection) -> None:
        mine = random.sample(everything, REQUESTS)
        for start in range(0, REQUESTS, quarter):
            part = mine[start : start + quarter]
            await asyncio.to_thread(emit, producer, services.org_id, part)
            await services.deduct(connection, part[::-1])

    services.each(call_and_emit)
    wait_until_drained(stack)

    once = sorted((f"r-{number}", 1, CREDITS) for number in everything)
    assert found(services, CHARGES) == once
    assert found(services, STATES) == [("charged",)]
    assert found(services, SOURCES) == [("loopnet",), ("sql",)]
    used = REQUESTS // len(USERS) * CREDITS
    assert found(services, BALANCES) == [(CREDITS_EACH, used, CREDITS_EACH - used, 0)]
    total = CREDITS_EACH * len(USERS)
    paid = PRICE * CONNECTIONS
    assert found(services, POOL) == [(total, total, REQUESTS * CREDITS, 0, total, paid)]
    assert found(services, LETTERS) == []
    assert metering("reconcile").code == 0


@pytest.mark.parametrize(
    ("call", "types"),
    [
        (HAS, ["uuid", "varchar", "int8"]),
        (DEDUCT, ["uuid", "varchar", "int8", "varchar", "varchar", "varchar", "jsonb"]),
        (ADD, ["uuid", "int8", "numeric"]),
        (ALLOCATE, ["uuid", "varchar", "int8", "varchar"]),
    ],
    ids=["has_sufficient_credits", "deduct_credits", "add_credits_to_pool", "allocate"],
)
def test_positional_parameters_have_the_types_of_the_contract(
    services: Services, call: str, types: list[str]
) -> None:
    async def prepare(connection: asyncpg.Connection) -> list[str]:
        statement = await connection.prepare(call)
        return [parameter.name for parameter in statement.get_parameters()]

    assert services.ask(prepare) == types


@pytest.mark.parametrize(
    ("call", "arguments", "message"),
    [
        (
            DEDUCT,
            ("ana", 41, SERVICE, None, "r-1", None),
            "Insufficient credits: 40 available, 41 needed",
        ),
        (
            DEDUCT,
            ("eve", 1, SERVICE, None, "r-2", None),
            "No credit allocation found for user eve in org {org_id}",
        ),
        (
            ALLOCATE,
            ("ana", 61, "boss"),
            "Insufficient credits in pool: 60 available, 61 needed",
        ),
    ],
    ids=["credits", "allocation", "pool"],
)
def test_refusals_speak_the_words_of_the_contract(
    services: Services, call: str, arguments: tuple[object, ...], message: str
) -> None:
    services.one(ADD, services.org_id, 100, Decimal(0))
    services.one(ALLOCATE, services.org_id, "ana", 40, None)
    with pytest.raises(asyncpg.RaiseError) as caught:
        services.one(call, services.org_id, *arguments)
    assert caught.value.sqlstate == "P0001"
    assert caught.value.args == (message.format(org_id=services.org_id),)


def test_nothing_is_handed_out_without_a_pool(services: Services) -> None:
    with pytest.raises(asyncpg.RaiseError) as caught:
        services.one(ALLOCATE, services.org_id, "ana", 1, None)
    assert caught.value.args == (f"No credit pool found for org {services.org_id}",)
    assert services.one(HAS, services.org_id, "ana", 1) is False
