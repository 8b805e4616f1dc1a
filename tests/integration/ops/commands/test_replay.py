"""`metering replay`: what it prints, and how it exits."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from uuid import UUID, uuid4

import pytest
import typer
from redis import Redis
from typer.testing import CliRunner

from ledger import directory
from ledger.database import Database
from ops.commands.replay import replay
from schema.errors import NotFound
from schema.settings import Settings
from tests.integration.ops.replays.scene import (
    DEADLINE_SECONDS,
    csv_file,
    organization,
    queried,
    trace,
    until,
)
from worker import stream

app = typer.Typer()
app.command()(replay)


@pytest.fixture
def environment(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """What names the test's servers to a command."""
    monkeypatch.setenv("METERING_DATABASE_URL", settings.database_url.get_secret_value())
    monkeypatch.setenv("METERING_REDIS_URL", settings.redis_url.get_secret_value())


@pytest.mark.usefixtures("environment", "worker")
def test_the_command_prints_json_and_names_the_organization_it_took(
    database: Database, acme: UUID, tmp_path: Path
) -> None:
    newest = organization(database, "newest", zoe=1000)
    file = trace(tmp_path / "a.csv")
    result = CliRunner().invoke(app, [str(file), "--preset", "azure-llm", "--json"])
    assert result.exit_code == 0, result.stderr
    assert f"organization newest ({newest}), the newest test organization" in result.stderr
    printed = json.loads(result.stdout)
    assert printed.pop("seconds") > 0
    assert printed.pop("events_per_second") > 0
    assert printed == {
        "file": str(file),
        "org_id": str(newest),
        "events": 40,
        "charged": 40,
        "duplicates": 0,
        "dead": {},
        "missing": 0,
        "invalid_rows": 0,
        "first_invalid": [],
        "credits": 80,
    }
    result = CliRunner().invoke(app, [str(file), "--preset", "azure-llm", "--org", "acme"])
    assert result.exit_code == 0, result.stderr
    assert "Replay of" in result.stdout
    assert queried(database, f"SELECT count(*) FROM usage_requests WHERE org_id = '{acme}'") == [
        (40,)
    ]


@pytest.mark.usefixtures("environment", "worker", "acme")
def test_the_command_shows_bad_rows_and_exits_with_1(tmp_path: Path) -> None:
    mapping = tmp_path / "map.toml"
    mapping.write_text('[event]\nservice_type = "valuation"\nquantity = { column = "[n]" }\n')
    file = csv_file(tmp_path / "a.csv", "[n]", "1", *["x"] * 12)
    result = CliRunner().invoke(app, [str(file), "--map", str(mapping), "--user", "ana"])
    assert result.exit_code == 1
    assert "line 3: quantity: 'x' is not a number\n" in result.stderr
    assert "line 12: " in result.stderr
    assert "line 13: " not in result.stderr
    assert "… and 2 more rows" in result.stderr
    assert "invalid rows" in result.stdout


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "with either --map FILE.toml or --preset"),
        (["--preset", "azure-llm", "--map", "m.toml"], "with either --map FILE.toml or --preset"),
        (["--preset", "azure"], "no preset 'azure'"),
        (["--map", "gone.toml"], "cannot read gone.toml"),
        (["--preset", "azure-llm"], "make one with 'metering org create'"),
        (["--preset", "azure-llm", "--org", "nobody"], "no organization with the id or name 'nob"),
    ],
)
def test_the_command_says_what_it_lacks(tmp_path: Path, arguments: list[str], problem: str) -> None:
    result = CliRunner().invoke(app, [str(trace(tmp_path / "a.csv")), *arguments])
    assert result.exit_code == 2
    assert problem in result.stderr


@pytest.mark.usefixtures("environment", "acme")
def test_ctrl_c_ends_the_command_in_words(settings: Settings, redis: Redis, tmp_path: Path) -> None:
    program = "import typer; from ops.commands.replay import replay; typer.run(replay)"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(trace(tmp_path / "a.csv")), "--preset", "azure-llm"],
        cwd=Path(__file__).parents[4],
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        until(lambda: stream.total_depth(redis, settings.shards) == 40, "sending")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 130, errors
    assert "interrupted: " in errors
    assert "Traceback" not in errors


def test_organizations_are_found_by_id_and_by_name(database: Database) -> None:
    assert directory.newest_test_organization(database) is None
    acme = organization(database, "acme", ben=1, ana=3)
    named_as_id = organization(database, str(uuid4()))
    misleading = organization(database, str(acme))
    assert directory.find_organization(database, "acme") == acme
    assert directory.find_organization(database, str(acme)) == acme
    assert directory.find_organization(database, str(named_as_id).upper()) == named_as_id
    newest = directory.newest_test_organization(database)
    assert newest is not None
    assert (newest.id, newest.name) == (misleading, str(acme))
    for unknown in ("ACME", "", str(uuid4())):
        with pytest.raises(NotFound, match=f"no organization with the id or name '{unknown}'"):
            directory.find_organization(database, unknown)
    assert [
        (one.user_id, one.allocated_credits) for one in directory.allocations_of(database, acme)
    ] == [
        ("ana", 3),
        ("ben", 1),
    ]
