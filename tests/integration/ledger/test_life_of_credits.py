"""Random lives of two organizations, every act of the ledger among them, held against a model.

`tests.integration.ledger.model` is the specification: it predicts each answer and every figure.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from datetime import timedelta
from typing import Any, Final
from uuid import UUID

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from psycopg.errors import RaiseException

from ledger import allocations, corrections, debts, holds, pools, resets, subscriptions
from ledger.apply import apply_batch
from ledger.database import Database
from ledger.decisions import Entry, Outcome
from ledger.gate import Operation
from ledger.reconcile import reconcile
from schema.errors import MeteringError
from schema.periods import ResetPeriod
from schema.plans import PlanName
from tests.integration.ledger.model import Event, Organization, Refused
from tests.integration.ledger.world import NOW, World, entry, event, open_world

EXAMPLES: Final = int(os.environ.get("LIFE_EXAMPLES", "25"))
STEPS: Final = 50
SHRINKING_SECONDS: Final = 330
"""What Hypothesis may take to make a counterexample small, and then some."""
STEPS_PER_RECONCILIATION: Final = 15

POOL: Final = 300
TOP_UP: Final = 40
NUMBERS: Final = 8
LENDER: Final = 1
"""Number of the organization with a live subscription: the other cannot lend whatever it allows."""
RHYTHMS: Final[Mapping[str, ResetPeriod]] = {
    "ada": ResetPeriod.WEEKLY,
    "bob": ResetPeriod.MONTHLY,
    "cyd": ResetPeriod.NEVER,
}
USERS: Final = tuple(RHYTHMS)
SERVICES: Final = ("skip_trace", "title_search")
"""Without a price, so that events say what they cost."""
SQL_REFUSALS: Final = {
    "Insufficient credits": "insufficient_credits",
    "No credit allocation": "no_allocation",
    "Request id conflict": "conflict",
    "Request ": "dead",
}
LATE: Final = ("holds.overdue", "resets.overdue")
"""Checks that fail as long as nobody does what is due."""
BEATS: Final = ("expire", "return_unused", "bill", "reset_due", "settle")
"""What workers do by the clock."""
OF_ORGANIZATION: Final = (
    "credit_transactions",
    "credit_usage_attribution",
    "dead_letters",
    "idempotency_keys",
    "org_billing_history",
    "organization_credit_pools",
    "usage_requests",
    "user_credit_allocations",
)
"""Tables with a column `org_id` that acts write."""

Act = tuple[str, dict[str, Any]]
"""The name of a method, and its arguments."""

Wanted = tuple[str, str, str, int]
"""Request id, user, service, credits."""


@st.composite
def wanted_operations(draw: st.DrawFn) -> Wanted:
    """One of a few requests; now and then another one under its id."""
    number = draw(st.integers(0, 15))
    odd = draw(st.sampled_from([None] * 9 + ["user", "service", "credits"]))
    user = USERS[(number + (odd == "user")) % 3]
    service = SERVICES[(number + (odd == "service")) % 2]
    credits = (5, 20, 50)[number // 3 % 3] + (odd == "credits")
    return f"request-{number}", user, service, credits


def act(name: str, **arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[Act]:
    """Calls of a method of `LifeOfCredits`."""
    return st.tuples(st.just(name), st.fixed_dictionaries(arguments))


organizations = st.integers(0, 1)
users = st.sampled_from(USERS)
amounts = st.sampled_from([1, 10, 40, 100])
keys = st.sampled_from([None, None, None, "key-1", "key-2", "key-3"])
limits = st.sampled_from([0, 15, 60])
rhythms = st.sampled_from([None, None, *RHYTHMS.values()])
numbers = st.integers(0, NUMBERS - 1)
operations = wanted_operations()
ages = st.sampled_from(
    [timedelta()] * 4
    + [timedelta(hours=20), timedelta(days=5), timedelta(days=20), timedelta(days=36)]
)
batches = st.lists(st.tuples(operations, ages), min_size=1, max_size=4)
steps_of_time = st.sampled_from(
    [timedelta(minutes=2), timedelta(hours=3), timedelta(days=4), timedelta(days=20)]
)
beats = st.lists(st.sampled_from(BEATS), unique=True) | st.just(BEATS)

apply = act("apply", org=organizations, batch=batches)
hold = act(
    "hold",
    org=organizations,
    wanted=operations,
    lasts=st.sampled_from([timedelta(hours=24), timedelta(minutes=1)]),
)
release = act("release", org=organizations, number=numbers)
deduct = act("deduct", org=organizations, number=numbers, wanted=operations)
refund = act(
    "refund", org=organizations, number=numbers, credits=st.none() | st.integers(1, 50), key=keys
)
adjust = act(
    "adjust", org=organizations, number=numbers, to=st.sampled_from([0, 5, 30, 80]), key=keys
)
time_passes = act("time_passes", step=steps_of_time, beats=beats)
add = act("add", org=organizations, credits=st.sampled_from([-100, -20, 1, 60]), key=keys)
allocate = act(
    "allocate",
    org=organizations,
    user=users,
    credits=amounts,
    rhythm=rhythms,
    raises=st.booleans(),
    key=keys,
)
reclaim = act("reclaim", org=organizations, user=users, credits=st.none() | amounts, key=keys)
deactivate = act("deactivate", org=organizations, number=numbers, key=keys)
change_terms = act(
    "change_terms", org=organizations, refresh=st.sampled_from([0, 50, 90]), limit=limits
)
again = act("again", number=numbers)
# Usage and time are most of life; `one_of` would count each of them once.
acts = st.sampled_from(
    [apply] * 5
    + [hold] * 5
    + [deduct] * 3
    + [release, refund, adjust, allocate] * 2
    + [time_passes] * 4
    + [add, reclaim, deactivate, change_terms, again]
).flatmap(lambda strategy: strategy)


def refusal(act: Callable[[], object]) -> str | None:
    """Why an act was refused, as the code of an error; None if it was done."""
    try:
        act()
    except (MeteringError, Refused) as error:
        return error.code
    except RaiseException as error:
        message = str(error.diag.message_primary)
        return next(code for text, code in SQL_REFUSALS.items() if message.startswith(text))
    return None


def predicted(model: Organization) -> dict[str, object]:
    """The figures of a model, as `found` reads them from the tables."""
    return {
        "pool": (model.total, model.allocated, model.used, model.overage, model.refresh_date),
        "allocations": {
            user: (
                own.allocated,
                own.used,
                own.held,
                own.allowance,
                own.rhythm.value,
                own.start,
                own.end,
                own.active,
            )
            for user, own in model.allocations.items()
        },
        "periods": sorted(
            (user, period.start, period.end, period.allocated, period.used)
            for user, own in model.allocations.items()
            for period in own.closed
        ),
        "requests": {
            request_id: (
                request.user,
                request.service,
                request.state,
                request.reason,
                request.credits,
                request.held if request.state == "held" else 0,
            )
            for request_id, request in model.requests.items()
        },
        "charges": sorted(
            (request_id, request.user, request.period, request.cost, request.overage)
            for request_id, request in model.requests.items()
            if request.state == "charged"
        ),
        "debts": model.debts,
        "conflicts": len(model.conflicts),
    }


FIGURES: Final = {
    "pool": """
        SELECT total_credits, allocated_credits, used_credits, overage_credits, next_refresh_date
        FROM organization_credit_pools
        WHERE org_id = %s
    """,
    "allocations": """
        SELECT user_id, allocated_credits, used_credits, held_credits, allowance_credits,
            reset_period, last_reset_date, next_reset_date, is_active
        FROM user_credit_allocations
        WHERE org_id = %s
    """,
    "periods": """
        SELECT a.user_id, c.period_start, c.period_end, c.allocated_credits, c.used_credits
        FROM allocation_periods c
        JOIN user_credit_allocations a ON a.id = c.allocation_id
        WHERE a.org_id = %s
        ORDER BY a.user_id, c.period_start
    """,
    "requests": """
        SELECT request_id, user_id, service_type, state, reason, credits,
            CASE WHEN state = 'held' THEN held_credits ELSE 0 END
        FROM usage_requests
        WHERE org_id = %s
    """,
    "charges": """
        SELECT request_id, user_id, period_start, sum(credits_used) AS cost,
            sum(overage_credits) AS overage
        FROM credit_usage_attribution
        WHERE org_id = %s
        GROUP BY request_id, user_id, period_start
        ORDER BY request_id
    """,
    "debts": """
        SELECT request_id
        FROM dead_letters
        WHERE org_id = %s AND state = 'open'
            AND reason IN ('insufficient_credits', 'no_allocation')
        ORDER BY id
    """,
    "conflicts": """
        SELECT count(*)
        FROM dead_letters
        WHERE org_id = %s AND reason = 'request_id_conflict'
    """,
}


def found(world: World, org_id: UUID) -> dict[str, object]:
    """What the tables say of an organization."""
    rows = {
        name: [tuple(row.values()) for row in world.sql.execute(query.encode(), (org_id,))]
        for name, query in FIGURES.items()
    }
    return {
        "pool": rows["pool"][0],
        "allocations": {user_id: tuple(figures) for user_id, *figures in rows["allocations"]},
        "periods": rows["periods"],
        "requests": {request_id: tuple(figures) for request_id, *figures in rows["requests"]},
        "charges": rows["charges"],
        "debts": [request_id for (request_id,) in rows["debts"]],
        "conflicts": rows["conflicts"][0][0],
    }


class LifeOfCredits(RuleBasedStateMachine):
    """Acts in random order, at a time that only ever goes forward."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.database = world.database
        self.now = NOW
        self.models = [Organization(), Organization()]
        self.org_ids = [
            world.organization(members=dict.fromkeys(USERS, "member")) for _ in range(2)
        ]
        self.sent: list[Entry] = []
        self.keyed: dict[tuple[int, str], tuple[object, Callable[[], object]]] = {}
        self.steps = 0

    @initialize(
        purses=st.lists(st.sampled_from([60, 60, 20, 20, 5, 0]), min_size=6, max_size=6),
        limit=limits,
    )
    def begin(self, purses: list[int], limit: int) -> None:
        subscriptions.create(
            self.database, self.org_ids[LENDER], PlanName.BYOK, actor="root", now=self.now
        )
        self.models[LENDER].subscribe(self.now)
        for org in range(2):
            self.add(org, POOL, None)
            self.change_terms(org, 0, limit)
            for user, credits in zip(USERS, purses[org * 3 :], strict=False):
                if credits:
                    self.allocate(org, user, credits, RHYTHMS[user], raises=False, key=None)
                    self.allocate(org, user, TOP_UP, None, raises=False, key=None)

    @rule(act=acts)
    def something_happens(self, act: Act) -> None:
        """One rule for all: with one each, Hypothesis would leave half of them out of a life."""
        name, arguments = act
        getattr(self, name)(**arguments)

    # Time

    def time_passes(self, step: timedelta, beats: Sequence[str]) -> None:
        """And workers do some of what is due, in any order."""
        self.now += step
        for beat in beats:
            getattr(self, beat)()

    def expire(self) -> None:
        for model in self.models:
            model.expire(self.now)
        holds.expire(self.database, self.now)

    def reset_due(self) -> None:
        for model in self.models:
            model.reset_due(self.now)
        resets.reset_due(self.database, self.now)
        assert resets.reset_due(self.database, self.now) == resets.ResetReport()

    def return_unused(self) -> None:
        for model in self.models:
            model.return_unused()
        allocations.return_unused(self.database, self.now)

    def bill(self) -> None:
        self.models[LENDER].bill(self.now)
        subscriptions.roll_over(self.database, self.now)

    def settle(self) -> None:
        for model, org_id in zip(self.models, self.org_ids, strict=True):
            model.settle()
            debts.settle(self.database, self.now, org_id)

    # Pools and allocations

    def add(self, org: int, credits: int, key: str | None) -> None:
        kind = pools.Kind.GRANT if credits > 0 else pools.Kind.ADJUSTMENT
        self.act(
            org,
            lambda model: model.add(credits),
            lambda org_id: pools.add(
                self.database, org_id, credits, kind=kind, **self.by(key), now=self.now
            ),
            key,
            ("add", credits),
        )

    def allocate(
        self,
        org: int,
        user: str,
        credits: int,
        rhythm: ResetPeriod | None,
        raises: bool,
        key: str | None,
    ) -> None:
        self.act(
            org,
            lambda model: model.allocate(user, credits, rhythm, raises=raises, now=self.now),
            lambda org_id: allocations.allocate(
                self.database,
                org_id,
                user,
                credits,
                reset_period=rhythm,
                raise_allowance=raises,
                **self.by(key),
                now=self.now,
            ),
            key,
            ("allocate", user, credits, rhythm, raises),
        )

    def reclaim(self, org: int, user: str, credits: int | None, key: str | None) -> None:
        self.act(
            org,
            lambda model: model.reclaim(user, credits),
            lambda org_id: allocations.reclaim(
                self.database, org_id, user, credits, **self.by(key), now=self.now
            ),
            key,
            ("reclaim", user, credits),
        )

    def deactivate(self, org: int, number: int, key: str | None) -> None:
        """Rather somebody with a hold, who is the interesting case."""
        held = self.held(org, number)
        user = held[1] if held else USERS[number % len(USERS)]
        self.act(
            org,
            lambda model: model.deactivate(user),
            lambda org_id: allocations.deactivate(
                self.database, org_id, user, **self.by(key), now=self.now
            ),
            key,
            ("deactivate", user),
        )

    def change_terms(self, org: int, refresh: int, limit: int) -> None:
        """Every organization may say that it allows overage; only a subscriber is lent any."""
        self.models[org].set_refresh(refresh, self.now)
        self.models[org].overage_limit = limit
        pools.set_refresh(self.database, self.org_ids[org], refresh, now=self.now)
        self.world.sql.execute(
            """
            UPDATE organization_credit_pools SET allow_overage = true, overage_limit = %s
            WHERE org_id = %s
            """,
            (limit, self.org_ids[org]),
        )

    # Holds

    def hold(self, org: int, wanted: Wanted, lasts: timedelta) -> None:
        request_id, user, service, credits = wanted
        operation = Operation(service, credits=credits)
        self.act(
            org,
            lambda model: model.hold(*wanted, self.now + lasts),
            lambda org_id: holds.place(
                self.database, org_id, user, operation, request_id, lasts, self.now
            ),
        )

    def release(self, org: int, number: int) -> None:
        request_id = self.nth(org, "held", number)
        self.act(
            org,
            lambda model: model.release(request_id),
            lambda org_id: holds.release(self.database, org_id, request_id, self.now),
        )

    # Usage

    def apply(self, org: int, batch: list[tuple[Wanted, timedelta]]) -> None:
        events = [Event(*wanted, self.now - age) for wanted, age in batch]
        before = {id_: r.cost for id_, r in self.models[org].requests.items()}
        verdicts = Counter(self.models[org].apply(one, self.now) for one in events)
        charged = sum(r.cost - before.get(id_, 0) for id_, r in self.models[org].requests.items())
        expected = Outcome(verdicts.pop("charged", 0), verdicts.pop("duplicate", 0), charged)
        expected.dead = verdicts
        entries = [entry(self.reported(org, one)) for one in events]
        assert self.applied(entries) == expected
        self.sent += entries

    @staticmethod
    def by(key: str | None) -> dict[str, Any]:
        return {"actor": "life", "reason": "a test", "key": key}

    def reported(self, org: int, one: Event) -> Any:
        return event(
            self.org_ids[org],
            one.request_id,
            user_id=one.user,
            service_type=one.service,
            credits=one.credits,
            occurred_at=one.occurred_at,
        )

    def applied(self, entries: list[Entry]) -> Outcome:
        with self.database.session() as connection:
            return apply_batch(connection, entries, self.now)

    def deduct(self, org: int, number: int, wanted: Wanted) -> None:
        """Rather what a hold was placed for."""
        request_id, user, service, credits = self.held(org, number) or wanted
        self.act(
            org,
            lambda model: model.deduct(request_id, user, service, credits),
            lambda org_id: self.call(org_id, request_id, user, service, credits),
        )

    def call(self, org_id: UUID, request_id: str, user: str, service: str, credits: int) -> None:
        assert self.world.deduct(org_id, request_id, credits, user_id=user, service_type=service)

    def refund(self, org: int, number: int, credits: int | None, key: str | None) -> None:
        request_id = self.nth(org, "charged", number)
        self.act(
            org,
            lambda model: model.refund(request_id, credits),
            lambda org_id: corrections.refund(
                self.database, org_id, request_id, credits, **self.by(key), now=self.now
            ),
            key,
            ("refund", request_id, credits),
        )

    def adjust(self, org: int, number: int, to: int, key: str | None) -> None:
        request_id = self.nth(org, "charged", number)
        self.act(
            org,
            lambda model: model.adjust(request_id, to),
            lambda org_id: corrections.adjust(
                self.database, org_id, request_id, to, **self.by(key), now=self.now
            ),
            key,
            ("adjust", request_id, to),
        )

    def nth(self, org: int, state: str, number: int) -> str:
        """Rather a request in this state; else whatever has such a number."""
        requests = self.models[org].requests.items()
        fitting = [request_id for request_id, one in requests if one.state == state]
        if fitting and number < NUMBERS - 2:
            return fitting[number % len(fitting)]
        return f"request-{number}"

    def held(self, org: int, number: int) -> Wanted | None:
        request_id = self.nth(org, "held", number)
        request = self.models[org].requests.get(request_id)
        if request is None or request.state != "held":
            return None
        return request_id, *request.identity

    def again(self, number: int) -> None:
        """The same key again moves nothing; `act` sees to the same key for something else."""
        repetitions = [actual for _, actual in self.keyed.values()]
        if repetitions:
            assert refusal(repetitions[number % len(repetitions)]) is None

    def act(
        self,
        org: int,
        predicted: Callable[[Organization], None],
        actual: Callable[[UUID], object],
        key: str | None = None,
        what: object = None,
    ) -> None:
        """Do the same to model and ledger; both do it, or refuse it for the same reason."""
        org_id = self.org_ids[org]
        taken = self.keyed.get((org, key)) if key else None
        if taken is not None:
            expected = None if taken[0] == what else "invalid_request"
            assert refusal(lambda: actual(org_id)) == expected
            return
        trial = deepcopy(self.models[org])
        expected = refusal(lambda: predicted(trial))
        assert refusal(lambda: actual(org_id)) == expected
        if expected is None:
            self.models[org] = trial
            if key:
                self.keyed[org, key] = what, lambda: actual(org_id)

    # What is true after every act

    @invariant()
    def figures_are_as_predicted(self) -> None:
        for model, org_id in zip(self.models, self.org_ids, strict=True):
            assert found(self.world, org_id) == predicted(model)

    @invariant()
    def credits_are_conserved(self) -> None:
        """By the figures just found, which are those of the model."""
        for model in self.models:
            owned = model.allocations.values()
            remaining = sum(own.allocated - own.used for own in owned)
            assert model.total == model.available + remaining + model.used
            assert model.available >= 0
            assert all(own.available >= 0 for own in owned)

    @invariant()
    def books_are_sound_now_and_then(self) -> None:
        self.steps += 1
        if self.steps % STEPS_PER_RECONCILIATION == 0:
            self.reconcile()

    def reconcile(self) -> None:
        for org_id in self.org_ids:
            drifts = reconcile(self.database, now=self.now, org_id=org_id).drifts
            assert [drift for drift in drifts if drift.check not in LATE] == []

    # At the end

    def teardown(self) -> None:
        try:
            self.expire()
            self.reset_due()
            for org_id in self.org_ids:
                assert reconcile(self.database, now=self.now, org_id=org_id).is_clean
            self.nothing_changes_when_all_is_sent_again()
        finally:
            self.retire()

    def nothing_changes_when_all_is_sent_again(self) -> None:
        """Events, keyed acts, and everything that was charged once more as a direct call."""
        before = self.contents()
        if self.sent:
            self.applied(self.sent)
        for model, org_id in zip(self.models, self.org_ids, strict=True):
            for request_id, one in model.requests.items():
                if one.state == "charged":
                    self.call(org_id, request_id, *one.identity)
        for _, actual in self.keyed.values():
            assert refusal(actual) is None
        assert self.contents() == before

    def contents(self) -> dict[str, list[str]]:
        """Every row of these organizations; one rewritten with equal values has another `xmin`."""
        return {
            table: [
                row["line"]
                for row in self.world.sql.execute(
                    f"""
                    SELECT concat(t.xmin, ' ', to_jsonb(t)) AS line FROM {table} t
                    WHERE org_id = ANY(%s)
                    ORDER BY to_jsonb(t)
                    """.encode(),
                    (self.org_ids,),
                )
            ]
            for table in OF_ORGANIZATION
        }

    def retire(self) -> None:
        """Leave nothing that is due some day: the organizations of later lives share the tables."""
        self.world.sql.execute(
            """
            UPDATE user_credit_allocations SET is_active = true, next_reset_date = NULL
            WHERE org_id = ANY(%s)
            """,
            (self.org_ids,),
        )
        self.world.sql.execute(
            "UPDATE organization_credit_pools SET next_refresh_date = NULL WHERE org_id = ANY(%s)",
            (self.org_ids,),
        )
        self.world.sql.execute(
            "UPDATE organization_subscriptions SET status = 'canceled' WHERE org_id = ANY(%s)",
            (self.org_ids,),
        )
        self.world.sql.execute(
            "UPDATE usage_requests SET hold_expires_at = 'infinity' WHERE org_id = ANY(%s)",
            (self.org_ids,),
        )


@pytest.fixture
def world(database: Database, database_url: str) -> Iterator[World]:
    with open_world(database, database_url) as opened:
        # Nothing crashes here: no commit needs to wait for the disk.
        opened.sql.execute(
            """
            DO $$
            BEGIN
                EXECUTE format(
                    'ALTER DATABASE %I SET synchronous_commit = off', current_database()
                );
            END
            $$
            """
        )
        yield opened


@pytest.mark.timeout(SHRINKING_SECONDS + 4 * EXAMPLES)
def test_every_life_goes_as_predicted(world: World) -> None:
    run_state_machine_as_test(
        lambda: LifeOfCredits(world),  # type: ignore[arg-type]  # any factory will do
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )
