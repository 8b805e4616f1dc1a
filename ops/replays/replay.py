"""Replay: feed the rows of a CSV file through the queue, and say exactly what became of them.

The file is read twice and never held in memory: once to see that it is whole and when its events
took place, once to send them. What was sent is noted in a temporary database, so that the ledger
can be asked about each request at the end.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final, ParamSpec, TypeVar
from uuid import UUID

import stamina

from ledger import directory, requests
from ledger.clock import utc_now
from ledger.database import Database
from ops.replays.assignment import Assignment
from ops.replays.backlog import Ahead, Backlog
from ops.replays.journal import Journal
from ops.replays.mapping import EventMapping
from ops.replays.report import Report
from ops.replays.traces import Trace
from producers import UsageProducer
from schema.errors import (
    ConfigurationError,
    InvalidEvent,
    LedgerUnavailable,
    QueueUnavailable,
    Unavailable,
)
from schema.events import UsageEvent
from schema.settings import Settings
from worker import stream

CHUNK_EVENTS: Final = 500
OUTAGE_SECONDS: Final = 120.0
RECOVERY_FACTOR: Final = 1.25
"""An outage of the length that must be survived is followed by servers and workers starting."""
POLL_SECONDS: Final = 0.05

Watch = Callable[[str, int, int | None], None]
"""Told what is being done, how much of it is done, and of how much, where that is known."""

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Order:
    """What to replay, and how."""

    path: Path
    mapping: EventMapping
    org_id: UUID | None = None
    """Whose events these are, where a row does not say."""
    user_id: str | None = None
    """Whose they are, where a row does not say; None spreads them over the organization."""
    strict: bool = False
    """Refuse the file, before anything is sent, if a single row cannot be mapped."""
    keep_times: bool = False
    """Leave the times as they are, instead of moving the last event to now."""
    outage_seconds: float = OUTAGE_SECONDS


class Replay:
    """One replay of one file; `sent` tells how far it is, even after an interruption."""

    def __init__(
        self, settings: Settings, database: Database, order: Order, watch: Watch | None = None
    ) -> None:
        self.sent = 0
        self._settings = settings
        self._database = database
        self._order = order
        self._watch = watch or (lambda *_: None)
        self._trace = Trace(order.path, order.mapping)
        self._patience_seconds = order.outage_seconds * RECOVERY_FACTOR
        self._retrying = stamina.RetryingCaller(
            attempts=None, timeout=self._patience_seconds, wait_max=2.0, wait_jitter=0.5
        ).on((QueueUnavailable, LedgerUnavailable))
        self._report = Report(str(order.path), order.org_id)
        self._backlog = Backlog(settings.shards)

    def run(self) -> Report:
        """Send every row, wait until all are applied, and count the outcomes.

        Idempotent: a second replay of the same file finds duplicates only. The figures are exact
        as long as nobody else sends the same request ids at the same time.

        Raises:
            ConfigurationError: the file is not as the mapping needs it; nothing was sent.
            QueueUnavailable: Redis was away for longer than the order allows.
            LedgerUnavailable: PostgreSQL was.
            Unavailable: the queue stood still for that long.
        """
        now = utc_now()
        if self._order.strict:
            self._check_every_row(now)
        survey = self._trace.survey(lambda rows: self._watch("reading", rows, None))
        shift = timedelta() if self._order.keep_times else survey.shift_to(now)
        mark = self._patiently(requests.latest_dead_letter, self._database)
        with closing(Journal()) as journal:
            started = time.perf_counter()
            self._send_all(self._assignment(now, shift), journal, survey.rows)
            self._wait_until_applied()
            self._report.seconds = time.perf_counter() - started
            self._count(journal, mark)
        return self._report

    def _assignment(self, now: datetime, shift: timedelta = timedelta()) -> Assignment:
        order = self._order
        assignment = Assignment(
            order.mapping, self._allocations_of, now, shift, order.org_id, order.user_id
        )
        assignment.check()
        return assignment

    def _allocations_of(self, org_id: UUID) -> Sequence[directory.Allocation]:
        return self._patiently(directory.allocations_of, self._database, org_id)

    def _check_every_row(self, now: datetime) -> None:
        assignment = self._assignment(now)
        for row in self._trace.rows():
            try:
                assignment.event(row)
            except InvalidEvent as error:
                raise ConfigurationError(
                    f"{self._order.path}: line {row.line}: {error.message}; nothing was sent"
                ) from None

    def _send_all(self, assignment: Assignment, journal: Journal, rows: int) -> None:
        chunk: list[UsageEvent] = []
        with UsageProducer(self._settings) as producer:
            for number, row in enumerate(self._trace.rows(), start=1):
                try:
                    chunk.append(assignment.event(row))
                except InvalidEvent as error:
                    self._report.refuse(row, error)
                if len(chunk) == CHUNK_EVENTS:
                    self._send(producer, journal, chunk)
                    self._watch("sending", number, rows)
                    chunk = []
            self._send(producer, journal, chunk)
            self._watch("sending", rows, rows)

    def _send(self, producer: UsageProducer, journal: Journal, chunk: list[UsageEvent]) -> None:
        by_organization: defaultdict[UUID, list[str]] = defaultdict(list)
        for event in chunk:
            by_organization[event.org_id].append(event.request_id)
        for org_id, request_ids in by_organization.items():
            known = self._patiently(requests.states, self._database, org_id, request_ids)
            journal.add(org_id, request_ids, {name for name in known if known[name].is_settled})
        # Some of a chunk may have arrived before an outage: the ledger knows them again.
        entry_ids = self._patiently(producer.emit_many, chunk)
        for event, entry_id in zip(chunk, entry_ids, strict=True):
            self._backlog.add(event.org_id, entry_id)
        self.sent += len(chunk)

    def _patiently(self, act: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return self._retrying(act, *args, **kwargs)
        except Unavailable as error:
            raise type(error)(
                f"gave up after {self._patience_seconds:.0f} s, {self.sent} events were sent: "
                f"{error.message}"
            ) from error

    def _wait_until_applied(self) -> None:
        """Wait while the queue moves, and as long as an outage may last when it does not."""
        seen: Ahead | None = None
        moved_at = time.monotonic()
        total = 0
        with stream.connect(self._settings) as client:
            while (ahead := self._backlog.ahead(client)) is None or ahead.heads:
                if ahead is not None and (seen is None or ahead.heads != seen.heads):
                    seen, moved_at, total = ahead, time.monotonic(), max(total, ahead.depth)
                    self._watch("applying", total - ahead.depth, total)
                if time.monotonic() - moved_at > self._patience_seconds:
                    raise self._stuck(ahead)
                time.sleep(POLL_SECONDS)
        self._watch("applying", total, total)

    def _stuck(self, ahead: Ahead | None) -> Unavailable:
        waited = f"for {self._patience_seconds:.0f} s; {self.sent} events were sent"
        if ahead is None:
            return QueueUnavailable(f"Redis did not answer {waited}")
        return Unavailable(
            f"nothing was applied {waited}, {ahead.depth} entries wait on their streams: see that "
            "PostgreSQL and a worker are running"
        )

    def _count(self, journal: Journal, mark: int) -> None:
        """Ask the ledger about every request; what it cannot tell apart were duplicates."""
        report = self._report
        report.events = self.sent
        for org_id, page in journal.pages():
            buried = self._buried(mark, org_id, list(page))
            new = [name for name in page if page[name]]
            states = self._patiently(requests.states, self._database, org_id, new)
            for name in page:
                report.count_conflicts(buried[name])
            for name in new:
                report.count_new(states.get(name), buried[name])
        report.count_duplicates()

    def _buried(self, mark: int, org_id: UUID, request_ids: list[str]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {name: [] for name in request_ids}
        letters = self._patiently(
            requests.dead_letters_after, self._database, mark, org_id, request_ids
        )
        for request_id, reason in letters:
            found[request_id].append(reason)
        return found
