"""Traces: files as they come, what is refused, and what a first reading tells."""

import gzip
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from ops.replays.mappingfile import load_preset, parse_mapping
from ops.replays.traces import TICK_ROWS, Survey, Trace
from schema.errors import ConfigurationError

PRESET = load_preset("azure-llm")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty: its first line must name the columns"),
        (gzip.compress(b""), "is empty: its first line must name the columns"),
        (b"\n\n", "is empty"),
        (b"a,b\n1,2\n", "missing column 'ContextTokens'; the file has: a, b"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "not utf-8 text after line 0"),
        (gzip.compress(b"TIMESTAMP,ContextTokens" * 99)[:-9], "the compressed file is damaged"),
        (b"\x1f\x8brubbish", "the compressed file is damaged"),
        (b'TIMESTAMP,ContextTokens,GeneratedTokens\n"2023', "not CSV: line 2: unexpected end of"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    file = tmp_path / "file.csv"
    file.write_bytes(content)
    with pytest.raises(ConfigurationError) as caught:
        list(Trace(file, PRESET).rows())
    assert problem in caught.value.message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"cannot read .*gone.csv: No such file"):
        list(Trace(tmp_path / "gone.csv", PRESET).rows())
    with pytest.raises(ConfigurationError, match="Is a directory"):
        list(Trace(tmp_path, PRESET).rows())


def test_rows_of_a_compressed_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "file.csv.gz"
    text = '\ufeffTIMESTAMP,ContextTokens,GeneratedTokens\n"a\nb",1,2\n\nc,3,4\n'
    file.write_bytes(gzip.compress(text.encode()))
    rows = [*Trace(file, PRESET).rows()]
    assert [(row.file, row.line, row.cells["TIMESTAMP"]) for row in rows] == [
        ("file.csv.gz", 3, "a\nb"),
        ("file.csv.gz", 5, "c"),
    ]


def test_a_file_that_spans_too_long_is_refused() -> None:
    now = datetime.now(UTC)
    first, last = (now - timedelta(days=200), 2), (now - timedelta(days=100), 9)
    with pytest.raises(ConfigurationError, match=r"span 100 days, from line 2 .* to line 9 "):
        Survey(8, first, last).shift_to(now)
    assert Survey(0).shift_to(now) == timedelta()


def test_a_survey_tells_rows_and_the_first_and_last_time(tmp_path: Path) -> None:
    file = tmp_path / "file.csv"
    times = ["2023-11-17", "noon", "2023-11-16", "2023-11-19", *["2023-11-18"] * TICK_ROWS]
    file.write_text("\n".join(["at", *times]))
    mapping = parse_mapping("[event]\nservice_type = 'x'\noccurred_at = { column = 'at' }")
    ticks: list[int] = []
    assert Trace(file, mapping).survey(ticks.append) == Survey(
        TICK_ROWS + 4,
        (datetime(2023, 11, 16, tzinfo=UTC), 4),
        (datetime(2023, 11, 19, tzinfo=UTC), 5),
    )
    assert ticks == [TICK_ROWS]
