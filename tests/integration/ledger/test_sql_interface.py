"""The SQL that other services call, read and write by name: contract.md §2 (D12)."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from decimal import Decimal
from threading import Barrier, Thread
from typing import Any, Final
from uuid import UUID, uuid4

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg.errors import GeneratedAlways, IntegrityError, RaiseException

import migrations
from ledger.clock import utc_now
from ledger.database import Database
from ledger.decisions import Outcome
from ops.servers import EmbeddedPostgres, EmbeddedValkey
from schema.events import fingerprint
from schema.plans import PlanName
from tests.integration.ledger.race import await_lock
from tests.integration.ledger.world import World, event, open_world

COLUMNS: Final = {
    "organizations": "id name display_name max_seats status timezone is_test created_at",
    "organization_members": "org_id user_id role email name",
    "organization_subscriptions": """
        id org_id subscription_plan monthly_price billing_cycle status trial_ends_at
        current_period_start current_period_end canceled_at lago_subscription_id
        stripe_subscription_id
    """,
    "organization_credit_pools": """
        id org_id total_credits allocated_credits used_credits available_credits
        monthly_refresh_amount last_refresh_date next_refresh_date allow_overage overage_limit
        overage_rate lifetime_purchased_credits lifetime_spent_amount
    """,
    "user_credit_allocations": """
        id org_id user_id allocated_credits used_credits remaining_credits held_credits
        reset_period last_reset_date next_reset_date is_active allocated_by notes
    """,
    "credit_usage_attribution": """
        id org_id user_id allocation_id credits_used service_type service_name api_cost
        markup_applied total_cost request_id request_metadata created_at occurred_at
    """,
    "org_billing_history": """
        id org_id subscription_id event_type amount currency payment_status payment_method paid_at
        period_start period_end event_metadata notes created_at
    """,
    "org_billing_summary": "org_id",
    "user_multi_org_credits": "user_id org_id",
    "top_credit_users_by_org": """
        org_id user_id total_credits request_count services_used last_usage
    """,
    "org_billing_metrics": "org_id",
}

BILLING_EVENTS: Final = (
    "invoice_created", "invoice_paid", "invoice_failed", "subscription_created",
    "subscription_upgraded", "subscription_downgraded", "subscription_canceled",
    "credit_purchase", "credit_refund", "overage_charged",
)  # fmt: skip

CALL_BY_NAME: Final = {
    "has_sufficient_credits": """
        SELECT has_sufficient_credits(
            p_credits_needed => 100, p_user_id => 'ada', p_org_id => %(org)s
        ) AS answer
    """,
    "deduct_credits": """
        SELECT deduct_credits(
            p_request_metadata => '{"company_id": "c-7"}', p_request_id => 'r-1',
            p_service_name => 'Valuation', p_service_type => 'valuation', p_credits_used => 75,
            p_user_id => 'ada', p_org_id => %(org)s
        ) AS answer
    """,
    "add_credits_to_pool": """
        SELECT add_credits_to_pool(
            p_purchase_amount => 9.99, p_credits_amount => 500, p_org_id => %(org)s
        ) AS answer
    """,
    "allocate_credits_to_user": """
        SELECT allocate_credits_to_user(
            p_allocated_by => 'boss', p_credits_amount => 50, p_user_id => 'ada',
            p_org_id => %(org)s
        ) AS answer
    """,
}

CALL_BY_POSITION: Final = {
    "has_sufficient_credits": "SELECT has_sufficient_credits(%(org)s, 'ada', 100) AS answer",
    "deduct_credits": """
        SELECT deduct_credits(
            %(org)s, 'ada', 75, 'valuation', 'Valuation', 'r-1', '{"company_id": "c-7"}'
        ) AS answer
    """,
    "add_credits_to_pool": "SELECT add_credits_to_pool(%(org)s, 500, 9.99) AS answer",
    "allocate_credits_to_user": """
        SELECT allocate_credits_to_user(%(org)s, 'ada', 50, 'boss') AS answer
    """,
}

storable_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@pytest.fixture
def world(database: Database, database_url: str) -> Iterator[World]:
    with open_world(database, database_url) as opened:
        yield opened


@pytest.fixture
def org(world: World) -> UUID:
    """An organization with 1,000 credits, 100 of them with Ada."""
    return world.organization(pool=1000, allocations={"ada": 100})


@pytest.fixture(scope="module")
def refusing(servers: tuple[EmbeddedPostgres, EmbeddedValkey]) -> Iterator[World]:
    """A world for calls that are refused and change nothing, so that one database serves all.

    Ada has 100 of its organization's 1,000 credits and used 10.
    """
    postgres, _ = servers
    postgres.ensure_database("refusing")
    url = postgres.url_of("refusing")
    migrations.upgrade(url)
    database = Database(url)
    with open_world(database, url) as opened:
        opened.deduct(opened.organization(pool=1000, allocations={"ada": 100}), "r-1")
        yield opened
    database.close()


def answer(world: World, sql: str, **parameters: object) -> Any:
    """The single value that a query answers."""
    row = world.sql.execute(sql.encode(), parameters).fetchone()
    assert row is not None
    (value,) = row.values()
    return value


def refused(world: World, sql: str, **parameters: object) -> psycopg.Error:
    """The error that a statement raises; should it raise none, it is undone."""
    with pytest.raises(psycopg.Error) as caught, world.sql.transaction(force_rollback=True):
        world.sql.execute(sql.encode(), parameters)
    return caught.value


def refusal(world: World, sql: str, **parameters: object) -> str:
    """The message of the P0001 that a call raises."""
    error = refused(world, sql, **parameters)
    assert error.sqlstate == "P0001"
    return str(error.diag.message_primary)


def only_organization(world: World) -> UUID:
    org_id = world.row("organizations")["id"]
    assert isinstance(org_id, UUID)
    return org_id


# Calling convention


@pytest.mark.parametrize("calls", [CALL_BY_NAME, CALL_BY_POSITION], ids=["name", "position"])
@pytest.mark.parametrize("function", CALL_BY_NAME)
def test_functions_take_their_arguments_either_way(
    world: World, org: UUID, function: str, calls: dict[str, str]
) -> None:
    assert answer(world, calls[function], org=org) is True
    attributions = world.rows(
        "credit_usage_attribution",
        *("user_id", "credits_used", "service_type", "service_name", "request_id"),
        "request_metadata ->> 'company_id'",
    )
    expected_attributions = [("ada", 75, "valuation", "Valuation", "r-1", "c-7")]
    assert attributions == (expected_attributions if function == "deduct_credits" else [])
    assert (world.pool(org), world.allocations(org)["ada"]) == {
        "has_sufficient_credits": ((1000, 100, 0), (100, 0)),
        "deduct_credits": ((1000, 100, 75), (100, 75)),
        "add_credits_to_pool": ((1500, 100, 0), (100, 0)),
        "allocate_credits_to_user": ((1000, 150, 0), (150, 0)),
    }[function]


def test_argument_names_types_and_defaults_are_the_contract(world: World) -> None:
    found = world.sql.execute(
        """
        SELECT proname, pg_get_function_arguments(oid) AS arguments, prorettype::regtype::text
        FROM pg_proc
        WHERE proname = ANY(%s)
        """,
        (list(CALL_BY_NAME),),
    ).fetchall()
    arguments = {row["proname"]: re.sub(r"::[a-z ]+", "", row["arguments"]) for row in found}
    text = "character varying"
    assert arguments == {
        "has_sufficient_credits": f"p_org_id uuid, p_user_id {text}, p_credits_needed bigint",
        "deduct_credits": (
            f"p_org_id uuid, p_user_id {text}, p_credits_used bigint, p_service_type {text}, "
            f"p_service_name {text} DEFAULT NULL, p_request_id {text} DEFAULT NULL, "
            "p_request_metadata jsonb DEFAULT NULL"
        ),
        "add_credits_to_pool": (
            "p_org_id uuid, p_credits_amount bigint, p_purchase_amount numeric DEFAULT 0"
        ),
        "allocate_credits_to_user": (
            f"p_org_id uuid, p_user_id {text}, p_credits_amount bigint, "
            f"p_allocated_by {text} DEFAULT NULL"
        ),
    }
    assert {row["prorettype"] for row in found} == {"boolean"}


# has_sufficient_credits


@pytest.mark.parametrize(("needed", "enough"), [(1, True), (60, True), (61, False)])
def test_sufficient_is_what_remains_less_what_is_held(
    world: World, org: UUID, needed: int, *, enough: bool
) -> None:
    world.deduct(org, "r-1", 30)
    world.sql.execute("UPDATE user_credit_allocations SET held_credits = 10")
    call = "SELECT has_sufficient_credits(%(org)s, 'ada', %(needed)s)"
    assert answer(world, call, org=org, needed=needed) is enough


def test_nobody_without_an_active_allocation_has_sufficient_credits(
    world: World, org: UUID
) -> None:
    call = "SELECT has_sufficient_credits(%(org)s, %(user)s, 0)"
    assert answer(world, call, org=org, user="nobody") is False
    assert answer(world, call, org=uuid4(), user="ada") is False
    assert answer(world, call, org=org, user="ada") is True
    world.sql.execute("UPDATE user_credit_allocations SET is_active = false")
    assert answer(world, call, org=org, user="ada") is False


# deduct_credits


def test_a_minimal_deduction_fills_in_the_rest(world: World, org: UUID) -> None:
    assert answer(world, "SELECT deduct_credits(%(org)s, 'ada', 3, 'probe')", org=org) is True
    row = world.row("credit_usage_attribution")
    assert (row["service_name"], row["request_metadata"]) == (None, {})
    assert (row["api_cost"], row["markup_applied"], row["total_cost"]) == (0, 0, 0)
    assert row["request_id"].startswith("sql:")
    assert world.rows("usage_requests", "request_id", "state", "credits") == [
        (row["request_id"], "charged", 3)
    ]


def test_deductions_without_a_request_id_are_all_charged(world: World, org: UUID) -> None:
    for _ in range(3):
        world.sql.execute("SELECT deduct_credits(%s, 'ada', 5, 'probe')", (org,))
    assert world.pool(org) == (1000, 100, 15)


def test_a_request_id_is_deducted_once(world: World, org: UUID) -> None:
    assert world.deduct(org, "r-1") is True
    before = world.contents()
    assert world.deduct(org, "r-1") is True
    assert world.contents() == before


@pytest.mark.parametrize(
    ("user", "credits", "message"),
    [
        ("ada", 71, "Insufficient credits: 70 available, 71 needed"),
        ("ben", 1, "No credit allocation found for user ben in org {org}"),
        ("off", 1, "No credit allocation found for user off in org {org}"),
        ("ada", 0, "Credits must be positive: 0"),
        ("ada", -5, "Credits must be positive: -5"),
        ("ada", None, "Credits must be positive: null"),
    ],
)
def test_a_deduction_is_refused_in_the_words_of_the_contract(
    world: World, user: str, credits: int | None, message: str
) -> None:
    org_id = world.organization(pool=200, allocations={"ada": 100, "off": 100})
    world.sql.execute("UPDATE user_credit_allocations SET is_active = user_id <> 'off'")
    world.sql.execute("UPDATE user_credit_allocations SET held_credits = 30")
    call = "SELECT deduct_credits(%(org)s, %(user)s, %(credits)s, 'probe')"
    found = refusal(world, call, org=org_id, user=user, credits=credits)
    assert found == message.format(org=org_id)


@pytest.mark.parametrize(
    "other",
    [{"credits": 11}, {"user_id": "ben"}, {"service_type": "property_search"}],
    ids=["credits", "user", "service"],
)
def test_another_deduction_under_a_used_request_id_is_refused(
    world: World, other: dict[str, Any]
) -> None:
    org_id = world.organization(pool=200, allocations={"ada": 100, "ben": 100})
    world.deduct(org_id, "r-1")
    before = world.contents()
    with pytest.raises(RaiseException, match="Request id conflict: r-1 was used for another"):
        world.deduct(org_id, "r-1", **other)
    assert world.contents() == before


def test_a_deduction_in_a_transaction_that_fails_leaves_nothing(world: World, org: UUID) -> None:
    before = world.contents()
    with world.sql.transaction(force_rollback=True):
        world.deduct(org, "r-1")
    assert world.contents() == before
    assert world.deduct(org, "r-1") is True
    assert world.pool(org) == (1000, 100, 10)


def test_concurrent_deductions_of_one_request_id_charge_once(
    world: World, org: UUID, database_url: str
) -> None:
    start = Barrier(4, timeout=30)

    def deduct_all() -> None:
        with psycopg.connect(database_url, autocommit=True) as connection:
            start.wait()
            for number in range(10):
                connection.execute(
                    "SELECT deduct_credits(%s, 'ada', 10, 'probe', NULL, %s)",
                    (org, f"r-{number}"),
                )

    with ThreadPoolExecutor(4) as pool:
        for running in [pool.submit(deduct_all) for _ in range(4)]:
            running.result(timeout=60)
    assert world.allocations(org) == {"ada": (100, 100)}
    assert len(world.rows("credit_usage_attribution", "request_id")) == 10


# One request through both doors


def test_an_event_after_the_direct_call_is_a_duplicate(world: World, org: UUID) -> None:
    world.deduct(org, "r-1")
    before = world.contents()
    assert world.apply(event(org, "r-1")) == Outcome(duplicates=1)
    assert world.contents() == before


def test_a_direct_call_after_the_event_is_a_duplicate(world: World, org: UUID) -> None:
    world.apply(event(org, "r-1"))
    before = world.contents()
    assert world.deduct(org, "r-1") is True
    assert world.contents() == before


def test_an_event_and_a_direct_call_that_differ_conflict_either_way(
    world: World, org: UUID
) -> None:
    world.deduct(org, "sql-first", 11)
    assert world.apply(event(org, "sql-first")).dead == {"request_id_conflict": 1}
    world.apply(event(org, "event-first"))
    with pytest.raises(RaiseException, match="Request id conflict: event-first"):
        world.deduct(org, "event-first", 11)
    assert world.pool(org) == (1000, 100, 21)


@pytest.mark.parametrize(
    ("user", "reason"), [("ada", "insufficient_credits"), ("ben", "no_allocation")]
)
def test_a_direct_call_settles_the_dead_letter_of_a_debt(
    world: World, org: UUID, user: str, reason: str
) -> None:
    owed = event(org, "r-1", user_id=user, service_type="market_analysis")
    assert world.apply(owed).dead == {reason: 1}
    world.allocate(org, user, 150)
    fields = {"user_id": user, "service_type": "market_analysis"}
    assert world.deduct(org, "r-1", 150, **fields) is True
    assert world.rows("usage_requests", "state", "reason", "credits") == [("charged", None, 150)]
    assert world.rows("dead_letters", "reason", "state") == [(reason, "charged")]
    assert world.allocations(org)[user][1] == 150
    before = world.contents()
    assert world.apply(owed) == Outcome(duplicates=1)
    assert world.deduct(org, "r-1", 150, **fields) is True
    assert world.contents() == before


def test_a_direct_call_does_not_revive_a_request_that_died_of_more_than_debt(
    world: World, org: UUID
) -> None:
    long_ago = utc_now() - timedelta(days=50)
    world.apply(event(org, "r-1", occurred_at=long_ago), now=utc_now())
    before = world.contents()
    with pytest.raises(RaiseException, match="Request r-1 is dead: too_old"):
        world.deduct(org, "r-1")
    assert world.contents() == before


@given(user_id=storable_text, service_type=storable_text, credits=st.integers(1, 2**63 - 1))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_fingerprints_are_equal_in_sql_and_python(
    world: World, user_id: str, service_type: str, credits: int
) -> None:
    call = "SELECT usage_fingerprint(%(user)s, %(service)s, %(credits)s)"
    for amount in (credits, None):
        in_sql = answer(world, call, user=user_id, service=service_type, credits=amount)
        assert in_sql == fingerprint(user_id, service_type, amount)


def test_a_request_id_that_a_gate_is_giving_to_somebody_else_is_refused(
    world: World, database_url: str
) -> None:
    org_id = world.organization(pool=1000, allocations={"ada": 100, "bob": 100})
    refusals: list[str] = []

    def charge_ada() -> None:
        call = "SELECT deduct_credits(%s, 'ada', 10, 'contact_lookup', p_request_id => 'r-1')"
        with psycopg.connect(database_url) as other:
            try:
                other.execute(call, (org_id,))
            except RaiseException as error:
                refusals.append(str(error))

    racer = Thread(target=charge_ada)
    with psycopg.connect(database_url) as gate:
        gate.execute(
            "SELECT place_hold(%s, 'bob', 'contact_lookup', NULL, 1, NULL, 'r-1', '1 h', now())",
            (org_id,),
        )
        racer.start()
        await_lock(world)
    racer.join(30)
    assert "Request id conflict" in "".join(refusals)
    assert world.rows("usage_requests", "user_id", "state") == [("bob", "held")]


def test_fingerprints_are_computed_in_line(world: World) -> None:
    # Each pre-check has one: called, it would be run as a statement of its own.
    plan = world.sql.execute(
        "EXPLAIN (VERBOSE) SELECT usage_fingerprint(user_id, 'llm', 3) FROM organization_members"
    ).fetchall()
    assert "sha256" in str(plan)
    assert "usage_fingerprint" not in str(plan)


# add_credits_to_pool and allocate_credits_to_user


def test_adding_credits_makes_the_pool_and_then_adds_to_it(world: World) -> None:
    org_id = world.organization()
    call = "SELECT add_credits_to_pool(%(org)s, %(credits)s)"
    assert answer(world, call, org=org_id, credits=300) is True
    assert world.pool(org_id) == (300, 0, 0)
    assert answer(world, call, org=org_id, credits=200) is True
    assert world.pool(org_id) == (500, 0, 0)
    assert world.row("organization_credit_pools")["available_credits"] == 500
    assert world.rows("credit_transactions", "id", "kind", "credits", "amount") == [
        (1, "grant", 300, 0),
        (2, "grant", 200, 0),
    ]


def test_a_purchase_is_counted_and_written_to_the_billing_history(world: World) -> None:
    org_id = world.organization()
    for amount in ("49.99", "0.01"):
        call = "SELECT add_credits_to_pool(%(org)s, 5000, %(amount)s)"
        answer(world, call, org=org_id, amount=Decimal(amount))
    pool = world.row("organization_credit_pools")
    assert (pool["lifetime_purchased_credits"], pool["lifetime_spent_amount"]) == (10_000, 50)
    assert world.rows("credit_transactions", "kind", "credits", "amount") == [
        ("purchase", 5000, Decimal("0.01")),
        ("purchase", 5000, Decimal("49.99")),
    ]
    columns = ("event_type", "amount", "currency", "payment_status", "event_metadata ->> 'credits'")
    assert world.rows("org_billing_history", *columns) == [
        ("credit_purchase", Decimal("0.01"), "USD", "paid", "5000"),
        ("credit_purchase", Decimal("49.99"), "USD", "paid", "5000"),
    ]


def test_a_test_organization_is_never_billed(world: World) -> None:
    org_id = world.organization(is_test=True)
    answer(world, "SELECT add_credits_to_pool(%(org)s, 5000, 49.99)", org=org_id)
    assert world.pool(org_id) == (5000, 0, 0)
    assert world.rows("org_billing_history", "id") == []


@pytest.mark.parametrize(
    ("credits", "amount", "message"),
    [
        (0, 0, "Credits must be positive: 0"),
        (-1, 0, "Credits must be positive: -1"),
        (None, 0, "Credits must be positive: null"),
        (1, -1, "Purchase amount must not be negative: -1"),
        (1, None, "Purchase amount must not be negative: null"),
    ],
)
def test_credits_are_added_in_positive_numbers_only(
    refusing: World, credits: int | None, amount: int | None, message: str
) -> None:
    org_id = only_organization(refusing)
    call = "SELECT add_credits_to_pool(%(org)s, %(credits)s, %(amount)s)"
    assert refusal(refusing, call, org=org_id, credits=credits, amount=amount) == message


def test_credits_are_not_added_to_an_unknown_organization(world: World) -> None:
    stranger = uuid4()
    found = refusal(world, "SELECT add_credits_to_pool(%(org)s, 1)", org=stranger)
    assert found == f"No organization found: {stranger}"


def test_allocating_adds_to_what_the_user_has(world: World, org: UUID) -> None:
    world.deduct(org, "r-1", 40)
    call = "SELECT allocate_credits_to_user(%(org)s, 'ada', 50, 'boss')"
    assert answer(world, call, org=org) is True
    row = world.row("user_credit_allocations")
    assert (row["allocated_credits"], row["used_credits"]) == (150, 40)
    assert (row["remaining_credits"], row["allocated_by"]) == (110, "boss")
    assert world.row("organization_credit_pools")["available_credits"] == 850
    assert world.rows("credit_transactions", "kind", "credits", "user_id", "actor")[:2] == [
        ("allocation", 50, "ada", "boss"),
        ("allocation", 100, "ada", None),
    ]


def test_allocating_switches_an_inactive_allocation_on(world: World, org: UUID) -> None:
    world.sql.execute("UPDATE user_credit_allocations SET is_active = false")
    world.allocate(org, "ada", 1)
    assert world.row("user_credit_allocations")["is_active"] is True


@pytest.mark.parametrize(
    ("credits", "message"),
    [
        (901, "Insufficient credits in pool: 900 available, 901 needed"),
        (0, "Credits must be positive: 0"),
        (-1, "Credits must be positive: -1"),
        (None, "Credits must be positive: null"),
    ],
)
def test_an_allocation_is_refused_in_the_words_of_the_contract(
    refusing: World, credits: int | None, message: str
) -> None:
    org_id = only_organization(refusing)
    call = "SELECT allocate_credits_to_user(%(org)s, 'ben', %(credits)s)"
    assert refusal(refusing, call, org=org_id, credits=credits) == message


def test_without_a_pool_nothing_is_allocated(world: World) -> None:
    org_id = world.organization()
    found = refusal(world, "SELECT allocate_credits_to_user(%(org)s, 'ada', 1)", org=org_id)
    assert found == f"No credit pool found for org {org_id}"


# Tables


def test_all_columns_of_the_contract_are_there(world: World) -> None:
    found = world.sql.execute(
        """
        SELECT table_name, array_agg(column_name::text) AS columns
        FROM information_schema.columns
        WHERE table_schema = 'public'
        GROUP BY table_name
        """
    )
    there = {row["table_name"]: set(row["columns"]) for row in found}
    missing = {
        f"{table}.{column}"
        for table, columns in COLUMNS.items()
        for column in set(columns.split()) - there.get(table, set())
    }
    assert missing == set()


def test_organizations_and_members_need_only_their_keys_and_names(world: World) -> None:
    world.sql.execute("INSERT INTO organizations (name, display_name) VALUES ('acme', 'Acme')")
    world.sql.execute(
        "INSERT INTO organization_members (org_id, user_id) SELECT id, 'ada' FROM organizations"
    )
    organization = world.row("organizations")
    assert (organization["status"], organization["timezone"]) == ("active", "UTC")
    assert organization["is_test"] is False
    assert world.row("organization_members")["role"] == "member"


def test_the_billing_history_takes_every_event_type_of_the_contract(world: World) -> None:
    org_id = world.organization()
    for event_type in BILLING_EVENTS:
        world.sql.execute(
            "INSERT INTO org_billing_history (org_id, event_type) VALUES (%s, %s)",
            (org_id, event_type),
        )
    written = world.rows("org_billing_history", "event_type")
    assert written == sorted((event_type,) for event_type in BILLING_EVENTS)


@pytest.mark.parametrize(
    ("statement", "constraint"),
    [
        (
            "INSERT INTO organizations (name, display_name) SELECT name, 'x' FROM organizations",
            "organizations_name_key",
        ),
        ("UPDATE organizations SET status = 'asleep'", "organizations_status_check"),
        ("UPDATE organizations SET max_seats = 0", "organizations_max_seats_check"),
        (
            """
            INSERT INTO organization_members (org_id, user_id, role)
            SELECT id, 'ada', 'owner' FROM organizations
            """,
            "organization_members_role_check",
        ),
        (
            """
            INSERT INTO organization_subscriptions (org_id, subscription_plan, monthly_price)
            SELECT id, 'gold', 1 FROM organizations
            """,
            "organization_subscriptions_subscription_plan_check",
        ),
        (
            """
            INSERT INTO organization_subscriptions (org_id, subscription_plan, monthly_price)
            SELECT id, plan, 1 FROM organizations, (VALUES ('byok'), ('hybrid')) AS twice (plan)
            """,
            "organization_subscriptions_one_live_key",
        ),
        (
            "UPDATE organization_credit_pools SET allocated_credits = total_credits + 1",
            "organization_credit_pools_allocated_check",
        ),
        (
            "UPDATE organization_credit_pools SET total_credits = allocated_credits - 1",
            "organization_credit_pools_allocated_check",
        ),
        (
            "UPDATE organization_credit_pools SET used_credits = -1",
            "organization_credit_pools_used_check",
        ),
        (
            "INSERT INTO organization_credit_pools (org_id) SELECT id FROM organizations",
            "organization_credit_pools_org_id_key",
        ),
        (
            "UPDATE user_credit_allocations SET used_credits = allocated_credits + 1",
            "user_credit_allocations_not_overspent_check",
        ),
        (
            "UPDATE user_credit_allocations SET used_credits = 60, held_credits = 41",
            "user_credit_allocations_not_overspent_check",
        ),
        (
            "UPDATE user_credit_allocations SET used_credits = -1",
            "user_credit_allocations_used_check",
        ),
        (
            "UPDATE user_credit_allocations SET reset_period = 'hourly'",
            "user_credit_allocations_reset_period_check",
        ),
        (
            """
            INSERT INTO user_credit_allocations (org_id, user_id)
            SELECT org_id, user_id FROM user_credit_allocations
            """,
            "user_credit_allocations_org_id_user_id_key",
        ),
        (
            """
            INSERT INTO org_billing_history (org_id, event_type)
            SELECT id, 'party' FROM organizations
            """,
            "org_billing_history_event_type_check",
        ),
    ],
)
def test_constraints_refuse_what_must_not_be(
    refusing: World, statement: str, constraint: str
) -> None:
    assert refused(refusing, statement).diag.constraint_name == constraint


@pytest.mark.parametrize("status", ["active", "trialing", "past_due", "paused"])
def test_a_canceled_subscription_makes_room_for_a_live_one(
    world: World, org: UUID, status: str
) -> None:
    world.subscribe(org, PlanName.BYOK, "canceled")
    world.subscribe(org, PlanName.BYOK, "canceled")
    world.subscribe(org, PlanName.HYBRID, status)
    with pytest.raises(IntegrityError, match="organization_subscriptions_one_live_key"):
        world.subscribe(org, PlanName.PLATFORM)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE organization_credit_pools SET available_credits = 1",
        "UPDATE user_credit_allocations SET remaining_credits = 1",
        "INSERT INTO credit_usage_attribution (total_cost) VALUES (1)",
    ],
)
def test_generated_columns_cannot_be_written(refusing: World, statement: str) -> None:
    assert isinstance(refused(refusing, statement), GeneratedAlways)


@pytest.mark.parametrize("table", ["credit_usage_attribution", "credit_transactions"])
@pytest.mark.parametrize(
    ("operation", "statement"),
    [
        ("UPDATE", "UPDATE {} SET org_id = org_id"),
        ("DELETE", "DELETE FROM {}"),
        ("TRUNCATE", "TRUNCATE {}"),
    ],
)
def test_what_happened_is_never_rewritten(
    refusing: World, table: str, operation: str, statement: str
) -> None:
    found = refusal(refusing, statement.format(table))
    assert found == f"{table} is append-only: {operation} refused"


def test_what_happened_does_not_go_with_its_organization(refusing: World) -> None:
    found = refusal(refusing, "TRUNCATE organizations CASCADE")
    assert found.endswith("is append-only: TRUNCATE refused")


# What outside queries read


def test_usage_can_be_summed_by_service(world: World, org: UUID) -> None:
    world.apply(event(org, "r-1"), event(org, "r-2"), event(org, "r-3", service_type="valuation"))
    found = world.sql.execute(
        """
        SELECT service_type, SUM(credits_used) AS credits
        FROM credit_usage_attribution
        WHERE org_id = %s
        GROUP BY service_type
        """,
        (org,),
    )
    assert {row["service_type"]: row["credits"] for row in found} == {
        "contact_lookup": 20,
        "valuation": 75,
    }


def test_usage_can_be_found_by_its_metadata_through_both_doors(world: World, org: UUID) -> None:
    world.apply(
        event(org, "r-1", metadata={"company_id": "c-7", "record_count": 3}),
        event(org, "r-2", metadata={"company_id": "c-8"}),
    )
    answer(world, CALL_BY_NAME["deduct_credits"].replace("r-1", "r-3"), org=org)
    assert world.rows(
        "credit_usage_attribution WHERE request_metadata->>'company_id' = 'c-7'", "request_id"
    ) == [("r-1",), ("r-3",)]
    assert world.rows(
        "credit_usage_attribution WHERE (request_metadata->>'record_count')::int > 2",
        "request_id",
    ) == [("r-1",)]


def test_the_views_count_thirty_days(world: World) -> None:
    org_id = world.organization(
        plan=PlanName.PLATFORM, pool=1000, allocations={"ada": 300, "ben": 200}
    )
    now = utc_now()
    yesterday, last_month = now - timedelta(days=1), now - timedelta(days=31)
    world.apply(
        event(org_id, "r-1", occurred_at=yesterday, api_cost="0.04"),
        event(org_id, "r-2", occurred_at=now, service_type="valuation"),
        event(org_id, "r-3", occurred_at=now, user_id="ben"),
        event(org_id, "r-4", occurred_at=last_month, service_type="market_analysis"),
        now=now,
    )
    columns = ("user_id", "total_credits", "request_count", "services_used", "last_usage")
    assert world.rows("top_credit_users_by_org", *columns) == [
        ("ada", 85, 2, 2, now),
        ("ben", 10, 1, 1, now),
    ]
    metrics = world.row("org_billing_metrics")
    assert (metrics["org_id"], metrics["total_credits_used"]) == (org_id, 95)
    assert (metrics["total_requests"], metrics["active_users"]) == (3, 2)
    assert metrics["total_cost"] == Decimal("0.06")


def test_the_summary_has_one_row_per_organization(world: World) -> None:
    bare = world.organization()
    full = world.organization(
        plan=PlanName.HYBRID,
        pool=1000,
        allocations={"ada": 100, "ben": 50},
        members={"ada": "admin", "ben": "member", "cy": "member"},
    )
    world.subscribe(bare, PlanName.BYOK, "canceled")
    world.deduct(full, "r-1")
    columns = (
        *("org_id", "subscription_plan", "monthly_price", "total_credits", "allocated_credits"),
        *("used_credits", "available_credits", "member_count", "active_allocations"),
    )
    assert set(world.rows("org_billing_summary", *columns)) == {
        (bare, None, None, 0, 0, 0, 0, 0, 0),
        (full, "hybrid", 99, 1000, 150, 10, 850, 3, 2),
    }


def test_a_user_is_seen_in_all_organizations(world: World) -> None:
    first = world.organization(
        plan=PlanName.BYOK, pool=100, allocations={"ada": 60}, members={"ada": "admin"}
    )
    second = world.organization(members={"ada": "member", "ben": "member"})
    outside = world.organization(pool=100, allocations={"ada": 5})
    world.leave(outside, "ada")
    world.deduct(first, "r-1")
    columns = ("org_id", "role", "allocated_credits", "used_credits", "remaining_credits")
    found = world.rows("user_multi_org_credits WHERE user_id = 'ada'", *columns)
    assert set(found) == {
        (first, "admin", 60, 10, 50),
        (second, "member", 0, 0, 0),
        (outside, None, 5, 0, 5),
    }


@pytest.mark.parametrize("request_id", ["", "a b", "a\nb", "ä", "x" * 300])
def test_a_direct_call_refuses_a_bad_request_id(world: World, request_id: str) -> None:
    org_id = world.organization(pool=100, allocations={"ada": 100})
    with pytest.raises(psycopg.errors.RaiseException, match="Invalid request id"):
        world.deduct(org_id, request_id)
    assert world.rows("usage_requests", "request_id") == []
