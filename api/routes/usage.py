"""`/credits/{org_id}/usage`: what an organization has used (contract.md §4, row 11)."""

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Literal
from uuid import UUID

from fastapi import APIRouter, Query
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from starlette.responses import Response

from api.access import Grant, GuardedRoute, allows
from api.errors import documented
from api.resources import LedgerDatabase
from api.spreadsheets import MEDIA_TYPE, csv_file
from ledger import usage
from ledger.clock import utc_now
from ledger.usage import Dimension, Group, Selection, UserUsage
from schema.errors import InvalidRequest
from schema.events import Moment, Name, UserId
from schema.money import Usd

router = APIRouter(prefix="/api/v1/org-billing", tags=["usage"], route_class=GuardedRoute)

LONGEST: Final = timedelta(days=366)
_FIGURES: Final = ("total_credits", "request_count", "total_cost")


def _split(values: object) -> object:
    """The items of `?group_by=day,service`, each once; `?group_by=day&group_by=service` as well."""
    if not isinstance(values, list):
        return values
    return list(dict.fromkeys(item for value in values for item in str(value).split(",")))


class UsageQuery(BaseModel):
    """Which usage is asked for, and how it is told apart."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    days: Annotated[int, Field(ge=1, le=365)] = 30
    """So many times 24 hours before `to`, unless `from` says when to begin."""
    from_: Annotated[Moment | None, Field(alias="from")] = None
    """With its UTC offset, as `to`."""
    to: Moment | None = None
    """Not included; now unless given. At most 366 days after `from`."""
    user_id: UserId | None = None
    service_type: Name | None = None
    group_by: Annotated[list[Dimension], BeforeValidator(_split)] = Field(default_factory=list)
    """By commas; days, weeks and months are those of the organization's time zone."""
    format: Literal["json", "csv"] = "json"

    def span(self, now: datetime) -> tuple[datetime, datetime]:
        """From when up to when, in UTC.

        Raises:
            InvalidRequest: it ends before it begins, or is too long.
        """
        end = self.to or now
        start = self.from_ or end - timedelta(days=self.days)
        if start >= end:
            raise InvalidRequest("from: must be before to", fields=["from", "to"])
        if end - start > LONGEST:
            raise InvalidRequest(
                f"from: must be at most {LONGEST.days} days before to", fields=["from", "to"]
            )
        return start.astimezone(UTC), end.astimezone(UTC)


class UsageGroup(Group):
    """Usage that agrees in what it was grouped by; fields it was not grouped by are left out."""

    model_config = ConfigDict(from_attributes=True)

    total_cost: Usd
    """Upstream cost and markup in USD."""


class UsageReport(BaseModel):
    """What was used from `date_range_start` up to `date_range_end`, in credits.

    `top_users` are the ten who used most, `groups` are there if they were asked for. Corrections
    are counted in when the request that they correct occurred.
    """

    org_id: UUID
    total_credits_used: int
    user_count: int
    service_breakdown: dict[str, int]
    top_users: list[UserUsage]
    date_range_start: datetime
    date_range_end: datetime
    groups: list[UsageGroup] | None = None


_CSV: Final[dict[int | str, dict[str, Any]]] = {
    200: {"content": {MEDIA_TYPE: {"schema": {"type": "string"}}}}
}


@router.get(
    "/credits/{org_id}/usage",
    response_model=UsageReport,
    response_model_exclude_none=True,
    responses=documented(401, 403, 404, 422, 429, 503) | _CSV,
    **allows(Grant.MEMBER),
)
def report(
    org_id: UUID, query: Annotated[UsageQuery, Query()], database: LedgerDatabase
) -> UsageReport | Response:
    """Credits by service and by user, and by whatever `group_by` names.

    `format=csv` answers the groups alone, by service unless told otherwise.
    """
    start, end = query.span(utc_now())
    # Without an end of its own, what services with a faster clock dated ahead is counted in.
    selection = Selection(org_id, start, query.to, query.user_id, query.service_type)
    if query.format == "csv":
        return _file(database, selection, query.group_by or [Dimension.SERVICE], end)
    found = usage.summary(database, selection, query.group_by)
    groups = found.groups
    return UsageReport(
        org_id=org_id,
        total_credits_used=found.total_credits,
        user_count=found.user_count,
        service_breakdown=found.services,
        top_users=list(found.top_users),
        date_range_start=start,
        date_range_end=end,
        groups=None if groups is None else [UsageGroup.model_validate(group) for group in groups],
    )


def _file(
    database: LedgerDatabase, selection: Selection, dimensions: list[Dimension], end: datetime
) -> Response:
    columns = [usage.field_of(dimension) for dimension in dimensions]
    groups = usage.groups(database, selection, dimensions)
    return csv_file(
        f"usage-{selection.org_id}-{selection.start:%Y%m%d}-{end:%Y%m%d}.csv",
        [*columns, *_FIGURES],
        [group.model_dump() for group in groups],
    )
