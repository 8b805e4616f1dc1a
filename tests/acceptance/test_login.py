"""Logging in to the stack that `metering up` has started."""

from pathlib import Path

import httpx
import pytest

from ops.stackfile import StackFile

pytestmark = pytest.mark.acceptance


def test_anybody_logs_in_where_the_welcome_says(stack: StackFile, home: Path) -> None:
    page = f"{stack.api_url}/dev/login"
    assert page in (home / "up.log").read_text()
    with httpx.Client(base_url=stack.api_url) as browser:
        assert browser.get("/api/v1/nothing").status_code == 401
        browser.post(page, data={"user_id": "ada"}, headers={"Origin": stack.api_url})
        assert browser.get("/api/v1/nothing").status_code == 404
    assert (home / ".metering" / "dev-issuer.pem").stat().st_mode & 0o077 == 0
