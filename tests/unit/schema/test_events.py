"""The usage event: every field's rule, its JSON form and its fingerprint (contract.md §1)."""

from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any, Final
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import JsonValue, ValidationError
from pydantic_core import from_json, to_json

from schema.errors import InvalidEvent, MalformedEvent
from schema.events import Clues, UsageEvent, clues_in, fingerprint, parse_event
from schema.plans import KeySource

ORG: Final = UUID("6f9b2a50-94d1-4f0e-8a37-0d5a4c1a7e11")
AT: Final = "2026-03-15T12:30:00Z"
REQUIRED: Final = {
    "request_id": "r-1",
    "org_id": str(ORG),
    "user_id": "ada",
    "service_type": "contact_lookup",
    "occurred_at": AT,
}
TEXT_LIMITS: Final = {
    "user_id": (1, 255),
    "service_type": (1, 100),
    "service_name": (0, 200),
    "variant": (0, 100),
    "source": (1, 100),
    "traceparent": (0, 255),
}
DECIMALS: Final = ("quantity", "api_cost")


def texts(shortest: int, longest: int) -> st.SearchStrategy[str]:
    """Text that PostgreSQL can store."""
    letters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
    return st.text(letters, min_size=shortest, max_size=longest)


def optional_texts(name: str) -> st.SearchStrategy[str | None]:
    return st.none() | texts(*TEXT_LIMITS[name])


json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(allow_nan=False, allow_infinity=False),
        texts(0, 8),
    ),
    lambda children: (
        st.lists(children, max_size=4) | st.dictionaries(texts(0, 8), children, max_size=4)
    ),
    max_leaves=8,
)
offsets = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timedelta(minutes=minutes))
events = st.fixed_dictionaries(
    {
        "request_id": st.from_regex(r"[A-Za-z0-9_.:\-]{1,255}", fullmatch=True),
        "org_id": st.uuids(),
        "user_id": texts(*TEXT_LIMITS["user_id"]),
        "service_type": texts(*TEXT_LIMITS["service_type"]),
        "occurred_at": st.datetimes(
            datetime(2, 1, 1),  # noqa: DTZ001 - the offset is drawn as well
            datetime(9998, 12, 31),  # noqa: DTZ001
            timezones=offsets.map(timezone),
        ),
    },
    optional={
        "service_name": optional_texts("service_name"),
        "variant": optional_texts("variant"),
        "quantity": st.integers(1, 10**12) | st.decimals("1e-12", 10**12, places=12),
        "credits": st.none() | st.integers(1, 1_000_000),
        "api_cost": st.none() | st.decimals(0, "99999999.999999", places=6),
        "key_source": st.sampled_from([*KeySource, "byok", "managed"]),
        "metadata": st.dictionaries(texts(0, 8), json_values, max_size=4),
        "source": texts(*TEXT_LIMITS["source"]),
        "traceparent": optional_texts("traceparent"),
    },
)


def event(**fields: Any) -> UsageEvent:
    return UsageEvent.of(**REQUIRED | fields)


def refusal(**fields: Any) -> str:
    """What is said about the one bad field, from Python and from JSON alike."""
    ((name, value),) = fields.items()
    with pytest.raises(InvalidEvent) as caught:
        event(**fields)
    assert caught.value.details == {"fields": [name]}
    with pytest.raises(InvalidEvent) as parsed:
        parse_event(to_json(REQUIRED | {name: value}, inf_nan_mode="strings"))
    assert parsed.value.details == {"fields": [name]}
    field, _, problem = str(caught.value).partition(": ")
    assert field == name
    return problem


# Fields


def test_only_five_fields_are_needed() -> None:
    assert event().model_dump() == {
        "request_id": "r-1",
        "org_id": ORG,
        "user_id": "ada",
        "service_type": "contact_lookup",
        "service_name": None,
        "variant": None,
        "quantity": Decimal(1),
        "credits": None,
        "api_cost": None,
        "key_source": KeySource.MANAGED,
        "occurred_at": datetime(2026, 3, 15, 12, 30, tzinfo=UTC),
        "metadata": {},
        "source": "loopnet",
        "traceparent": None,
    }


@pytest.mark.parametrize("name", REQUIRED)
def test_each_of_the_five_is_missed(name: str) -> None:
    fields = {key: value for key, value in REQUIRED.items() if key != name}
    with pytest.raises(InvalidEvent, match=f"^{name}: Field required$"):
        UsageEvent.of(**fields)


def test_a_field_that_does_not_exist_is_refused() -> None:
    assert refusal(quantiy=3) == "is not a field of a usage event"


def test_all_bad_fields_are_named_at_once() -> None:
    with pytest.raises(InvalidEvent) as caught:
        event(user_id="", credits=0, colour="red")
    assert caught.value.details == {"fields": ["user_id", "credits", "colour"]}


@pytest.mark.parametrize("request_id", ["a", "a" * 255, "A-Z_a.z:0-9", "7", "-", "."])
def test_request_ids_of_the_contract_are_taken(request_id: str) -> None:
    assert event(request_id=request_id).request_id == request_id


@pytest.mark.parametrize(
    "request_id", ["", "a" * 256, "a b", "a\n", "\na", "ü", "a/b", "a\0", "Ⅷ", "٣"]
)
def test_other_request_ids_are_refused(request_id: str) -> None:
    words = "must be 1 to 255 of the characters A-Z a-z 0-9 . _ : -"
    assert refusal(request_id=request_id) == words


@pytest.mark.parametrize("org_id", ["", "acme", str(ORG)[:-1], str(ORG) + "0", 7, None])
def test_an_organization_is_a_uuid(org_id: object) -> None:
    assert "UUID" in refusal(org_id=org_id)


@pytest.mark.parametrize(("name", "limits"), TEXT_LIMITS.items())
def test_texts_as_long_as_allowed_are_kept(name: str, limits: tuple[int, int]) -> None:
    for length in limits:
        for letter in ("x", "😀"):
            assert getattr(event(**{name: letter * length}), name) == letter * length


@pytest.mark.parametrize(("name", "limits"), TEXT_LIMITS.items())
def test_texts_beyond_their_limits_are_refused(name: str, limits: tuple[int, int]) -> None:
    shortest, longest = limits
    assert f"at most {longest} characters" in refusal(**{name: "😀" * (longest + 1)})
    if shortest:
        assert "at least 1 character" in refusal(**{name: ""})


@pytest.mark.parametrize("name", TEXT_LIMITS)
def test_texts_are_texts_without_nul(name: str) -> None:
    assert refusal(**{name: "a\0b"}) == "must not contain a NUL character"
    assert "valid string" in refusal(**{name: 7})


@pytest.mark.parametrize("name", TEXT_LIMITS)
def test_a_lone_surrogate_is_refused_in_every_text(name: str) -> None:
    with pytest.raises(InvalidEvent) as caught:
        event(**{name: "a\ud800"})
    assert caught.value.details == {"fields": [name]}


@pytest.mark.parametrize(
    ("quantity", "expected"),
    [
        (1, "1"),
        ("2.3", "2.3"),
        (0.1, "0.1"),
        (10**12, "1000000000000"),
        ("1e-12", "0.000000000001"),
        (Decimal("0.418"), "0.418"),
    ],
)
def test_quantities_are_exact(quantity: object, expected: str) -> None:
    assert event(quantity=quantity).quantity == Decimal(expected)


@pytest.mark.parametrize(
    ("quantity", "problem"),
    [
        (0, "greater than 0"),
        (-1, "greater than 0"),
        ("-0.0", "greater than 0"),
        (10**12 + 1, "less than or equal to"),
        ("1e40", "no more than 38 digits"),
        ("1e-39", "no more than 38 digits"),
        (None, "should be"),
    ],
)
def test_quantities_out_of_range_are_refused(quantity: object, problem: str) -> None:
    assert problem in refusal(quantity=quantity)


@pytest.mark.parametrize("api_cost", [0, "0.000001", "99999999.999999", 0.04, None])
def test_api_costs_of_six_places_are_taken(api_cost: object) -> None:
    expected = None if api_cost is None else Decimal(str(api_cost))
    assert event(api_cost=api_cost).api_cost == expected


@pytest.mark.parametrize(
    ("api_cost", "problem"),
    [
        (-1, "greater than or equal to 0"),
        ("-0.000001", "greater than or equal to 0"),
        ("0.0000001", "no more than 6 decimal places"),
        ("100000000", "no more than 8 digits before"),
    ],
)
def test_api_costs_out_of_range_are_refused(api_cost: object, problem: str) -> None:
    assert problem in refusal(api_cost=api_cost)


@pytest.mark.parametrize("name", DECIMALS)
@pytest.mark.parametrize("value", ["NaN", "sNaN", "Infinity", "-Infinity", float("nan"), "many"])
def test_decimals_are_numbers(name: str, value: object) -> None:
    assert any(words in refusal(**{name: value}) for words in ("finite number", "valid decimal"))


@pytest.mark.parametrize("name", DECIMALS)
def test_a_boolean_is_no_number(name: str) -> None:
    assert refusal(**{name: True}) == "must be a number"


@pytest.mark.parametrize("credits", [1, 1_000_000, None])
def test_credits_in_range_are_taken(credits: int | None) -> None:
    assert event(credits=credits).credits == credits


@pytest.mark.parametrize("credits", [0, -1, 1_000_001, 2**70, 1.0, 1.5, "10", True])
def test_other_credits_are_refused(credits: object) -> None:
    assert refusal(credits=credits).startswith("Input should be ")


def test_a_key_source_is_managed_or_byok() -> None:
    assert event(key_source="byok").key_source is KeySource.BYOK
    assert refusal(key_source="stolen") == "Input should be 'managed' or 'byok'"


@pytest.mark.parametrize(
    "occurred_at",
    ["2026-03-15T12:30:00Z", "2026-03-15T12:30:00+00:00", "2026-03-15T18:00:00+05:30"],
)
def test_times_with_an_offset_are_taken(occurred_at: str) -> None:
    assert event(occurred_at=occurred_at) == event(
        occurred_at=datetime(2026, 3, 15, 12, 30, tzinfo=UTC)
    )


@pytest.mark.parametrize(
    "occurred_at",
    [
        1_773_577_800,
        1_773_577_800_000,
        1_773_577_800.5,
        -1_773_577_800,
        True,
        None,
        "1773577800",
        "1773577800.5",
        "-1773577800",
        "1e-5",
        "",
        "yesterday",
    ],
)
def test_epoch_times_and_other_words_are_refused(occurred_at: object) -> None:
    assert refusal(occurred_at=occurred_at)


@pytest.mark.parametrize(
    "occurred_at",
    ["2026-03-15T12:30:00", "2026-03-15", datetime(2026, 3, 15)],  # noqa: DTZ001
)
def test_times_without_an_offset_are_refused(occurred_at: object) -> None:
    assert refusal(occurred_at=occurred_at) == "Input should have timezone info"


@pytest.mark.parametrize("metadata", [None, [], "text", 7])
def test_metadata_is_an_object(metadata: object) -> None:
    assert refusal(metadata=metadata) == "Input should be a valid dictionary"


def test_metadata_is_cleaned_by_whoever_reads_it() -> None:
    dirty = {"api_key": "sk-1", "deep": [{"password": "x", "kept": True}], "total_tokens": 9}
    clean = {"deep": [{"kept": True}], "total_tokens": 9}
    assert event(metadata=dirty).metadata == clean
    assert parse_event(to_json(REQUIRED | {"metadata": dirty})).metadata == clean


def test_long_metadata_is_refused() -> None:
    assert "8192 bytes" in refusal(metadata={"a": "x" * 8192})


def test_a_nul_character_in_metadata_is_refused() -> None:
    assert refusal(metadata={"a": [{"b": "\0"}]}) == "must not contain a NUL character"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud800", (1, 2), {1: 2}, b"x"])
def test_metadata_that_is_no_json_is_refused(value: object) -> None:
    with pytest.raises(InvalidEvent) as caught:
        event(metadata={"a": value})
    assert caught.value.details == {"fields": ["metadata"]}


def nested(depth: int) -> dict[str, JsonValue]:
    value: dict[str, JsonValue] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def test_metadata_that_contains_itself_is_refused() -> None:
    circle: dict[str, Any] = {}
    circle["a"] = circle
    with pytest.raises(InvalidEvent) as caught:
        event(metadata=circle)
    assert caught.value.details == {"fields": ["metadata"]}


@pytest.mark.parametrize("depth", [1000, 100_000])
def test_metadata_nested_without_end_is_refused(depth: int) -> None:
    with pytest.raises(InvalidEvent) as caught:
        event(metadata=nested(depth))
    assert caught.value.details == {"fields": ["metadata"]}


def test_events_do_not_change() -> None:
    fixed = event()
    with pytest.raises(ValidationError, match="frozen"):
        fixed.user_id = "ben"  # type: ignore[misc]
    assert fixed.user_id == "ada"


# JSON


@given(events)
def test_an_event_comes_back_from_its_json_as_it_was(fields: dict[str, Any]) -> None:
    sent = UsageEvent.of(**fields)
    received = parse_event(sent.to_json())
    assert received == sent
    assert received.to_json() == sent.to_json()


@pytest.mark.parametrize("depth", [1, 50, 60])
def test_nested_metadata_comes_back_from_json(depth: int) -> None:
    sent = event(metadata=nested(depth))
    assert parse_event(sent.to_json()) == sent


def test_json_leaves_defaults_out() -> None:
    sent = event(quantity="1.0", source="loopnet", key_source="managed", metadata={})
    assert from_json(sent.to_json()) == REQUIRED


def test_numbers_may_be_json_numbers_or_strings() -> None:
    as_numbers = parse_event(to_json(REQUIRED | {"quantity": 2.5, "api_cost": 0.04}))
    as_strings = parse_event(to_json(REQUIRED | {"quantity": "2.5", "api_cost": "0.04"}))
    assert as_numbers == as_strings


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"7",
        b'"text"',
        b"{} {}",
        b"\xff\xfe",
        b"\xef\xbb\xbf{}",
        b"{'a': 1}",
        b"[" * 100_000,
        b'{"a":' * 1000 + b"1" + b"}" * 1000,
        b'{"metadata": {"a": "\\ud800"}}',
        b'{"metadata": {"a": NaN}}',
        b'{"metadata": {"a": Infinity}}',
        b'{"metadata": {"a": -Infinity}}',
        b'{"metadata": {"a": ' + b"1" * 5000 + b"}}",
    ],
    ids=lambda payload: repr(payload[:24]),
)
def test_what_is_not_one_json_object_is_malformed(payload: bytes) -> None:
    with pytest.raises(MalformedEvent):
        parse_event(payload)


@pytest.mark.parametrize(
    "extra", [b'"user_id": "ben"', b'"metadata": {"a": 1, "b": [{"c": 1, "c": 1}]}']
)
def test_a_key_that_is_there_twice_is_malformed(extra: bytes) -> None:
    payload = to_json(REQUIRED)[:-1] + b", " + extra + b"}"
    with pytest.raises(MalformedEvent, match="Detected duplicate key"):
        parse_event(payload)


@given(st.binary())
def test_no_payload_raises_anything_else(payload: bytes) -> None:
    for candidate in (payload, to_json(REQUIRED)[:-1] + b', "metadata": {"a": ' + payload + b"}}"):
        try:
            parse_event(candidate)
        except (MalformedEvent, InvalidEvent):
            clues_in(candidate)


# Clues


def test_clues_are_whatever_a_broken_event_still_tells() -> None:
    broken = REQUIRED | {"quantity": -1, "metadata": 7}
    assert clues_in(to_json(broken)) == Clues(ORG, "r-1", "ada", "contact_lookup")


@pytest.mark.parametrize(
    ("name", "value"),
    [("request_id", "a b"), ("org_id", "acme"), ("user_id", "a\0b"), ("service_type", "x" * 101)],
)
def test_clues_hold_nothing_that_could_not_be_stored(name: str, value: str) -> None:
    clues = clues_in(to_json(REQUIRED | {name: value}))
    assert {
        field: getattr(clues, field) is None
        for field in ("request_id", "org_id", "user_id", "service_type")
    } == {field: field == name for field in ("request_id", "org_id", "user_id", "service_type")}


@pytest.mark.parametrize("payload", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b"{}"])
def test_there_may_be_no_clue(payload: bytes) -> None:
    assert clues_in(payload) == Clues()


# Fingerprint


@pytest.mark.parametrize(
    ("user_id", "service_type", "credits", "expected"),
    [
        ("ada", "contact_lookup", 10, "5906b40fe372c1a88133c09e8ec20a0d"),
        ("ada", "x", None, "339fb98cc9574c8e3263e51758048335"),
        ("jürgen", "üö😀", 7, "0017f1798f3760137c751459d90615c7"),
    ],
)
def test_fingerprints_never_change(
    user_id: str, service_type: str, credits: int | None, expected: str
) -> None:
    assert fingerprint(user_id, service_type, credits).hex() == expected


triples = st.tuples(
    st.text("1:a", min_size=1, max_size=4),
    st.text("1:a", min_size=1, max_size=4),
    st.none() | st.integers(1, 12),
)


@given(triples, triples)
def test_distinct_requests_have_distinct_fingerprints(
    one: tuple[str, str, int | None], other: tuple[str, str, int | None]
) -> None:
    assert (fingerprint(*one) == fingerprint(*other)) == (one == other)


def test_no_two_of_many_short_triples_share_a_fingerprint() -> None:
    texts = ["1", ":", "a", "11", "1:", ":1", "1:1", "1:a", "a1", "11:"]
    all_triples = {(u, s, c) for u in texts for s in texts for c in (None, 1, 11, 111)}
    assert len({fingerprint(*triple) for triple in all_triples}) == len(all_triples)


@pytest.mark.parametrize("moment", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"])
def test_times_that_have_no_utc_are_refused(moment: str) -> None:
    assert refusal(occurred_at=moment).startswith("Input should be")
