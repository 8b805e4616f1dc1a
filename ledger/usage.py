"""Usage of an organization over a span of time: in all, and by service, user and day.

Each attribution counts when its operation occurred. A correction counts with its credits when the
request that it corrects occurred, and is no request of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from enum import StrEnum
from typing import Final
from uuid import UUID

from pydantic import BaseModel, ConfigDict
from sqlalchemy import Connection

from ledger.database import Database, run
from schema.errors import InvalidRequest, NotFound

TOP_USERS: Final = 10
MAX_GROUPS: Final = 10_000
"""Most groups of one answer."""

_TIMEZONE: Final = "SELECT timezone FROM organizations WHERE id = %(org_id)b"

# The attributions are read once; what is summed up from there on is small.
_SUMMARY: Final = """
    WITH used AS (
        SELECT
            service_type, user_id,
            sum(credits_used) AS credits,
            count(*) FILTER (WHERE corrects IS NULL) AS requests
        FROM credit_usage_attribution
        WHERE org_id = %(org_id)b
            AND occurred_at >= %(start)b
            AND occurred_at < coalesce(%(end)b::timestamptz, 'infinity')
            AND (%(user_id)b::text IS NULL OR user_id = %(user_id)b::text)
            AND (%(service_type)b::text IS NULL OR service_type = %(service_type)b::text)
        GROUP BY service_type, user_id
    ),
    ranked AS (
        SELECT
            service_type, user_id,
            sum(credits)::bigint AS credits,
            sum(requests)::bigint AS requests,
            count(*) OVER (PARTITION BY grouping(user_id)) AS number,
            row_number() OVER (
                PARTITION BY grouping(user_id)
                ORDER BY sum(credits) DESC, service_type, user_id
            ) AS place
        FROM used
        GROUP BY GROUPING SETS ((service_type), (user_id))
    )
    SELECT service_type, user_id, credits, requests, number
    FROM ranked
    WHERE service_type IS NOT NULL OR place <= %(top)b
    ORDER BY place
"""

# Groups by what is asked for and nothing else, so that the local day, which costs more than all the
# rest of a row, is told only where it counts.
_GROUPS: Final = """
    SELECT
        {keys},
        sum(credits_used)::bigint AS total_credits,
        count(*) FILTER (WHERE corrects IS NULL) AS request_count,
        sum(total_cost) AS total_cost
    FROM credit_usage_attribution
    WHERE org_id = %(org_id)b
        AND occurred_at >= %(start)b
        AND occurred_at < coalesce(%(end)b::timestamptz, 'infinity')
        AND (%(user_id)b::text IS NULL OR user_id = %(user_id)b::text)
        AND (%(service_type)b::text IS NULL OR service_type = %(service_type)b::text)
    GROUP BY {names}
    ORDER BY {names}
    LIMIT {most}
"""


class Dimension(StrEnum):
    """What usage is told apart by."""

    SERVICE = "service"
    USER = "user"
    DAY = "day"
    WEEK = "week"
    MONTH = "month"


_LOCAL: Final = "occurred_at AT TIME ZONE %(timezone)b::text"
_KEYS: Final = {
    Dimension.SERVICE: ("service", "service_type"),
    Dimension.USER: ("user_id", "user_id"),
    Dimension.DAY: ("day", f"({_LOCAL})::date"),
    Dimension.WEEK: ("week", f"date_trunc('week', {_LOCAL})::date"),
    Dimension.MONTH: ("month", f"date_trunc('month', {_LOCAL})::date"),
}
"""The field of a group that says where it stands in a dimension, and what it is in SQL."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which usage is meant: from `start` up to, and without, `end`; without end, all since then."""

    org_id: UUID
    start: datetime
    end: datetime | None = None
    user_id: str | None = None
    service_type: str | None = None


class UserUsage(BaseModel):
    """What one user has used, in credits."""

    model_config = ConfigDict(frozen=True)

    user_id: str
    total_credits: int
    request_count: int


class Group(BaseModel):
    """Usage that agrees in some dimensions; those that it was not told apart by are None."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    service: str | None = None
    user_id: str | None = None
    day: date | None = None
    """In the organization's time zone, as week and month."""
    week: date | None = None
    """The Monday it begins with."""
    month: date | None = None
    """The first day of it."""
    total_credits: int
    request_count: int
    total_cost: Decimal
    """Upstream cost and markup, in USD."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Usage in all, by service from the costliest on, and of the users who used most."""

    total_credits: int
    user_count: int
    services: dict[str, int]
    top_users: Sequence[UserUsage]
    groups: Sequence[Group] | None
    """In the order of their dimensions; None if none were asked for."""


def summary(
    database: Database, selection: Selection, dimensions: Sequence[Dimension] = ()
) -> Summary:
    """What was used, told apart by these dimensions as well if there are any.

    Raises:
        NotFound: there is no such organization.
        InvalidRequest: there are more than `MAX_GROUPS` groups.
        LedgerUnavailable: PostgreSQL does not answer.
    """
    with database.snapshot() as connection:
        timezone = _timezone(connection, selection.org_id)
        rows = run(connection, _SUMMARY, top=TOP_USERS, **_filters(selection)).fetchall()
        found = _groups(connection, selection, dimensions, timezone) if dimensions else None
    services = {row.service_type: row.credits for row in rows if row.service_type is not None}
    users = [row for row in rows if row.service_type is None]
    return Summary(
        total_credits=sum(services.values()),
        user_count=users[0].number if users else 0,
        services=services,
        top_users=[
            UserUsage(user_id=row.user_id, total_credits=row.credits, request_count=row.requests)
            for row in users
        ],
        groups=found,
    )


def groups(
    database: Database, selection: Selection, dimensions: Sequence[Dimension]
) -> list[Group]:
    """What was used, told apart by these dimensions and in their order.

    Raises:
        NotFound: there is no such organization.
        InvalidRequest: there are more than `MAX_GROUPS` groups.
        LedgerUnavailable: PostgreSQL does not answer.
    """
    with database.snapshot() as connection:
        timezone = _timezone(connection, selection.org_id)
        return _groups(connection, selection, dimensions, timezone)


def field_of(dimension: Dimension) -> str:
    """The field of a group that says where it stands in a dimension."""
    return _KEYS[dimension][0]


def _timezone(connection: Connection, org_id: UUID) -> str:
    timezone: str | None = run(connection, _TIMEZONE, org_id=org_id).scalar_one_or_none()
    if timezone is None:
        raise NotFound(f"no organization {org_id}")
    return timezone


def _groups(
    connection: Connection, selection: Selection, dimensions: Sequence[Dimension], timezone: str
) -> list[Group]:
    keys = [_KEYS[dimension] for dimension in dimensions]
    statement = _GROUPS.format(
        keys=", ".join(f"{sql} AS {name}" for name, sql in keys),
        names=", ".join(name for name, _ in keys),
        most=MAX_GROUPS + 1,
    )
    rows = run(connection, statement, timezone=timezone, **_filters(selection)).mappings()
    found = [Group.model_validate(dict(row)) for row in rows]
    if len(found) > MAX_GROUPS:
        raise InvalidRequest(
            f"group_by: there are more than {MAX_GROUPS} groups: ask for a shorter time, one user "
            "or service, or fewer dimensions",
            fields=["group_by"],
        )
    return found


def _filters(selection: Selection) -> dict[str, object]:
    return {
        "org_id": selection.org_id,
        "start": selection.start,
        "end": selection.end,
        "user_id": selection.user_id,
        "service_type": selection.service_type,
    }
