"""Sources: a constant, column, formula or template that a field takes its value from."""

from collections.abc import Callable, Iterator, Mapping
from string import Formatter
from typing import Any, Final, Protocol

from ops.replays.formulas import Formula
from ops.replays.rows import Row
from schema.errors import ConfigurationError


class Source(Protocol):
    """Where the value of a field comes from."""

    columns: frozenset[str]

    def value(self, row: Row) -> object:
        """The value for one row, or `ValueError`."""


class Constant:
    """The same for every row."""

    def __init__(self, value: object) -> None:
        self.columns: frozenset[str] = frozenset()
        self._value = value

    def value(self, _row: Row) -> object:
        """What was given."""
        return self._value


class Column:
    """The cell of one column."""

    def __init__(self, name: str) -> None:
        self.columns = frozenset({name})
        self._name = name

    def value(self, row: Row) -> object:
        """The cell, or `ValueError` if it is empty or not there."""
        return row.text(self._name)


class Template:
    """Text around columns; `{FILE}` and `{LINE}` are where the row stands.

    Raises:
        ConfigurationError: the text is not a template.
    """

    def __init__(self, text: str) -> None:
        try:
            self._parts = [*self._parsed(text)]
        except ValueError as error:
            raise ConfigurationError(f"template {text[:100]!r}: {error}") from None
        names = frozenset(name for _, name in self._parts if name is not None)
        self.columns = names - {"FILE", "LINE"}

    def _parsed(self, text: str) -> Iterator[tuple[str, str | None]]:
        for literal, name, form, conversion in Formatter().parse(text):
            if form or conversion or name == "":
                raise ValueError("'{}' takes the plain name of a column, FILE or LINE")
            yield literal, name

    def value(self, row: Row) -> object:
        """The text, or `ValueError` if a cell of it is empty or not there."""
        return "".join(literal + self._filled(name, row) for literal, name in self._parts)

    def _filled(self, name: str | None, row: Row) -> str:
        match name:
            case None:
                return ""
            case "FILE":
                return row.file
            case "LINE":
                return str(row.line)
            case _:
                return row.text(name)


SOURCES: Final[Mapping[str, Callable[[Any], Source]]] = {
    "value": Constant,
    "column": Column,
    "formula": Formula,
    "template": Template,
}
"""What makes each kind of source, by the option that names it."""
