"""The report of a replay: what became of each row and event of a file."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import UUID

from ledger.requests import RequestState
from ops.replays.rows import Row
from schema.errors import DeadReason, InvalidEvent

SHOWN_ROWS: Final = 10


@dataclass(frozen=True, slots=True)
class InvalidRow:
    """A row that is no event, and why."""

    line: int
    reason: str


@dataclass(slots=True)
class Report:
    """What became of a file. `events` is charged, duplicates, dead and missing together."""

    file: str
    org_id: UUID | None
    events: int = 0
    charged: int = 0
    duplicates: int = 0
    dead: Counter[str] = field(default_factory=Counter)
    missing: int = 0
    """Events that left the queue without any outcome: Redis lost them."""
    invalid_rows: int = 0
    invalid: list[InvalidRow] = field(default_factory=list)
    """The first of them."""
    credits: int = 0
    seconds: float = 0.0
    """From the first event sent to the last one applied."""

    @property
    def is_complete(self) -> bool:
        """Whether every row became an event, and every event has an outcome."""
        return not self.invalid_rows and not self.missing

    @property
    def events_per_second(self) -> float:
        """Sent and applied; zero without events."""
        return round(self.events / self.seconds, 1) if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "file": self.file,
            "org_id": self.org_id,
            "events": self.events,
            "charged": self.charged,
            "duplicates": self.duplicates,
            "dead": dict(sorted(self.dead.items())),
            "missing": self.missing,
            "invalid_rows": self.invalid_rows,
            "first_invalid": [{"line": row.line, "reason": row.reason} for row in self.invalid],
            "credits": self.credits,
            "seconds": round(self.seconds, 3),
            "events_per_second": self.events_per_second,
        }

    def refuse(self, row: Row, error: InvalidEvent) -> None:
        """Count a row that is no event."""
        self.invalid_rows += 1
        if len(self.invalid) < SHOWN_ROWS:
            self.invalid.append(InvalidRow(row.line, error.message))

    def count_conflicts(self, buried: Iterable[str]) -> None:
        """Count the dead letters of a request that say its id was taken."""
        self.dead.update(one for one in buried if one == DeadReason.REQUEST_ID_CONFLICT)

    def count_new(self, state: RequestState | None, buried: Sequence[str]) -> None:
        """Count a request that had no outcome before; one may be buried without a state."""
        if state is not None and state.state == "charged":
            self.charged += 1
            self.credits += state.credits or 0
        elif state is not None and state.reason is not None:
            self.dead[state.reason] += 1
        elif not buried:
            self.missing += 1
        elif DeadReason.REQUEST_ID_CONFLICT not in buried:
            self.dead[buried[0]] += 1

    def count_duplicates(self) -> None:
        """Take events without an outcome of their own for duplicates, once the rest is counted."""
        outcomes = self.charged + self.dead.total() + self.missing
        self.duplicates = max(0, self.events - outcomes)
