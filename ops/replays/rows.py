"""Rows of a CSV file: their cells, and where they stand."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from schema.errors import InvalidEvent

_NOT_IN_REQUEST_IDS: Final = re.compile(r"[^A-Za-z0-9_.:\-]")
_MAX_FILE_NAME: Final = 200


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
