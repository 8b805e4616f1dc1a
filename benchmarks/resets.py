"""How long the resets of a month end take, and how long a drain waits meanwhile.

Allocations of 100 organizations are all due at once, each with usage to make up for and one of
them in three a period behind. While they are reset, another connection charges one event after the
other, as a drain would: what its slowest charge took is what the locks of a batch cost.
"""

import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from itertools import count
from pathlib import Path
from threading import Event, Thread
from typing import Any, Final
from uuid import UUID

import migrations
from ledger.apply import apply_batch
from ledger.clock import utc_now
from ledger.database import Database, run
from ledger.decisions import Entry
from ledger.resets import reset_due
from ops.servers import embedded_servers
from schema.events import UsageEvent

ORGANIZATIONS: Final = 100
CREDITS_EACH: Final = 10_000
GOALS: Final = {"seconds": 60.0, "slowest_charge_seconds": 0.5}

_ORGANIZATIONS: Final = """
    INSERT INTO organizations (id, name, display_name, timezone)
    SELECT
        md5('org' || n)::uuid, 'org-' || n, 'bench',
        (ARRAY['UTC', 'America/New_York', 'Europe/Berlin', 'Pacific/Auckland'])[1 + n %% 4]
    FROM generate_series(1, %(organizations)s) n
"""

_POOLS: Final = """
    SELECT add_credits_to_pool(id, 10 * %(users)s * %(credits)s::bigint) FROM organizations
"""

_ALLOCATIONS: Final = """
    SELECT fund_allocation(
        o.id, 'user-' || n, %(credits)s, false, 'monthly', NULL, 'bench', NULL,
        %(now)s - (CASE WHEN n %% 3 = 0 THEN 65 ELSE 35 END) * interval '1 day'
    )
    FROM organizations o, generate_series(1, %(users)s) n
"""

_USE: Final = """
    UPDATE user_credit_allocations SET used_credits = allocated_credits / 2
"""


@dataclass(frozen=True, slots=True)
class Figures:
    """What the resets of one moment took, and what charges did beside them."""

    allocations: int
    periods: int
    seconds: float
    charges: int
    slowest_charge_seconds: float

    def as_document(self) -> dict[str, Any]:
        """The figures for programs."""
        return asdict(self) | {"goals": GOALS}


def measure(allocations: int, tell: Callable[[str], None]) -> Figures:
    """Make as many allocations that are due, on an embedded server, and reset them once."""
    with (
        tempfile.TemporaryDirectory(prefix="metering-bench-") as name,
        embedded_servers(Path(name)) as (postgres, _),
    ):
        postgres.ensure_database()
        migrations.upgrade(postgres.url)
        now = utc_now()
        tell(f"making {allocations} allocations")
        with closing(Database(postgres.url, statement_timeout_seconds=600, role="")) as owner:
            organizations = _make(owner, -(-allocations // ORGANIZATIONS), now)
        tell("resetting them")
        with closing(Database(postgres.url)) as database:
            return _measure(database, organizations, now)


def _make(database: Database, users: int, now: datetime) -> list[UUID]:
    with database.transaction() as connection:
        run(connection, _ORGANIZATIONS, organizations=ORGANIZATIONS)
        run(connection, _POOLS, users=users, credits=CREDITS_EACH)
        run(connection, _ALLOCATIONS, users=users, credits=CREDITS_EACH, now=now)
        run(connection, _USE)
        run(connection, "ANALYZE")
        return list(run(connection, "SELECT id FROM organizations ORDER BY id").scalars())


def _measure(database: Database, organizations: list[UUID], now: datetime) -> Figures:
    over = Event()
    waits: list[float] = []
    drain = Thread(target=_charge, args=(database, organizations, over, waits))
    drain.start()
    try:
        started = time.perf_counter()
        report = reset_due(database, now)
        seconds = time.perf_counter() - started
    finally:
        over.set()
        drain.join()
    return Figures(
        allocations=report.allocations_reset,
        periods=report.periods_closed,
        seconds=round(seconds, 2),
        charges=len(waits),
        slowest_charge_seconds=round(max(waits), 3),
    )


def _charge(database: Database, organizations: list[UUID], over: Event, waits: list[float]) -> None:
    """Charge the first user of one organization after the other, until it is over."""
    with database.session() as connection:
        for number in count():
            event = UsageEvent.of(
                request_id=f"r-{number}",
                org_id=str(organizations[number % len(organizations)]),
                user_id="user-1",
                service_type="contact_lookup",
                occurred_at=utc_now() + timedelta(seconds=1),
            )
            started = time.perf_counter()
            apply_batch(connection, [Entry(event.to_json())], utc_now())
            waits.append(time.perf_counter() - started)
            if over.wait(0.001):
                return
