"""Reconciliation: silent on a sound ledger, and it names the row that somebody spoiled."""

from collections.abc import Iterator

import pytest

from ledger.database import Database
from ledger.reconcile import CHECKS, Report, reconcile
from tests.integration.ledger.world import World, event, open_world

SPOILED = {
    "requests.charged": "DELETE FROM usage_requests WHERE request_id = 'paid'",
    "requests.dead": "UPDATE dead_letters SET state = 'discarded'",
    "allocations.used": "UPDATE user_credit_allocations SET used_credits = used_credits + 1",
    "allocations.held": "UPDATE user_credit_allocations SET held_credits = 5",
    "attributions.owner": "UPDATE credit_usage_attribution SET user_id = 'eve'",
    "pools.used": "UPDATE organization_credit_pools SET used_credits = used_credits - 1",
    "pools.total": "UPDATE organization_credit_pools SET total_credits = total_credits + 1",
    "allocations.funded": "UPDATE user_credit_allocations SET allocated_credits = 101",
}


@pytest.fixture
def world(database: Database, database_url: str) -> Iterator[World]:
    with open_world(database, database_url) as opened:
        org_id = opened.organization(pool=1000, allocations={"ada": 100})
        opened.apply(
            event(org_id, "paid"),
            event(org_id, "unpaid", service_type="market_analysis"),
            event(org_id, "paid", user_id="impostor"),
        )
        yield opened


def drifting(report: Report) -> set[str]:
    return {drift.check for drift in report.drifts}


def test_a_sound_ledger_is_clean(world: World) -> None:
    report = reconcile(world.database)
    assert report.is_clean
    assert report.figures == {
        "organizations": 1,
        "charged_requests": 1,
        "dead_requests": 1,
        "open_dead_letters": 2,
        "credits_charged": 10,
    }


def test_an_empty_ledger_is_clean(database: Database) -> None:
    assert reconcile(database).is_clean


def test_every_check_has_its_spoiler() -> None:
    assert {check.name for check in CHECKS} == set(SPOILED)


@pytest.mark.parametrize("check", SPOILED)
def test_each_check_finds_its_drift(world: World, check: str) -> None:
    world.sql.execute("SET session_replication_role = replica")  # past the triggers
    world.sql.execute(SPOILED[check].encode())
    report = reconcile(world.database)
    assert check in drifting(report)
    drift = next(drift for drift in report.drifts if drift.check == check)
    assert drift.recorded != drift.computed
    assert drift.subject
