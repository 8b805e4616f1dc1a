"""Apply a batch of usage events in one transaction (design decisions D4 to D6).

A batch costs the same few statements whatever its size: read the price book, lock the pools and
allocations, look up the request ids, copy the new rows in, add up the balances.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Final

from sqlalchemy import Connection

from ledger import charges, deadletters, prices
from ledger.database import run
from ledger.decisions import Death, Entry, Key, Outcome, Reported, Seen, Verdicts, decide, read

_KNOWN_REQUESTS: Final = """
    SELECT
        r.org_id, r.request_id,
        r.fingerprint, r.state, r.user_id, r.service_type,
        CASE WHEN r.state = 'held' THEN r.held_credits ELSE 0 END,
        CASE WHEN r.state = 'held' THEN r.credits - r.held_credits ELSE 0 END
    FROM usage_requests r
    JOIN unnest(%(org_ids)b::uuid[], %(request_ids)b::text[]) AS wanted (org_id, request_id)
        ON r.org_id = wanted.org_id AND r.request_id = wanted.request_id
"""

_DIE: Final = """
    INSERT INTO usage_requests (
        org_id, request_id, user_id, service_type, fingerprint, state, credits, reason,
        occurred_at, created_at, settled_at
    )
    SELECT
        org_id, request_id, user_id, service_type, fingerprint, 'dead', credits, reason,
        occurred_at, %(now)b, %(now)b
    FROM unnest(
        %(org_id)b::uuid[], %(request_id)b::text[], %(user_id)b::text[], %(service_type)b::text[],
        %(fingerprint)b::bytea[], %(credits)b::bigint[], %(reason)b::text[],
        %(occurred_at)b::timestamptz[]
    ) AS dead (
        org_id, request_id, user_id, service_type, fingerprint, credits, reason, occurred_at
    )
    ON CONFLICT (org_id, request_id) DO UPDATE
    SET state = excluded.state,
        fingerprint = excluded.fingerprint,
        credits = excluded.credits,
        reason = excluded.reason,
        occurred_at = excluded.occurred_at,
        settled_at = excluded.settled_at
    WHERE usage_requests.state IN ('held', 'released', 'expired')
        AND usage_requests.user_id = excluded.user_id
        AND usage_requests.service_type = excluded.service_type
"""


class RequestTaken(Exception):
    """A gate gave a request id to another request while a batch was decided: decide it again.

    Gates lock their user's allocation only, so the id of somebody else's event is free to them.
    """


def apply_batch(connection: Connection, entries: Sequence[Entry], now: datetime) -> Outcome:
    """Charge or dead-letter every entry, once each, in one transaction.

    An entry that was dealt with before, in this batch or ever, changes nothing. The result equals
    calling `deduct_credits()` for each event in order.

    Args:
        connection: a connection without an open transaction; this function commits.
        entries: the events, in the order in which they were sent.
        now: the time of the decision, and of the rows written.

    Raises:
        sqlalchemy.exc.DBAPIError: PostgreSQL refused; nothing was written.
        RequestTaken: a request was not as it had been read; nothing was written.
    """
    with connection.begin():
        reports, deaths = read(entries, prices.book(connection))
        verdicts = Verdicts(deaths=deaths)
        if reports:
            organizations = charges.lock_organizations(connection, reports)
            balances = charges.lock_allocations(connection, reports)
            seen = known_requests(connection, reports)
            decide(
                reports,
                seen=seen,
                organizations=organizations,
                balances=balances,
                now=now,
                verdicts=verdicts,
            )
            charges.write(connection, verdicts.charges, now)
            charges.write_balances(connection, organizations.values(), balances.values())
        _write_deaths(connection, verdicts.deaths, now)
    return verdicts.counts()


def known_requests(connection: Connection, reports: Sequence[Reported]) -> dict[Key, Seen]:
    """What is known of the requests of these events; true under the locks of their allocations."""
    events = {report.request_key: report.event for report in reports}.values()
    rows = run(
        connection,
        _KNOWN_REQUESTS,
        org_ids=[event.org_id for event in events],
        request_ids=[event.request_id for event in events],
    )
    return {
        (org_id.int, request_id): Seen(*known) for org_id, request_id, *known in rows.fetchall()
    }


def _write_deaths(connection: Connection, deaths: Sequence[Death], now: datetime) -> None:
    if not deaths:
        return
    dead = [(d.report, d.reason) for d in deaths if d.report is not None and d.takes_request_id]
    if dead:
        buried = run(
            connection,
            _DIE,
            now=now,
            org_id=[report.event.org_id for report, _ in dead],
            request_id=[report.event.request_id for report, _ in dead],
            user_id=[report.event.user_id for report, _ in dead],
            service_type=[report.event.service_type for report, _ in dead],
            fingerprint=[report.fingerprint for report, _ in dead],
            credits=[report.credits for report, _ in dead],
            reason=[reason.value for _, reason in dead],
            occurred_at=[report.event.occurred_at for report, _ in dead],
        )
        if buried.rowcount != len(dead):
            raise RequestTaken(f"{len(dead) - buried.rowcount} request ids were taken meanwhile")
    deadletters.bury(connection, deaths, now)
