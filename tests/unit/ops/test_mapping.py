"""Mappings: every kind of source, the arithmetic, the times, and what is refused."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ops.mapping import (
    EventMapping,
    Formula,
    Row,
    file_name_for_ids,
    load_mapping,
    load_preset,
    parse_mapping,
)
from schema.errors import ConfigurationError, InvalidEvent
from schema.events import UsageEvent
from schema.plans import KeySource
from schema.prices import credits_for

ORG = UUID("11111111-2222-3333-4444-555555555555")
NOON = "2026-03-01T12:00:00Z"


def row(**cells: str) -> Row:
    return Row("calls.csv", 2, cells)


def mapped(toml: str, **cells: str) -> UsageEvent:
    """The event of one row under a mapping whose `[event]` table ends with `toml`."""
    mapping = parse_mapping(f"[event]\nservice_type = 'llm'\noccurred_at = {NOON}\n{toml}")
    return mapping.event(row(**cells), org_id=ORG, user_id="ana")


def refusal(toml: str, **cells: str) -> str:
    with pytest.raises(InvalidEvent) as caught:
        mapped(toml, **cells)
    return caught.value.message


def load_error(toml: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        parse_mapping(toml)
    return caught.value.message


def value(formula: str, **cells: str) -> Decimal:
    return Formula(formula).value(row(**cells))


@dataclass
class Term:
    """A formula, its exact result and the cells it reads."""

    text: str
    exact: Fraction
    cells: dict[str, str]


def _literal(number: Decimal) -> Term:
    text = f"({number})" if number < 0 else str(number)
    return Term(text, Fraction(number), {})


def _column(number: Decimal) -> Term:
    name = f"c {number}"
    return Term(repr(name), Fraction(number), {name: f" {number} "})


def _joined(parts: tuple[Term, str, Term]) -> Term:
    left, operator, right = parts
    exact = {
        "+": left.exact + right.exact,
        "-": left.exact - right.exact,
        "*": left.exact * right.exact,
    }[operator]
    return Term(f"({left.text} {operator} {right.text})", exact, left.cells | right.cells)


def _divided(parts: tuple[Term, Term]) -> Term:
    left, right = parts
    return Term(f"({left.text} / {right.text})", left.exact / right.exact, left.cells | right.cells)


def _negated(term: Term) -> Term:
    return Term(f"-{term.text}", -term.exact, term.cells)


NUMBERS = st.decimals(-1000, 1000, allow_nan=False, allow_infinity=False, places=3)
LEAVES = st.one_of(NUMBERS.map(_literal), NUMBERS.map(_column))
DIVISORS = LEAVES.filter(lambda term: term.exact != 0)


def _longer(shorter: st.SearchStrategy[Term]) -> st.SearchStrategy[Term]:
    joined = st.tuples(shorter, st.sampled_from("+-*"), shorter).map(_joined)
    return st.one_of(joined, shorter.map(_negated))


EXACT = st.recursive(LEAVES, _longer, max_leaves=6)
DIVIDED = st.recursive(
    LEAVES,
    lambda shorter: st.one_of(_longer(shorter), st.tuples(shorter, DIVISORS).map(_divided)),
    max_leaves=6,
)


@given(EXACT)
def test_sums_and_products_are_exact(term: Term) -> None:
    assert Fraction(value(term.text, **term.cells)) == term.exact


@given(DIVIDED)
def test_quotients_are_as_good_as_exact(term: Term) -> None:
    assert abs(Fraction(value(term.text, **term.cells)) - term.exact) < Fraction(1, 10**30)


@given(st.text(max_size=60))
@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
def test_any_text_is_a_formula_or_refused(text: str) -> None:
    try:
        formula = Formula(text)
    except ConfigurationError:
        return
    try:
        result = formula.value(Row("f", 2, dict.fromkeys(formula.columns, "7")))
    except ValueError:
        return
    assert isinstance(result, Decimal)


@pytest.mark.parametrize(
    ("formula", "result"),
    [
        ("(a + b) / 1000", "0.418"),
        ("a - b - 1", "329"),
        ("-a", "-374"),
        ("+a * 2 + b", "792"),
        ("0.1 + 0.2", "0.3"),
        ("1_000 * 1e-3", "1"),
        ("  ( a +\n b )", "418"),
        ("0.1234567890123456789012345", "0.1234567890123456789012345"),
    ],
)
def test_formulas(formula: str, result: str) -> None:
    assert value(formula, a="374", b="44") == Decimal(result)


def test_quoted_names_and_words_of_python_are_columns() -> None:
    cells = {"Prompt Tokens": "3", "class": "4", "größe": "5"}
    assert Formula("\"Prompt Tokens\" + 'class' + größe").value(Row("f", 2, cells)) == 12


@pytest.mark.parametrize(
    "formula",
    [
        "",
        "a **",
        "a ** 2",
        "a // 2",
        "a % 2",
        "a if b else c",
        "__import__('os')",
        "a.b",
        "a[0]",
        "lambda: 1",
        "(a, b)",
        "a < b",
        "not a",
        "~a",
        "True",
        "None",
        "1j",
        "b'a'",
        "1e999999999999999999999 + a",
        "a := 1",
        "a\0",
        "-" * 999 + "a",
        "(" * 300 + "a" + ")" * 300,
        "+".join("a" * 600),
    ],
)
def test_what_is_no_formula(formula: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^formula "):
        Formula(formula)


@pytest.mark.parametrize(
    ("formula", "problem"),
    [
        ("a / (b - 44)", "division by zero in a / (b - 44)"),
        ("word + 1", "column 'word': 'many' is not a number"),
        ("void + 1", "column 'void' is empty"),
        ("gone + 1", "there is no column 'gone'"),
        ("infinite + 1", "column 'infinite': 'Infinity' is not a finite number"),
        ("huge * huge", "huge * huge is out of range"),
    ],
)
def test_what_a_row_cannot_give(formula: str, problem: str) -> None:
    cells = {"a": "1", "b": "44", "word": "many", "void": " ", "infinite": "Infinity"}
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}$"):
        value(formula, huge="9e999990", **cells)


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


def test_the_longest_file_name_still_makes_a_request_id() -> None:
    assert len(f"{file_name_for_ids('x' * 255)}:{10**12}") <= 255


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


@pytest.mark.parametrize(
    ("options", "cell", "expected"),
    [
        ("", "2023-11-16 18:15:46.6805900", datetime(2023, 11, 16, 18, 15, 46, 680590, UTC)),
        ("", "2023-11-16T18:15:46Z", datetime(2023, 11, 16, 18, 15, 46, tzinfo=UTC)),
        ("", "2023-11-16T18:15:46+02:00", datetime(2023, 11, 16, 16, 15, 46, tzinfo=UTC)),
        (
            "timezone = 'Europe/Berlin'",
            "2023-11-16 18:15",
            datetime(2023, 11, 16, 17, 15, tzinfo=UTC),
        ),
        (
            "timezone = 'Europe/Berlin'",
            "2023-11-16 18:15Z",
            datetime(2023, 11, 16, 18, 15, tzinfo=UTC),
        ),
        (
            "format = '%d.%m.%Y %H:%M:%S.%f', timezone = 'America/New_York'",
            "16.07.2023 18:15:46.1234567",
            datetime(2023, 7, 16, 22, 15, 46, 123456, UTC),
        ),
        ("format = '%Y.%m%d%H%M%S'", "2023.1116181546", datetime(2023, 11, 16, 18, 15, 46, 0, UTC)),
        ("format = 'unix'", "1700158546.25", datetime(2023, 11, 16, 18, 15, 46, 250000, UTC)),
    ],
)
def test_times(options: str, cell: str, expected: datetime) -> None:
    option = f", {options}" if options else ""
    toml = f"[event]\nservice_type = 'x'\noccurred_at = {{ column = 'T'{option} }}"
    event = parse_mapping(toml).event(row(T=cell), org_id=ORG, user_id="ana")
    assert event.occurred_at == expected
    assert event.occurred_at.utcoffset() == UTC.utcoffset(None)


@pytest.mark.parametrize(
    ("options", "cell", "problem"),
    [
        ("", "yesterday", "'yesterday' is not an ISO 8601 time"),
        ("", "1700158546", "'1700158546' is not an ISO 8601 time"),
        ("format = '%d.%m.%Y'", "2023-11-16", "'2023-11-16' is not in the format %d.%m.%Y"),
        ("format = 'unix'", "1e29", "'1e29' is not in the format unix"),
        ("timezone = 'Asia/Tokyo'", "0001-01-01", "0001-01-01 is out of range"),
    ],
)
def test_what_is_no_time(options: str, cell: str, problem: str) -> None:
    option = f", {options}" if options else ""
    mapping = parse_mapping(
        f"[event]\nservice_type = 'x'\noccurred_at = {{ column = 'T'{option} }}"
    )
    with pytest.raises(InvalidEvent) as caught:
        mapping.event(row(T=cell), org_id=ORG, user_id="ana")
    assert caught.value.message == f"occurred_at: {problem}"


def test_times_from_two_columns_and_from_a_formula() -> None:
    template = "[event]\nservice_type = 'x'\noccurred_at = { template = '{Day}T{Hour}' }"
    assert parse_mapping(template).given("occurred_at", row(Day="2023-11-16", Hour="18:15")) == (
        datetime(2023, 11, 16, 18, 15, tzinfo=UTC)
    )
    formula = "[event]\nservice_type = 'x'\noccurred_at = { formula = 'ms/1000', format = 'unix' }"
    assert parse_mapping(formula).given("occurred_at", row(ms="1700158546250")) == (
        datetime(2023, 11, 16, 18, 15, 46, 250000, UTC)
    )


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
        ("[event]\nservice_type={template='{}'}", "template '{}': "),
        ("[event]\nservice_type={template='{a:>3}'}", "template '{a:>3}': "),
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


def test_a_mapping_may_say_how_the_file_is_written() -> None:
    mapping = parse_mapping(
        "[event]\nservice_type = 'a'\n[csv]\ndelimiter = ';'\nencoding = 'latin-1'"
    )
    assert isinstance(mapping, EventMapping)
    assert (mapping.delimiter, mapping.encoding) == (";", "latin-1")


def test_the_example_of_the_guide_is_a_mapping() -> None:
    guide = (Path(__file__).parents[3] / "docs" / "replay.md").read_text("utf-8")
    (example,) = re.findall(r"```toml\n(.*?)```", guide, re.DOTALL)
    mapping = parse_mapping(example)
    assert mapping.columns == {
        "Model", "User", "Region", "Call ID", "Prompt Tokens", "Output", "Cost", "Time",
    }  # fmt: skip
