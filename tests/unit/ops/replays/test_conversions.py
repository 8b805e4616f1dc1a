"""Conversions: times in every format and zone, and numbers as texts and as JSON."""

from datetime import UTC, datetime
from decimal import Decimal
from zoneinfo import ZoneInfo

import pytest

from ops.replays.conversions import TimeFormat, as_json_value, as_text

BERLIN = ZoneInfo("Europe/Berlin")


@pytest.mark.parametrize(
    ("form", "cell", "expected"),
    [
        (
            TimeFormat(),
            "2023-11-16 18:15:46.6805900",
            datetime(2023, 11, 16, 18, 15, 46, 680590, UTC),
        ),
        (TimeFormat(), "2023-11-16T18:15:46Z", datetime(2023, 11, 16, 18, 15, 46, tzinfo=UTC)),
        (TimeFormat(), "2023-11-16T18:15:46+02:00", datetime(2023, 11, 16, 16, 15, 46, tzinfo=UTC)),
        (TimeFormat(zone=BERLIN), "2023-11-16 18:15", datetime(2023, 11, 16, 17, 15, tzinfo=UTC)),
        (TimeFormat(zone=BERLIN), "2023-11-16 18:15Z", datetime(2023, 11, 16, 18, 15, tzinfo=UTC)),
        (
            TimeFormat("%d.%m.%Y %H:%M:%S.%f", ZoneInfo("America/New_York")),
            "16.07.2023 18:15:46.1234567",
            datetime(2023, 7, 16, 22, 15, 46, 123456, UTC),
        ),
        (
            TimeFormat("%Y.%m%d%H%M%S"),
            "2023.1116181546",
            datetime(2023, 11, 16, 18, 15, 46, tzinfo=UTC),
        ),
        (
            TimeFormat("unix"),
            "1700158546.25",
            datetime(2023, 11, 16, 18, 15, 46, 250000, UTC),
        ),
    ],
)
def test_times(form: TimeFormat, cell: str, expected: datetime) -> None:
    assert form(cell) == expected
    assert form(cell).tzinfo is UTC


@pytest.mark.parametrize(
    ("form", "cell", "problem"),
    [
        (TimeFormat(), "yesterday", "'yesterday' is not an ISO 8601 time"),
        (TimeFormat(), "1700158546", "'1700158546' is not an ISO 8601 time"),
        (TimeFormat("%d.%m.%Y"), "2023-11-16", "'2023-11-16' is not in the format %d.%m.%Y"),
        (TimeFormat("unix"), "1e29", "'1e29' is not in the format unix"),
        (TimeFormat(zone=ZoneInfo("Asia/Tokyo")), "0001-01-01", "0001-01-01 is out of range"),
    ],
)
def test_what_is_no_time(form: TimeFormat, cell: str, problem: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared whole
        form(cell)
    assert str(caught.value) == problem


def test_numbers_as_texts_have_plain_digits() -> None:
    assert as_text(Decimal("1E+3")) == "1000"
    assert as_text("1E+3") == "1E+3"


@pytest.mark.parametrize(
    ("value", "expected"), [("2.0", 2), ("1E+3", 1000), ("0.125", 0.125), ("1E+40", 1e40)]
)
def test_whole_numbers_are_whole_in_json(value: str, expected: float) -> None:
    found = as_json_value(Decimal(value))
    assert (found, type(found)) == (expected, type(expected))
