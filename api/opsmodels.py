"""What the endpoints of operators answer. Credits are whole, times are in UTC."""

from datetime import datetime
from typing import Any, Final
from uuid import UUID

from pydantic import BaseModel, ConfigDict

from ledger.deadletters import LetterState
from schema.errors import DeadReason

_ORG_ID: Final = "0d5a3c1e-6f0b-4f57-9a2b-0f6f3a1b2c3d"
_LETTER: Final[dict[str, Any]] = {
    "id": 17,
    "reason": "insufficient_credits",
    "detail": "Insufficient credits: 5 available, 10 needed",
    "org_id": _ORG_ID,
    "request_id": "req-7f3a",
    "user_id": "8c1f2d5e-ada",
    "service_type": "contact_lookup",
    "credits": 10,
    "occurred_at": "2026-03-15T12:30:00Z",
    "state": "charged",
    "created_at": "2026-03-15T12:30:01Z",
    "resolved_at": "2026-03-15T14:05:00Z",
    "stream": "metering:usage:3",
    "entry_id": "1773577801000-0",
}


def _example(**fields: Any) -> ConfigDict:  # noqa: ANN401 - any JSON
    return ConfigDict(json_schema_extra={"examples": [fields]})


class ShardState(BaseModel):
    """One usage stream: entries on it, entries that a drain has read, age of the oldest entry."""

    shard: int
    depth: int
    pending: int
    oldest_seconds: float | None


class Queues(BaseModel):
    """The usage streams together, the age of the oldest entry of all, and each shard."""

    model_config = _example(
        depth=12,
        pending=10,
        oldest_seconds=0.41,
        shards=[{"shard": 0, "depth": 12, "pending": 10, "oldest_seconds": 0.41}],
    )

    depth: int
    pending: int
    oldest_seconds: float | None
    shards: list[ShardState]


class DeadLetter(BaseModel):
    """An event that could not be applied; what could not be told of it is null."""

    model_config = _example(**_LETTER)

    id: int
    reason: DeadReason
    detail: str
    org_id: UUID | None
    request_id: str | None
    user_id: str | None
    service_type: str | None
    credits: int | None
    occurred_at: datetime | None
    state: LetterState
    created_at: datetime
    resolved_at: datetime | None
    stream: str | None
    entry_id: str | None


class OpenedLetter(DeadLetter):
    """A dead letter with its event as text."""

    model_config = _example(**_LETTER, payload='{"request_id": "req-7f3a", "user_id": "8c1f…"}')

    payload: str


class OpenLetters(BaseModel):
    """How many dead letters are open, in all and by reason."""

    model_config = _example(total=3, reasons={"insufficient_credits": 2, "malformed": 1})

    total: int
    reasons: dict[DeadReason, int]


class ListedHold(BaseModel):
    """Credits that are set aside for a request, or were until the hold expired."""

    model_config = _example(
        org_id=_ORG_ID,
        request_id="req-7f3a",
        user_id="8c1f2d5e-ada",
        service_type="contact_lookup",
        state="held",
        credits=10,
        placed_at="2026-03-15T12:30:00Z",
        expires_at="2026-03-15T12:35:00Z",
    )

    org_id: UUID
    request_id: str
    user_id: str
    service_type: str
    state: str
    credits: int
    placed_at: datetime
    expires_at: datetime


class LatestRun(BaseModel):
    """When the latest run of a task began, how long it took, and what it found."""

    started_at: datetime
    seconds: float
    figures: dict[str, Any]


class DueResets(BaseModel):
    """How many allocations and pools wait for a run, and since when the first of them does."""

    allocations: int
    pools: int
    since: datetime | None


class ResetsState(BaseModel):
    """The latest scheduled run, what is due by now, and when something will be due next."""

    model_config = _example(
        last_run={
            "started_at": "2026-03-15T12:30:00Z",
            "seconds": 0.02,
            "figures": {"allocations_reset": 0, "credits_short": 0},
        },
        due_now={"allocations": 3, "pools": 1, "since": "2026-03-15T12:31:00Z"},
        next_due="2026-03-31T23:00:00Z",
    )

    last_run: LatestRun | None
    due_now: DueResets
    next_due: datetime | None


class PlannedRefresh(BaseModel):
    """What a pool gets: one refresh per date, missed months included; `credits` in all."""

    org_id: UUID
    organization: str
    credits: int
    refresh_dates: list[datetime]
    next_refresh_date: datetime


class ClosedPeriod(BaseModel):
    """A period of an allocation that ends; `end` belongs to the next one."""

    start: datetime
    end: datetime


class PlannedReset(BaseModel):
    """What a reset does to an allocation.

    `used` is what the period used, `drawn` what the pool gives (negative: gets back), `short`
    what it cannot give, `begins_with` the credits of the new period.
    """

    org_id: UUID
    organization: str
    user_id: str
    closed_periods: list[ClosedPeriod]
    used: int
    drawn: int
    short: int
    begins_with: int
    next_reset_date: datetime


class FailedOrganization(BaseModel):
    """An organization that a run must leave as it is, and why."""

    org_id: UUID
    error: str


class ResetsPreview(BaseModel):
    """What a run at a time would do as things stand, in its order.

    `refreshes` and `resets` are cut off at the limit; `refreshes_due` and `resets_due` count all.
    """

    model_config = _example(
        at="2026-04-01T00:00:00Z",
        refreshes_due=0,
        resets_due=1,
        refreshes=[],
        resets=[
            {
                "org_id": _ORG_ID,
                "organization": "acme",
                "user_id": "8c1f2d5e-ada",
                "closed_periods": [
                    {"start": "2026-03-01T00:00:00Z", "end": "2026-04-01T00:00:00Z"}
                ],
                "used": 700,
                "drawn": 700,
                "short": 0,
                "begins_with": 1000,
                "next_reset_date": "2026-05-01T00:00:00Z",
            }
        ],
        failed=[],
    )

    at: datetime
    refreshes_due: int
    resets_due: int
    refreshes: list[PlannedRefresh]
    resets: list[PlannedReset]
    failed: list[FailedOrganization]


class ResetReport(BaseModel):
    """What a run of resets did; `…_short` is what pools could not give."""

    model_config = _example(
        pools_refreshed=1,
        credits_refreshed=10000,
        allocations_reset=12,
        periods_closed=12,
        credits_drawn=8300,
        credits_returned=0,
        allocations_short=0,
        credits_short=0,
        organizations_failed=0,
    )

    pools_refreshed: int
    credits_refreshed: int
    allocations_reset: int
    periods_closed: int
    credits_drawn: int
    credits_returned: int
    allocations_short: int
    credits_short: int
    organizations_failed: int


class ReconciliationState(BaseModel):
    """The latest reconciliation, if there was one: its figures, and rows off by check."""

    model_config = _example(
        last_run={
            "started_at": "2026-03-15T12:00:00Z",
            "seconds": 1.3,
            "figures": {"drifts": {"pools.used": 0}, "organizations_off": 0, "organizations": 7},
        }
    )

    last_run: LatestRun | None


class CheckResult(BaseModel):
    """One statement about the whole ledger, and how many rows contradict it."""

    name: str
    invariant: str
    meaning: str
    clean: bool
    rows_off: int


class OrganizationDrift(BaseModel):
    """An organization whose books are off: how many checks, and rows by check."""

    org_id: UUID
    checks: int
    rows: dict[str, int]


class Drift(BaseModel):
    """One row that is off: what is recorded, and what the movements add up to."""

    check: str
    org_id: UUID
    subject: str
    recorded: str
    computed: str


class Reconciliation(BaseModel):
    """A proof of the books as of `taken_at`, the moment of its snapshot.

    `clean` is whether no row is off. `drifts` names at most 100 rows of each check;
    `organizations` counts all.
    """

    model_config = _example(
        clean=True,
        taken_at="2026-03-15T12:30:00Z",
        figures={"organizations": 7, "charged_requests": 5120, "credits_charged": 81200},
        checks=[
            {
                "name": "requests.charged_once",
                "invariant": "I1",
                "meaning": "no request is charged twice",
                "clean": True,
                "rows_off": 0,
            }
        ],
        organizations=[],
        drifts=[],
    )

    clean: bool
    taken_at: datetime
    figures: dict[str, int]
    checks: list[CheckResult]
    organizations: list[OrganizationDrift]
    drifts: list[Drift]
