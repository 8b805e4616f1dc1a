"""Replay: feed the rows of a CSV file through the queue, and say exactly what became of them.

The file is read twice and never held in memory: once to see that it is whole and when its events
took place, once to send them. What was sent is noted in a temporary database, so that the ledger
can be asked about each request at the end.
"""

import csv
import gzip
import io
import sqlite3
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, Final, ParamSpec, TextIO, TypeVar
from uuid import UUID

import stamina
from redis import Redis
from redis.exceptions import RedisError

from ledger import directory, requests
from ledger.clock import utc_now
from ledger.database import Database
from ledger.decisions import MAX_AGE
from ops.mapping import EventMapping, Row, file_name_for_ids
from producers import UsageProducer
from schema.errors import (
    ConfigurationError,
    DeadReason,
    InvalidEvent,
    LedgerUnavailable,
    QueueUnavailable,
    Unavailable,
)
from schema.events import UsageEvent
from schema.settings import Settings
from schema.wire import shard_of, stream_name
from worker import stream

CHUNK_EVENTS: Final = 500
PAGE_REQUESTS: Final = 1000
TICK_ROWS: Final = 1000
OUTAGE_SECONDS: Final = 120.0
RECOVERY_FACTOR: Final = 1.25
"""An outage of the length that must be survived is followed by servers and workers starting."""
POLL_SECONDS: Final = 0.05
MAX_SPAN: Final = MAX_AGE - timedelta(days=1)
"""Longest time between first and last event: the replay and an outage take time as well."""
SHOWN_ROWS: Final = 10

_GZIP_MAGIC: Final = b"\x1f\x8b"
_DAMAGED: Final = (EOFError, zlib.error, gzip.BadGzipFile)

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


class Rotation:
    """Users in turn, each as often as its weight says: smooth weighted round robin."""

    def __init__(self, weights: Mapping[str, int]) -> None:
        every = dict(weights) if any(weights.values()) else dict.fromkeys(weights, 1)
        self._weights = {name: weight for name, weight in every.items() if weight > 0}
        self._total = sum(self._weights.values())
        self._claims = dict.fromkeys(self._weights, 0)

    def next(self) -> str:
        """Whose turn it is; `ValueError` if there is nobody."""
        for name, weight in self._weights.items():
            self._claims[name] += weight
        chosen = max(self._claims, key=self._claims.__getitem__)
        self._claims[chosen] -= self._total
        return chosen


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


class _Events:
    """Turns rows into events: fills in organization, user and time where rows leave them open."""

    def __init__(
        self,
        order: Order,
        allocations: Callable[[UUID], Sequence[directory.Allocation]],
        now: datetime,
        shift: timedelta,
    ) -> None:
        self._order = order
        self._allocations = allocations
        self._now = now
        self._shift = shift
        self._rotations: dict[UUID, Rotation] = {}

    def event(self, row: Row) -> UsageEvent:
        """The event of a row, or `InvalidEvent`.

        The user is chosen before anything else can fail, so that correcting one row later does
        not give the rows after it to other users.
        """
        org_id = self._org_id(row)
        user_id = self._user_id(row, org_id)
        moment = self._order.mapping.given("occurred_at", row)
        occurred_at = self._now if moment is None else moment + self._shift
        return self._order.mapping.event(
            row, org_id=org_id, user_id=user_id, occurred_at=occurred_at
        )

    def _org_id(self, row: Row) -> UUID:
        given = self._order.mapping.given("org_id", row)
        if given is None:
            if self._order.org_id is None:
                raise InvalidEvent("org_id: the row names no organization", fields=["org_id"])
            return self._order.org_id
        try:
            return UUID(str(given))
        except ValueError:
            raise InvalidEvent(f"org_id: {given!r} is not a UUID", fields=["org_id"]) from None

    def _user_id(self, row: Row, org_id: UUID) -> str:
        given: str | None = self._order.mapping.given("user_id", row) or self._order.user_id
        if given is not None:
            return given
        if org_id not in self._rotations:
            self._rotations[org_id] = self._rotation(org_id)
        try:
            return self._rotations[org_id].next()
        except ValueError:
            raise InvalidEvent(
                f"user_id: organization {org_id} has no active allocation", fields=["user_id"]
            ) from None

    def _rotation(self, org_id: UUID) -> Rotation:
        """The organization's users, weighted by what they were allocated, used or not."""
        users = self._allocations(org_id)
        return Rotation({user.user_id: user.allocated_credits for user in users})


class _Journal:
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


@dataclass(slots=True)
class _Ahead:
    """What still waits on the shards that hold events of ours."""

    heads: dict[int, tuple[int, int]] = field(default_factory=dict)
    """The first entry of each; it changes as entries are applied."""
    depth: int = 0
    """Entries on them, events of others included."""


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
        self._last: dict[int, tuple[int, int]] = {}
        """The last entry of ours on each shard."""

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
        survey = self._survey()
        shift = timedelta() if self._order.keep_times else survey.shift_to(now)
        mark = self._patiently(requests.latest_dead_letter, self._database)
        with closing(_Journal()) as journal:
            started = time.perf_counter()
            self._send_all(self._events(now, shift), journal, survey.rows)
            self._wait_until_applied()
            self._report.seconds = time.perf_counter() - started
            self._count(journal, mark)
        return self._report

    def _events(self, now: datetime, shift: timedelta = timedelta()) -> _Events:
        events = _Events(self._order, self._allocations_of, now, shift)
        org_id = self._order.org_id
        if org_id and not self._names_users and not self._allocations_of(org_id):
            raise ConfigurationError(
                f"organization {org_id} has no active allocation: allocate credits to "
                "its users, or name one with --user"
            )
        return events

    @property
    def _names_users(self) -> bool:
        return bool(self._order.user_id) or "user_id" in self._order.mapping.fields

    def _allocations_of(self, org_id: UUID) -> Sequence[directory.Allocation]:
        return self._patiently(directory.allocations_of, self._database, org_id)

    def _check_every_row(self, now: datetime) -> None:
        events = self._events(now)
        for row in self._trace.rows():
            try:
                events.event(row)
            except InvalidEvent as error:
                raise ConfigurationError(
                    f"{self._order.path}: line {row.line}: {error.message}; nothing was sent"
                ) from None

    def _survey(self) -> Survey:
        rows = 0
        moments: list[tuple[datetime, int]] = []
        for rows, row in enumerate(self._trace.rows(), start=1):
            try:
                moment = self._order.mapping.given("occurred_at", row)
            except InvalidEvent:
                moment = None  # reported when the row's turn comes
            if moment is not None:
                here = (moment, row.line)
                moments = [min([*moments, here]), max([*moments, here])]
            if rows % TICK_ROWS == 0:
                self._watch("reading", rows, None)
        return Survey(rows, *moments)

    def _send_all(self, events: _Events, journal: _Journal, rows: int) -> None:
        chunk: list[UsageEvent] = []
        with UsageProducer(self._settings) as producer:
            for number, row in enumerate(self._trace.rows(), start=1):
                try:
                    chunk.append(events.event(row))
                except InvalidEvent as error:
                    self._report.refuse(row, error)
                if len(chunk) == CHUNK_EVENTS:
                    self._send(producer, journal, chunk)
                    self._watch("sending", number, rows)
                    chunk = []
            self._send(producer, journal, chunk)
            self._watch("sending", rows, rows)

    def _send(self, producer: UsageProducer, journal: _Journal, chunk: list[UsageEvent]) -> None:
        by_organization: defaultdict[UUID, list[str]] = defaultdict(list)
        for event in chunk:
            by_organization[event.org_id].append(event.request_id)
        for org_id, request_ids in by_organization.items():
            known = self._patiently(requests.states, self._database, org_id, request_ids)
            journal.add(org_id, request_ids, {name for name in known if known[name].is_settled})
        # Some of a chunk may have arrived before an outage: the ledger knows them again.
        entry_ids = self._patiently(producer.emit_many, chunk)
        for event, entry_id in zip(chunk, entry_ids, strict=True):
            self._last[shard_of(event.org_id, self._settings.shards)] = _position(entry_id)
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
        seen: _Ahead | None = None
        moved_at = time.monotonic()
        total = 0
        with stream.connect(self._settings) as client:
            while (ahead := self._ahead(client)) is None or ahead.heads:
                if ahead is not None and (seen is None or ahead.heads != seen.heads):
                    seen, moved_at, total = ahead, time.monotonic(), max(total, ahead.depth)
                    self._watch("applying", total - ahead.depth, total)
                if time.monotonic() - moved_at > self._patience_seconds:
                    raise self._stuck(ahead)
                time.sleep(POLL_SECONDS)
        self._watch("applying", total, total)

    def _ahead(self, client: "Redis") -> _Ahead | None:
        """What is still to be applied of the shards in use, or None if Redis is away."""
        try:
            with client.pipeline(transaction=False) as pipeline:
                for shard in self._last:
                    pipeline.xlen(stream_name(shard))
                    pipeline.xrange(stream_name(shard), count=1)
                replies = pipeline.execute()
        except RedisError:
            return None
        ahead = _Ahead()
        for (shard, last), depth, first in zip(
            self._last.items(), replies[::2], replies[1::2], strict=True
        ):
            if first and (head := _position(first[0][0].decode())) <= last:
                ahead.heads[shard] = head
                ahead.depth += depth
        return ahead

    def _stuck(self, ahead: _Ahead | None) -> Unavailable:
        waited = f"for {self._patience_seconds:.0f} s; {self.sent} events were sent"
        if ahead is None:
            return QueueUnavailable(f"Redis did not answer {waited}")
        return Unavailable(
            f"nothing was applied {waited}, {ahead.depth} entries wait on their streams: see that "
            "PostgreSQL and a worker are running"
        )

    def _count(self, journal: _Journal, mark: int) -> None:
        """Ask the ledger about every request; what it cannot tell apart were duplicates."""
        report = self._report
        report.events = self.sent
        for org_id, page in journal.pages():
            buried = self._buried(mark, org_id, list(page))
            new = [name for name in page if page[name]]
            states = self._patiently(requests.states, self._database, org_id, new)
            for name in page:
                conflicts = [r for r in buried[name] if r == DeadReason.REQUEST_ID_CONFLICT]
                report.dead.update(conflicts)
            for name in new:
                self._count_new(states.get(name), buried[name])
        outcomes = report.charged + report.dead.total() + report.missing
        report.duplicates = max(0, report.events - outcomes)

    def _buried(self, mark: int, org_id: UUID, request_ids: list[str]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {name: [] for name in request_ids}
        letters = self._patiently(
            requests.dead_letters_after, self._database, mark, org_id, request_ids
        )
        for request_id, reason in letters:
            found[request_id].append(reason)
        return found

    def _count_new(self, state: requests.RequestState | None, buried: list[str]) -> None:
        """Count a request that had no outcome before; one may be buried without a state."""
        report = self._report
        if state is not None and state.state == "charged":
            report.charged += 1
            report.credits += state.credits or 0
        elif state is not None and state.reason is not None:
            report.dead[state.reason] += 1
        elif not buried:
            report.missing += 1
        elif DeadReason.REQUEST_ID_CONFLICT not in buried:
            report.dead[buried[0]] += 1


def _position(entry_id: str) -> tuple[int, int]:
    milliseconds, _, sequence = entry_id.partition("-")
    return int(milliseconds), int(sequence)
