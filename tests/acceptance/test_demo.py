"""The showpieces stay alive: the demonstration and the benchmarks."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.conftest import clean_environment, run_metering

pytestmark = pytest.mark.acceptance


def test_demo_accounts_for_everything(tmp_path: Path) -> None:
    done = run_metering("demo", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    story = done.document
    assert story["accounted"] is True
    assert story["reconcile"]["clean"] is True
    assert story["tally"]["denied"] > 0
    assert story["tally"]["failed"] > 0
    assert story["tally"]["sent_twice"] > 0
    reasons = {row["reason"] for row in story["dead_letters"]}
    assert {"insufficient_credits", "malformed", "invalid"} <= reasons
    end = story["month_end"]
    assert len(end["lost"]) == story["tally"]["lost"] == 1
    assert end["debts"] > 0
    assert all(row["used_credits"] == 0 for row in end["balances"])
    services = {row["service_type"] for row in story["usage_by_service"]}
    assert len(services) > 10
    assert any("kill -9" in line for line in done.err.splitlines())


def measured(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments, "--json"],
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def test_benchmark_compares_all_cases() -> None:
    figures = measured("apply", "--events", "1000", "--baseline-events", "50", "--rounds", "1")
    for case in ("baseline", "pipeline_hot", "pipeline_spread", "ceiling"):
        assert figures[case] > 0
    assert set(figures["ratios"]) == {
        "spread_to_baseline", "hot_to_baseline", "spread_to_ceiling",
    }  # fmt: skip


def test_holds_are_faster_than_asking_on_a_new_connection() -> None:
    figures = measured("holds", "--holds", "400", "--baseline-calls", "100", "--rounds", "1")
    assert figures["ratios"]["holds_to_baseline"] > 1


def test_the_benchmark_of_resets_resets_all() -> None:
    figures = measured("resets", "--allocations", "300")
    assert figures["allocations"] == 300
    assert figures["charges"] > 0


def test_the_benchmark_of_reconciliation_reconciles_a_sound_ledger() -> None:
    figures = measured("reconcile", "--attributions", "3000")
    assert (figures["charged"], figures["is_clean"]) == (3000, True)


def test_the_benchmark_of_the_gate_asks_all_cases() -> None:
    figures = measured("gate", "--seconds", "0.5", "--connections", "4", "--rounds", "1")
    assert set(figures["failures"].values()) == {0}
    assert figures["ratios"]["check_to_connecting"] > 1
    assert figures["drained_per_second"] > 0
