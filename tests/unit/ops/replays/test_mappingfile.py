"""Mapping files: what they say, what is refused, and the mappings that come along."""

import re
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from uuid import UUID

import pytest

from ops.replays.mappingfile import load_mapping, load_preset, parse_mapping
from ops.replays.rows import Row
from schema.errors import ConfigurationError
from schema.events import UsageEvent

ORG = UUID("11111111-2222-3333-4444-555555555555")


def row(**cells: str) -> Row:
    return Row("calls.csv", 2, cells)


def load_error(toml: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        parse_mapping(toml)
    return caught.value.message


@pytest.mark.parametrize(
    ("toml", "problem"),
    [
        ("[event", "not TOML: "),
        ("", "the mapping needs a table [event]"),
        ("event = 3", "the mapping needs a table [event]"),
        ("[event]\nvariant = 'a'", "event.service_type is missing"),
        ("[event]\nservice_type='a'\nquantty=2", "unknown event field 'quantty'; did you mean qua"),
        ("[event]\nservice_type='a'\n[events]", "unknown section 'events'; did you mean event?"),
        ("[event]\nservice_type={colum='a'}", "unknown option of service_type: 'colum'; did you"),
        ("[event]\nservice_type={}", "service_type needs one of column, formula, template and va"),
        ("[event]\nservice_type={column='a',value='b'}", "service_type needs one of"),
        ("[event]\nservice_type={column=3}", "service_type: column must be a text"),
        ("[event]\nservice_type={column=''}", "service_type: column must be a text"),
        ("[event]\nservice_type=['a']", "service_type: a constant must be a text, a number or a"),
        ("[event]\nservice_type={column='a',optional=1}", "service_type: optional must be true or"),
        ("[event]\nservice_type={column='a',format='b'}", "service_type: format and timezone are"),
        ("[event]\nservice_type={template='{a'}", "template '{a': "),
        ("[event]\nservice_type='a'\nquantity={formula='a b'}", "formula 'a b': invalid syntax"),
        (
            "[event]\nservice_type='a'\noccurred_at={column='t',timezone='Mars'}",
            "occurred_at: no t",
        ),
        ("[event]\nservice_type='a'\noccurred_at={column='t',format=3}", "occurred_at: format mu"),
        ("[event]\nservice_type='a'\nmetadata=3", "the mapping needs a table [event.metadata]"),
        ("[event]\nservice_type='a'\n[csv]\ndelimiter='ab'", "csv.delimiter must be one character"),
        ("[event]\nservice_type='a'\n[csv]\nencoding='runes'", "csv.encoding: no encoding 'runes'"),
        ("[event]\nservice_type='a'\n[csv]\nquote='x'", "unknown option of csv: 'quote'"),
    ],
)
def test_mappings_that_are_refused(toml: str, problem: str) -> None:
    assert load_error(toml).startswith(problem)


def test_times_are_in_the_format_and_zone_that_the_mapping_names() -> None:
    mapping = parse_mapping(
        "[event]\nservice_type = 'x'\noccurred_at = { column = 'T', "
        "format = '%d.%m.%Y %H:%M', timezone = 'America/New_York' }"
    )
    assert mapping.given("occurred_at", row(T="16.07.2023 18:15")) == (
        datetime(2023, 7, 16, 22, 15, tzinfo=UTC)
    )


def test_times_from_two_columns_and_from_a_formula() -> None:
    template = "[event]\nservice_type = 'x'\noccurred_at = { template = '{Day}T{Hour}' }"
    assert parse_mapping(template).given("occurred_at", row(Day="2023-11-16", Hour="18:15")) == (
        datetime(2023, 11, 16, 18, 15, tzinfo=UTC)
    )
    formula = "[event]\nservice_type = 'x'\noccurred_at = { formula = 'ms/1000', format = 'unix' }"
    assert parse_mapping(formula).given("occurred_at", row(ms="1700158546250")) == (
        datetime(2023, 11, 16, 18, 15, 46, 250000, UTC)
    )


def test_a_mapping_may_say_how_the_file_is_written() -> None:
    mapping = parse_mapping(
        "[event]\nservice_type = 'a'\n[csv]\ndelimiter = ';'\nencoding = 'latin-1'"
    )
    assert (mapping.delimiter, mapping.encoding) == (";", "latin-1")


def test_the_preset_reads_the_trace() -> None:
    preset = load_preset("azure-llm")
    cells = {
        "TIMESTAMP": "2023-11-16 18:15:46.6805900",
        "ContextTokens": "374",
        "GeneratedTokens": "44",
    }
    event = preset.event(Row("trace.csv", 2, cells), org_id=ORG, user_id="ana")
    assert event == UsageEvent(
        request_id="trace.csv:2",
        org_id=ORG,
        user_id="ana",
        service_type="llm",
        variant="claude-sonnet",
        quantity=Decimal("0.418"),
        occurred_at=datetime(2023, 11, 16, 18, 15, 46, 680590, UTC),
    )


def test_unknown_presets_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no preset 'azure'; there is: azure-llm"):
        load_preset("azure")
    with pytest.raises(ConfigurationError, match=r"cannot read .*gone.toml: No such file"):
        load_mapping(tmp_path / "gone.toml")
    broken = tmp_path / "broken.toml"
    broken.write_bytes(b"\xff")
    with pytest.raises(ConfigurationError, match=r"broken.toml: not UTF-8 text"):
        load_mapping(broken)
    broken.write_text("[event]")
    with pytest.raises(ConfigurationError, match=r"broken.toml: event.service_type is missing"):
        load_mapping(broken)


def test_the_example_of_the_guide_is_a_mapping() -> None:
    guide = (Path(__file__).parents[4] / "docs" / "replay.md").read_text("utf-8")
    (example,) = re.findall(r"```toml\n(.*?)```", guide, re.DOTALL)
    mapping = parse_mapping(example)
    assert mapping.columns == {
        "Model", "User", "Region", "Call ID", "Prompt Tokens", "Output", "Cost", "Time",
    }  # fmt: skip
