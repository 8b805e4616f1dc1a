"""Conversions: how cells, constants and results of formulas become values of fields.

`quantity` is cut off after 24 decimal places, `api_cost` (USD) rounded to 6, `credits` rounded up.
Times become UTC.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from decimal import (
    ROUND_CEILING,
    ROUND_DOWN,
    ROUND_HALF_UP,
    Context,
    Decimal,
    InvalidOperation,
)
from typing import Final

ARITHMETIC: Final = Context(prec=60)
"""Decimal, and exact to 60 digits."""

_MAX_MAGNITUDE: Final = 30
"""Numbers of more digits before the point are out of every field's range."""
_QUANTITY_STEP: Final = Decimal("1e-24")
_MICRO_USD: Final = Decimal("0.000001")
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_BEYOND_MICROSECONDS: Final = re.compile(r"([.,]\d{6})\d+(?!.*[.,]\d{7})")
_UNIX: Final = "unix"

Converter = Callable[[object], object]
"""Gives the value of a field, or `ValueError`."""


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
        return number.quantize(step, rounding, ARITHMETIC)
    return number


def as_text(value: object) -> object:
    """Numbers in plain digits; what is no number stays as it is, for the event to judge."""
    return f"{value:f}" if isinstance(value, Decimal) else value


def as_json_value(value: object) -> object:
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


CONVERTERS: Final[Mapping[str, Converter]] = {
    "quantity": _quantity,
    "api_cost": _usd,
    "credits": _credits,
    "occurred_at": TimeFormat(),
}
"""How the value of a field is made; that of any other is a text."""
