"""`/api/v1/ops`: queues, dead letters, holds, resets, reconciliation (contract.md §4, row 23)."""

import time
from dataclasses import asdict
from datetime import timedelta
from typing import Annotated, Final, Literal
from uuid import UUID

from fastapi import APIRouter, Path, Query, Response
from pydantic import BaseModel, Field
from redis.exceptions import RedisError

from api import opsmodels
from api.access import Grant, GuardedRoute, allows
from api.errors import documented
from api.opsmodels import LatestRun
from api.paging import PAGED, TOTAL, Limit, Offset
from api.resources import CurrentSettings, LedgerDatabase, UsageQueue
from ledger import deadletters, holds, reconcile, resets, runs
from ledger.clock import utc_now
from ledger.database import Database
from ledger.deadletters import LetterState, Sought
from ledger.pages import Window
from schema.errors import DeadReason, InvalidRequest, Unavailable
from schema.events import Moment, RequestId, UserId
from schema.wire import TASK_RECONCILE, TASK_RESET_DUE
from worker import stream

router = APIRouter(prefix="/api/v1/ops", tags=["ops"], route_class=GuardedRoute)

MAX_PREVIEW_AHEAD: Final = timedelta(days=92)
"""A preview beyond it would have more daily resets than anybody reads."""
LetterId = Annotated[int, Path(ge=1, le=2**63 - 1)]

_READS = allows(Grant.OPS_READ, Grant.SYSTEM_ADMIN)
_ACTS = allows(Grant.OPS_WRITE, Grant.SYSTEM_ADMIN)
_ERRORS = documented(401, 403, 422, 429, 503)


@router.get("/queues", responses=_ERRORS, **_READS)
def queues(queue: UsageQueue, settings: CurrentSettings) -> opsmodels.Queues:
    """Show what waits on each usage stream; the age of the oldest entry is the lag."""
    try:
        states = stream.inspect(queue, settings.shards)
    except RedisError as error:
        raise Unavailable(f"Redis does not answer: {error}") from error
    ages = [state.oldest_seconds for state in states if state.oldest_seconds is not None]
    return opsmodels.Queues(
        depth=sum(state.depth for state in states),
        pending=sum(state.pending for state in states),
        oldest_seconds=max(ages, default=None),
        shards=[opsmodels.ShardState(**state.as_dict()) for state in states],
    )


class LettersWanted(BaseModel):
    """Which dead letters to list; `from` and `to` are about when they were written."""

    reason: DeadReason | None = None
    org_id: UUID | None = None
    user_id: UserId | None = None
    request_id: RequestId | None = None
    state: Literal["open", "charged", "discarded", "all"] = "open"
    since: Annotated[Moment | None, Field(alias="from", description="This time or later.")] = None
    until: Annotated[Moment | None, Field(alias="to", description="Before this time.")] = None
    limit: Limit = 100
    offset: Offset = 0

    def sought(self) -> Sought:
        """What the ledger is asked for."""
        return Sought(
            state=None if self.state == "all" else LetterState(self.state),
            reason=self.reason,
            org_id=self.org_id,
            user_id=self.user_id,
            request_id=self.request_id,
            since=self.since,
            until=self.until,
        )


@router.get("/dead-letters", responses=_ERRORS | PAGED, **_READS)
def dead_letters(
    wanted: Annotated[LettersWanted, Query()], database: LedgerDatabase, response: Response
) -> list[opsmodels.DeadLetter]:
    """List events that could not be applied, the latest first; open ones unless asked otherwise."""
    window = Window(wanted.limit, wanted.offset)
    page = deadletters.page(database, wanted.sought(), window)
    response.headers[TOTAL] = str(page.total)
    return [opsmodels.DeadLetter(**asdict(letter)) for letter in page.items]


@router.get("/dead-letters/summary", responses=_ERRORS, **_READS)
def open_dead_letters(database: LedgerDatabase) -> opsmodels.OpenLetters:
    """Count the open dead letters by reason."""
    reasons = deadletters.open_by_reason(database)
    return opsmodels.OpenLetters(
        total=sum(reasons.values()),
        reasons={DeadReason(reason): number for reason, number in reasons.items()},
    )


@router.get("/dead-letters/{letter_id}", responses=_ERRORS | documented(404), **_READS)
def dead_letter(letter_id: LetterId, database: LedgerDatabase) -> opsmodels.OpenedLetter:
    r"""Show one dead letter with its event as it was sent.

    What is no UTF-8 in it is shown as `\x…`. Keys that name secrets are left out, at every
    depth, if it is JSON; from what is not JSON nothing can be left out.
    """
    return opsmodels.OpenedLetter(**asdict(deadletters.one(database, letter_id)))


@router.get("/holds", responses=_ERRORS, **_READS)
def listed_holds(
    database: LedgerDatabase,
    state: Literal["held", "expired"] = "held",
    org_id: UUID | None = None,
    limit: Limit = 100,
) -> list[opsmodels.ListedHold]:
    """List holds, those that last longest first.

    `expired` ones ran out without an event: their operations may have been lost.
    """
    listed = holds.open_holds if state == "held" else holds.suspects
    return [opsmodels.ListedHold(**asdict(hold)) for hold in listed(database, org_id, limit)]


@router.get("/resets", responses=_ERRORS, **_READS)
def resets_state(database: LedgerDatabase) -> opsmodels.ResetsState:
    """Show what the scheduled resets last did, and what is due now and next."""
    now = utc_now()
    return opsmodels.ResetsState(
        last_run=_latest_run(database, TASK_RESET_DUE),
        due_now=opsmodels.DueResets(**asdict(resets.overdue(database, now))),
        next_due=resets.next_due(database, now),
    )


@router.get("/resets/preview", responses=_ERRORS, **_READS)
def resets_preview(
    database: LedgerDatabase,
    at: Moment | None = None,
    org_id: UUID | None = None,
    limit: Limit = 100,
) -> opsmodels.ResetsPreview:
    """Show what a run of resets would do now, or at a time up to 92 days ahead, as things stand."""
    now = utc_now()
    moment = at or now
    if moment > now + MAX_PREVIEW_AHEAD:
        raise InvalidRequest(
            f"at: must be at most {MAX_PREVIEW_AHEAD.days} days ahead", fields=["at"]
        )
    found = resets.preview(database, moment, org_id)
    shown = resets.Preview(found.refreshes[:limit], found.resets[:limit], found.failed)
    return opsmodels.ResetsPreview(
        refreshes_due=len(found.refreshes),
        resets_due=len(found.resets),
        **shown.as_document(moment),
    )


@router.post("/resets/run", responses=_ERRORS, **_ACTS)
def run_resets(database: LedgerDatabase) -> opsmodels.ResetReport:
    """Refresh the pools and reset the allocations that are due now.

    Workers do the same each minute, so this is safe at any time and as often as one likes.
    """
    return opsmodels.ResetReport(**asdict(resets.reset_due(database, utc_now())))


@router.get("/reconcile", responses=_ERRORS, **_READS)
def reconciliation_state(database: LedgerDatabase) -> opsmodels.ReconciliationState:
    """Show what the latest reconciliation found."""
    return opsmodels.ReconciliationState(last_run=_latest_run(database, TASK_RECONCILE))


@router.post("/reconcile", responses=_ERRORS, **_ACTS)
def run_reconciliation(database: LedgerDatabase) -> opsmodels.Reconciliation:
    """Recompute every balance from the movements, and name the rows that differ.

    Reads one snapshot and changes no balance; takes seconds on a large ledger. Rows that are off
    are an answer like any other. The run counts as the latest one, for metrics as well.
    """
    started_at, started = utc_now(), time.monotonic()
    report = reconcile.reconcile(database, now=started_at)
    seconds = time.monotonic() - started
    runs.record(database, TASK_RECONCILE, started_at, seconds, report.as_figures())
    return opsmodels.Reconciliation(**report.as_document())


def _latest_run(database: Database, task: str) -> LatestRun | None:
    run = runs.latest(database, task)
    return LatestRun.model_validate(asdict(run)) if run else None
