"""The gate for event loops: a check or a hold in one round trip to PostgreSQL (design decision D9).

Connections commit each statement by itself and keep it prepared, so that a question costs its
answer and no more: no thread, no BEGIN, no COMMIT, no parsing. `docs/adr/0007` says why.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Final, LiteralString, NamedTuple, Self
from uuid import UUID

from psycopg import AsyncConnection, OperationalError
from psycopg_pool import AsyncConnectionPool, PoolClosed, PoolTimeout

from ledger import holds
from ledger.clock import utc_now
from ledger.database import connection_options, outages_named, sqlstate
from ledger.decisions import MAX_CHARGE
from ledger.gate import Operation, refusal
from ledger.holds import Hold
from ledger.together import Together
from schema.errors import LedgerUnavailable
from schema.settings import Settings

CONNECTIONS: Final = 8
"""Few: sessions that outnumber the cores take turns, and it is the slowest answers that wait."""
WAIT_SECONDS: Final = 2.0
"""Longest wait for a connection that is free."""

STATEMENT_SECONDS: Final = 5.0
"""Longest statement, with its waits for locks: nobody has a use for a later answer."""
CHECKS_TOGETHER: Final = 100
"""Most questions of advice in one statement."""
CHECKS_AT_ONCE: Final = 2
"""Statements with advice under way; questions that come meanwhile go together in the next one."""

_CUT: Final = (None, "57P01", "57P02", "57P03")
"""No answer at all, or: the server is shutting down, has crashed, is starting."""

Row = tuple[Any, ...]

# Always one row for each question, so that one round trip tells everything there is to say.
_CHECK: Final = """
    SELECT
        ceil(price_of(asked.service_type, asked.variant, %(now)b) * asked.quantity),
        a.remaining_credits - a.held_credits,
        CASE WHEN p.allow_overage THEN overage_room(p.org_id) ELSE 0 END,
        CASE
            WHEN a.id IS NULL OR m.user_id IS NULL OR o.status <> 'active'
            THEN why_not_spend(asked.org_id, asked.user_id)
        END
    FROM unnest(
        %(org_ids)b::uuid[], %(user_ids)b::varchar[], %(service_types)b::varchar[],
        %(variants)b::varchar[], %(quantities)b::numeric[]
    ) WITH ORDINALITY AS asked (org_id, user_id, service_type, variant, quantity, number)
    LEFT JOIN organizations o ON o.id = asked.org_id
    LEFT JOIN organization_members m ON m.org_id = asked.org_id AND m.user_id = asked.user_id
    LEFT JOIN organization_credit_pools p ON p.org_id = asked.org_id
    LEFT JOIN user_credit_allocations a
        ON a.org_id = asked.org_id AND a.user_id = asked.user_id AND a.is_active
    ORDER BY asked.number
"""


class _Check(NamedTuple):
    """A question of advice."""

    org_id: UUID
    user_id: str
    operation: Operation


@dataclass(frozen=True, slots=True)
class Advice:
    """The operation may run. Both figures are credits, and nothing is held."""

    credits: int
    """What the operation will cost."""
    remaining: int
    """What the user can spend before it: remaining credits less those held by others."""


class AsyncGate:
    """Asks the ledger whether operations may run; open it inside the event loop that uses it."""

    def __init__(self, settings: Settings) -> None:
        options = connection_options(
            application_name="metering gate",
            statement_timeout_seconds=min(
                STATEMENT_SECONDS, settings.api_statement_timeout_seconds
            ),
            role=settings.database_role,
        )
        self._pool: AsyncConnectionPool[AsyncConnection[Row]] = AsyncConnectionPool(
            settings.database_url.get_secret_value(),
            min_size=1,
            max_size=CONNECTIONS,
            open=False,
            timeout=WAIT_SECONDS,
            # One that is away for long is looked for by the next question, not forever.
            reconnect_timeout=WAIT_SECONDS,
            kwargs={"autocommit": True, **options},
        )
        self._checks: Together[_Check, Row] = Together(
            self._check_all, most=CHECKS_TOGETHER, at_once=CHECKS_AT_ONCE
        )

    async def __aenter__(self) -> Self:
        await self._pool.open(wait=False)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._pool.close()

    async def check(self, org_id: UUID, user_id: str, operation: Operation) -> Advice:
        """Say whether allocation and overage cover the operation at this moment.

        Raises:
            InvalidRequest: the operation has no price, its credits contradict the price book, or
                it costs more than one request can.
            NotFound: there is no such organization.
            Forbidden: it is suspended or closed.
            NotAMember: the user does not belong to it.
            NoAllocation: the user has no active allocation in it.
            InsufficientCredits: the allocation is too small, by `required` and `remaining`.
            LedgerUnavailable: PostgreSQL does not answer.
        """
        question = _Check(org_id, user_id, operation)
        cost, available, overage_room, why_not = await self._checks.answer(question)
        outcome, credits = _priced(cost, operation.credits)
        if outcome is None:
            outcome = why_not
        if outcome is None and available + overage_room < credits:
            outcome = "insufficient_credits"
        if outcome is None:
            return Advice(credits, available)
        raise refusal(
            outcome, org_id=org_id, user_id=user_id, credits=credits, available=available or 0
        )

    async def place(
        self,
        org_id: UUID,
        user_id: str,
        operation: Operation,
        request_id: str,
        lasts: timedelta,
        now: datetime,
    ) -> Hold:
        """Price an operation and set its credits aside, as `ledger.holds.place` does."""
        parameters = holds.placing(org_id, user_id, operation, request_id, lasts, now)
        (row,) = await self._ask(holds.PLACE, parameters)
        return holds.placed(row, org_id, user_id, request_id)

    async def release(
        self, org_id: UUID, request_id: str, now: datetime, user_id: str | None = None
    ) -> None:
        """Give a hold's credits back, as `ledger.holds.release` does."""
        ((state,),) = await self._ask(
            holds.RELEASE,
            {"org_id": org_id, "request_id": request_id, "now": now, "user_id": user_id},
        )
        holds.check_released(state, org_id, request_id)

    async def _check_all(self, questions: Sequence[_Check]) -> list[Row]:
        operations = [question.operation for question in questions]
        return await self._ask(
            _CHECK,
            {
                "org_ids": [question.org_id for question in questions],
                "user_ids": [question.user_id for question in questions],
                "service_types": [operation.service_type for operation in operations],
                "variants": [operation.variant for operation in operations],
                "quantities": [operation.quantity for operation in operations],
                "now": utc_now(),
            },
        )

    async def _ask(self, sql: LiteralString, parameters: Mapping[str, object]) -> list[Row]:
        """The rows that a statement answers, committed.

        Every statement here may be sent twice, so one that met a connection which had been cut
        while it was idle is sent again over another.
        """
        with _outages_named():
            try:
                return await self._send(sql, parameters)
            except OperationalError as error:
                if not _was_cut(error):
                    raise
                await self._pool.check()
                return await self._send(sql, parameters)

    async def _send(self, sql: LiteralString, parameters: Mapping[str, object]) -> list[Row]:
        connection = await self._pool.getconn()
        try:
            cursor = await connection.execute(sql, parameters, prepare=True, binary=True)
            return await cursor.fetchall()
        finally:
            await self._pool.putconn(connection)


def _priced(cost: Decimal | None, stated: int | None) -> tuple[str | None, int]:
    """What is wrong with the price of an operation, if anything, and its credits."""
    if cost is None:
        return ("unknown_service", 0) if stated is None else (None, stated)
    if cost > MAX_CHARGE:
        return "out_of_range", 0
    credits = int(cost)
    return (None if stated in (None, credits) else "price_mismatch"), credits


def _was_cut(error: OperationalError) -> bool:
    """Whether the server, or what is between, ended the connection; another one may do."""
    return sqlstate(error) in _CUT and not isinstance(error, PoolTimeout | PoolClosed)


@contextmanager
def _outages_named() -> Iterator[None]:
    with outages_named():
        try:
            yield
        except (PoolTimeout, PoolClosed) as error:
            raise LedgerUnavailable(f"PostgreSQL does not answer: {error}") from error
