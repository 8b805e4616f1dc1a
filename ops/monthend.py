"""The last acts of the demonstration: an operation gets lost, a debt settles, a month ends."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from ledger import allocations, holds, pools, reports, resets
from ledger.clock import utc_now
from ledger.database import Database
from ledger.holds import ListedHold
from ledger.organizations import CreatedOrganization, CreatedUser
from ops.stack import Tell
from schema.errors import Unavailable

TOP_UP: Final = 4_000
REFRESH: Final = 60_000
MONTH: Final = timedelta(days=32)
"""Long enough for every monthly period to end."""
TIMEOUT_SECONDS: Final = 40.0
POLL_SECONDS: Final = 0.2
DEBT: Final = "insufficient_credits"


@dataclass(frozen=True, slots=True)
class MonthEnd:
    """What became of lost operations, debts and balances."""

    lost: Sequence[ListedHold]
    """Operations that were allowed and never heard of again."""
    debts: int
    """Events that had died for want of credits, and were charged after a top-up."""
    reset: resets.ResetReport
    balances: reports.Rows
    """After the reset."""


def end_month(database: Database, organization: CreatedOrganization, tell: Tell) -> MonthEnd:
    """Wait for the lost operation, pay the debts, and put the clock forward by a month."""
    org_id = organization.org_id
    tell("waiting for the lost operation's hold to run out")
    _wait_until(lambda: bool(holds.suspects(database, org_id)), "the hold did not expire")
    lost = holds.suspects(database, org_id)
    debts = _debts(database, organization)
    user = poorest(organization)
    tell(f"giving {user.email} {TOP_UP:,} credits: {debts} dead letters settle by themselves")
    allocations.allocate(
        database, org_id, user.user_id, TOP_UP, actor="demo", reason="to pay debts", now=utc_now()
    )
    _wait_until(lambda: _debts(database, organization) == 0, "the debts did not settle")
    tell("putting the clock forward by a month: the pool is refreshed, allocations are reset")
    pools.set_refresh(database, org_id, REFRESH, now=utc_now())
    reset = resets.reset_due(database, utc_now() + MONTH)
    return MonthEnd(lost, debts, reset, reports.balances(database, org_id))


def poorest(organization: CreatedOrganization) -> CreatedUser:
    """The user who is going to run out of credits."""
    return min(organization.users, key=lambda user: user.allocated_credits)


def _debts(database: Database, organization: CreatedOrganization) -> int:
    letters = reports.dead_letters_by_reason(database, organization.org_id)
    return sum(int(row["letters"]) for row in letters if row["reason"] == DEBT)


def _wait_until(holds_true: Callable[[], bool], complaint: str) -> None:
    started = time.monotonic()
    while not holds_true():
        if time.monotonic() - started > TIMEOUT_SECONDS:
            raise Unavailable(f"{complaint}; see worker.log and beat.log")
        time.sleep(POLL_SECONDS)
