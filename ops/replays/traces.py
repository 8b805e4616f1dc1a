"""Traces: CSV files with a header, read row by row and never held in memory."""

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final, TextIO

from ledger.decisions import MAX_AGE
from ops.replays.mapping import EventMapping
from ops.replays.rows import Row, file_name_for_ids
from schema.errors import ConfigurationError, InvalidEvent

MAX_SPAN: Final = MAX_AGE - timedelta(days=1)
"""Longest time between first and last event: the replay and an outage take time as well."""
TICK_ROWS: Final = 1000

_GZIP_MAGIC: Final = b"\x1f\x8b"
_DAMAGED: Final = (EOFError, zlib.error, gzip.BadGzipFile)


@dataclass(frozen=True, slots=True)
class Survey:
    """What reading the file once tells."""

    rows: int = 0
    first: tuple[datetime, int] | None = None
    """The earliest time, and its line."""
    last: tuple[datetime, int] | None = None

    def shift_to(self, now: datetime) -> timedelta:
        """What to add to every time, so that the last event takes place now.

        Raises:
            ConfigurationError: the first event would then be too old to be charged.
        """
        if self.first is None or self.last is None:
            return timedelta()
        (first, first_line), (last, last_line) = self.first, self.last
        if last - first > MAX_SPAN:
            raise ConfigurationError(
                f"the events span {(last - first).days} days, from line {first_line} ({first}) to "
                f"line {last_line} ({last}), and no more than {MAX_SPAN.days} can be charged at "
                "once: split the file"
            )
        return now - last


@dataclass(frozen=True, slots=True)
class Trace:
    """A CSV file with a header, plain or gzip, read row by row as a mapping says."""

    path: Path
    mapping: EventMapping

    def rows(self) -> Iterator[Row]:
        """The data rows, empty lines left out.

        Raises:
            ConfigurationError: the file cannot be read, is empty, damaged, not CSV, or lacks a
                column that the mapping needs.
        """
        with self._open() as text:
            reader = csv.reader(text, delimiter=self.mapping.delimiter, strict=True)
            try:
                header = self._header(next(reader, []))
                for cells in reader:
                    if cells:
                        yield self._row(reader.line_num, header, cells)
            except csv.Error as error:
                raise self._refused(f"not CSV: line {reader.line_num}: {error}") from None
            except UnicodeDecodeError as error:
                raise self._refused(
                    f"not {error.encoding} text after line {reader.line_num}; the mapping's "
                    "csv.encoding may name another encoding"
                ) from None
            except _DAMAGED as error:
                raise self._refused(f"the compressed file is damaged: {error}") from None

    def survey(self, tick: Callable[[int], None]) -> Survey:
        """Read the file once, so that it is known to be whole before anything is done with it.

        `tick` is told now and then how many rows have been read.

        Raises:
            ConfigurationError: as `rows`.
        """
        rows = 0
        moments: list[tuple[datetime, int]] = []
        for rows, row in enumerate(self.rows(), start=1):
            try:
                moment = self.mapping.given("occurred_at", row)
            except InvalidEvent:
                moment = None  # reported when the row's turn comes
            if moment is not None:
                here = (moment, row.line)
                moments = [min([*moments, here]), max([*moments, here])]
            if rows % TICK_ROWS == 0:
                tick(rows)
        return Survey(rows, *moments)

    def _header(self, cells: list[str]) -> list[str]:
        header = [name.strip() for name in cells]
        if not any(header):
            raise self._refused("is empty: its first line must name the columns")
        self.mapping.require(header)
        return header

    def _row(self, line: int, header: list[str], cells: list[str]) -> Row:
        fault = None
        if len(cells) != len(header):
            fault = f"the row has {len(cells)} fields, the header {len(header)}"
        by_column = dict(zip(header, cells, strict=False))
        return Row(file_name_for_ids(self.path.name), line, by_column, fault)

    @contextmanager
    def _open(self) -> Iterator[TextIO]:
        try:
            raw = self.path.open("rb")
        except OSError as error:
            raise ConfigurationError(f"cannot read {self.path}: {error.strerror}") from None
        with raw:
            packed = raw.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
            raw.seek(0)
            content = gzip.GzipFile(fileobj=raw) if packed else raw
            with io.TextIOWrapper(content, self.mapping.encoding, newline="") as text:
                yield text

    def _refused(self, why: str) -> ConfigurationError:
        return ConfigurationError(f"{self.path}: {why}")
