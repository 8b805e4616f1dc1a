"""The two showpieces stay alive: the demonstration and the benchmark."""

import json
import subprocess
import sys
from pathlib import Path

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


def test_benchmark_compares_all_cases() -> None:
    command = [
        *(sys.executable, "-m", "benchmarks", "apply", "--json"),
        *("--events", "1000", "--baseline-events", "50", "--rounds", "1"),
    ]
    done = subprocess.run(
        command, env=clean_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    for case in ("baseline", "pipeline_hot", "pipeline_spread", "ceiling"):
        assert figures[case] > 0
    assert set(figures["ratios"]) == {
        "spread_to_baseline", "hot_to_baseline", "spread_to_ceiling",
    }  # fmt: skip
