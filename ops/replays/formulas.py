"""Formulas: numbers, columns, `+ - * /`, a leading minus and parentheses.

A column whose name is not a plain word is written in quotes. Formulas are parsed as Python is, and
never evaluated as such.
"""

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, DecimalException
from typing import Final

from ops.replays.conversions import ARITHMETIC, number_of
from ops.replays.rows import Row
from schema.errors import ConfigurationError

_MAX_CHARACTERS: Final = 1000


def _divide(left: Decimal, right: Decimal) -> Decimal:
    if not right:
        raise ValueError("division by zero")
    return ARITHMETIC.divide(left, right)


@dataclass(frozen=True, slots=True)
class _Operation:
    """A step of a formula that takes its operands from the stack and leaves its result there."""

    apply: Callable[..., Decimal]
    operands: int


_BINARY: Final[Mapping[type[ast.operator], _Operation]] = {
    ast.Add: _Operation(ARITHMETIC.add, 2),
    ast.Sub: _Operation(ARITHMETIC.subtract, 2),
    ast.Mult: _Operation(ARITHMETIC.multiply, 2),
    ast.Div: _Operation(_divide, 2),
}
_UNARY: Final[Mapping[type[ast.unaryop], _Operation]] = {
    ast.USub: _Operation(ARITHMETIC.minus, 1),
    ast.UAdd: _Operation(ARITHMETIC.plus, 1),
}

_Step = Decimal | str | _Operation
"""A number, the name of a column, or what to do with the numbers before."""


class Formula:
    """Arithmetic over columns, exact to 60 digits.

    Raises:
        ConfigurationError: the text is not a formula.
    """

    def __init__(self, text: str) -> None:
        self.text = text.strip()
        try:
            self._steps = tuple(self._compiled())
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ConfigurationError(f"formula {self.text[:100]!r}: {_in_words(error)}") from None
        self.columns = frozenset(step for step in self._steps if isinstance(step, str))

    def value(self, row: Row) -> Decimal:
        """The result for one row; `ValueError` for empty cells, words and division by zero."""
        stack: list[Decimal] = []
        for step in self._steps:
            match step:
                case Decimal():
                    stack.append(step)
                case str():
                    stack.append(self._number(row, step))
                case _Operation():
                    operands = stack[-step.operands :]
                    stack[-step.operands :] = [self._applied(step, operands)]
        return stack.pop()

    def _number(self, row: Row, column: str) -> Decimal:
        text = row.text(column)
        try:
            return number_of(text)
        except ValueError as error:
            raise ValueError(f"column {column!r}: {error}") from None

    def _applied(self, operation: _Operation, operands: Sequence[Decimal]) -> Decimal:
        try:
            return operation.apply(*operands)
        except DecimalException:
            raise ValueError(f"{self.text} is out of range") from None
        except ValueError as error:
            raise ValueError(f"{error} in {self.text}") from None

    def _compiled(self) -> Iterator[_Step]:
        if len(self.text) > _MAX_CHARACTERS:
            raise ValueError(f"is longer than {_MAX_CHARACTERS} characters")
        yield from self._steps_of(ast.parse(self.text, mode="eval").body)

    def _steps_of(self, node: ast.expr) -> Iterator[_Step]:
        match node:
            case ast.BinOp(left, operator, right) if type(operator) in _BINARY:
                yield from self._steps_of(left)
                yield from self._steps_of(right)
                yield _BINARY[type(operator)]
            case ast.UnaryOp(operator, operand) if type(operator) in _UNARY:
                yield from self._steps_of(operand)
                yield _UNARY[type(operator)]
            case ast.Name(name):
                yield name
            case ast.Constant(str() as name):
                yield name
            case ast.Constant(int() | float() as number) if not isinstance(number, bool):
                yield self._literal(node, number)
            case _:
                raise ValueError(f"{ast.unparse(node)!r} is not arithmetic over columns")

    def _literal(self, node: ast.expr, number: float) -> Decimal:
        """The number as it is written: 0.1 is a tenth, not the nearest binary fraction."""
        if isinstance(number, int):
            return Decimal(number)
        return number_of(ast.get_source_segment(self.text, node))


def _in_words(error: Exception) -> str:
    if isinstance(error, RecursionError | MemoryError):
        return "is nested too deeply"
    return error.msg if isinstance(error, SyntaxError) else str(error)
