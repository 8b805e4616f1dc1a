"""`/organizations`: organizations and their members (contract.md §4, rows 15 to 17)."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from api.access import CurrentUser, Grant, GuardedRoute, allows
from api.errors import documented
from api.idempotency import IdempotencyKey
from api.paging import PAGED, AskedWindow, answer
from api.resources import LedgerDatabase
from ledger import members, organizations
from ledger.clock import utc_now
from ledger.members import Member, MemberRole
from ledger.organizations import CreatedOrganization, Organization, TestOrganization
from schema.events import UserId
from schema.money import Usd

router = APIRouter(
    prefix="/api/v1/org-billing/organizations", tags=["organizations"], route_class=GuardedRoute
)

Email = Annotated[str, Field(max_length=320, pattern=r"^[^\s@\x00]+@[^\s@\x00]+$")]
PersonName = Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[^\x00]*$")]


class CreatedOrganizationAnswer(CreatedOrganization):
    """A new test organization; its price is in USD and never billed."""

    monthly_price: Usd


class MemberRequest(BaseModel):
    """A user who is to belong to an organization."""

    model_config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        json_schema_extra={
            "examples": [
                {
                    "user_id": "0b6f4f7e-3f0c-4b0e-9f5a-6f1f6f0c2a11",
                    "role": "member",
                    "email": "ada@example.com",
                    "name": "Ada Lovelace",
                }
            ]
        },
    )

    user_id: UserId
    """The Keycloak subject."""
    role: MemberRole = "member"
    email: Email | None = None
    name: PersonName | None = None


@router.get(
    "",
    responses=documented(401, 403, 422, 429, 503) | PAGED,
    **allows(Grant.USER),
)
def list_organizations(
    user: CurrentUser, window: AskedWindow, database: LedgerDatabase, response: Response
) -> list[Organization]:
    """The user's organizations, or for a system admin all there are, by name."""
    page = organizations.listed(database, user.id, window, of_all=user.is_system_admin)
    return answer(page, response)


@router.post(
    "",
    response_model=CreatedOrganizationAnswer,
    responses=documented(401, 403, 409, 413, 422, 429, 503),
    **allows(Grant.SYSTEM_ADMIN),
)
def create_test_organization(
    body: TestOrganization,
    user: CurrentUser,
    database: LedgerDatabase,
    key: IdempotencyKey = None,
) -> CreatedOrganization:
    """Make a test organization whole: subscription, credits, members and their allocations.

    It is metered like any other and never billed. 409 `organization_exists` if its name is taken.
    """
    return organizations.create_test_organization(database, body, user.actor, key)


@router.get(
    "/{org_id}/members",
    responses=documented(401, 403, 404, 422, 429, 503) | PAGED,
    **allows(Grant.MEMBER),
)
def list_members(
    org_id: UUID, window: AskedWindow, database: LedgerDatabase, response: Response
) -> list[Member]:
    """The members of an organization, by user id."""
    return answer(members.listed(database, org_id, window), response)


@router.post(
    "/{org_id}/members",
    responses=documented(401, 403, 404, 409, 413, 422, 429, 503),
    **allows(Grant.ADMIN),
)
def add_member(
    org_id: UUID, body: MemberRequest, user: CurrentUser, database: LedgerDatabase
) -> Member:
    """Give a user a seat; 409 `member_exists` if they have one, `no_seat_left` if none is free."""
    return members.add(
        database,
        org_id,
        body.user_id,
        role=body.role,
        email=body.email,
        name=body.name,
        actor=user.actor,
        now=utc_now(),
    )


# An id may hold slashes, so it takes the rest of the path.
@router.delete(
    "/{org_id}/members/{user_id:path}",
    responses=documented(401, 403, 404, 409, 422, 429, 503),
    **allows(Grant.ADMIN),
)
def remove_member(
    org_id: UUID, user_id: UserId, user: CurrentUser, database: LedgerDatabase
) -> Member:
    """Take a user out of an organization; their unused credits return to its pool.

    409 `conflict` for the last admin.
    """
    return members.remove(database, org_id, user_id, actor=user.actor, now=utc_now())
