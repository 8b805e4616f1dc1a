"""`metering token`: a token is printed once, listed without it, and revoked."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from ledger import servicetokens
from ledger.clock import utc_now
from ledger.database import Database
from ledger.servicetokens import ServiceToken
from ops.cli import app
from schema.scopes import Scope
from schema.settings import Settings


@pytest.fixture(autouse=True)
def _environment(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """What names the test's servers to a command."""
    monkeypatch.setenv("METERING_DATABASE_URL", settings.database_url.get_secret_value())
    monkeypatch.setenv("METERING_REDIS_URL", settings.redis_url.get_secret_value())
    monkeypatch.setenv("LOGNAME", "grace")


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["token", *arguments])


def done(*arguments: str) -> Result:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    return result


def document(*arguments: str) -> Any:
    return json.loads(done(*arguments, "--json").stdout)


def kept(database: Database, text: str) -> ServiceToken | None:
    return servicetokens.find(database, servicetokens.hash_of(text))


def test_people_are_given_the_token_alone(database: Database) -> None:
    result = done("create", "loopnet", "--scope", "usage:write", "--scope", "precheck")
    text = result.stdout.removesuffix("\n")
    token = kept(database, text)
    assert token is not None
    assert (token.name, token.created_by, token.expires_at) == ("loopnet", "grace", None)
    assert token.scopes == (Scope.PRECHECK, Scope.USAGE_WRITE)
    assert "created loopnet for precheck, usage:write, without an end" in result.stderr
    assert text not in result.stderr


def test_programs_are_given_a_document(database: Database) -> None:
    made = document("create", "loopnet", "--scope", "deduct", "--expires", "2100-01-01T00:00Z")
    token = kept(database, made.pop("token"))
    assert token is not None
    assert made == {
        "id": str(token.id),
        "name": "loopnet",
        "scopes": ["deduct"],
        "expires_at": "2100-01-01T00:00:00+00:00",
    }
    assert token.expires_at == datetime(2100, 1, 1, tzinfo=UTC)


def test_days_are_counted_from_now(database: Database) -> None:
    before = utc_now()
    text = done("create", "loopnet", "--scope", "deduct", "--expires", "90d").stdout.strip()
    token = kept(database, text)
    assert token is not None
    assert token.expires_at is not None
    assert before <= token.expires_at - timedelta(days=90) <= utc_now()


def test_the_list_is_of_valid_tokens_unless_all_are_wanted(database: Database) -> None:
    now = utc_now()
    servicetokens.create(
        database,
        "old",
        [Scope.DEDUCT],
        actor="ada",
        expires_at=now - timedelta(hours=1),
        now=now - timedelta(hours=2),
    )
    texts = [
        document("create", name, "--scope", "ops:read", "--scope", "deduct")["token"]
        for name in ("gone", "loopnet")
    ]
    gone = document("revoke", "gone")
    assert (gone["name"], gone["state"], gone["created_by"]) == ("gone", "revoked", "grace")
    assert now <= datetime.fromisoformat(gone["revoked_at"]) <= utc_now()
    (valid,) = document("list")
    assert valid == {
        "id": valid["id"],
        "name": "loopnet",
        "scopes": ["deduct", "ops:read"],
        "created_by": "grace",
        "created_at": valid["created_at"],
        "expires_at": None,
        "revoked_at": None,
        "state": "valid",
    }
    listed = document("list", "--all")
    assert [(token["name"], token["state"]) for token in listed] == [
        ("loopnet", "valid"),
        ("gone", "revoked"),
        ("old", "expired"),
    ]
    assert listed[:2] == [valid, gone]
    shown = done("list").stdout
    assert "loopnet" in shown
    assert "gone" not in shown
    shown += done("list", "--all").stdout
    assert "gone" in shown
    assert not any(text in f"{shown} {listed}" for text in texts)


def test_a_revoked_name_can_be_given_again(database: Database) -> None:
    first = done("create", "loopnet", "--scope", "precheck").stdout.strip()
    taken = invoke("create", "loopnet", "--scope", "precheck")
    assert taken.exit_code == 2
    assert taken.stdout == ""
    assert "a valid token has the name loopnet" in taken.stderr
    assert "revoked loopnet, which grace made at 20" in done("revoke", "loopnet").stdout
    second = done("create", "loopnet", "--scope", "precheck").stdout.strip()
    states = [(t := kept(database, text)) and t.is_valid(utc_now()) for text in (first, second)]
    assert states == [False, True]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("create a/b --scope deduct", "name: must be 1 to 100 of the characters"),
        ("create a --scope deduct --expires 90", "not '90'; or days from now, such as 90d"),
        ("create a --scope deduct --expires 2100-01-01", "--expires takes an ISO 8601 time with"),
        ("create a --scope deduct --expires 1234567d", "such as 90d"),
        ("create a --scope deduct --expires 0d", "expires_at: must be after"),
        ("create a --scope deduct --expires 2020-01-01T00:00Z", "expires_at: must be after"),
        ("create a --scope deduct --expires 9999-12-31T23:59:59-12:00", "not after 9998-12-31"),
        ("create a --scope deduct --expires=", "--expires takes an ISO 8601 time with"),
        ("revoke nobody", "no valid token has the name nobody"),
        ("revoke a/b", "name: must be 1 to 100 of the characters"),
    ],
)
def test_what_is_wrong_is_said(database: Database, arguments: str, problem: str) -> None:
    result = invoke(*arguments.split())
    assert result.exit_code == 2
    assert problem in result.stderr
    as_json = invoke(*arguments.split(), "--json")
    assert as_json.exit_code == 2
    assert problem in json.loads(as_json.stderr)["detail"]["message"]
    assert servicetokens.every(database) == []


@pytest.mark.parametrize("flags", [(), ("--scope", "moon"), ("--scope", "deduct", "--scope", "")])
def test_the_scopes_there_are_are_told(database: Database, flags: tuple[str, ...]) -> None:
    result = invoke("create", "loopnet", *flags)
    assert result.exit_code == 2
    assert all(scope in result.stderr for scope in Scope)
    assert servicetokens.every(database) == []


@pytest.mark.parametrize("command", [(), ("create",), ("list",), ("revoke",)])
def test_every_command_explains_itself(command: tuple[str, ...]) -> None:
    result = done(*command, "--help")
    assert "Usage: " in result.stdout
