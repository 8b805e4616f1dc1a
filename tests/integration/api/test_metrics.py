"""`/metrics`: the latest runs as gauges, read for each scrape, and what happens without them."""

from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

from api.app import create_app
from ledger import runs
from ledger.checks import CHECKS
from ledger.database import Database
from ledger.reconcile import reconcile
from ledger.resets import ResetReport
from ops.servers import LOOPBACK, free_port
from schema.settings import Settings
from schema.wire import TASK_RECONCILE, TASK_RESET_DUE
from tests.integration.api.answers import refused
from tests.integration.api.conftest import serving
from tests.integration.ledger.world import NOW

GAUGES = {
    "metering_reconcile_drift_rows",
    "metering_reconcile_timestamp_seconds",
    "metering_reconcile_duration_seconds",
    "metering_resets_last_run_timestamp_seconds",
    "metering_resets_short_credits",
}


@pytest.fixture
def client(settings: Settings) -> Iterator[httpx.Client]:
    """A scraper: it has no token."""
    with serving(create_app(settings)) as opened:
        yield opened


def scraped(client: httpx.Client) -> dict[tuple[str, str], float]:
    """The value of each gauge, by name and check; what is counted besides is zero."""
    answer = client.get("/metrics")
    assert answer.status_code == 200, answer.text
    assert answer.headers["Content-Type"].startswith("text/plain; version=")
    families = list(text_string_to_metric_families(answer.text))
    gauges = [family for family in families if family.type == "gauge"]
    assert {family.name for family in gauges} == GAUGES
    (counter,) = (family for family in families if family.type == "counter")
    assert {(sample.name, sample.value) for sample in counter.samples} == {
        ("metering_rate_limit_unchecked_total", 0)
    }
    return {
        (sample.name, sample.labels.get("check", "")): sample.value
        for family in gauges
        for sample in family.samples
    }


def test_tasks_that_never_ran_have_no_values(client: httpx.Client) -> None:
    assert scraped(client) == {}


def test_the_latest_reconciliation_is_shown(client: httpx.Client, database: Database) -> None:
    figures = reconcile(database).as_figures()
    figures["drifts"]["pools.used"] = 3
    runs.record(database, TASK_RECONCILE, NOW - timedelta(hours=1), 9.5, figures)
    figures["drifts"]["pools.used"] = 2
    runs.record(database, TASK_RECONCILE, NOW, 1.5, figures)
    found = scraped(client)
    rows = {check: value for (name, check), value in found.items() if name.endswith("_rows")}
    assert rows == {check.name: 2 if check.name == "pools.used" else 0 for check in CHECKS}
    assert found["metering_reconcile_timestamp_seconds", ""] == NOW.timestamp()
    assert found["metering_reconcile_duration_seconds", ""] == 1.5


def test_the_latest_resets_are_shown_by_the_next_scrape(
    client: httpx.Client, database: Database
) -> None:
    for short in (70, 40):
        figures = asdict(ResetReport(credits_short=short))
        runs.record(database, TASK_RESET_DUE, NOW, 0.5, figures)
        assert scraped(client) == {
            ("metering_resets_last_run_timestamp_seconds", ""): NOW.timestamp(),
            ("metering_resets_short_credits", ""): short,
        }


def test_without_postgresql_it_is_unavailable(settings: Settings) -> None:
    away = SecretStr(f"postgresql://postgres@{LOOPBACK}:{free_port()}/metering")
    with serving(create_app(settings.model_copy(update={"database_url": away}))) as client:
        answer = client.get("/metrics")
    refused(answer, 503, "unavailable")
    assert LOOPBACK not in answer.text


def test_the_openapi_document_names_it(client: httpx.Client) -> None:
    operation = client.get("/openapi.json").json()["paths"]["/metrics"]["get"]
    assert "text/plain" in operation["responses"]["200"]["content"]
    assert "503" in operation["responses"]
    assert "security" not in operation
