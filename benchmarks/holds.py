"""How many holds a second one process places, against asking over a connection per call.

Both cases run in one go on one embedded PostgreSQL, with the same number of threads, over 100
users of 10 organizations:

- `baseline`: what people would write: connect, `SELECT has_sufficient_credits(…)`, close;
- `holds`: `ledger.holds.place` over a pool with one connection per thread, which also sets the
  credits aside.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import cycle, islice
from pathlib import Path
from threading import Barrier
from typing import Any, Final
from uuid import UUID, uuid4

import psycopg

import migrations
from benchmarks.organizations import make_organizations
from ledger import holds
from ledger.clock import utc_now
from ledger.database import Database
from ledger.gate import Operation
from ops.servers import embedded_servers

ORGANIZATIONS: Final = 10
USERS: Final = 10
"""In each organization."""
CREDITS_EACH: Final = 10_000_000
OPERATION: Final = Operation("contact_lookup")
CREDITS_NEEDED: Final = 10
HOLD_LASTS: Final = timedelta(hours=1)
PATIENCE_SECONDS: Final = 300.0
GOALS: Final = {"holds_to_baseline": 3.0}

_ASK: Final = "SELECT has_sufficient_credits(%s, %s, %s)"

User = tuple[UUID, str]
Call = Callable[[User], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure."""

    holds: int
    baseline_calls: int
    threads: int
    rounds: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement: calls per second, and the seconds that each call took."""

    rate: float
    seconds: Sequence[float]


@dataclass(slots=True)
class Figures:
    """The samples of each case, one per round."""

    baseline: list[Sample] = field(default_factory=list)
    holds: list[Sample] = field(default_factory=list)

    def rates(self) -> list[tuple[str, int, float, float]]:
        """Case, median calls per second, and the p50 and p99 of a call in milliseconds."""
        cases = (("baseline", self.baseline), ("holds", self.holds))
        return [
            (
                case,
                round(statistics.median(sample.rate for sample in samples)),
                *_percentiles([one for sample in samples for one in sample.seconds]),
            )
            for case, samples in cases
        ]

    def ratios(self) -> list[tuple[str, float, float]]:
        """Name, value and goal of each ratio."""
        rate = {case: per_second for case, per_second, *_ in self.rates()}
        reached = {"holds_to_baseline": rate["holds"] / rate["baseline"]}
        return [(name, round(value, 3), GOALS[name]) for name, value in reached.items()]

    def as_document(self) -> dict[str, Any]:
        """The figures for programs."""
        cases = {
            case: {"per_second": rate, "p50_ms": p50, "p99_ms": p99}
            for case, rate, p50, p99 in self.rates()
        }
        return cases | {
            "ratios": {name: value for name, value, _ in self.ratios()},
            "goals": GOALS,
        }


def _percentiles(seconds: Sequence[float]) -> tuple[float, float]:
    cuts = statistics.quantiles(seconds, n=100)
    return round(cuts[49] * 1000, 2), round(cuts[98] * 1000, 2)


def measure(plan: Plan, tell: Callable[[str], None]) -> Figures:
    """Run both cases `plan.rounds` times."""
    figures = Figures()
    with _database(plan.threads) as (url, database):
        users = _users(database)
        cases: tuple[tuple[str, Call, int], ...] = (
            ("baseline", lambda user: _ask(url, user), plan.baseline_calls),
            ("holds", lambda user: _place(database, user), plan.holds),
        )
        for number in range(1, plan.rounds + 1):
            for case, call, count in cases:
                tell(f"round {number} of {plan.rounds}: {case}")
                getattr(figures, case).append(_sample(call, users, count, plan.threads))
    return figures


@contextmanager
def _database(connections: int) -> Iterator[tuple[str, Database]]:
    with (
        tempfile.TemporaryDirectory(prefix="metering-bench-") as name,
        embedded_servers(Path(name)) as (postgres, _),
    ):
        postgres.ensure_database()
        migrations.upgrade(postgres.url)
        database = Database(postgres.url, pool_size=connections)
        yield postgres.url, database
        database.close()


def _users(database: Database) -> list[User]:
    """Neighbours in the list are of different organizations."""
    made = make_organizations(database, ORGANIZATIONS, users=USERS, credits_each=CREDITS_EACH)
    return [(org_id, f"user-{number}") for number in range(1, USERS + 1) for org_id in made]


def _ask(url: str, user: User) -> None:
    org_id, user_id = user
    with psycopg.connect(url) as connection:
        connection.execute(_ASK, (org_id, user_id, CREDITS_NEEDED)).fetchone()


def _place(database: Database, user: User) -> None:
    org_id, user_id = user
    request_id = f"req-{uuid4()}"
    holds.place(database, org_id, user_id, OPERATION, request_id, HOLD_LASTS, utc_now())


def _sample(call: Call, users: Sequence[User], count: int, threads: int) -> Sample:
    """Make `count` calls in all, each thread its share, one user after the other."""
    start = Barrier(threads + 1, timeout=PATIENCE_SECONDS)

    def work(number: int) -> list[float]:
        mine = islice(cycle(users), number, None, threads)
        call(next(mine))  # connections of the pool are made once, and not while the clock runs
        start.wait()
        return [_timed(call, user) for user in islice(mine, count // threads)]

    with ThreadPoolExecutor(threads) as pool:
        working = [pool.submit(work, number) for number in range(threads)]
        start.wait()
        started = time.perf_counter()
        seconds = [one for future in working for one in future.result(PATIENCE_SECONDS)]
        elapsed = time.perf_counter() - started
    return Sample(len(seconds) / elapsed, seconds)


def _timed(call: Call, user: User) -> float:
    started = time.perf_counter()
    call(user)
    return time.perf_counter() - started
