"""Sessions over HTTP: who is let in, and that nobody else learns anything at all."""

import hmac
import json
import time
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterator
from hashlib import sha256
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from api.app import create_app
from schema.scopes import Scope
from schema.settings import Settings
from tests.integration.api.conftest import Callers, Headers, serving
from tests.integration.api.issuer import AUDIENCE, Issuer, Key, running_issuer

NOWHERE = "/api/v1/nothing"
LET_IN = 404
"""What NOWHERE answers to callers who are known."""

PROBES: list[tuple[str, str, dict[str, Any]]] = [
    ("GET", NOWHERE, {}),
    ("GET", "/api/v1/precheck", {}),
    ("POST", "/api/v1/precheck", {"content": b'{"org_id": ', "headers": {}}),
    ("POST", "/api/v1/precheck", {"content": b"\xff\x00", "headers": {}}),
    ("DELETE", "/api/v1/precheck/x?org_id=nonsense", {}),
    ("POST", "/api/", {"json": {}}),
]


def cookie(token: str) -> Headers:
    return {"Cookie": f"session_token={token}"}


def refusal(answer: httpx.Response) -> str:
    """What a caller is told who is not known: the same shape wherever they knock."""
    assert answer.status_code == 401, answer.text
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    detail: dict[str, str] = answer.json()["detail"]
    assert detail.keys() == {"error", "message", "suggested_action", "request_id"}
    assert detail["error"] == "not_authenticated"
    assert detail["request_id"] == answer.headers["X-Request-ID"]
    return detail["message"]


def unsigned(issuer: Issuer, algorithm: str) -> str:
    token = issuer.sign(issuer.claims("ada"), headers={"alg": "RS256"})
    head = json.dumps({"alg": algorithm, "typ": "JWT", "kid": issuer.keys[0].id}).encode()
    return f"{urlsafe_b64encode(head).rstrip(b'=').decode()}.{token.split('.')[1]}."


def signed_with_public_key(issuer: Issuer) -> str:
    """HS256 with what everybody knows as the secret."""
    public = issuer.keys[0].private.public_key()
    secret = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    text = unsigned(issuer, "HS256").rstrip(".")
    signature = hmac.digest(secret, text.encode(), sha256)
    return f"{text}.{urlsafe_b64encode(signature).rstrip(b'=').decode()}"


def brings_its_own_key(issuer: Issuer) -> str:
    key = Key()
    headers = {"kid": issuer.keys[0].id, "jwk": key.published(), "jku": "http://evil.example"}
    return issuer.sign(issuer.claims("ada"), key, headers=headers)


def ago(seconds: int) -> int:
    return int(time.time()) - seconds


BAD: dict[str, Callable[[Issuer], str]] = {
    "empty": lambda _: "",
    "no token": lambda _: "hunter2",
    "expired": lambda issuer: issuer.session("ada", iat=ago(600), exp=ago(300)),
    "not yet valid": lambda issuer: issuer.session("ada", nbf=ago(-300)),
    "issued in the future": lambda issuer: issuer.session("ada", iat=ago(-300), exp=ago(-600)),
    "never expires": lambda issuer: issuer.session("ada", exp=None),
    "wrong issuer": lambda issuer: issuer.session("ada", iss=f"{issuer.url}-2"),
    "no issuer": lambda issuer: issuer.session("ada", iss=None),
    "wrong audience": lambda issuer: issuer.session("ada", azp="other", aud=["account"]),
    "no audience": lambda issuer: issuer.session("ada", azp=None),
    "ID token": lambda issuer: issuer.session("ada", typ="ID"),
    "refresh token": lambda issuer: issuer.session("ada", typ="Refresh"),
    "untyped": lambda issuer: issuer.session("ada", typ=None),
    "nobody": lambda issuer: issuer.session(""),
    "RS512": lambda issuer: issuer.sign(issuer.claims("ada"), algorithm="RS512"),
    "PS256": lambda issuer: issuer.sign(issuer.claims("ada"), algorithm="PS256"),
    "none": lambda issuer: unsigned(issuer, "none"),
    "None": lambda issuer: unsigned(issuer, "None"),
    "RS256 without signature": lambda issuer: unsigned(issuer, "RS256"),
    "HS256 with the public key": signed_with_public_key,
    "critical extension": lambda issuer: issuer.sign(
        issuer.claims("ada"), headers={"crit": ["b64"], "b64": True}
    ),
    "unknown key": lambda issuer: issuer.sign(issuer.claims("ada"), Key()),
    "another key of that name": lambda issuer: issuer.sign(
        issuer.claims("ada"), Key(), headers={"kid": issuer.keys[0].id}
    ),
    "a key of its own": brings_its_own_key,
    "no key": lambda issuer: issuer.sign(issuer.claims("ada"), headers={"kid": ""}),
    "too long": lambda issuer: issuer.session("ada", padding="x" * 20_000),
}


@pytest.mark.parametrize("kind", BAD)
def test_whoever_has_no_session_learns_nothing(
    api: httpx.Client, issuer: Issuer, kind: str
) -> None:
    headers = cookie(BAD[kind](issuer))
    told = set()
    for method, path, options in PROBES:
        answer = api.request(method, path, **{**options, "headers": headers})
        told.add(refusal(answer))
    assert told == {
        "The session has expired." if kind == "expired" else "The session is not valid."
    }


def test_an_anonymous_caller_learns_nothing(api: httpx.Client) -> None:
    for method, path, options in PROBES:
        assert refusal(api.request(method, path, **options)).startswith("This needs a session")


@pytest.mark.parametrize("headers", [{}, cookie("hunter2"), {"Authorization": "Bearer hunter2"}])
def test_a_long_body_without_a_session_is_not_even_read(
    api: httpx.Client, headers: Headers
) -> None:
    def body() -> Iterator[bytes]:
        for _ in range(20):
            yield bytes(1024 * 1024)

    refusal(api.post("/api/v1/precheck", content=body(), headers=headers))


GOOD: dict[str, Callable[[Issuer], str]] = {
    "right azp": lambda issuer: issuer.session("ada"),
    "right azp, other audience": lambda issuer: issuer.session("ada", aud=["account"]),
    "right audience": lambda issuer: issuer.session("ada", azp="front-end", aud=AUDIENCE),
    "one of the audiences": lambda issuer: issuer.session("ada", azp=None, aud=["a", AUDIENCE]),
    "just expired": lambda issuer: issuer.session("ada", exp=ago(5)),
    "just about to be valid": lambda issuer: issuer.session("ada", nbf=ago(-5), iat=ago(-5)),
}


@pytest.mark.parametrize("kind", GOOD)
def test_whoever_has_a_session_is_let_in(api: httpx.Client, issuer: Issuer, kind: str) -> None:
    headers = cookie(GOOD[kind](issuer))
    assert api.get(NOWHERE, headers=headers).status_code == LET_IN
    assert api.get("/api/v1/precheck", headers=headers).status_code == 405


def test_a_token_in_the_header_counts_before_the_cookie(
    api: httpx.Client, callers: Callers, issuer: Issuer
) -> None:
    user, service = callers.user("ada"), callers.service(Scope.PRECHECK)
    assert api.get(NOWHERE, headers=cookie("hunter2") | service).status_code == LET_IN
    assert "service token" in refusal(
        api.get(NOWHERE, headers=user | {"Authorization": "Bearer hunter2"})
    )
    for scheme in ("Basic YTpi", "Bearer", "", f"Bearer {issuer.session('ada')}"):
        refusal(api.get(NOWHERE, headers=user | {"Authorization": scheme}))


def test_of_several_tokens_none_counts(api: httpx.Client, callers: Callers) -> None:
    token = callers.service(Scope.PRECHECK)["Authorization"]
    headers = [("Authorization", "Bearer hunter2"), ("Authorization", token)]
    for order in (headers, headers[::-1]):
        refusal(api.get(NOWHERE, headers=order))


def test_of_several_sessions_none_counts(api: httpx.Client, issuer: Issuer) -> None:
    ada, eve = issuer.session("ada"), issuer.session("eve")
    for both in (
        [("Cookie", f"session_token={ada}; session_token={eve}")],
        [("Cookie", f"session_token={ada}"), ("Cookie", f"session_token={eve}")],
        [("Cookie", f"session_token={ada}; session_token=")],
    ):
        assert "more than one" in refusal(api.get(NOWHERE, headers=both))


def test_a_session_is_found_among_other_cookies(api: httpx.Client, issuer: Issuer) -> None:
    ada = issuer.session("ada")
    for cookies in (
        f"theme=dark; session_token={ada}; session_token_2=x",
        f'a;;=;session_token="{ada}"',
        f"session_token={ada}; session_token={ada}",
    ):
        assert api.get(NOWHERE, headers={"Cookie": cookies}).status_code == LET_IN
    for cookies in (f"xsession_token={ada}", f"SESSION_TOKEN={ada}", "session_token"):
        refusal(api.get(NOWHERE, headers={"Cookie": cookies}))


@pytest.fixture
def own_issuer() -> Iterator[Issuer]:
    with running_issuer() as running:
        yield running


@pytest.fixture
def own_api(api_settings: Settings, own_issuer: Issuer) -> Iterator[httpx.Client]:
    """An API that has not asked for any key yet."""
    settings = api_settings.model_copy(update={"oidc_issuer": own_issuer.url})
    with serving(create_app(settings)) as client:
        yield client


def test_a_key_that_is_rotated_in_works_at_once(own_api: httpx.Client, own_issuer: Issuer) -> None:
    old = cookie(own_issuer.session("ada"))
    assert own_api.get(NOWHERE, headers=old).status_code == LET_IN
    own_issuer.keys.insert(0, Key())
    new = cookie(own_issuer.session("ada"))
    for headers in (new, old):
        assert own_api.get(NOWHERE, headers=headers).status_code == LET_IN
    assert own_issuer.fetches == 2


def test_a_key_that_is_withdrawn_ends_its_sessions(
    own_api: httpx.Client, own_issuer: Issuer
) -> None:
    old = cookie(own_issuer.session("ada"))
    assert own_api.get(NOWHERE, headers=old).status_code == LET_IN
    own_issuer.keys = [Key()]
    new = cookie(own_issuer.session("ada"))
    assert own_api.get(NOWHERE, headers=new).status_code == LET_IN
    refusal(own_api.get(NOWHERE, headers=old))


def test_sessions_go_on_while_the_issuer_is_away(own_api: httpx.Client, own_issuer: Issuer) -> None:
    assert own_api.get(NOWHERE, headers=cookie(own_issuer.session("ada"))).status_code == LET_IN
    own_issuer.is_away = True
    assert own_api.get(NOWHERE, headers=cookie(own_issuer.session("bob"))).status_code == LET_IN
    refusal(own_api.get(NOWHERE, headers=cookie(own_issuer.sign(own_issuer.claims("a"), Key()))))


def test_without_any_keys_the_answer_is_unavailable(
    own_api: httpx.Client, own_issuer: Issuer, callers: Callers
) -> None:
    own_issuer.is_away = True
    answer = own_api.get(NOWHERE, headers=cookie(own_issuer.session("ada")))
    assert answer.status_code == 503
    assert answer.json()["detail"]["error"] == "unavailable"
    assert own_issuer.url not in answer.text
    service = callers.service(Scope.PRECHECK)
    assert own_api.get(NOWHERE, headers=service).status_code == LET_IN
    assert own_api.get("/readyz").status_code == 200


def test_without_an_issuer_there_are_no_sessions(api_settings: Settings, issuer: Issuer) -> None:
    settings = api_settings.model_copy(update={"oidc_issuer": ""})
    with serving(create_app(settings)) as client:
        for token in (issuer.session("ada"), issuer.session("ada", iss="")):
            refusal(client.get(NOWHERE, headers=cookie(token)))
