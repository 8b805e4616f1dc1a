"""Whatever a token looks like, it names a user or is refused with one and the same error."""

import asyncio
import json
from base64 import urlsafe_b64encode
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from hypothesis import given, settings
from hypothesis import strategies as st
from jwt import PyJWK

from api.callers import User
from api.keys import FixedKeys
from api.sessions import MAX_TOKEN_CHARACTERS, REMEMBERED_SECONDS, Sessions
from schema.errors import NotAuthenticated
from tests.integration.api.issuer import AUDIENCE, Key

NOW = 1_800_000_000
LEEWAY = 30
ISSUER = "https://id.example/realms/loopnet"
KEY = Key()
PUBLISHED = PyJWK(KEY.published())
HEAD: dict[str, Any] = {"alg": "RS256", "typ": "JWT", "kid": KEY.id}
CLAIMS: dict[str, Any] = {
    "iss": ISSUER,
    "sub": "ada",
    "azp": AUDIENCE,
    "aud": ["account", AUDIENCE],
    "typ": "Bearer",
    "iat": NOW,
    "nbf": NOW,
    "exp": NOW + 300,
    "email": "ada@example.com",
    "name": "Ada",
    "realm_access": {"roles": ["user"]},
}
ADA = User("ada", "ada@example.com", "Ada")


class Keys(FixedKeys):
    """The issuer's one key, until it is withdrawn; counts who wants to know it."""

    is_withdrawn = False
    asked = 0

    async def key(self, key_id: str) -> PyJWK | None:
        self.asked += 1
        return None if self.is_withdrawn else await super().key(key_id)


def sessions(keys: FixedKeys | None = None, now: float = NOW) -> Sessions:
    return Sessions(
        keys or FixedKeys(PUBLISHED),
        issuer=ISSUER,
        audience=AUDIENCE,
        leeway_seconds=LEEWAY,
        clock=lambda: now,
    )


def encoded(part: bytes) -> str:
    return urlsafe_b64encode(part).rstrip(b"=").decode()


def signed(head: str | dict[str, Any], claims: str | bytes | dict[str, Any]) -> str:
    """A token with a good signature around anything, JSON or not."""
    parts = [json.dumps(part) if isinstance(part, dict) else part for part in (head, claims)]
    raw = [
        part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part for part in parts
    ]
    text = ".".join(map(encoded, raw))
    signature = KEY.private.sign(text.encode(), padding.PKCS1v15(), hashes.SHA256())
    return f"{text}.{encoded(signature)}"


def user_of(token: str, at: float = NOW) -> User | None:
    """The user, or None where the token is refused; any other error is raised."""
    try:
        return asyncio.run(sessions(now=at).user_of(token))
    except NotAuthenticated as error:
        told = str(error)
    assert told in {"The session is not valid.", "The session has expired."}
    return None


def without(claim: str) -> dict[str, Any]:
    return {name: value for name, value in CLAIMS.items() if name != claim}


numbers = st.one_of(
    st.integers(),
    st.integers(min_value=10**18, max_value=10**400),
    st.floats(),
    st.sampled_from([NOW, NOW - 0.5, -1, 0, 2**53, 253_402_300_800]),
)
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=20)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


def test_a_good_token_names_its_user() -> None:
    assert user_of(signed(HEAD, CLAIMS)) == ADA
    least = {name: CLAIMS[name] for name in ("iss", "sub", "azp", "typ", "iat", "exp")}
    assert user_of(signed(HEAD, least)) == User("ada")


@given(st.text(max_size=200))
def test_text_is_no_token(text: str) -> None:
    assert user_of(text) is None


@given(st.lists(st.one_of(st.binary(max_size=40), anything.map(json.dumps)), max_size=4))
def test_segments_of_anything_are_no_token(parts: list[str | bytes]) -> None:
    raw = [part.encode() if isinstance(part, str) else part for part in parts]
    assert user_of(".".join(map(encoded, raw))) is None


@given(st.binary(max_size=60))
def test_what_is_signed_must_be_claims(payload: bytes) -> None:
    assert user_of(signed(HEAD, payload)) is None


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([*CLAIMS, "x"]), anything))
def test_odd_claims_are_refused_or_do_not_matter(odd: dict[str, Any]) -> None:
    user = user_of(signed(HEAD, CLAIMS | odd))
    assert user is None or not user.is_system_admin


WRONG_TYPES: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(
        ("iss", "sub", "typ"), anything.filter(lambda value: not isinstance(value, str))
    ),
    **dict.fromkeys(
        ("iat", "nbf", "exp"),
        anything.filter(
            lambda value: isinstance(value, bool) or not isinstance(value, int | float)
        ),
    ),
    "realm_access": anything.filter(lambda value: not isinstance(value, dict)),
    "aud": anything.filter(lambda value: not isinstance(value, str | list)),
    **dict.fromkeys(
        ("azp", "email", "name"),
        anything.filter(lambda value: value is not None and not isinstance(value, str)),
    ),
}


@settings(deadline=None)
@given(
    st.sampled_from(sorted(WRONG_TYPES)).flatmap(
        lambda claim: st.tuples(st.just(claim), WRONG_TYPES[claim])
    )
)
def test_a_claim_of_the_wrong_type_is_refused(odd: tuple[str, Any]) -> None:
    claim, value = odd
    assert user_of(signed(HEAD, CLAIMS | {claim: value})) is None


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["alg", "typ", "kid", "crit", "b64", "jwk"]), anything))
def test_odd_heads_are_refused_or_do_not_matter(odd: dict[str, Any]) -> None:
    user = user_of(signed(HEAD | odd, CLAIMS))
    assert user in {None, ADA}
    if {"alg", "kid", "crit"} & odd.keys():
        assert user is None


ODD_HEADS: list[dict[str, Any]] = [
    {"alg": "none"},
    {"alg": "HS256"},
    {"alg": "PS256"},
    {"alg": "rs256"},
    {"alg": None},
    {"alg": ["RS256"]},
    {"kid": None},
    {"kid": 1},
    {"typ": "logout+jwt"},
    {"crit": []},
    {"crit": ["exp"]},
    {"crit": ["b64"], "b64": True},
    {"crit": ["b64"], "b64": False},
    {"b64": False},
]


@pytest.mark.parametrize("odd", ODD_HEADS, ids=str)
def test_an_odd_head_is_refused_before_any_key_is_looked_for(odd: dict[str, Any]) -> None:
    keys = Keys(PUBLISHED)
    for head in (HEAD | odd, {"alg": "RS256"}):
        with pytest.raises(NotAuthenticated):
            asyncio.run(sessions(keys).user_of(signed(head, CLAIMS)))
    assert keys.asked == 0


@pytest.mark.parametrize("claim", ["iss", "sub", "typ", "iat", "exp"])
def test_a_claim_that_is_needed_cannot_be_missing(claim: str) -> None:
    assert user_of(signed(HEAD, without(claim))) is None


@pytest.mark.parametrize(
    "exp", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400, "1" + "0" * 5000, "true",
            f'"{NOW + 300}"', f"[{NOW + 300}]", "null", "-1", "253402300800"],
)  # fmt: skip
@pytest.mark.parametrize("claim", ["exp", "iat", "nbf"])
def test_times_are_plain_numbers(claim: str, exp: str) -> None:
    claims = json.dumps(CLAIMS | {claim: "HERE"}).replace('"HERE"', exp)
    assert user_of(signed(HEAD, claims)) is None


def test_times_may_have_a_fraction() -> None:
    assert user_of(signed(HEAD, CLAIMS | {"iat": NOW - 0.25, "exp": NOW + 0.25})) == ADA


@pytest.mark.parametrize("depth", [100, 900, 990, 1000, 5000])
@pytest.mark.parametrize("name", ["sub", "aud", "realm_access", "x"])
def test_deep_claims_are_refused(name: str, depth: int) -> None:
    deep = "[" * depth + "]" * depth
    claims = json.dumps(CLAIMS | {name: "HERE"}).replace('"HERE"', deep)
    assert user_of(signed(HEAD, claims)) in {None, ADA if name == "x" else None}


@pytest.mark.parametrize("depth", [100, *range(900, 1000, 3), 5000])
@pytest.mark.parametrize("name", ["alg", "kid", "typ", "crit", "x"])
def test_deep_heads_are_refused(name: str, depth: int) -> None:
    deep = "[" * depth + "]" * depth
    head = json.dumps(HEAD | {name: "HERE"}).replace('"HERE"', deep)
    assert user_of(signed(head, CLAIMS)) in {None, ADA if name == "x" else None}


@pytest.mark.parametrize("subject", ["", "a" * 256, "a\x00b", "\ud800"])
def test_a_subject_that_no_user_can_have_is_refused(subject: str) -> None:
    assert user_of(signed(HEAD, CLAIMS | {"sub": subject})) is None


def test_the_longest_subject_is_kept_as_it_is() -> None:
    user = user_of(signed(HEAD, CLAIMS | {"sub": "é" * 255}))
    assert user is not None
    assert user.id == "é" * 255


@pytest.mark.parametrize("claim", ["name", "email"])
@pytest.mark.parametrize("text", ["a\x00b", "\ud800"])
def test_a_text_that_postgresql_cannot_hold_is_refused(claim: str, text: str) -> None:
    assert user_of(signed(HEAD, CLAIMS | {claim: text})) is None


@pytest.mark.parametrize(
    ("azp", "aud", "is_for_us"),
    [
        (AUDIENCE, "other", True),
        ("other", AUDIENCE, True),
        ("other", ["a", AUDIENCE], True),
        (None, AUDIENCE, True),
        (AUDIENCE, [], True),
        ("other", "other", False),
        (None, [], False),
        ("other", AUDIENCE.upper(), False),
        ("other", f"{AUDIENCE}-2", False),
    ],
)
def test_a_session_is_for_this_client(azp: Any, aud: Any, *, is_for_us: bool) -> None:
    assert user_of(signed(HEAD, CLAIMS | {"azp": azp, "aud": aud})) == (ADA if is_for_us else None)


@pytest.mark.parametrize("typ", ["JWT", "jwt", "at+jwt", None])
def test_access_tokens_have_these_types(typ: str | None) -> None:
    head = HEAD | {"typ": typ} if typ else {k: v for k, v in HEAD.items() if k != "typ"}
    assert user_of(signed(head, CLAIMS)) == ADA


@pytest.mark.parametrize("typ", ["", "logout+jwt", "dpop+jwt", None, 1, ["JWT"]])
def test_others_do_not(typ: Any) -> None:
    assert user_of(signed(HEAD | {"typ": typ}, CLAIMS)) is None


@pytest.mark.parametrize("typ", ["ID", "Refresh", "Offline", "bearer", "Logout", ""])
def test_only_access_tokens_are_sessions(typ: str) -> None:
    assert user_of(signed(HEAD, CLAIMS | {"typ": typ})) is None


@pytest.mark.parametrize("claim", ["iat", "nbf"])
def test_clocks_may_differ_by_the_leeway(claim: str) -> None:
    token = signed(HEAD, CLAIMS | {claim: NOW + 60})
    assert user_of(token, at=NOW + 60 - LEEWAY) == ADA
    assert user_of(token, at=NOW + 60 - LEEWAY - 1) is None


def test_a_session_ends_with_the_leeway_after_its_expiry() -> None:
    token = signed(HEAD, CLAIMS)
    assert user_of(token, at=NOW + 300 + LEEWAY - 1) == ADA
    assert user_of(token, at=NOW + 300 + LEEWAY) is None


def test_the_longest_token() -> None:
    bare = signed(HEAD, CLAIMS | {"x": ""})
    room = (MAX_TOKEN_CHARACTERS - len(bare)) * 3 // 4
    longest = signed(HEAD, CLAIMS | {"x": "x" * room})
    assert MAX_TOKEN_CHARACTERS - 4 < len(longest) <= MAX_TOKEN_CHARACTERS
    assert user_of(longest) == ADA
    assert user_of(signed(HEAD, CLAIMS | {"x": "x" * (room + 4)})) is None


@pytest.mark.parametrize(
    "change", ["{}=", "{}.", ".{}", "{}.x", " {}", "{}\n", '"{}"', "{}é", "{}\ud800"]
)
def test_nothing_may_be_around_a_token(change: str) -> None:
    assert user_of(change.format(signed(HEAD, CLAIMS))) is None


def test_a_checked_token_is_known_for_a_while_and_not_longer() -> None:
    now = [float(NOW)]
    known = Sessions(
        FixedKeys(PUBLISHED),
        issuer=ISSUER,
        audience=AUDIENCE,
        leeway_seconds=LEEWAY,
        clock=lambda: now[0],
    )
    lasting, ending = signed(HEAD, CLAIMS), signed(HEAD, CLAIMS | {"exp": NOW + 1})
    assert asyncio.run(known.user_of(lasting)) is asyncio.run(known.user_of(lasting))
    first = asyncio.run(known.user_of(lasting))
    assert asyncio.run(known.user_of(ending)) == ADA
    now[0] = NOW + 1 + LEEWAY
    assert now[0] < NOW + REMEMBERED_SECONDS
    with pytest.raises(NotAuthenticated, match="expired"):
        asyncio.run(known.user_of(ending))
    assert asyncio.run(known.user_of(lasting)) is first
    now[0] = NOW + REMEMBERED_SECONDS
    assert asyncio.run(known.user_of(lasting)) is not first


def test_a_checked_token_ends_with_its_key() -> None:
    keys = Keys(PUBLISHED)
    known = sessions(keys)
    token = signed(HEAD, CLAIMS)
    assert asyncio.run(known.user_of(token)) == ADA
    keys.is_withdrawn = True
    with pytest.raises(NotAuthenticated):
        asyncio.run(known.user_of(token))


def test_not_more_tokens_are_known_than_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.sessions._MOST", 2)
    known = sessions()
    tokens = [signed(HEAD, CLAIMS | {"jti": str(number)}) for number in range(3)]
    first, *_ = [asyncio.run(known.user_of(token)) for token in tokens]
    assert asyncio.run(known.user_of(tokens[0])) is not first


def test_only_whole_tokens_are_known() -> None:
    known = sessions()
    token = signed(HEAD, CLAIMS)
    assert asyncio.run(known.user_of(token)) == ADA
    for other in (token[:-1], token[:-4] + "AAAA", token.rpartition(".")[0] + "."):
        with pytest.raises(NotAuthenticated):
            asyncio.run(known.user_of(other))
