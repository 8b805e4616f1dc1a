"""The mutants: each takes one safeguard away, and names the tests that must notice."""

from dataclasses import dataclass
from typing import Final

_ACCESS: Final = "tests/integration/api/test_access_matrix.py"
_APPLY: Final = "tests/integration/ledger/test_apply.py"
_DEBTS: Final = "tests/integration/ledger/test_debts.py"
_DECISIONS: Final = "tests/unit/ledger/test_decisions.py"
_DRAIN: Final = "tests/integration/worker/test_drain.py"
_GATE: Final = "tests/integration/api/test_gate.py"
_HOLDS: Final = "tests/integration/ledger/test_holds.py"
_RESETS: Final = "tests/integration/ledger/test_resets.py"
_SQL: Final = "tests/integration/ledger/test_sql_interface.py"
_TOKENS: Final = "tests/integration/ledger/test_servicetokens.py"
_TOGETHER: Final = "tests/unit/ledger/test_together.py"


@dataclass(frozen=True, slots=True)
class Change:
    """A text of a file that must occur in it exactly once, and what takes its place."""

    path: str
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Mutant:
    """A defect that nobody may be able to make unnoticed."""

    name: str
    meaning: str
    changes: tuple[Change, ...]
    tests: tuple[str, ...]
    """Files, or `file::function`, of the tests meant to catch it."""


MUTANTS: Final = (
    Mutant(
        "unique-key",
        "requests have no unique key, so that an event is charged as often as it comes",
        (
            Change(
                "migrations/versions/0001_initial_schema.py",
                '        sa.PrimaryKeyConstraint("org_id", "request_id", '
                'name=op.f("usage_requests_pkey")),\n',
                "",
            ),
            Change(
                "ledger/apply.py",
                "ON r.org_id = wanted.org_id AND r.request_id = wanted.request_id",
                "ON false",
            ),
        ),
        (f"{_APPLY}::test_a_duplicate_in_a_later_batch_has_no_effect",),
    ),
    Mutant(
        "same-batch",
        "a request that comes twice in one batch is charged twice",
        (
            Change(
                "ledger/decisions.py",
                '        seen[report.request_key] = Seen(report.fingerprint, "charged")\n',
                "",
            ),
        ),
        (f"{_DECISIONS}::test_a_conflict_inside_a_batch_leaves_the_first_request_in_place",),
    ),
    Mutant(
        "gate-ignores-holds",
        "a hold is placed on credits that other requests hold already",
        (
            Change(
                "migrations/sql/place_hold.sql",
                "SELECT a.id, a.remaining_credits - a.held_credits INTO v_allocation_id, available",
                "SELECT a.id, a.remaining_credits INTO v_allocation_id, available",
            ),
        ),
        (f"{_HOLDS}::test_a_hold_sets_credits_aside",),
    ),
    Mutant(
        "sql-ignores-holds",
        "has_sufficient_credits() counts credits that other requests hold",
        (
            Change(
                "migrations/sql/has_sufficient_credits.sql",
                "WHEN remaining_credits - held_credits >= p_credits_needed THEN true",
                "WHEN remaining_credits >= p_credits_needed THEN true",
            ),
        ),
        (f"{_SQL}::test_sufficient_is_what_remains_less_what_is_held",),
    ),
    Mutant(
        "hold-lock",
        "gates do not lock the allocation, so that concurrent ones set the same credits aside",
        (
            Change(
                "migrations/sql/place_hold.sql",
                "o.status = 'active'\n    FOR NO KEY UPDATE OF a;",
                "o.status = 'active';",
            ),
        ),
        (f"{_HOLDS}::test_64_connections_race_for_the_last_credits",),
    ),
    Mutant(
        "early-acknowledgement",
        "entries leave the stream before their outcome is committed",
        (
            Change(
                "worker/drain.py",
                "            outcome = apply_or_isolate(connection, portion)\n"
                "            stream.acknowledge(portion)\n",
                "            stream.acknowledge(portion)\n"
                "            outcome = apply_or_isolate(connection, portion)\n",
            ),
        ),
        (f"{_DRAIN}::test_a_fault_of_every_event_is_a_fault_of_ours",),
    ),
    Mutant(
        "unresolved-debts",
        "a debt is charged and its dead letter stays open, so that it is charged again",
        (
            Change(
                "ledger/debts.py",
                "    _resolve(connection, [letters[charge.report.request_key]"
                " for charge in verdicts.charges], now)\n",
                "",
            ),
        ),
        (f"{_DEBTS}::test_settling_again_changes_nothing",),
    ),
    Mutant(
        "rewritable-attribution",
        "attributions can be changed and deleted",
        (
            Change(
                "migrations/versions/0003_periods.py",
                "ALTER TABLE credit_usage_attribution ENABLE TRIGGER append_only",
                "DROP TRIGGER append_only ON credit_usage_attribution",
            ),
        ),
        (f"{_SQL}::test_what_happened_is_never_rewritten",),
    ),
    Mutant(
        "pool-lock",
        "deduct_credits() does not lock the pool, the mutex of its organization",
        (
            Change(
                "migrations/sql/deduct_credits.sql",
                "    PERFORM FROM organization_credit_pools"
                " WHERE org_id = p_org_id FOR NO KEY UPDATE;\n",
                "",
            ),
        ),
        (f"{_APPLY}::test_the_pool_is_locked_before_its_allocations",),
    ),
    Mutant(
        "lock-order",
        "drains lock allocations before pools, against the order of everything else",
        (
            Change(
                "ledger/apply.py",
                "            organizations = charges.lock_organizations(connection, reports)\n"
                "            balances = charges.lock_allocations(connection, reports)\n",
                "            balances = charges.lock_allocations(connection, reports)\n"
                "            organizations = charges.lock_organizations(connection, reports)\n",
            ),
        ),
        (f"{_APPLY}::test_the_pool_is_locked_before_its_allocations",),
    ),
    Mutant(
        "reset-fence",
        "a period that is closed already is closed again, and its credits are drawn twice",
        (
            Change(
                "migrations/versions/0003_periods.py",
                """        sa.PrimaryKeyConstraint(
            "allocation_id", "period_start", name=op.f("allocation_periods_pkey")
        ),
""",
                "",
            ),
            Change("ledger/resetplans.py", "    if allocation.is_closed:\n", "    if False:\n"),
        ),
        (f"{_RESETS}::test_a_period_is_closed_once",),
    ),
    Mutant(
        "reset-recheck",
        "whether an allocation is due is not asked again under its lock: two runs reset it twice",
        (
            Change(
                "ledger/resets.py",
                "    WHERE a.is_active AND a.reset_period <> 'never'"
                " AND a.next_reset_date <= %(now)b\n",
                "",
            ),
        ),
        (
            f"{_RESETS}::test_a_run_that_waited_for_another_leaves_what_that_one_did",
            f"{_RESETS}::test_two_runs_at_once_under_load_reset_each_period_once",
        ),
    ),
    Mutant(
        "late-usage",
        "usage of a closed period is charged to the running one",
        (
            Change(
                "ledger/decisions.py",
                "return next((p for p in self.closed if p.start <= moment < p.end), None)",
                "return None",
            ),
        ),
        (f"{_RESETS}::test_usage_of_a_closed_period_is_paid_by_the_pool",),
    ),
    Mutant(
        "late-rights",
        "routes read their input before they check who may call them",
        (
            Change(
                "api/access.py",
                "            await _authorize(request, grants)\n"
                "            return await handle(request)\n",
                "            answer = await handle(request)\n"
                "            await _authorize(request, grants)\n"
                "            return answer\n",
            ),
        ),
        (f"{_ACCESS}::test_each_caller_gets_in_or_not",),
    ),
    Mutant(
        "telling-refusal",
        "who asks about an organization of others is told that there is one",
        (
            Change(
                "api/access.py",
                '        raise NotFound(f"no organization {org_id}")\n',
                '        raise Forbidden(f"no organization {org_id}")\n',
            ),
        ),
        (f"{_ACCESS}::test_each_caller_gets_in_or_not",),
    ),
    Mutant(
        "open-gate",
        "the gate sets credits aside for users who are no members",
        (
            Change(
                "migrations/sql/place_hold.sql",
                "    JOIN organization_members m"
                " ON m.org_id = a.org_id AND m.user_id = a.user_id\n",
                "",
            ),
        ),
        (f"{_HOLDS}::test_who_has_left_is_refused",),
    ),
    Mutant(
        "other-users-holds",
        "users give back the holds of others",
        (
            Change(
                "migrations/sql/release_hold.sql",
                "        AND (p_user_id IS NULL OR user_id = p_user_id);",
                ";",
            ),
        ),
        (f"{_GATE}::test_users_release_their_own_holds_only",),
    ),
    Mutant(
        "revoked-token",
        "a service token goes on after it was revoked",
        (
            Change(
                "ledger/servicetokens.py",
                "self.revoked_at is None and",
                "True and",
            ),
        ),
        (f"{_TOKENS}::test_a_token_ends_when_it_is_revoked",),
    ),
    Mutant(
        "mixed-answers",
        "questions that are asked together get each other's answers",
        (
            Change(
                "ledger/together.py",
                "zip(batch, answers, strict=True)",
                "zip(batch, reversed(answers), strict=True)",
            ),
        ),
        (_TOGETHER,),
    ),
)
