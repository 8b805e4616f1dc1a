"""Debts: dead letters for want of credits, charged by themselves when credits come (D6)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from operator import itemgetter
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Connection

from ledger import charges
from ledger.database import Database, run
from ledger.decisions import Entry, Reported, Verdicts, collect
from schema.events import parse_event

PORTION: Final = 500
"""Most letters that one transaction looks at."""

# Users with an open debt that might be covered now, by their own credits, by overage, or for usage
# of a closed period by what the pool has left. A guess: `collect` decides under the locks.
_DEBTORS: Final = """
    SELECT debts.org_id, debts.user_id
    FROM (
        SELECT org_id, user_id, min(credits) AS smallest, min(occurred_at) AS earliest
        FROM dead_letters
        WHERE state = 'open' AND reason IN ('insufficient_credits', 'no_allocation')
            AND (%(org_id)b::uuid IS NULL OR org_id = %(org_id)b)
        GROUP BY org_id, user_id
    ) debts
    JOIN user_credit_allocations a
        ON a.org_id = debts.org_id AND a.user_id = debts.user_id AND a.is_active
    JOIN organization_credit_pools p ON p.org_id = debts.org_id
    WHERE a.remaining_credits - a.held_credits >= debts.smallest
        OR (debts.earliest < a.last_reset_date AND p.available_credits >= debts.smallest)
        OR (
            p.allow_overage
            AND a.remaining_credits - a.held_credits + overage_room(p.org_id) >= debts.smallest
        )
    ORDER BY debts.org_id, debts.user_id
"""

_LETTERS: Final = """
    SELECT id, payload, credits, fingerprint
    FROM dead_letters
    WHERE state = 'open' AND reason IN ('insufficient_credits', 'no_allocation')
        AND org_id = %(org_id)b AND user_id = ANY(%(user_ids)b::text[]) AND id > %(after)b
    ORDER BY id
    LIMIT %(limit)b
"""

_LOCK_POOL: Final = """
    SELECT FROM organization_credit_pools WHERE org_id = %(org_id)b FOR NO KEY UPDATE
"""

_RESOLVE: Final = """
    UPDATE dead_letters
    SET state = 'charged', resolved_at = %(now)b
    WHERE id = ANY(%(ids)b::bigint[])
"""


@dataclass(slots=True)
class Settled:
    """Debts that were charged, and their credits."""

    debts: int = 0
    credits: int = 0

    def add(self, other: "Settled") -> None:
        """Count another portion in."""
        self.debts += other.debts
        self.credits += other.credits


def settle(database: Database, now: datetime, org_id: UUID | None = None) -> Settled:
    """Charge the debts that are covered by now, oldest first, of one organization or of all.

    A debt is charged whole or not at all; one that is still too large does not hold up a smaller
    one behind it, as if the events came again in order. Safe to run at any time and twice at once.
    """
    total = Settled()
    with database.snapshot() as connection:
        debtors = run(connection, _DEBTORS, org_id=org_id).fetchall()
    for debtor_org_id, of_organization in groupby(debtors, key=itemgetter(0)):
        user_ids = [user_id for _, user_id in of_organization]
        total.add(_settle_organization(database, debtor_org_id, user_ids, now))
    return total


def _settle_organization(
    database: Database, org_id: UUID, user_ids: Sequence[str], now: datetime
) -> Settled:
    total = Settled()
    last: int | None = 0
    while last is not None:
        with database.transaction() as connection:
            settled, last = _settle_portion(connection, org_id, user_ids, last, now)
        total.add(settled)
    return total


def _settle_portion(
    connection: Connection, org_id: UUID, user_ids: Sequence[str], after: int, now: datetime
) -> tuple[Settled, int | None]:
    # Whatever else settles a debt does so under this lock as well: the letters stay as read.
    run(connection, _LOCK_POOL, org_id=org_id)
    rows = run(
        connection, _LETTERS, org_id=org_id, user_ids=user_ids, after=after, limit=PORTION
    ).fetchall()
    if not rows:
        return Settled(), None
    reports = [_reported(row) for row in rows]
    letters = {report.request_key: row.id for report, row in zip(reports, rows, strict=True)}
    verdicts = Verdicts()
    organizations = charges.lock_organizations(connection, reports)
    balances = charges.lock_allocations(connection, reports)
    collect(reports, organizations=organizations, balances=balances, verdicts=verdicts)
    charges.write(connection, verdicts.charges, now)
    charges.write_balances(connection, organizations.values(), balances.values())
    _resolve(connection, [letters[charge.report.request_key] for charge in verdicts.charges], now)
    settled = Settled(len(verdicts.charges), sum(charge.credits for charge in verdicts.charges))
    return settled, rows[-1].id if len(rows) == PORTION else None


def _reported(letter: Any) -> Reported:  # noqa: ANN401 - a row of the statement above
    """The event as it was priced when it died."""
    event = parse_event(letter.payload)
    org = event.org_id.int
    return Reported(
        Entry(letter.payload),
        event,
        letter.credits,
        letter.fingerprint,
        (org, event.request_id),
        (org, event.user_id),
    )


def _resolve(connection: Connection, ids: Iterable[int], now: datetime) -> None:
    charged = list(ids)
    if charged:
        run(connection, _RESOLVE, ids=charged, now=now)
