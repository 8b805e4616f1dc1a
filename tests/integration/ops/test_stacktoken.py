"""The token that a stack keeps: valid from start to start, until somebody ends it."""

from pathlib import Path

import pytest

from ledger import servicetokens
from ledger.clock import utc_now
from ledger.database import Database
from ledger.servicetokens import ServiceToken
from ops import stacktoken
from schema.scopes import Scope


def start(database: Database, directory: Path) -> tuple[str, list[str]]:
    """The token after a start, and what was told."""
    told: list[str] = []
    stacktoken.let_in(database, directory, told.append)
    return stacktoken.kept_token(directory), told


def token(database: Database, text: str) -> ServiceToken:
    found = servicetokens.find(database, servicetokens.hash_of(text))
    assert found is not None
    return found


def test_the_first_start_makes_it_and_the_next_keeps_it(database: Database, tmp_path: Path) -> None:
    text, told = start(database, tmp_path)
    kept = token(database, text)
    assert kept.is_valid(utc_now())
    assert (kept.name, kept.scopes) == ("metering-up", tuple(sorted(Scope)))
    assert told == []
    file = tmp_path / "service.token"
    assert file.read_text() == text
    assert file.stat().st_mode & 0o077 == 0
    assert list(tmp_path.iterdir()) == [file]
    assert start(database, tmp_path) == (text, [])
    assert servicetokens.every(database) == [kept]


def test_a_new_database_takes_the_old_file(database: Database, tmp_path: Path) -> None:
    text = servicetokens.new_text()
    (tmp_path / "service.token").write_text(f"{text}\n")
    assert start(database, tmp_path) == (text, [])
    assert token(database, text).is_valid(utc_now())


def test_without_its_file_another_takes_its_place(database: Database, tmp_path: Path) -> None:
    before, _ = start(database, tmp_path)
    (tmp_path / "service.token").unlink()
    text, told = start(database, tmp_path)
    assert text != before
    assert not token(database, before).is_valid(utc_now())
    assert token(database, text).is_valid(utc_now())
    assert told == ["there is a new service token metering-up, and the one before it is revoked"]


@pytest.mark.parametrize("content", [b"x" * 43, b"", b"\xff\xfe", b"lnm_" + b"x" * 42])
def test_what_is_no_token_of_today_is_replaced(
    database: Database, tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "service.token"
    file.write_bytes(content)
    file.chmod(0o644)
    text, _ = start(database, tmp_path)
    assert servicetokens.is_well_formed(text)
    assert token(database, text).is_valid(utc_now())
    assert file.stat().st_mode & 0o077 == 0


def test_a_revoked_one_stays_revoked_and_the_way_out_is_told(
    database: Database, tmp_path: Path
) -> None:
    text, _ = start(database, tmp_path)
    revoked = servicetokens.revoke(database, "metering-up", now=utc_now())
    for _ in range(2):
        same, told = start(database, tmp_path)
        assert same == text
        (line,) = told
        assert f"{tmp_path / 'service.token'} was revoked" in line
        assert "remove the file and start again" in line
    assert servicetokens.every(database) == [revoked]
    (tmp_path / "service.token").unlink()
    text, told = start(database, tmp_path)
    assert token(database, text).is_valid(utc_now())
    assert told == []


def test_a_token_of_ones_own_may_lie_in_the_file(database: Database, tmp_path: Path) -> None:
    text, own = servicetokens.create(database, "mine", [Scope.PRECHECK], actor="ops", now=utc_now())
    (tmp_path / "service.token").write_text(text)
    assert start(database, tmp_path) == (text, [])
    assert servicetokens.every(database) == [own]
