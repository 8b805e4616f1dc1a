"""The walk through the API in `docs/api.md` works as it is written, and leaves nothing out."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import pytest

from api import openapi
from ops.stackfile import StackFile
from tests.acceptance.conftest import clean_environment

pytestmark = pytest.mark.acceptance

GUIDE: Final = Path(__file__).parents[2] / "docs" / "api.md"
CURL: Final = Path(__file__).parent / "curl.py"


def script() -> str:
    blocks = re.findall(r"^```bash\n(.*?)^```", GUIDE.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    return "set -euo pipefail\n" + "\n".join(blocks)


def operations() -> set[tuple[str, str]]:
    paths = openapi.document()["paths"]
    return {(method.upper(), path) for path, of_path in paths.items() for method in of_path}


def template_of(method: str, url: str) -> tuple[str, str] | None:
    path = urlsplit(url).path
    found = [
        (verb, template)
        for verb, template in operations()
        if verb == method and re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", template), path)
    ]
    # A path without parameters is the better reading of itself.
    return min(found, key=lambda one: one[1].count("{"), default=None)


@pytest.mark.parametrize("without_curl", [False, True], ids=["curl", "no curl"])
def test_the_walk_goes_through_every_endpoint(
    home: Path, stack: StackFile, tmp_path: Path, without_curl: bool
) -> None:
    assert stack.api_url
    tools = tmp_path / "bin"
    tools.mkdir()
    wrapper = tools / "curl"
    wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{CURL}" "$@"\n')
    wrapper.chmod(0o755)
    notes = tmp_path / "notes"
    search = os.environ["PATH"]
    environment = clean_environment() | {
        "PATH": f"{tools}:{search}",
        "CURL_PATH": "" if without_curl else search,
        "CURL_NOTES": str(notes),
    }
    done = subprocess.run(
        ["bash", "-c", script()],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    assert '"outcome":"duplicate"' in done.stdout
    sent = [json.loads(line) for line in notes.read_text().splitlines()]
    assert {template_of(method, url) for method, url in sent} >= operations()
