"""The scheduled tasks as beat starts them, by a clock of the test's own."""

from collections.abc import Iterator
from datetime import datetime, timedelta
from uuid import UUID

import pytest
from structlog.testing import capture_logs

from ledger import holds, runs, subscriptions
from ledger.clock import clock_replaced
from ledger.database import Database
from ledger.gate import Operation
from schema.plans import PlanName
from schema.settings import Settings
from schema.wire import TASK_RECONCILE, TASK_RESET_DUE
from tests.integration.ledger.world import NOW, World, event, open_world
from worker import tasks
from worker.app import SCHEDULE_SECONDS, app

LATER = NOW + timedelta(days=40)


@pytest.fixture
def world(
    database: Database, database_url: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> Iterator[World]:
    """The database of this process's tasks."""
    monkeypatch.setenv("METERING_DATABASE_URL", database_url)
    monkeypatch.setenv("METERING_REDIS_URL", settings.redis_url.get_secret_value())
    forget()
    with open_world(database, database_url) as opened:
        yield opened
    tasks._database().close()  # noqa: SLF001 - made by the tasks, for a process that ends
    forget()


def forget() -> None:
    for cached in (tasks._settings, tasks._database, tasks._drain):  # noqa: SLF001 - per process
        cached.cache_clear()


@pytest.fixture
def org(world: World) -> UUID:
    """Ada has 20 of 1,000 credits since `NOW`, every month."""
    org_id = world.organization(pool=1000, members={"ada": "member"})
    world.sql.execute(
        "SELECT fund_allocation(%s, 'ada', 20, false, 'monthly', NULL, 'boss', NULL, %s)",
        (org_id, NOW),
    )
    return org_id


def at(moment: datetime) -> "Clock":
    return Clock(moment)


class Clock:
    """A clock that stands."""

    def __init__(self, moment: datetime) -> None:
        self.moment = moment

    def __call__(self) -> datetime:
        return self.moment


def test_every_scheduled_task_exists() -> None:
    app.loader.import_default_modules()
    assert set(SCHEDULE_SECONDS) <= set(app.tasks)


def test_debts_settle(world: World, org: UUID) -> None:
    world.apply(event(org, quantity=3))
    world.allocate(org, "ada", 10)
    with clock_replaced(at(NOW)):
        tasks.settle()
    assert world.row("usage_requests")["state"] == "charged"


def test_holds_expire(world: World, org: UUID) -> None:
    lookup = Operation(service_type="contact_lookup")
    holds.place(world.database, org, "ada", lookup, "r-1", timedelta(minutes=5), NOW)
    with clock_replaced(at(LATER)):
        tasks.expire_holds()
    assert world.row("usage_requests")["state"] == "expired"


def test_resets_run_once_and_leave_their_figures(world: World, org: UUID) -> None:
    world.apply(event(org))
    with clock_replaced(at(LATER)):
        tasks.reset_due()
        tasks.reset_due()
    assert world.allocations(org) == {"ada": (20, 0)}
    assert len(world.rows("allocation_periods", "period_start")) == 1
    run = runs.latest(world.database, TASK_RESET_DUE)
    assert run is not None
    assert run.started_at == LATER
    assert run.figures["allocations_reset"] == 0


def test_credits_of_members_who_left_return_after_their_holds(world: World, org: UUID) -> None:
    lookup = Operation(service_type="contact_lookup")
    holds.place(world.database, org, "ada", lookup, "r-1", timedelta(minutes=5), NOW)
    world.sql.execute("UPDATE user_credit_allocations SET is_active = false")
    with clock_replaced(at(LATER)):
        tasks.expire_holds()
        tasks.reset_due()
    assert world.pool(org) == (1000, 0, 0)


def test_subscriptions_roll_over(world: World, org: UUID) -> None:
    subscriptions.create(world.database, org, PlanName.PLATFORM, actor="root", now=NOW)
    with clock_replaced(at(LATER)):
        tasks.roll_over()
    assert len(world.rows("org_billing_history WHERE event_type = 'invoice_created'", "id")) == 2


@pytest.mark.usefixtures("org")
def test_a_reconciliation_names_the_row_that_is_off(world: World) -> None:
    with clock_replaced(at(NOW)), capture_logs() as logs:
        tasks.reconcile()
        assert not [entry for entry in logs if entry["log_level"] == "error"]
        world.sql.execute("UPDATE user_credit_allocations SET used_credits = 1")
        tasks.reconcile()
    errors = [entry for entry in logs if entry["log_level"] == "error"]
    assert "allocations.used" in {entry["check"] for entry in errors}
    assert runs.latest(world.database, TASK_RECONCILE) is not None


@pytest.mark.parametrize("name", ["settle", "expire_holds", "reset_due", "roll_over", "reconcile"])
@pytest.mark.usefixtures("world")
def test_an_outage_puts_the_work_off(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("METERING_DATABASE_URL", "postgresql://nobody@127.0.0.1:1/nothing")
    forget()
    with capture_logs() as logs:
        getattr(tasks, name)()
    assert [entry["log_level"] for entry in logs] == ["warning"]
