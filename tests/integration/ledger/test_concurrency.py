"""Threads of several processes that do everything at once to the rows of one organization.

Nobody may see an error other than a refusal, and the books have to be right afterwards. What each
actor does is fixed beforehand; only who comes first is left to chance.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

import pytest
from sqlalchemy.exc import DBAPIError

from ledger import allocations, corrections, debts, holds, pools, resets
from ledger.apply import apply_batch
from ledger.database import Database, run, sqlstate
from ledger.gate import Operation
from ledger.reconcile import reconcile
from schema.errors import Conflict, InsufficientCredits, NoAllocation, NotFound
from schema.periods import ResetPeriod
from schema.plans import PlanName
from tests.integration.ledger.world import NOW, World, entry, event, open_world

PROCESSES: Final = 2
DAYS: Final = 8
EVENTS: Final = 24
"""Requests of a day that an event reports."""
CALLS: Final = 6
"""Requests of a day that only a direct call reports."""
COST: Final = 10
REFUND: Final = 4
GRANT: Final = 500
POOL: Final = 5_000
USERS: Final = {
    "ada": ResetPeriod.DAILY,
    "bob": ResetPeriod.WEEKLY,
    "cyd": ResetPeriod.NEVER,
}
LOOKUP: Final = Operation("contact_lookup")
LASTS: Final = timedelta(minutes=1)
DAY: Final = timedelta(days=1)
BY: Final[dict[str, Any]] = {"actor": "crowd", "reason": "all at once"}
TIMEOUT_SECONDS: Final = 100

refusable = suppress(InsufficientCredits, NoAllocation, NotFound, Conflict)
"""What others made of it meanwhile; every other error is a failure, a deadlock first of all."""


_DEDUCT: Final = """
    SELECT deduct_credits(
        %(org_id)b, %(user_id)b::text, %(credits)b::bigint, 'contact_lookup',
        p_request_id => %(request_id)b::text
    )
"""


@contextmanager
def refusable_by_sql() -> Iterator[None]:
    """The same for what SQL functions raise."""
    try:
        yield
    except DBAPIError as error:
        if sqlstate(error) != "P0001":
            raise


def time_of(day: int) -> datetime:
    return NOW + day * DAY


def request(day: int, number: int) -> str:
    return f"request-{day}-{number}"


def user_of(number: int) -> str:
    return list(USERS)[number % len(USERS)]


def gate(database: Database, org_id: UUID, day: int) -> None:
    """Holds that events settle, and others that are released or expire; all under way at once."""
    now = time_of(day)
    for number in range(EVENTS):
        with refusable:
            holds.place(database, org_id, user_of(number), LOOKUP, request(day, number), LASTS, now)
        with refusable:
            holds.place(database, org_id, user_of(number), LOOKUP, f"lost-{number}", LASTS, now)
        if number % 2:
            with refusable:
                holds.release(database, org_id, request(day, number), now)
    holds.expire(database, now + LASTS)


def drain(database: Database, org_id: UUID, day: int) -> None:
    """The events of a day, half of them of the day before; each process sends them all."""
    reports = [
        event(
            org_id,
            request(day, number),
            user_id=user_of(number),
            occurred_at=time_of(day) - (number % 2) * DAY,
        )
        for number in range(EVENTS)
    ]
    with database.session() as connection:
        for start in range(0, EVENTS, 8):
            apply_batch(connection, [entry(r) for r in reports[start : start + 8]], time_of(day))


def call_sql(database: Database, org_id: UUID, day: int) -> None:
    """Direct calls: some report what events do as well."""
    for number in [*range(0, EVENTS, 3), *range(EVENTS, EVENTS + CALLS)]:
        with refusable_by_sql(), database.transaction() as connection:
            run(
                connection,
                _DEDUCT,
                org_id=org_id,
                user_id=user_of(number),
                credits=COST,
                request_id=request(day, number),
            )


def spend_and_take_back(database: Database, org_id: UUID, day: int) -> None:
    """Admins: grants and refunds under keys that every process uses, top-ups, reclaims."""
    now = time_of(day)
    pools.add(database, org_id, GRANT, **BY, key=f"grant-{day}", now=now)
    for user, period in USERS.items():
        with refusable:
            allocations.reclaim(database, org_id, user, **BY, now=now)
        with refusable:
            allocations.allocate(
                database, org_id, user, 60, reset_period=period, **BY, key=f"{user}-{day}", now=now
            )
    with refusable:
        allocations.deactivate(database, org_id, user_of(day), **BY, now=now)
    allocations.return_unused(database, now)
    with refusable:
        allocations.allocate(database, org_id, user_of(day), 30, **BY, now=now)
    refund(database, org_id, day)


def refund(database: Database, org_id: UUID, day: int) -> None:
    with refusable:
        corrections.refund(
            database, org_id, request(day, 0), REFUND, **BY, key=f"refund-{day}", now=time_of(day)
        )


def beat(database: Database, org_id: UUID, day: int) -> None:
    """What workers do by the clock."""
    for _ in range(4):
        holds.expire(database, time_of(day) + LASTS)
        resets.reset_due(database, time_of(day))
        debts.settle(database, time_of(day), org_id)


ACTORS: Final[tuple[Callable[[Database, UUID, int], None], ...]] = (
    gate,
    drain,
    call_sql,
    spend_and_take_back,
    beat,
)


def crowd(database_url: str, org_id: UUID) -> None:
    """One process: every actor in a thread of its own, for all days."""
    database = Database(database_url, pool_size=len(ACTORS))
    try:
        with ThreadPoolExecutor(len(ACTORS)) as threads:
            finish([threads.submit(live, actor, database, org_id) for actor in ACTORS])
    finally:
        database.close()


def live(actor: Callable[[Database, UUID, int], None], database: Database, org_id: UUID) -> None:
    for day in range(DAYS):
        actor(database, org_id, day)


def finish(work: list[Future[None]]) -> None:
    for one in work:
        one.result(TIMEOUT_SECONDS)


@pytest.fixture
def world(database: Database, database_url: str) -> Iterator[World]:
    with open_world(database, database_url) as opened:
        yield opened


@pytest.fixture
def org_id(world: World) -> UUID:
    """It may use a little on account, so that gates lock the pool as well."""
    org_id = world.organization(
        plan=PlanName.PLATFORM, pool=POOL, members=dict.fromkeys(USERS, "member")
    )
    for user, period in USERS.items():
        allocations.allocate(world.database, org_id, user, 100, reset_period=period, **BY, now=NOW)
    world.sql.execute(
        "UPDATE organization_credit_pools SET allow_overage = true, overage_limit = 50"
    )
    return org_id


def test_everything_at_once_charges_each_request_once(
    world: World, database_url: str, org_id: UUID
) -> None:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, spawn) as processes:
        finish([processes.submit(crowd, database_url, org_id) for _ in range(PROCESSES)])
    assert reconcile(world.database, now=NOW, org_id=org_id).drifts == []

    bring_to_an_end(world, org_id)
    assert reconcile(world.database, now=time_of(DAYS), org_id=org_id).drifts == []
    assert states(world, "request-%") == {"charged": DAYS * (EVENTS + CALLS)}
    assert set(states(world, "lost-%")) <= {"released", "expired"}
    total, allocated, used = world.pool(org_id)
    overage = world.row("organization_credit_pools")["overage_credits"]
    assert used == DAYS * ((EVENTS + CALLS) * COST - REFUND)
    assert total == POOL + DAYS * GRANT + overage
    remaining = sum(given - spent for given, spent in world.allocations(org_id).values())
    assert total == (total - allocated) + remaining + used


def bring_to_an_end(world: World, org_id: UUID) -> None:
    """Do what is due, give every user plenty, and report again what was refused in the crowd."""
    end = time_of(DAYS)
    holds.expire(world.database, end)
    resets.reset_due(world.database, end)
    for user in USERS:
        allocations.allocate(world.database, org_id, user, 900, **BY, now=end)
    debts.settle(world.database, end, org_id)
    for day in range(DAYS):
        call_sql(world.database, org_id, day)
        refund(world.database, org_id, day)


def states(world: World, request_ids: str) -> dict[str, int]:
    found = world.sql.execute(
        """
        SELECT state, count(*) AS requests FROM usage_requests
        WHERE request_id LIKE %s
        GROUP BY state
        """,
        (request_ids,),
    )
    return {row["state"]: row["requests"] for row in found}
