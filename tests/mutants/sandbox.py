"""A copy of the repository in which mutants live, and its tests run there."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from tests.mutants.catalogue import Change, Mutant

REPOSITORY: Final = Path(__file__).parents[2]
STOP_TIMEOUT_SECONDS: Final = 60.0

_FAILED: Final = re.compile(r"^FAILED \S+?::(\w+)", re.MULTILINE)
_TESTS_FAILED: Final = 1
"""Pytest's exit status; higher ones mean that it could not run the tests."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run of tests: how it ended, and what it printed."""

    code: int
    output: str
    seconds: float

    @property
    def outcome(self) -> str:
        """`survived` if all passed, `killed` if an assertion failed, else `broken`.

        A mutant that cannot be imported or migrated proves nothing about the tests.
        """
        if self.code == 0:
            return "survived"
        return "killed" if self.code == _TESTS_FAILED and self.killer else "broken"

    @property
    def killer(self) -> str | None:
        """The test that failed first."""
        found = _FAILED.search(self.output)
        return found[1] if found else None


class Sandbox:
    """A copy of the repository's sources."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def test(self, tests: Sequence[str]) -> Run:
        """Run tests of the copy with this interpreter until one fails."""
        command = [
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", "-q"),
            *("--tb=short", *dict.fromkeys(tests)),
        ]
        # Compiled files go by time and size, which a mutant may well have in common with the
        # original.
        environment = os.environ | {"PYTHONPATH": str(self._root), "PYTHONDONTWRITEBYTECODE": "1"}
        started = time.perf_counter()
        with subprocess.Popen(
            command,
            cwd=self._root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            output = _output_of(process)
        return Run(process.returncode, output, time.perf_counter() - started)

    @contextmanager
    def mutated(self, mutant: Mutant) -> Iterator[None]:
        """Apply a mutant for a while."""
        originals: dict[Path, str] = {}
        for change in mutant.changes:
            path = self._root / change.path
            text = path.read_text("utf-8")
            originals.setdefault(path, text)
            path.write_text(changed(text, change), "utf-8")
        try:
            yield
        finally:
            for path, text in originals.items():
                path.write_text(text, "utf-8")


def changed(text: str, change: Change) -> str:
    """The text with the change made to it.

    Raises:
        ValueError: what is to be changed does not occur exactly once.
    """
    found = text.count(change.old)
    if found != 1:
        raise ValueError(f"{change.path}: {change.old.strip()!r} occurs {found} times")
    return text.replace(change.old, change.new)


@contextmanager
def sandbox() -> Iterator[Sandbox]:
    """Copy what git knows or would add; the copy is removed at the end."""
    with TemporaryDirectory(prefix="metering-mutants-") as name:
        root = Path(name)
        for path in _sources():
            target = root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / path, target)
        yield Sandbox(root)


def _sources() -> list[Path]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    paths = [Path(name) for name in listed.stdout.split("\0") if name]
    return [path for path in paths if (REPOSITORY / path).is_file()]


def _output_of(process: "subprocess.Popen[str]") -> str:
    try:
        return process.communicate()[0]
    except KeyboardInterrupt:
        # Tests have servers to stop; killed at once, they would leave them running.
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=STOP_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
        raise
