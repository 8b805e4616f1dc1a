"""Mappings: the events that rows become, and the rows that become none."""

from datetime import UTC, datetime
from decimal import Decimal
from uuid import UUID

import pytest

from ops.replays.mappingfile import parse_mapping
from ops.replays.rows import Row, file_name_for_ids
from schema.errors import ConfigurationError, InvalidEvent
from schema.events import UsageEvent
from schema.plans import KeySource
from schema.prices import credits_for

ORG = UUID("11111111-2222-3333-4444-555555555555")
NOON = "2026-03-01T12:00:00Z"


def mapped(toml: str, **cells: str) -> UsageEvent:
    """The event of one row under a mapping whose `[event]` table ends with `toml`."""
    mapping = parse_mapping(f"[event]\nservice_type = 'llm'\noccurred_at = {NOON}\n{toml}")
    return mapping.event(Row("calls.csv", 2, cells), org_id=ORG, user_id="ana")


def refusal(toml: str, **cells: str) -> str:
    with pytest.raises(InvalidEvent) as caught:
        mapped(toml, **cells)
    return caught.value.message


def test_constants_columns_and_templates() -> None:
    event = mapped(
        """
        service_name = { value = "Chat" }
        variant = { column = "Model" }
        request_id = { template = "{Region}:{Call ID}" }
        quantity = 2.5
        key_source = "byok"
        """,
        **{"Model": " gpt-4-turbo ", "Region": "eu", "Call ID": "17"},
    )
    assert event.service_name == "Chat"
    assert event.variant == "gpt-4-turbo"
    assert event.request_id == "eu:17"
    assert event.quantity == Decimal("2.5")
    assert event.key_source is KeySource.BYOK


def test_request_ids_are_file_and_line_unless_mapped() -> None:
    mapping = parse_mapping(f"[event]\nservice_type = 'llm'\noccurred_at = {NOON}")
    line = Row(file_name_for_ids("März (1).csv.gz"), 7, {})
    assert mapping.event(line, org_id=ORG, user_id="ana").request_id == "M_rz__1_.csv.gz:7"


def test_empty_cells_are_errors_unless_declared() -> None:
    assert refusal("variant = { column = 'Model' }", Model="") == "variant: column 'Model' is empty"
    assert refusal("quantity = { formula = 'N / 2' }", N="") == "quantity: column 'N' is empty"
    assert mapped("variant = { column = 'Model', optional = true }", Model=" ").variant is None
    assert mapped("variant = { column = 'Model', default = 'x' }", Model="").variant == "x"
    assert mapped("quantity = { formula = 'N', default = 3 }", N="").quantity == 3


def test_repeating_fractions_do_not_cost_one_credit_more() -> None:
    quantity = mapped("quantity = { formula = 'N / 3' }", N="2").quantity
    assert credits_for(Decimal("1.5"), quantity) == 1
    assert credits_for(Decimal(3), quantity) == 2


def test_costs_are_rounded_and_credits_rounded_up() -> None:
    event = mapped("api_cost = { formula = 'N / 3' }\ncredits = { column = 'C' }", N="2", C="2.3")
    assert event.api_cost == Decimal("0.666667")
    assert event.credits == 3


@pytest.mark.parametrize(
    ("toml", "problem"),
    [
        ("quantity = { column = 'N' }", "quantity: '1,5' is not a number"),
        ("quantity = true", "quantity: True is not a number"),
        ("quantity = 0", "quantity: Input should be greater than 0"),
        ("quantity = 1e40", "quantity: 1.000000e+40 is out of range"),
        ("credits = 1e25", "credits: Input should be less than or equal to 1000000"),
        ("request_id = { column = 'N' }", "request_id: must be 1 to 255 of the characters"),
        ("key_source = 'mine'", "key_source: Input should be 'managed' or 'byok'"),
    ],
)
def test_rows_that_break_a_rule(toml: str, problem: str) -> None:
    assert refusal(toml, N="1,5").startswith(problem)


def test_metadata_keeps_numbers_and_leaves_out_empty_cells() -> None:
    event = mapped(
        """
        [event.metadata]
        region = { column = "Region" }
        tokens = { formula = "A + B" }
        share = { formula = "A / 8" }
        empty = { column = "Void" }
        batch = { value = { name = "trial", round = 2 } }
        tags = ["a", "b"]
        api_key = "hidden"
        """,
        Region="eu",
        A="1",
        B="2.0",
        Void="",
    )
    assert event.metadata == {
        "region": "eu",
        "tokens": 3,
        "share": 0.125,
        "batch": {"name": "trial", "round": 2},
        "tags": ["a", "b"],
    }


def test_a_row_of_the_wrong_length_is_refused_as_a_whole() -> None:
    mapping = parse_mapping("[event]\nservice_type = 'llm'")
    faulty = Row("f.csv", 3, {"a": "1"}, "the row has 1 fields, the header 2")
    with pytest.raises(InvalidEvent, match="the row has 1 fields, the header 2"):
        mapping.event(faulty, org_id=ORG, user_id="ana", occurred_at=datetime.now(UTC))


def test_every_column_that_is_read_must_be_there_once() -> None:
    mapping = parse_mapping(
        "[event]\nservice_type = { template = '{FILE}-{a}' }\n"
        "quantity = { formula = '\"b c\" * 2' }\n[event.metadata]\nd = { column = 'd' }"
    )
    assert mapping.columns == {"a", "b c", "d"}
    mapping.require(["d", "b c", "a", "else"])
    with pytest.raises(ConfigurationError, match="missing column 'b c'; the file has: a, d"):
        mapping.require(["a", "d"])
    with pytest.raises(ConfigurationError, match="column 'a' is there twice"):
        mapping.require(["a", "b c", "d", "a"])
