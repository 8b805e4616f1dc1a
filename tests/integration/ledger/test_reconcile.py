"""Reconciliation: silent on a sound ledger, and it names the row that somebody spoiled."""

from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timedelta
from uuid import UUID

import pytest

from benchmarks.reconcile import measure
from ledger import debts, holds
from ledger.checks import CHECKS
from ledger.database import Database
from ledger.gate import Operation
from ledger.reconcile import MAX_DRIFTS_PER_CHECK, Report, reconcile
from schema.plans import PlanName
from tests.integration.ledger.world import NOW, World, event, open_world

LOOKUP = Operation(service_type="contact_lookup")
DAY = timedelta(days=1)
TEN_MINUTES = timedelta(minutes=10)
TOO_LATE = NOW - TEN_MINUTES - timedelta(microseconds=1)

SPOILED = {
    "requests.charged": "DELETE FROM usage_requests WHERE request_id = 'paid'",
    "requests.charged_once": """
        INSERT INTO credit_usage_attribution (
            org_id, user_id, allocation_id, credits_used, service_type, request_id, period_start
        )
        SELECT org_id, user_id, allocation_id, credits_used, service_type, request_id, period_start
        FROM credit_usage_attribution
        WHERE request_id = 'paid' AND corrects IS NULL
    """,
    "requests.dead": "UPDATE dead_letters SET state = 'discarded'",
    "requests.discarded": "UPDATE dead_letters SET state = 'open' WHERE state = 'discarded'",
    "letters.charged": "UPDATE usage_requests SET state = 'released' WHERE request_id = 'owed'",
    "allocations.used": "UPDATE user_credit_allocations SET used_credits = used_credits - 1",
    "periods.used": "UPDATE allocation_periods SET used_credits = used_credits - 1",
    "allocations.held": "UPDATE user_credit_allocations SET held_credits = 0",
    "pools.used": "UPDATE organization_credit_pools SET used_credits = used_credits - 1",
    "corrections.charge": """
        UPDATE credit_usage_attribution
        SET corrects = (SELECT id FROM credit_usage_attribution WHERE request_id = 'late')
        WHERE corrects IS NOT NULL
    """,
    "corrections.net": """
        UPDATE credit_usage_attribution SET credits_used = -11 WHERE corrects IS NOT NULL
    """,
    "pools.total": "UPDATE organization_credit_pools SET total_credits = total_credits + 1",
    "allocations.funded": """
        UPDATE user_credit_allocations SET allocated_credits = allocated_credits + 1
    """,
    "pools.overage": "UPDATE credit_usage_attribution SET overage_credits = 0",
    "requests.fingerprint": """
        UPDATE usage_requests SET fingerprint = '\\x00' WHERE request_id = 'paid'
    """,
    "holds.overdue": f"""
        UPDATE usage_requests SET hold_expires_at = '{TOO_LATE}' WHERE state = 'held'
    """,
    "periods.contiguous": """
        UPDATE allocation_periods SET period_end = period_end - interval '1 hour'
    """,
    "resets.overdue": f"""
        UPDATE user_credit_allocations SET next_reset_date = '{TOO_LATE}' WHERE user_id = 'ada'
    """,
    "attributions.owner": "UPDATE credit_usage_attribution SET user_id = 'eve'",
    "transactions.owner": """
        UPDATE credit_transactions SET user_id = 'eve' WHERE allocation_id IS NOT NULL
    """,
}


@pytest.fixture
def world(database: Database, database_url: str) -> Iterator[World]:
    with open_world(database, database_url) as opened:
        yield opened


@pytest.fixture
def org_id(world: World) -> UUID:
    """A history of everything: a closed period, late usage, overage, debts, a correction."""
    org_id = world.organization(
        plan=PlanName.PLATFORM, pool=1000, allocations={"ada": 100, "bob": 50}
    )
    world.sql.execute(
        "UPDATE organization_credit_pools SET allow_overage = true, overage_limit = 30"
    )
    close_period(world, "ada")
    world.apply(
        event(org_id, "paid"),
        event(org_id, "late", occurred_at=(NOW - 2 * DAY).isoformat()),
        event(org_id, "lent", user_id="bob", service_type="valuation"),
        event(org_id, "unpaid", service_type="market_analysis"),
        event(org_id, "owed", user_id="cyd"),
        event(org_id, "strange", service_type="teleport"),
        event(org_id, "paid", user_id="impostor"),
    )
    world.allocate(org_id, "cyd", 20)
    assert debts.settle(world.database, NOW).debts == 1
    holds.place(world.database, org_id, "ada", LOOKUP, "open", timedelta(hours=1), NOW)
    discard(world, "strange")
    give_back(world, "paid", 3)
    return org_id


def close_period(world: World, user_id: str) -> None:
    """Let a period without usage end yesterday."""
    world.sql.execute(
        """
        UPDATE user_credit_allocations
        SET last_reset_date = %s, next_reset_date = %s
        WHERE user_id = %s
        """,
        (NOW - DAY, NOW + 30 * DAY, user_id),
    )
    world.sql.execute(
        """
        INSERT INTO allocation_periods (allocation_id, period_start, period_end, created_at)
        SELECT id, %s, last_reset_date, last_reset_date
        FROM user_credit_allocations
        WHERE user_id = %s
        """,
        (NOW - 31 * DAY, user_id),
    )


def discard(world: World, request_id: str) -> None:
    for table in ("usage_requests", "dead_letters"):
        world.sql.execute(
            f"UPDATE {table} SET state = 'discarded' WHERE request_id = %s".encode(), (request_id,)
        )


def give_back(world: World, request_id: str, credits: int) -> None:
    """Correct a charge of the running period."""
    world.sql.execute(
        """
        WITH correction AS (
            INSERT INTO credit_usage_attribution (
                org_id, user_id, allocation_id, period_start, service_type, request_id,
                credits_used, corrects, actor, reason
            )
            SELECT
                org_id, user_id, allocation_id, period_start, service_type, request_id,
                -%(credits)s, id, 'root', 'of no use'
            FROM credit_usage_attribution
            WHERE request_id = %(request_id)s
            RETURNING allocation_id, org_id
        ),
        allocation AS (
            UPDATE user_credit_allocations
            SET used_credits = used_credits - %(credits)s
            WHERE id = (SELECT allocation_id FROM correction)
        )
        UPDATE organization_credit_pools
        SET used_credits = used_credits - %(credits)s
        WHERE org_id = (SELECT org_id FROM correction)
        """,
        {"request_id": request_id, "credits": credits},
    )


def spoil(world: World, statement: str) -> None:
    """Change rows past the triggers."""
    world.sql.execute("SET session_replication_role = replica")
    world.sql.execute(statement.encode())


def looked_at(world: World, org_id: UUID | None = None, now: datetime = NOW) -> Report:
    return reconcile(world.database, now=now, org_id=org_id)


def test_a_sound_ledger_is_clean(world: World, org_id: UUID) -> None:
    report = looked_at(world)
    assert report.drifts == []
    assert report.is_clean
    assert report.organizations == []
    assert report.taken_at == NOW
    assert report.figures == {
        "organizations": 1,
        "charged_requests": 4,
        "dead_requests": 1,
        "open_dead_letters": 2,
        "credits_charged": 102,
    }
    assert looked_at(world, org_id).figures == report.figures


def test_an_empty_ledger_is_clean(database: Database) -> None:
    assert reconcile(database).is_clean


def test_every_check_has_its_spoiler() -> None:
    assert {check.name for check in CHECKS} == set(SPOILED)


@pytest.mark.parametrize("check", SPOILED)
@pytest.mark.parametrize("of", ["all", "one"])
def test_each_check_finds_its_drift(world: World, org_id: UUID, check: str, of: str) -> None:
    spoil(world, SPOILED[check])
    report = looked_at(world, org_id if of == "one" else None)
    drift = next(drift for drift in report.drifts if drift.check == check)
    assert drift.recorded != drift.computed
    assert drift.subject
    assert drift.org_id == org_id
    assert not report.is_clean


@pytest.mark.parametrize(
    ("check", "statement"),
    [
        ("requests.charged", "UPDATE usage_requests SET user_id = 'eve' WHERE user_id = 'bob'"),
        ("requests.charged", "UPDATE usage_requests SET credits = 1 WHERE request_id = 'paid'"),
        ("requests.charged", "DELETE FROM credit_usage_attribution WHERE request_id = 'late'"),
        ("requests.dead", "DELETE FROM usage_requests WHERE state = 'dead'"),
        ("letters.charged", "DELETE FROM usage_requests WHERE request_id = 'owed'"),
        ("periods.used", "DELETE FROM allocation_periods"),
        ("allocations.held", "DELETE FROM user_credit_allocations WHERE user_id = 'ada'"),
        ("allocations.funded", "UPDATE allocation_periods SET used_credits = 9"),
        ("pools.used", "DELETE FROM organization_credit_pools"),
        ("pools.total", "DELETE FROM organization_credit_pools"),
        ("pools.total", "DELETE FROM credit_transactions WHERE kind = 'late_usage'"),
        ("pools.overage", "DELETE FROM credit_transactions WHERE kind = 'overage'"),
        ("corrections.charge", "DELETE FROM credit_usage_attribution WHERE corrects IS NULL"),
    ],
)
def test_a_check_finds_other_drift_as_well(
    world: World, org_id: UUID, check: str, statement: str
) -> None:
    assert org_id
    spoil(world, statement)
    assert check in {drift.check for drift in looked_at(world).drifts}


def test_what_is_just_due_is_not_overdue(world: World, org_id: UUID) -> None:
    world.sql.execute(
        "UPDATE usage_requests SET hold_expires_at = %s WHERE state = 'held'", (NOW - TEN_MINUTES,)
    )
    world.sql.execute(
        "UPDATE user_credit_allocations SET next_reset_date = %s WHERE user_id = 'ada'",
        (NOW - TEN_MINUTES,),
    )
    assert looked_at(world).drifts == []
    late = looked_at(world, now=NOW + timedelta(microseconds=1))
    assert {drift.check for drift in late.drifts} == {"holds.overdue", "resets.overdue"}
    world.sql.execute("UPDATE user_credit_allocations SET is_active = false")
    late = looked_at(world, org_id, now=NOW + timedelta(microseconds=1))
    assert {drift.check for drift in late.drifts} == {"holds.overdue"}


def test_drift_is_grouped_by_organization(world: World, org_id: UUID) -> None:
    other = world.organization(pool=100, allocations={"dan": 10, "eli": 10})
    sound = world.organization(pool=100, allocations={"fay": 10})
    spoil(world, f"UPDATE user_credit_allocations SET held_credits = 1 WHERE org_id = '{other}'")
    spoil(world, f"UPDATE organization_credit_pools SET used_credits = 1 WHERE org_id = '{other}'")
    report = looked_at(world)
    assert report.figures["organizations"] == 3
    assert {off.org_id: (off.checks, dict(off.rows)) for off in report.organizations} == {
        other: (2, {"allocations.held": 2, "pools.used": 1})
    }
    assert looked_at(world, other).organizations == report.organizations
    for clean in (org_id, sound):
        assert looked_at(world, clean).is_clean
    assert looked_at(world, sound).figures == {
        "organizations": 1,
        "charged_requests": 0,
        "dead_requests": 0,
        "open_dead_letters": 0,
        "credits_charged": 0,
    }


def test_a_large_drift_is_counted_whole_and_hides_no_small_one(world: World) -> None:
    crowd = {f"u{number}": 1 for number in range(MAX_DRIFTS_PER_CHECK + 50)}
    organizations = [
        world.organization(pool=1000, allocations=crowd),
        world.organization(pool=1000, allocations={"ada": 1}),
    ]
    spoil(world, "UPDATE user_credit_allocations SET held_credits = 1")
    report = looked_at(world)
    assert len(report.drifts) == MAX_DRIFTS_PER_CHECK
    assert {drift.org_id for drift in report.drifts} == set(organizations)
    found = {off.org_id: off.rows["allocations.held"] for off in report.organizations}
    assert found == dict(zip(organizations, (len(crowd), 1), strict=True))
    assert report.rows_off["allocations.held"] == len(crowd) + 1
    assert report.rows_off["pools.used"] == 0
    figures = report.as_figures()
    assert figures["drifts"] == report.rows_off
    assert (figures["organizations"], figures["organizations_off"]) == (2, 2)


def test_the_ledger_of_the_benchmark_is_sound(database_url: str) -> None:
    with closing(Database(database_url, pool_size=1, role="")) as owner:
        figures = measure(owner, 500)
    assert figures.is_clean
    assert figures.charged == 500
