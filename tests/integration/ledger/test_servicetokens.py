"""Service tokens: kept as hashes, valid for a while, under names that nobody else has meanwhile."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from hashlib import sha256
from typing import Any, Final

import psycopg
import pytest
from sqlalchemy.exc import ProgrammingError

from ledger import servicetokens
from ledger.database import Database, run, sqlstate
from ledger.servicetokens import ServiceToken
from schema.errors import Conflict, InvalidRequest, NotFound
from schema.scopes import Scope
from tests.integration.ledger.race import RACERS, await_lock, race
from tests.integration.ledger.world import NOW, World, open_world

TICK: Final = timedelta(microseconds=1)
HOUR: Final = timedelta(hours=1)
NO_PRIVILEGE: Final = "42501"


@pytest.fixture
def world(database: Database, database_url: str) -> Iterator[World]:
    with open_world(database, database_url) as opened:
        yield opened


def make(database: Database, name: str = "loopnet", **fields: Any) -> tuple[str, ServiceToken]:
    usual: dict[str, Any] = {"scopes": [Scope.PRECHECK], "actor": "ops", "now": NOW}
    return servicetokens.create(database, name, **usual | fields)


def found(database: Database, text: str) -> ServiceToken | None:
    return servicetokens.find(database, servicetokens.hash_of(text))


def test_a_token_is_random_and_recognizable() -> None:
    texts = {servicetokens.new_text() for _ in range(100)}
    assert len(texts) == 100
    assert all(servicetokens.is_well_formed(text) for text in texts)
    assert {len(text) for text in texts} == {len("lnm_") + 43}  # 256 bits


@pytest.mark.parametrize(
    "text",
    [
        "",
        "lnm_",
        "x" * 43,
        "lnm_" + "x" * 42,
        "lnm_" + "x" * 44,
        "LNM_" + "x" * 43,
        "lnm_" + "x" * 42 + "é",
        "lnm_" + "x" * 43 + "\n",
    ],
)
def test_what_cannot_be_a_token_is_told_at_once(database: Database, text: str) -> None:
    assert not servicetokens.is_well_formed(text)
    with pytest.raises(InvalidRequest, match="token: "):
        servicetokens.register(database, "loopnet", text, [Scope.PRECHECK], actor="ops", now=NOW)


def test_a_token_is_found_by_its_hash_and_kept_as_nothing_else(world: World) -> None:
    scopes = [Scope.USAGE_WRITE, Scope.PRECHECK, Scope.PRECHECK]
    text, token = make(world.database, scopes=scopes, expires_at=NOW + HOUR)
    assert token == ServiceToken(
        token.id, "loopnet", (Scope.PRECHECK, Scope.USAGE_WRITE), "ops", NOW, NOW + HOUR, None
    )
    assert found(world.database, text) == token
    assert found(world.database, servicetokens.new_text()) is None
    row = world.row("service_tokens")
    assert row["token_hash"] == sha256(text.encode()).digest()
    assert text not in str(row)
    assert text[4:] not in str(row)


def test_a_token_ends_when_it_expires(database: Database) -> None:
    _, token = make(database, expires_at=NOW + HOUR)
    assert token.is_valid(NOW + HOUR - TICK)
    assert not token.is_valid(NOW + HOUR)
    with pytest.raises(Conflict):
        make(database, now=NOW + HOUR - TICK)
    with pytest.raises(NotFound):
        servicetokens.revoke(database, "loopnet", now=NOW + HOUR)
    _, successor = make(database, now=NOW + HOUR)
    assert servicetokens.every(database) == [successor, token]


def test_a_token_ends_when_it_is_revoked(database: Database) -> None:
    text, token = make(database)
    _, other = make(database, "other")
    assert token.is_valid(NOW + 1_000_000 * HOUR)
    revoked = servicetokens.revoke(database, "loopnet", now=NOW + HOUR)
    assert (revoked.id, revoked.revoked_at) == (token.id, NOW + HOUR)
    assert not revoked.is_valid(NOW)
    assert found(database, text) == revoked
    with pytest.raises(NotFound, match="no valid token has the name loopnet"):
        servicetokens.revoke(database, "loopnet", now=NOW + HOUR)
    _, successor = make(database, now=NOW + 2 * HOUR)
    assert servicetokens.every(database)[0] == successor
    assert other in servicetokens.every(database)


def test_a_name_belongs_to_one_valid_token(world: World) -> None:
    text, token = make(world.database)
    before = world.contents()
    with pytest.raises(Conflict, match="a valid token has the name loopnet"):
        make(world.database, scopes=[Scope.OPS_READ])
    assert world.contents() == before
    assert found(world.database, text) == token


def test_of_those_who_want_a_name_at_once_one_gets_it(world: World, database_url: str) -> None:
    outcomes = race(database_url, lambda database, _: make(database))
    assert len(outcomes) == RACERS
    assert sum(isinstance(outcome, tuple) for outcome in outcomes) == 1
    assert sum(isinstance(outcome, Conflict) for outcome in outcomes) == RACERS - 1
    assert len(world.rows("service_tokens", "id")) == 1


def test_whoever_wants_a_name_waits_for_the_one_before(world: World, database_url: str) -> None:
    with psycopg.connect(database_url) as first, ThreadPoolExecutor(1) as pool:
        first.execute(
            """
            INSERT INTO service_tokens (name, token_hash, scopes, created_by)
            VALUES ('loopnet', sha256('one'), '{precheck}', 'ops')
            """
        )
        second = pool.submit(make, world.database)
        await_lock(world)
        first.commit()
        with pytest.raises(Conflict):
            second.result(30)
    assert len(world.rows("service_tokens", "id")) == 1


def test_other_names_are_made_side_by_side(world: World, database_url: str) -> None:
    outcomes = race(database_url, lambda database, number: make(database, f"service-{number}"))
    assert all(isinstance(outcome, tuple) for outcome in outcomes)
    assert len(world.rows("service_tokens", "name")) == RACERS


def test_a_token_is_known_once_and_never_valid_again(world: World) -> None:
    text, _ = make(world.database)
    servicetokens.revoke(world.database, "loopnet", now=NOW)
    before = world.contents()
    for name in ("loopnet", "other"):
        with pytest.raises(Conflict, match="known already"):
            servicetokens.register(
                world.database, name, text, [Scope.DEDUCT], actor="ops", now=NOW + HOUR
            )
    assert world.contents() == before


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"name": ""}, "name: "),
        ({"name": "a" * 101}, "name: "),
        ({"name": "-a"}, "name: "),
        ({"name": "a b"}, "name: "),
        ({"name": "a\n"}, "name: "),
        ({"name": "a\0"}, "name: "),
        ({"name": "\udc80"}, "name: "),
        ({"name": "é"}, "name: "),
        ({"actor": ""}, "actor: "),
        ({"actor": "a" * 256}, "actor: "),
        ({"actor": "a\0"}, "actor: "),
        ({"actor": "\udc80"}, "actor: "),
        ({"scopes": []}, "scopes: "),
        ({"expires_at": NOW}, "expires_at: must be after 2026-03-15T12:30:00"),
        ({"expires_at": NOW - TICK}, "expires_at: "),
        ({"expires_at": datetime.max.replace(tzinfo=UTC)}, "expires_at: "),
        ({"expires_at": datetime.max.replace(tzinfo=timezone(-HOUR))}, "expires_at: "),
    ],
)
def test_a_token_that_cannot_be_is_refused(
    world: World, fields: dict[str, Any], problem: str
) -> None:
    with pytest.raises(InvalidRequest, match=problem):
        make(world.database, **fields)
    assert world.rows("service_tokens", "id") == []


@pytest.mark.parametrize("name", ["a", "0", "LoopNet_back-end.2", "a" * 100])
def test_the_longest_and_the_oddest_are_kept(database: Database, name: str) -> None:
    last = datetime(9998, 12, 31, tzinfo=UTC)
    text, token = make(database, name, scopes=list(Scope), actor="Ö" * 255, expires_at=last)
    assert found(database, text) == token
    assert token.scopes == tuple(sorted(Scope))


@pytest.mark.parametrize("name", ["", "\0", "\udc80", "no such"])
def test_a_name_that_cannot_be_is_not_looked_for(database: Database, name: str) -> None:
    with pytest.raises(InvalidRequest, match="name: "):
        servicetokens.revoke(database, name, now=NOW)


def test_a_scope_of_a_later_version_grants_nothing(world: World) -> None:
    text, token = make(world.database)
    world.sql.execute("UPDATE service_tokens SET scopes = scopes || ARRAY['moon:land']")
    assert found(world.database, text) == token


@pytest.mark.parametrize("statement", ["DELETE FROM service_tokens", "TRUNCATE service_tokens"])
def test_who_had_access_stays_on_record(world: World, statement: str) -> None:
    make(world.database)
    with pytest.raises(ProgrammingError) as refused, world.database.transaction() as connection:
        run(connection, statement)
    assert sqlstate(refused.value) == NO_PRIVILEGE
    assert len(world.rows("service_tokens", "id")) == 1
