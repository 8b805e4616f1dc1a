"""Metadata: secrets go at every depth, figures stay, and 8 KiB is the limit (contract.md §1)."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import JsonValue

from schema.metadata import MAX_METADATA_BYTES, clean_metadata, is_secret_key, without_secrets

SECRET_KEYS: Final = [
    "password", "PASSWORD", "Password", "user_password", "userPassword", "password_hash", "passwd",
    "api_key", "apiKey", "APIKey", "API_KEY", "apikey", "X-API-KEY", "api key", "openai.api.key",
    "secret", "client_secret", "clientSecret", "aws_secret_access_key", "private_key",
    "token", "TOKEN", "access_token", "refreshToken", "bearer-token", "csrftoken",
    "authorization", "Authorization", "Proxy-Authorization", "auth", "cookie", "Set-Cookie",
    "ssn", "SSN", "user_ssn", "ssnLast4", "credentials",
]  # fmt: skip

PLAIN_KEYS: Final = [
    "operation", "company_id", "property_id", "enrichment_fields", "data_sources",
    "enrichment_level", "record_count", "processing_time_ms", "cache_hit", "api_version",
    "total_tokens", "prompt_tokens", "max_tokens", "token_count", "tokens", "tokenizer",
    "key", "keyboard", "monkey", "author", "authorized_by", "secretary", "passport", "lessons",
    "api", "access", "", "123", "日本",
]  # fmt: skip

SECRET_VALUE: Final = "hunter2"

plain_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8),
)


def containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Lists, and objects in which some keys name secrets."""
    harmless = st.dictionaries(st.sampled_from(PLAIN_KEYS), children, max_size=4)
    secret = st.dictionaries(
        st.sampled_from(SECRET_KEYS),
        st.sampled_from([SECRET_VALUE, [SECRET_VALUE], {"a": {"b": SECRET_VALUE}}]),
        max_size=2,
    )
    objects = st.builds(lambda one, other: {**one, **other}, harmless, secret)
    return st.one_of(st.lists(children, max_size=3), objects)


nested = containers(st.recursive(plain_values, containers, max_leaves=12)).filter(
    lambda value: isinstance(value, dict)
)


def without(value: Any, keys: list[str]) -> Any:
    """The same JSON without these keys, at every depth."""
    if isinstance(value, dict):
        return {key: without(item, keys) for key, item in value.items() if key not in keys}
    if isinstance(value, list):
        return [without(item, keys) for item in value]
    return value


def deep(depth: int, bottom: JsonValue) -> dict[str, JsonValue]:
    """An object inside as many others."""
    for _ in range(depth):
        bottom = {"a": bottom}
    assert isinstance(bottom, dict)
    return bottom


@pytest.mark.parametrize("key", SECRET_KEYS)
def test_keys_of_secrets_are_known(key: str) -> None:
    assert is_secret_key(key)


@pytest.mark.parametrize("key", PLAIN_KEYS)
def test_keys_of_figures_are_left_alone(key: str) -> None:
    assert not is_secret_key(key)


@given(nested)
def test_secrets_are_removed_at_every_depth_and_nothing_else(metadata: dict[str, Any]) -> None:
    cleaned = clean_metadata(metadata)
    assert SECRET_VALUE not in json.dumps(cleaned)
    assert cleaned == without(metadata, SECRET_KEYS)


@given(nested)
def test_cleaning_twice_is_cleaning_once(metadata: dict[str, Any]) -> None:
    cleaned = clean_metadata(metadata)
    assert clean_metadata(cleaned) == cleaned


@given(nested)
def test_the_metadata_of_the_caller_is_not_changed(metadata: dict[str, Any]) -> None:
    before = json.dumps(metadata)
    clean_metadata(metadata)
    assert json.dumps(metadata) == before


@pytest.mark.parametrize(
    "metadata",
    [
        {"password": SECRET_VALUE},
        {"a": {"password": SECRET_VALUE}},
        {"a": [{"password": SECRET_VALUE}]},
        {"a": [[[{"b": {"password": {"c": SECRET_VALUE}}}]]]},
        deep(60, {"password": SECRET_VALUE}),
    ],
    ids=["top", "object", "list", "mixed", "60 deep"],
)
def test_no_depth_hides_a_secret(metadata: dict[str, JsonValue]) -> None:
    assert SECRET_VALUE not in json.dumps(clean_metadata(metadata))


def test_token_figures_stay() -> None:
    usage: dict[str, JsonValue] = {"total_tokens": 418, "prompt_tokens": 300, "token": "x"}
    assert clean_metadata(usage) == {"total_tokens": 418, "prompt_tokens": 300}


def filled(size: int, letter: str = "x") -> dict[str, JsonValue]:
    """Metadata of exactly so many bytes of JSON."""
    frame = len('{"a":""}')
    return {"a": letter * ((size - frame) // len(letter.encode()))}


@pytest.mark.parametrize("letter", ["x", "é", "😀"])
def test_metadata_of_8_kib_is_kept(letter: str) -> None:
    metadata = filled(MAX_METADATA_BYTES, letter)
    assert clean_metadata(metadata) == metadata


@pytest.mark.parametrize("letter", ["x", "é", "😀"])
def test_metadata_over_8_kib_is_refused(letter: str) -> None:
    metadata = filled(MAX_METADATA_BYTES, letter) | {"b": 1}
    with pytest.raises(ValueError, match="must not be longer than 8192 bytes of JSON"):
        clean_metadata(metadata)


def test_what_is_removed_does_not_count() -> None:
    assert clean_metadata({"password": "x" * MAX_METADATA_BYTES, "a": 1}) == {"a": 1}


@pytest.mark.parametrize(
    "metadata",
    [{"a": "\0"}, {"a\0": 1}, {"a": ["x\0y"]}, {"a": [{"b\0": 1}]}],
    ids=["value", "key", "list", "nested key"],
)
def test_a_nul_character_is_refused_at_every_depth(metadata: dict[str, JsonValue]) -> None:
    with pytest.raises(ValueError, match="must not contain a NUL character"):
        clean_metadata(metadata)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_json_lacks_are_refused_at_every_depth(number: float) -> None:
    shallow: dict[str, JsonValue] = {"a": number}
    deeper: dict[str, JsonValue] = {"a": [shallow]}
    for metadata in (shallow, deeper):
        with pytest.raises(ValueError, match="must not contain infinite numbers or NaN"):
            clean_metadata(metadata)


@pytest.mark.parametrize("metadata", [{"a": "\ud800"}, {"\udfff": 1}, {"a": [{"b": "x\ud800"}]}])
def test_a_lone_surrogate_is_refused(metadata: dict[str, JsonValue]) -> None:
    with pytest.raises(ValueError, match="surrogates not allowed"):
        clean_metadata(metadata)


@pytest.mark.parametrize(
    "key",
    [
        "api_keys", "apiKeys", "passWord", "access_tokens", "token1", "token_1", "token_value",
        "SSNs", "sSN", "x_auth", "cookies", "jwt", "bearer", "clientSecret", "db-credentials",
    ],
)  # fmt: skip
def test_odd_spellings_are_secret_too(key: str) -> None:
    assert is_secret_key(key)


@pytest.mark.parametrize("key", ["secretary", "tokens", "prompt_tokens", "tokenizer", "author"])
def test_words_that_only_look_alike_stay(key: str) -> None:
    assert not is_secret_key(key)


@pytest.mark.parametrize(
    ("nest", "levels", "fits"),
    [
        (lambda inner: {"a": inner}, 63, True),
        (lambda inner: {"a": inner}, 64, False),
        (lambda inner: [inner], 63, True),
        (lambda inner: [inner], 64, False),
    ],
)
def test_depth_has_a_limit(nest: Callable[[Any], Any], levels: int, fits: bool) -> None:
    value: Any = 1
    for _ in range(levels):
        value = nest(value)
    with nullcontext() if fits else pytest.raises(ValueError, match="nested"):
        clean_metadata({"a": value})


def test_integers_have_a_limit() -> None:
    assert clean_metadata({"a": 2**1024 - 1})
    with pytest.raises(ValueError, match="bits"):
        clean_metadata({"a": 2**1024})


@pytest.mark.parametrize(
    "text",
    ["", "{", "7", '{"a": 1.50,\n"b": "\\u00e9"}', '{"a": 1, "a": 2}', "[" * 100_000],
)
def test_a_text_without_secrets_is_not_changed(text: str) -> None:
    assert without_secrets(text) == text


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ('{"api_key": "sesame", "a": 1}', {"a": 1}),
        ('[{"a": [{"password": {"b": 1}}]}]', [{"a": [{}]}]),
        ('{"metadata": {"token": "sesame"}, "metadata": {}}', {"metadata": {}}),
        ('{"password": "sesame", "a": "\n"}', {"a": "\n"}),
        ('{"a": {"ssn": "sesame", "b": "' + "b" * 10_000 + '"}}', {"a": {"b": "b" * 10_000}}),
    ],
)
def test_secrets_of_any_document_are_removed(text: str, left: Any) -> None:
    assert json.loads(without_secrets(text)) == left


def test_odd_values_do_not_save_a_secret() -> None:
    shown = without_secrets('{"jwt": "sesame", "n": ' + "9" * 10_000 + r', "s": "\ud83d"}')
    assert shown == r'{"n": Infinity, "s": "\ud83d"}'
