"""Formulas: exact arithmetic, columns by name, and what is refused."""

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ops.replays.formulas import Formula
from ops.replays.rows import Row
from schema.errors import ConfigurationError


def value(formula: str, **cells: str) -> Decimal:
    return Formula(formula).value(Row("calls.csv", 2, cells))


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
