"""Mappings: how the rows of a CSV file become usage events.

A mapping is a TOML document. `[event]` names, for fields of the event contract (contract.md §1),
where each value comes from; `[event.metadata]` does so for any metadata key::

    [csv]                       # optional
    delimiter = ";"             # one character, "," unless given
    encoding = "latin-1"        # UTF-8 unless given

    [event]
    service_type = "llm"                                      # a constant
    user_id = { column = "User" }                             # a column
    quantity = { formula = '("Prompt Tokens" + Output) / 1000' }
    request_id = { template = "{Region}:{Call ID}" }          # text around columns
    occurred_at = { column = "Time", format = "%d.%m.%Y %H:%M:%S.%f", timezone = "Europe/Berlin" }
    variant = { column = "Model", optional = true }           # an empty cell leaves the field out
    api_cost = { column = "Cost", default = 0 }               # … or takes this value instead

    [event.metadata]
    region = { column = "Region" }
    batch = { value = { name = "trial", round = 2 } }         # a constant of any form

* An empty cell is an error of its row, unless `optional` or `default` say otherwise; in metadata
  it is left out.
* Formulas know numbers, columns, `+ - * /`, a leading minus and parentheses. A column whose name
  is not a plain word is written in quotes.
* `quantity` is cut off after 24 decimal places, `api_cost` rounded to 6, `credits` rounded up.
* In templates `{FILE}` is the file's name and `{LINE}` the line on which the row ends, the header
  being line 1. Unless mapped, `request_id` is `{FILE}:{LINE}`.
* Times are ISO 8601, or as `format` says in the words of `strptime`, or `format = "unix"` for
  seconds since 1970. Those without an offset are in `timezone`, UTC unless given. Digits beyond
  microseconds are cut off.

Nothing here is evaluated as Python, and nothing but the two loaders reads files.
"""

import ast
import codecs
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, tzinfo
from decimal import (
    ROUND_CEILING,
    ROUND_DOWN,
    ROUND_HALF_UP,
    Context,
    Decimal,
    DecimalException,
    InvalidOperation,
)
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from string import Formatter
from typing import Any, Final, Protocol
from zoneinfo import ZoneInfo

from schema.errors import ConfigurationError, InvalidEvent
from schema.events import UsageEvent

_ARITHMETIC: Final = Context(prec=60)
_MAX_MAGNITUDE: Final = 30
"""Numbers of more digits before the point are out of every field's range."""
_QUANTITY_STEP: Final = Decimal("1e-24")
_MICRO_USD: Final = Decimal("0.000001")
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_BEYOND_MICROSECONDS: Final = re.compile(r"([.,]\d{6})\d+(?!.*[.,]\d{7})")
_NOT_IN_REQUEST_IDS: Final = re.compile(r"[^A-Za-z0-9_.:\-]")
_MAX_FILE_NAME: Final = 200
_MAX_FORMULA: Final = 1000
_UNIX: Final = "unix"
_DEFAULT_REQUEST_ID: Final = "{FILE}:{LINE}"


class EmptyCell(ValueError):
    """A cell that a field needs is empty."""


@dataclass(frozen=True, slots=True)
class Row:
    """One data row: its cells by column, and where it stands."""

    file: str
    """The file's name, in characters that request ids may have."""
    line: int
    cells: Mapping[str, str]
    fault: str | None = None
    """What is wrong with the row as a whole, where something is."""

    def text(self, column: str) -> str:
        """The cell without surrounding space; `ValueError` if it is empty or not there."""
        if column not in self.cells:
            raise ValueError(f"there is no column {column!r}")
        if not (text := self.cells[column].strip()):
            raise EmptyCell(f"column {column!r} is empty")
        return text

    def check(self) -> None:
        """Raise `InvalidEvent` if something is wrong with the row as a whole."""
        if self.fault:
            raise InvalidEvent(self.fault)


def file_name_for_ids(name: str) -> str:
    """A file name in the alphabet of request ids: other characters become '_'."""
    return _NOT_IN_REQUEST_IDS.sub("_", name)[:_MAX_FILE_NAME]


def number_of(value: object) -> Decimal:
    """A finite number from a cell or constant, or `ValueError`."""
    if isinstance(value, bool):
        raise ValueError(f"{value} is not a number")
    try:
        number = Decimal(str(value))
    except InvalidOperation:
        raise ValueError(f"{str(value)[:50]!r} is not a number") from None
    if not number.is_finite():
        raise ValueError(f"{str(value)[:50]!r} is not a finite number")
    return number


def _bounded(value: object) -> Decimal:
    number = number_of(value)
    if number.adjusted() > _MAX_MAGNITUDE:
        raise ValueError(f"{number:.6e} is out of range")
    return number


def _quantity(value: object) -> Decimal:
    # Cut off, so that a third times three never rounds up to one more credit.
    return _cut(_bounded(value), _QUANTITY_STEP, ROUND_DOWN)


def _usd(value: object) -> Decimal:
    return _cut(_bounded(value), _MICRO_USD, ROUND_HALF_UP)


def _credits(value: object) -> int:
    return int(_bounded(value).to_integral_value(ROUND_CEILING))


def _cut(number: Decimal, step: Decimal, rounding: str) -> Decimal:
    exponent = number.as_tuple().exponent
    if isinstance(exponent, int) and exponent < step.adjusted():
        return number.quantize(step, rounding, _ARITHMETIC)
    return number


def _divide(left: Decimal, right: Decimal) -> Decimal:
    if not right:
        raise ValueError("division by zero")
    return _ARITHMETIC.divide(left, right)


@dataclass(frozen=True, slots=True)
class _Operation:
    """A step of a formula that takes its operands from the stack and leaves its result there."""

    apply: Callable[..., Decimal]
    operands: int


_BINARY: Final[Mapping[type[ast.operator], _Operation]] = {
    ast.Add: _Operation(_ARITHMETIC.add, 2),
    ast.Sub: _Operation(_ARITHMETIC.subtract, 2),
    ast.Mult: _Operation(_ARITHMETIC.multiply, 2),
    ast.Div: _Operation(_divide, 2),
}
_UNARY: Final[Mapping[type[ast.unaryop], _Operation]] = {
    ast.USub: _Operation(_ARITHMETIC.minus, 1),
    ast.UAdd: _Operation(_ARITHMETIC.plus, 1),
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
        if len(self.text) > _MAX_FORMULA:
            raise ValueError(f"is longer than {_MAX_FORMULA} characters")
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


class Source(Protocol):
    """Where the value of a field comes from."""

    columns: frozenset[str]

    def value(self, row: Row) -> object:
        """The value for one row, or `ValueError`."""


class _Constant:
    def __init__(self, value: object) -> None:
        self.columns: frozenset[str] = frozenset()
        self._value = value

    def value(self, _row: Row) -> object:
        return self._value


class _Column:
    def __init__(self, name: str) -> None:
        self.columns = frozenset({name})
        self._name = name

    def value(self, row: Row) -> object:
        return row.text(self._name)


class _Template:
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


_SOURCES: Final[Mapping[str, Callable[[Any], Source]]] = {
    "value": _Constant,
    "column": _Column,
    "formula": Formula,
    "template": _Template,
}
_OPTIONS: Final = ("default", "optional", "format", "timezone")


def _text(value: object) -> object:
    return f"{value:f}" if isinstance(value, Decimal) else value


def _json_value(value: object) -> object:
    """Formulas give numbers; JSON knows whole ones and floats."""
    if not isinstance(value, Decimal):
        return value
    whole = value.adjusted() <= _MAX_MAGNITUDE and value == value.to_integral_value()
    return int(value) if whole else float(value)


@dataclass(frozen=True, slots=True)
class TimeFormat:
    """How times are written: `strptime` format, or None for ISO 8601; and in which zone."""

    format: str | None = None
    zone: tzinfo = UTC

    def __call__(self, value: object) -> datetime:
        """An aware time in UTC, or `ValueError`."""
        time = value if isinstance(value, datetime) else self._parsed(str(value))
        try:
            return (time if time.tzinfo else time.replace(tzinfo=self.zone)).astimezone(UTC)
        except OverflowError:
            raise ValueError(f"{value} is out of range") from None

    def _parsed(self, text: str) -> datetime:
        try:
            if self.format == _UNIX:
                return _EPOCH + timedelta(microseconds=int(_bounded(text).scaleb(6)))
            if not self.format:
                return datetime.fromisoformat(text)
            if "%f" in self.format:
                text = _BEYOND_MICROSECONDS.sub(r"\1", text)
            return datetime.strptime(text, self.format)  # noqa: DTZ007 - the zone follows
        except (ValueError, ArithmeticError):
            expected = f"in the format {self.format}" if self.format else "an ISO 8601 time"
            raise ValueError(f"{text[:50]!r} is not {expected}") from None


_CONVERTERS: Final[Mapping[str, Callable[[object], object]]] = {
    "quantity": _quantity,
    "api_cost": _usd,
    "credits": _credits,
    "occurred_at": TimeFormat(),
}


@dataclass(frozen=True, slots=True)
class _Field:
    """One field of the event or key of the metadata."""

    name: str
    source: Source
    convert: Callable[[object], object] = _text
    optional: bool = False
    default: object = None

    def value(self, row: Row) -> object:
        """The value for one row, None where the field is left out, or `InvalidEvent`."""
        try:
            return self.convert(self._found(row))
        except EmptyCell as error:
            if self.optional:
                return None
            raise self._invalid(error) from None
        except ValueError as error:
            raise self._invalid(error) from None

    def _found(self, row: Row) -> object:
        try:
            return self.source.value(row)
        except EmptyCell:
            if self.default is None:
                raise
            return self.default

    def _invalid(self, error: ValueError) -> InvalidEvent:
        return InvalidEvent(f"{self.name}: {error}", fields=[self.name.partition(".")[0]])


@dataclass(frozen=True, slots=True)
class EventMapping:
    """A mapping, read and checked: turns rows into events without any I/O."""

    fields: Mapping[str, _Field]
    metadata: Mapping[str, _Field] = field(default_factory=dict)
    delimiter: str = ","
    encoding: str = "utf-8-sig"

    @property
    def columns(self) -> frozenset[str]:
        """The columns that the mapping reads."""
        every = [*self.fields.values(), *self.metadata.values()]
        return frozenset[str]().union(*(one.source.columns for one in every))

    def require(self, header: Sequence[str]) -> None:
        """Check that a file has every column the mapping reads.

        Raises:
            ConfigurationError: one is missing, or is there twice.
        """
        listed = ", ".join(header[:50])
        for column in sorted(self.columns):
            if column not in header:
                raise ConfigurationError(f"missing column {column!r}; the file has: {listed}")
            if header.count(column) > 1:
                raise ConfigurationError(
                    f"column {column!r} is there twice; the file has: {listed}"
                )

    def given(self, name: str, row: Row) -> Any | None:  # noqa: ANN401 - of the field's type
        """What the row gives for one field, None where it gives nothing, or `InvalidEvent`."""
        if name not in self.fields:
            return None
        row.check()
        return self.fields[name].value(row)

    def event(self, row: Row, **resolved: object) -> UsageEvent:
        """The event of a row; `resolved` are fields that have been decided already.

        Raises:
            InvalidEvent: the row lacks something or breaks a rule; the message names the field.
        """
        row.check()
        wanted = [one for name, one in self.fields.items() if name not in resolved]
        found = dict(_values(wanted, row)) | resolved
        if self.metadata:
            found["metadata"] = dict(_values(self.metadata.values(), row))
        return UsageEvent.of(**found)


def _values(wanted: Iterable[_Field], row: Row) -> Iterator[tuple[str, object]]:
    for one in wanted:
        value = one.value(row)
        if value is not None:
            yield one.name.removeprefix("metadata."), value


def parse_mapping(text: str) -> EventMapping:
    """Read a mapping.

    Raises:
        ConfigurationError: it is not TOML, or something in it is not as this module says.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"not TOML: {error}") from None
    _only(document, ("event", "csv"), "section")
    event = _table(document.get("event"), "event")
    metadata = _table(event.pop("metadata", {}), "event.metadata")
    event.setdefault("request_id", {"template": _DEFAULT_REQUEST_ID})
    if "service_type" not in event:
        raise ConfigurationError("event.service_type is missing: give a constant or a column")
    known = UsageEvent.model_fields.keys() - {"metadata"}
    _only(event, sorted(known), "event field")
    return EventMapping(
        {name: _field(name, entry) for name, entry in event.items()},
        {name: _metadata_field(name, entry) for name, entry in metadata.items()},
        **_csv_options(_table(document.get("csv", {}), "csv")),
    )


def load_mapping(path: Path) -> EventMapping:
    """Read the mapping in a file.

    Raises:
        ConfigurationError: the file cannot be read, or is not a mapping.
    """
    try:
        return parse_mapping(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path}: not UTF-8 text") from None
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error.message}") from None


def load_preset(name: str) -> EventMapping:
    """Read a mapping that comes with the product.

    Raises:
        ConfigurationError: there is none of this name.
    """
    found = {
        entry.name.removesuffix(".toml"): entry
        for entry in files("ops").joinpath("presets").iterdir()
        if entry.name.endswith(".toml")
    }
    if name not in found:
        raise ConfigurationError(f"no preset {name!r}; there is: {', '.join(sorted(found))}")
    return parse_mapping(found[name].read_text("utf-8"))


def _field(name: str, entry: object) -> _Field:
    entry = entry if isinstance(entry, dict) else {"value": entry}
    convert = _CONVERTERS.get(name, _text)
    if isinstance(convert, TimeFormat):
        convert = _time_format(name, entry)
    return _sourced(name, entry, convert, optional=False)


def _metadata_field(name: str, entry: object) -> _Field:
    entry = entry if isinstance(entry, dict) else {"value": entry}
    return _sourced(f"metadata.{name}", entry, _json_value, optional=True)


def _sourced(
    name: str,
    entry: Mapping[str, Any],
    convert: Callable[[object], object],
    *,
    optional: bool,
) -> _Field:
    kinds = [kind for kind in entry if kind in _SOURCES]
    _only(entry, (*_SOURCES, *_OPTIONS), f"option of {name}:")
    if len(kinds) != 1:
        raise ConfigurationError(f"{name} needs one of column, formula, template and value")
    (kind,) = kinds
    given = entry[kind]
    if kind != "value" and not (isinstance(given, str) and given.strip()):
        raise ConfigurationError(f"{name}: {kind} must be a text")
    if not isinstance(entry.get("optional", False), bool):
        raise ConfigurationError(f"{name}: optional must be true or false")
    if convert is not _json_value and isinstance(given, dict | list):
        raise ConfigurationError(f"{name}: a constant must be a text, a number or a time")
    if entry.keys() & {"format", "timezone"} and not isinstance(convert, TimeFormat):
        raise ConfigurationError(f"{name}: format and timezone are for occurred_at only")
    return _Field(
        name,
        _SOURCES[kind](given),
        convert,
        optional=entry.get("optional", optional),
        default=entry.get("default"),
    )


def _time_format(name: str, entry: Mapping[str, Any]) -> TimeFormat:
    zone = entry.get("timezone", "UTC")
    written = entry.get("format")
    if written is not None and not isinstance(written, str):
        raise ConfigurationError(f"{name}: format must be a text")
    try:
        return TimeFormat(written, UTC if zone == "UTC" else ZoneInfo(zone))
    except (KeyError, ValueError, TypeError, OSError):
        raise ConfigurationError(
            f"{name}: no time zone {zone!r}; write one as Europe/Berlin"
        ) from None


def _csv_options(section: Mapping[str, Any]) -> dict[str, Any]:
    _only(section, ("delimiter", "encoding"), "option of csv:")
    delimiter = section.get("delimiter")
    if delimiter is not None and not (isinstance(delimiter, str) and len(delimiter) == 1):
        raise ConfigurationError("csv.delimiter must be one character")
    try:
        codecs.lookup(section.get("encoding", "utf-8"))
    except (LookupError, TypeError):
        raise ConfigurationError(f"csv.encoding: no encoding {section['encoding']!r}") from None
    return dict(section)


def _table(value: object, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigurationError(f"the mapping needs a table [{name}]")
    return dict(value)


def _only(names: Iterable[str], known: Sequence[str], what: str) -> None:
    for name in names:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"
            raise ConfigurationError(f"unknown {what} {name!r}{hint}")
