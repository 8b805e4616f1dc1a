"""`metering up`: who may log in without a password."""

from pathlib import Path

import pytest

from ops.stack import Stack
from schema.settings import load_settings


@pytest.mark.parametrize(
    ("variables", "is_open"),
    [
        ({}, True),
        ({"METERING_DEV_ISSUER": "false"}, False),
        ({"METERING_ENV": "production"}, False),
        ({"METERING_OIDC_ISSUER": "https://id.example/realms/x"}, False),
        (
            {"METERING_OIDC_ISSUER": "https://id.example", "METERING_DEV_ISSUER": "true"},
            True,
        ),
    ],
)
def test_anybody_is_let_in_unless_there_is_a_realm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variables: dict[str, str], *, is_open: bool
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    stack = Stack(load_settings(data_dir=tmp_path), workers=1, port=8123, tell=print)
    assert stack.login_url == ("http://127.0.0.1:8123/dev/login" if is_open else None)
