"""Proof that the books are right: invariants I1 to I7, checked in one snapshot (design.md)."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Connection

from ledger.checks import CHECKS, Check
from ledger.clock import utc_now
from ledger.database import Database, run


@dataclass(frozen=True, slots=True)
class Drift:
    """One row that is off: what is recorded, and what the movements add up to."""

    check: str
    org_id: UUID
    subject: str
    recorded: str
    computed: str


@dataclass(frozen=True, slots=True)
class OrganizationDrift:
    """An organization whose books are off: how many rows, by the checks that found them."""

    org_id: UUID
    rows: Mapping[str, int]

    @property
    def checks(self) -> int:
        """How many checks are off."""
        return len(self.rows)


@dataclass(frozen=True, slots=True)
class Report:
    """The result of a reconciliation; `taken_at` is the moment of the snapshot.

    `drifts` names at most `MAX_DRIFTS_PER_CHECK` rows of each check, of as many organizations as
    possible; `organizations` counts all rows.
    """

    taken_at: datetime
    checks: Sequence[Check]
    drifts: Sequence[Drift]
    organizations: Sequence[OrganizationDrift]
    figures: dict[str, int]

    @property
    def is_clean(self) -> bool:
        """Whether no row is off."""
        return not self.drifts

    @property
    def rows_off(self) -> dict[str, int]:
        """How many rows each check found to be off, those without any included."""
        rows = Counter({check.name: 0 for check in self.checks})
        for organization in self.organizations:
            rows.update(organization.rows)
        return dict(rows)

    def as_figures(self) -> dict[str, Any]:
        """What is kept of a scheduled run, and read by the metrics."""
        return {
            "drifts": self.rows_off,
            "organizations_off": len(self.organizations),
            **self.figures,
        }

    def as_document(self) -> dict[str, Any]:
        """The report for programs."""
        rows_off = self.rows_off
        return {
            "clean": self.is_clean,
            "taken_at": self.taken_at.isoformat(),
            "figures": self.figures,
            "checks": [
                {
                    "name": check.name,
                    "invariant": check.invariant,
                    "meaning": check.meaning,
                    "clean": rows_off[check.name] == 0,
                    "rows_off": rows_off[check.name],
                }
                for check in self.checks
            ],
            "organizations": [
                {"org_id": str(off.org_id), "checks": off.checks, "rows": dict(off.rows)}
                for off in self.organizations
            ],
            "drifts": [asdict(drift) | {"org_id": str(drift.org_id)} for drift in self.drifts],
        }


MAX_DRIFTS_PER_CHECK: Final = 100

_NAMED: Final = """
    WITH found (org_id, subject, recorded, computed) AS ({check}),
    numbered AS (
        SELECT
            *,
            row_number() OVER (PARTITION BY org_id ORDER BY subject) AS number,
            count(*) OVER (PARTITION BY org_id) AS rows
        FROM found
    ),
    placed AS (
        SELECT *, row_number() OVER (ORDER BY number, org_id) AS place
        FROM numbered
    )
    SELECT org_id, subject, recorded, computed, number, rows, place
    FROM placed
    WHERE number = 1 OR place <= %(limit)b
    ORDER BY place
"""

_FIGURES: Final = """
    SELECT
        (
            SELECT count(*) FROM organizations WHERE (%(org_id)b::uuid IS NULL OR id = %(org_id)b)
        ) AS organizations,
        requests.charged AS charged_requests,
        requests.dead AS dead_requests,
        (
            SELECT count(*)
            FROM dead_letters
            WHERE state = 'open' AND (%(org_id)b::uuid IS NULL OR org_id = %(org_id)b)
        ) AS open_dead_letters,
        (
            SELECT coalesce(sum(credits_used), 0)
            FROM credit_usage_attribution
            WHERE (%(org_id)b::uuid IS NULL OR org_id = %(org_id)b)
        )::bigint AS credits_charged
    FROM (
        SELECT
            count(*) FILTER (WHERE state = 'charged') AS charged,
            count(*) FILTER (WHERE state = 'dead') AS dead
        FROM usage_requests
        WHERE (%(org_id)b::uuid IS NULL OR org_id = %(org_id)b)
    ) requests
"""

# Hashes of a million requests stay in memory; the planner, which cannot know that hardly a row is
# off, still reads in parallel; it plans for the `org_id` at hand, known or null; and a large ledger
# may take longer than a statement of the pipeline.
_PREPARE: Final = """
    SELECT
        set_config('work_mem', '128MB', true),
        set_config('parallel_tuple_cost', '0', true),
        set_config('jit', 'off', true),
        set_config('plan_cache_mode', 'force_custom_plan', true),
        set_config('statement_timeout', '10min', true)
"""


def reconcile(
    database: Database, *, now: datetime | None = None, org_id: UUID | None = None
) -> Report:
    """Recompute every balance from the movements, in one snapshot, and name the rows that differ.

    Reads only; safe to run under load. With `org_id` all checks and figures are of that
    organization.

    Args:
        database: the ledger.
        now: the time by which holds and resets may be overdue; that of the clock by default.
        org_id: the only organization to look at; all by default.

    Raises:
        LedgerUnavailable: PostgreSQL does not answer.
    """
    drifts: list[Drift] = []
    rows: dict[UUID, dict[str, int]] = {}
    with database.snapshot() as connection:
        taken_at = now or utc_now()
        run(connection, _PREPARE)
        figures = dict(run(connection, _FIGURES, org_id=org_id).mappings().one())
        for check in CHECKS:
            for row in _found(connection, check, taken_at, org_id):
                if row.number == 1:
                    rows.setdefault(row.org_id, {})[check.name] = row.rows
                if row.place <= MAX_DRIFTS_PER_CHECK:
                    drifts.append(
                        Drift(check.name, row.org_id, row.subject, row.recorded, row.computed)
                    )
    organizations = [OrganizationDrift(off, rows[off]) for off in sorted(rows)]
    return Report(taken_at, CHECKS, drifts, organizations, figures)


def _found(
    connection: Connection, check: Check, now: datetime, org_id: UUID | None
) -> Sequence[Any]:
    return run(
        connection,
        _NAMED.format(check=check.sql),
        org_id=org_id,
        now=now,
        limit=MAX_DRIFTS_PER_CHECK,
    ).fetchall()
