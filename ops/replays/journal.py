"""The journal of a replay: what was sent, so that the ledger can be asked about each at the end."""

import sqlite3
from collections.abc import Collection, Iterator, Sequence
from itertools import groupby, islice
from operator import itemgetter
from typing import Final
from uuid import UUID

PAGE_REQUESTS: Final = 1000


class Journal:
    """The requests of one replay, on disk beyond a few megabytes."""

    def __init__(self) -> None:
        self._rows = sqlite3.connect("")
        self._rows.execute(
            "CREATE TABLE sent (org_id BLOB, request_id TEXT, is_new INT, "
            "PRIMARY KEY (org_id, request_id)) WITHOUT ROWID"
        )

    def add(self, org_id: UUID, request_ids: Sequence[str], settled: Collection[str]) -> None:
        """Note requests about to be sent, and which of them the ledger had settled before."""
        with self._rows:
            self._rows.executemany(
                "INSERT OR IGNORE INTO sent VALUES (?, ?, ?)",
                [(org_id.bytes, name, name not in settled) for name in request_ids],
            )

    def pages(self) -> Iterator[tuple[UUID, dict[str, bool]]]:
        """Requests of one organization at a time, with whether they were new."""
        rows = self._rows.execute("SELECT * FROM sent ORDER BY org_id, request_id")
        for org_id, group in groupby(rows, key=itemgetter(0)):
            while page := list(islice(group, PAGE_REQUESTS)):
                yield UUID(bytes=org_id), {name: bool(new) for _, name, new in page}

    def close(self) -> None:
        """Forget everything."""
        self._rows.close()
