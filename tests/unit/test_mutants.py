"""The mutation check stays alive: every mutant fits the sources, and the command tells truly."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from ops.servers import wait_until
from tests.mutants import __main__ as command
from tests.mutants.catalogue import MUTANTS, Change, Mutant
from tests.mutants.sandbox import REPOSITORY, Run, changed

CHEAP = "same-batch"
COMMAND = [sys.executable, "-m", "tests.mutants"]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_what_a_mutant_changes_occurs_once(mutant: Mutant) -> None:
    for change in mutant.changes:
        text = (REPOSITORY / change.path).read_text("utf-8")
        assert changed(text, change) != text


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_tests_of_a_mutant_exist(mutant: Mutant) -> None:
    assert mutant.tests
    for test in mutant.tests:
        path, _, function = test.partition("::")
        text = (REPOSITORY / path).read_text("utf-8")
        assert re.search(rf"^def {function or 'test_'}", text, re.MULTILINE), test


def test_mutants_have_names_of_their_own() -> None:
    names = [mutant.name for mutant in MUTANTS]
    assert sorted(set(names)) == sorted(names)


@pytest.mark.parametrize("text", ["nothing", "twice twice"])
def test_a_mutant_that_does_not_fit_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=f"'twice' occurs {text.count('twice')} times"):
        changed(text, Change("a.py", "twice", "once"))


@pytest.mark.parametrize(
    ("code", "output", "outcome"),
    [
        (0, "1 passed", "survived"),
        (1, "FAILED tests/a.py::test_b[c d] - assert 1 == 2\n1 failed", "killed"),
        (1, "ERROR tests/a.py::test_b - ImportError\n1 error", "broken"),
        (2, "FAILED tests/a.py::test_b - assert 1 == 2\n!!! Interrupted", "broken"),
        (4, "ERROR: not found: tests/a.py::test_b", "broken"),
        (5, "no tests ran", "broken"),
    ],
)
def test_only_a_failing_test_kills(code: int, output: str, outcome: str) -> None:
    run = Run(code, output, 0.1)
    assert (run.outcome, run.killer if outcome == "killed" else "test_b") == (outcome, "test_b")


def test_a_mutant_is_killed_by_the_test_meant_to_catch_it() -> None:
    done = subprocess.run(
        [*COMMAND, CHEAP, "--json"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (verdict,) = json.loads(done.stdout)["mutants"]
    (mutant,) = (mutant for mutant in MUTANTS if mutant.name == CHEAP)
    assert (verdict["name"], verdict["outcome"]) == (CHEAP, "killed")
    assert mutant.tests[0].endswith(f"::{verdict['killed_by']}")
    assert verdict["seconds"] > 0
    assert "without any mutant: green" in done.stderr


def test_a_survivor_is_named_and_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    (mutant,) = (mutant for mutant in MUTANTS if mutant.name == CHEAP)
    harmless = Change("ledger/decisions.py", '"""What is already known', '"""Whatever is known')
    survivor = Mutant("harmless", "nothing is lost", (harmless,), mutant.tests)
    monkeypatch.setattr(command, "MUTANTS", (survivor,))
    done = CliRunner().invoke(command.app, ["harmless", "--json"])
    assert done.exit_code == 1, done.output
    (verdict,) = json.loads(done.stdout)["mutants"]
    assert (verdict["outcome"], verdict["killed_by"]) == ("survived", None)


def test_an_unknown_mutant_is_refused_with_those_there_are() -> None:
    done = subprocess.run(
        [*COMMAND, "werewolf"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "werewolf" in done.stderr
    assert CHEAP in done.stderr


def test_ctrl_c_ends_the_tests_and_removes_the_copy(tmp_path: Path) -> None:
    with subprocess.Popen(
        [*COMMAND, CHEAP], cwd=REPOSITORY, env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        main = psutil.Process(process.pid)

        def tests() -> list[psutil.Process]:
            return [child for child in main.children() if "pytest" in child.cmdline()]

        wait_until(lambda: bool(tests()), "the tests in the copy", 30)
        running = tests()
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130, errors
    assert "interrupted" in errors
    assert not any(child.is_running() for child in running)
    assert list(tmp_path.iterdir()) == []
