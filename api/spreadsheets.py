"""CSV files that spreadsheets open without running what is in them."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from starlette.responses import Response

MEDIA_TYPE: Final = "text/csv"

_BEGINS_A_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r", "\n")
"""CSV Injection, OWASP."""


def csv_file(name: str, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> Response:
    """A file for download: a line of column names, then one line per row."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows([_cell(row[column]) for column in columns] for row in rows)
    return Response(
        text.getvalue(),
        media_type=MEDIA_TYPE,
        headers={"Content-Disposition": f'attachment; filename="{name}"'},
    )


def _cell(value: object) -> object:
    """A value as it is, or with an apostrophe before what would be read as a formula."""
    if isinstance(value, str) and value.startswith(_BEGINS_A_FORMULA):
        return f"'{value}"
    return value
