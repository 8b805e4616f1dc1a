"""Organizations, credits and events for the tests of the ledger, and its tables read back whole."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import count
from typing import Any, Final
from uuid import UUID, uuid4

import psycopg
from psycopg.rows import dict_row
from pydantic_core import to_json

from ledger.apply import apply_batch
from ledger.database import Database
from ledger.decisions import Entry, Outcome
from schema.events import UsageEvent
from schema.plans import PLANS, PlanName
from schema.tables import metadata

NOW: Final = datetime(2026, 3, 15, 12, 30, tzinfo=UTC)
"""The time of every decision that a test does not date otherwise."""

STREAM: Final = "metering:usage:0"
TABLES: Final = tuple(sorted(metadata.tables))

Row = dict[str, Any]

_entry_numbers = count(1)


def event(org_id: UUID, request_id: str = "r-1", **fields: Any) -> UsageEvent:
    """A contact lookup (10 credits) of user `ada` at `NOW`, unless `fields` say otherwise."""
    return UsageEvent.of(**fields_of(org_id, request_id, **fields))


def fields_of(
    org_id: UUID,
    request_id: str = "r-1",
    **fields: Any,
) -> dict[str, Any]:
    """The fields of `event`, for tests that want to break one."""
    usual = {
        "request_id": request_id,
        "org_id": str(org_id),
        "user_id": "ada",
        "service_type": "contact_lookup",
        "occurred_at": NOW.isoformat(),
    }
    return usual | fields


def entry(content: UsageEvent | Mapping[str, Any] | bytes) -> Entry:
    """A stream entry of its own id around an event, its fields or raw bytes."""
    match content:
        case bytes():
            payload = content
        case UsageEvent():
            payload = content.to_json()
        case _:
            payload = to_json(content)
    return Entry(payload, STREAM, f"{next(_entry_numbers)}-0")


class World:
    """One database, seen through SQL as other services see it, and through the ledger."""

    def __init__(self, database: Database, sql: psycopg.Connection[Row]) -> None:
        self.database = database
        self.sql = sql

    def organization(
        self,
        *,
        plan: PlanName | None = None,
        pool: int | None = None,
        allocations: Mapping[str, int] | None = None,
        members: Mapping[str, str] | None = None,
        is_test: bool = False,
    ) -> UUID:
        """A new organization. `allocations` are credits by user, `members` roles by user.

        Who has an allocation is a member as well.
        """
        org_id = uuid4()
        self.sql.execute(
            "INSERT INTO organizations (id, name, display_name, is_test) VALUES (%s, %s, %s, %s)",
            (org_id, f"org-{org_id}", "An organization", is_test),
        )
        if plan:
            self.subscribe(org_id, plan)
        if pool:
            self.sql.execute("SELECT add_credits_to_pool(%s, %s)", (org_id, pool))
        for user_id, role in (members or {}).items():
            self.join(org_id, user_id, role)
        for user_id, credits in (allocations or {}).items():
            self.allocate(org_id, user_id, credits)
        return org_id

    def join(self, org_id: UUID, user_id: str, role: str = "member") -> None:
        """Make a user a member of the organization, unless they are one."""
        self.sql.execute(
            "INSERT INTO organization_members (org_id, user_id, role) VALUES (%s, %s, %s)"
            " ON CONFLICT DO NOTHING",
            (org_id, user_id, role),
        )

    def leave(self, org_id: UUID, user_id: str) -> None:
        """Take a user's membership away, and nothing else."""
        self.sql.execute(
            "DELETE FROM organization_members WHERE org_id = %s AND user_id = %s",
            (org_id, user_id),
        )

    def subscribe(self, org_id: UUID, plan: PlanName, status: str = "active") -> None:
        """Give the organization a subscription at the plan's price."""
        self.sql.execute(
            """
            INSERT INTO organization_subscriptions
                (org_id, subscription_plan, monthly_price, status)
            VALUES (%s, %s, %s, %s)
            """,
            (org_id, plan.value, PLANS[plan].monthly_price, status),
        )

    def allocate(self, org_id: UUID, user_id: str, credits: int) -> None:
        """Move credits from the pool to a user, who is a member from then on."""
        self.join(org_id, user_id)
        self.sql.execute("SELECT allocate_credits_to_user(%s, %s, %s)", (org_id, user_id, credits))

    def deduct(self, org_id: UUID, request_id: str, credits: int = 10, **fields: object) -> bool:
        """Charge one request by a direct SQL call."""
        named = {"user_id": "ada", "service_type": "contact_lookup"} | fields
        row = self.sql.execute(
            """
            SELECT deduct_credits(
                %(org_id)s, %(user_id)s, %(credits)s, %(service_type)s,
                p_request_id => %(request_id)s
            ) AS done
            """,
            {"org_id": org_id, "request_id": request_id, "credits": credits, **named},
        ).fetchone()
        assert row is not None
        return bool(row["done"])

    def apply(self, *contents: Entry | UsageEvent, now: datetime = NOW) -> Outcome:
        """Apply one batch."""
        entries = [item if isinstance(item, Entry) else entry(item) for item in contents]
        with self.database.session() as connection:
            return apply_batch(connection, entries, now)

    def rows(self, source: str, *columns: str) -> list[tuple[Any, ...]]:
        """Some columns of every row of a table (or of `table WHERE …`), sorted."""
        found = self.sql.execute(f"SELECT {', '.join(columns)} FROM {source}".encode())
        return sorted(tuple(row.values()) for row in found)

    def row(self, table: str) -> Row:
        """The only row of a table."""
        (found,) = self.sql.execute(f"SELECT * FROM {table}".encode()).fetchall()
        return found

    def pool(self, org_id: UUID) -> tuple[int, int, int]:
        """Total, allocated and used credits of the pool."""
        row = self.sql.execute(
            """
            SELECT total_credits, allocated_credits, used_credits
            FROM organization_credit_pools
            WHERE org_id = %s
            """,
            (org_id,),
        ).fetchone()
        assert row is not None
        return row["total_credits"], row["allocated_credits"], row["used_credits"]

    def allocations(self, org_id: UUID) -> dict[str, tuple[int, int]]:
        """Allocated and used credits by user."""
        found = self.sql.execute(
            """
            SELECT user_id, allocated_credits, used_credits
            FROM user_credit_allocations
            WHERE org_id = %s
            """,
            (org_id,),
        )
        return {row["user_id"]: (row["allocated_credits"], row["used_credits"]) for row in found}

    def contents(self) -> dict[str, list[Any]]:
        """Every row of every table. Rows that were rewritten with equal values differ by `xmin`."""
        return {
            table: [
                row["line"]
                for row in self.sql.execute(
                    f"""
                    SELECT to_jsonb(t) || jsonb_build_object('xmin', t.xmin::text) AS line
                    FROM {table} t
                    ORDER BY to_jsonb(t)
                    """.encode()
                )
            ]
            for table in TABLES
        }


@contextmanager
def open_world(database: Database, database_url: str) -> Iterator[World]:
    """The world of one migrated database."""
    with psycopg.connect(database_url, autocommit=True, row_factory=dict_row) as sql:
        yield World(database, sql)
