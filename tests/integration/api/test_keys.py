"""The realm's keys: when they are fetched, for how long they count, and which of them."""

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from api import keys
from api.keys import (
    FETCH_SECONDS,
    LOOKUP_SECONDS,
    MAX_DOCUMENT_BYTES,
    REFRESH_SECONDS,
    RETRY_SECONDS,
    FixedKeys,
    RemoteKeys,
    keys_of,
    usable_keys,
)
from ops.servers import LOOPBACK, free_port
from schema.errors import Unavailable
from schema.settings import load_settings
from tests.integration.api.issuer import Issuer, Key, running_issuer

pytestmark = pytest.mark.anyio
A_MOMENT = 0.001


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with running_issuer() as running:
        yield running


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def remote(issuer: Issuer, clock: Clock) -> RemoteKeys:
    return RemoteKeys(issuer.jwks_url, clock)


async def until_fetched(issuer: Issuer, times: int) -> None:
    """Wait for the issuer to be asked, on a loop that others use meanwhile."""
    deadline = time.monotonic() + 10
    while issuer.fetches < times:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def test_keys_are_fetched_once_and_kept(
    issuer: Issuer, remote: RemoteKeys, clock: Clock
) -> None:
    assert issuer.fetches == 0
    for _ in range(3):
        key = await remote.key(issuer.keys[0].id)
        assert key is not None
        assert key.key == issuer.keys[0].private.public_key()
        assert key.algorithm_name == "RS256"
        clock.advance(REFRESH_SECONDS / 3 - A_MOMENT)
    assert issuer.fetches == 1


async def test_a_new_key_works_at_once(issuer: Issuer, remote: RemoteKeys) -> None:
    old, new = issuer.keys[0], Key()
    assert await remote.key(old.id)
    issuer.keys.append(new)
    assert await remote.key(new.id)
    assert await remote.key(old.id)
    assert issuer.fetches == 2


async def test_made_up_key_ids_do_not_make_us_hammer_the_issuer(
    issuer: Issuer, remote: RemoteKeys, clock: Clock
) -> None:
    assert await remote.key(issuer.keys[0].id)
    for _ in range(50):
        assert await remote.key(uuid4().hex) is None
    assert issuer.fetches == 2
    clock.advance(LOOKUP_SECONDS - A_MOMENT)
    assert await remote.key(uuid4().hex) is None
    assert issuer.fetches == 2
    clock.advance(A_MOMENT)
    for _ in range(50):
        assert await remote.key(uuid4().hex) is None
    assert issuer.fetches == 3


@pytest.mark.parametrize("knows_keys", [False, True])
async def test_requests_wait_for_one_fetch_together(
    issuer: Issuer, remote: RemoteKeys, clock: Clock, *, knows_keys: bool
) -> None:
    if knows_keys:
        await remote.key(issuer.keys[0].id)
        clock.advance(REFRESH_SECONDS)
    asked = issuer.fetches + 1
    issuer.may_answer.clear()
    waiting = [asyncio.ensure_future(remote.key(issuer.keys[0].id)) for _ in range(50)]
    await until_fetched(issuer, asked)
    waiting[0].cancel()  # its client has gone away; the others still wait
    assert not any(task.done() for task in waiting[1:])
    issuer.may_answer.set()
    assert all(await asyncio.gather(*waiting[1:]))
    assert issuer.fetches == asked


async def test_a_key_that_is_known_does_not_wait_for_one_that_is_not(
    issuer: Issuer, remote: RemoteKeys
) -> None:
    assert await remote.key(issuer.keys[0].id)
    issuer.may_answer.clear()
    unknown = asyncio.ensure_future(remote.key("unknown"))
    await until_fetched(issuer, 2)
    async with asyncio.timeout(FETCH_SECONDS / 2):
        assert await remote.key(issuer.keys[0].id)
    assert not unknown.done()
    issuer.may_answer.set()
    assert await unknown is None


async def test_a_withdrawn_key_ends_with_the_next_refresh(
    issuer: Issuer, remote: RemoteKeys, clock: Clock
) -> None:
    old = issuer.keys[0]
    assert await remote.key(old.id)
    issuer.keys = [Key()]
    clock.advance(REFRESH_SECONDS - A_MOMENT)
    assert await remote.key(old.id)
    clock.advance(A_MOMENT)
    assert await remote.key(old.id) is None
    assert issuer.fetches == 2
    assert REFRESH_SECONDS <= 600


async def test_kept_keys_go_on_being_used_while_the_issuer_is_away(
    issuer: Issuer, remote: RemoteKeys, clock: Clock
) -> None:
    key_id = issuer.keys[0].id
    assert await remote.key(key_id)
    issuer.is_away = True
    clock.advance(REFRESH_SECONDS * 100)
    for _ in range(20):
        assert await remote.key(key_id)
        assert await remote.key("unknown") is None
    assert issuer.fetches == 2
    issuer.is_away = False
    issuer.keys = [Key()]
    clock.advance(RETRY_SECONDS)
    assert await remote.key(issuer.keys[0].id)
    assert issuer.fetches == 3
    assert await remote.key(key_id) is None


async def test_nobody_waits_for_an_issuer_that_failed_before(
    issuer: Issuer, remote: RemoteKeys, clock: Clock
) -> None:
    key_id = issuer.keys[0].id
    assert await remote.key(key_id)
    issuer.is_away = True
    clock.advance(REFRESH_SECONDS)
    assert await remote.key(key_id)
    issuer.may_answer.clear()
    clock.advance(RETRY_SECONDS)
    async with asyncio.timeout(FETCH_SECONDS / 2):
        assert await remote.key(key_id)
        await until_fetched(issuer, 3)
        assert await remote.key(key_id)


async def test_without_any_keys_the_issuer_is_asked_now_and_then(
    issuer: Issuer, remote: RemoteKeys, clock: Clock
) -> None:
    issuer.is_away = True
    for _ in range(20):
        with pytest.raises(Unavailable):
            await remote.key(issuer.keys[0].id)
    assert issuer.fetches == 1
    clock.advance(RETRY_SECONDS)
    issuer.is_away = False
    assert await remote.key(issuer.keys[0].id)
    assert issuer.fetches == 2


async def test_an_issuer_that_is_not_there_is_away(clock: Clock) -> None:
    remote = RemoteKeys(f"http://{LOOPBACK}:{free_port()}/certs", clock)
    with pytest.raises(Unavailable):
        await remote.key("any")


async def test_an_issuer_that_does_not_finish_is_away(
    issuer: Issuer, remote: RemoteKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "FETCH_SECONDS", 0.1)
    issuer.may_answer.clear()
    with pytest.raises(Unavailable):
        await remote.key(issuer.keys[0].id)


async def test_an_issuer_that_never_quite_stops_is_away(
    issuer: Issuer, remote: RemoteKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "FETCH_SECONDS", 0.3)
    issuer.trickles = True
    with pytest.raises(Unavailable):
        await remote.key(issuer.keys[0].id)


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"<html>Bad gateway</html>",
        b"\xff\xfe",
        b"[" * 100_000,
        b"null",
        b"[]",
        b"{}",
        b'{"keys": null}',
        b'{"keys": {}}',
        b'{"keys": []}',
        b'{"keys": [null, 1, "x", [], {}]}',
    ],
)
async def test_a_document_without_keys_leaves_those_there_were(
    issuer: Issuer, remote: RemoteKeys, clock: Clock, document: bytes
) -> None:
    assert await remote.key(issuer.keys[0].id)
    issuer.document = document
    clock.advance(REFRESH_SECONDS)
    assert await remote.key(issuer.keys[0].id)
    assert issuer.fetches == 2
    with pytest.raises(ValueError):  # noqa: PT011 - any of them will do
        usable_keys(document)


async def test_a_document_without_end_is_not_read(
    issuer: Issuer, remote: RemoteKeys, clock: Clock
) -> None:
    good = issuer.published()
    issuer.document = good.ljust(MAX_DOCUMENT_BYTES + 1)
    with pytest.raises(Unavailable):
        await remote.key(issuer.keys[0].id)
    issuer.document = good.ljust(MAX_DOCUMENT_BYTES)
    clock.advance(RETRY_SECONDS)
    assert await remote.key(issuer.keys[0].id)


def elliptic() -> dict[str, Any]:
    public = ec.generate_private_key(ec.SECP256R1()).public_key()
    return {**ECAlgorithm.to_jwk(public, as_dict=True), "kid": "elliptic", "use": "sig"}


ODD: dict[str, Any] = {
    "for encryption": Key().published(use="enc"),
    "RSA-OAEP": Key().published(alg="RSA-OAEP"),
    "PS256": Key().published(alg="PS256"),
    "RS512": Key().published(alg="RS512"),
    "too short": Key(bits=1024).published(),
    "without id": Key().published(kid=None),
    "empty id": Key().published(kid=""),
    "id of another type": Key().published(kid=1),
    "without modulus": Key().published(n=None),
    "modulus of another type": Key().published(n=17),
    "not base64": Key().published(n="!"),
    "even modulus": Key().published(n="AAAA"),
    "exponent of 1": Key().published(e="AQ"),
    "elliptic": elliptic(),
    "a secret": {"kty": "oct", "kid": "secret", "k": "c2VjcmV0", "alg": "HS256"},
    "null": None,
    "a list": [[]],
}


@pytest.mark.parametrize("odd", ODD)
async def test_one_odd_key_does_not_spoil_the_others(odd: str) -> None:
    good = Key()
    document = json.dumps({"keys": [ODD[odd], good.published()]}).encode()
    assert usable_keys(document).keys() == {good.id}


async def test_purpose_and_algorithm_may_be_left_out() -> None:
    key = Key()
    document = json.dumps({"keys": [key.published(use=None, alg=None)]}).encode()
    assert usable_keys(document)[key.id].algorithm_name == "RS256"


async def test_of_a_private_key_only_the_public_half_is_read() -> None:
    key = Key()
    private = {**RSAAlgorithm.to_jwk(key.private, as_dict=True), "kid": key.id}
    read = usable_keys(json.dumps({"keys": [private]}).encode())[key.id]
    assert read.key == key.private.public_key()


async def test_the_keys_are_where_keycloak_has_them_unless_told(issuer: Issuer) -> None:
    key_id = issuer.keys[0].id
    for settings in (
        load_settings(oidc_issuer=issuer.url),
        load_settings(oidc_issuer=f"{issuer.url}/"),
        load_settings(oidc_issuer="https://elsewhere.example", oidc_jwks_url=issuer.jwks_url),
    ):
        assert await keys_of(settings).key(key_id)


async def test_without_an_issuer_no_key_counts() -> None:
    found = keys_of(load_settings())
    assert isinstance(found, FixedKeys)
    assert await found.key("any") is None
