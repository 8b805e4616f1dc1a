"""Organizations: which there are, and those made whole in one step, for tests and trials."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Final, Literal
from uuid import UUID, uuid4, uuid5

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from ledger import pages
from ledger.clock import utc_now
from ledger.database import Database, run
from ledger.idempotency import Act, check_id, once_within
from ledger.pages import Page, Window
from ledger.pools import MAX_CREDITS
from schema.errors import InvalidRequest, NotFound, OrganizationExists
from schema.events import UserId
from schema.periods import zone_of
from schema.plans import PLANS, PlanName

MIN_SEATS: Final = 10
MAX_TEST_USERS: Final = 500

_IDS_OF_KEYS: Final = UUID("6f1e0f1c-6c52-4a53-9a5e-0d0cbb1d2f7e")
"""The namespace of the ids of organizations that were made under a key."""

_EARLIEST_ANCHOR: Final = datetime(2000, 1, 1, tzinfo=UTC)
_LATEST_ANCHOR: Final = datetime(2100, 1, 1, tzinfo=UTC)
"""Every period since the anchor is caught up on one by one."""

_LISTED: Final = """
    SELECT
        o.id, o.name, o.display_name, o.status, m.role, o.max_seats,
        (SELECT count(*) FROM organization_members WHERE org_id = o.id) AS member_count,
        o.is_test, o.timezone, o.created_at
    FROM organizations o
    LEFT JOIN organization_members m ON m.org_id = o.id AND m.user_id = %(user_id)b::text
    WHERE %(of_all)b OR m.user_id IS NOT NULL
"""

_EXISTS: Final = "SELECT EXISTS (SELECT FROM organizations WHERE id = %(org_id)b)"

# One that another transaction is just making under the same key is waited for.
_CREATE: Final = """
    INSERT INTO organizations (id, name, display_name, max_seats, timezone, is_test, created_at)
    VALUES (
        %(id)s, %(name)s, %(display_name)s, %(max_seats)s, %(timezone)s, true, %(anchor)s
    )
    ON CONFLICT (id) DO NOTHING
"""

_SUBSCRIBE: Final = """
    INSERT INTO organization_subscriptions (
        org_id, subscription_plan, monthly_price, billing_anchor, current_period_start,
        current_period_end, created_at
    )
    VALUES (
        %(org_id)s, %(plan)s, %(price)s, %(anchor)s, %(anchor)s,
        period_end(%(org_id)s, 'monthly', %(anchor)s), %(anchor)s
    )
"""

_ADD_CREDITS: Final = """
    SELECT add_pool_credits(
        %(org_id)s, 'grant', %(credits)s, 0, %(actor)s, 'initial credits', %(anchor)s
    )
"""

_ALLOCATE: Final = """
    SELECT fund_allocation(
        %(org_id)s, %(user_id)s, %(credits)s, false, NULL, NULL, %(actor)s, 'initial allocation',
        %(anchor)s
    )
"""

_ADD_MEMBER: Final = """
    INSERT INTO organization_members (org_id, user_id, role, email)
    VALUES (%(org_id)s, %(user_id)s, %(role)s, %(email)s)
"""


DisplayName = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00]*$")]


class Organization(BaseModel):
    """An organization in a list."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    id: UUID
    name: str
    display_name: str
    status: str
    role: Literal["member", "admin"] | None
    """Of the user who asks; null for one who does not belong to it."""
    max_seats: int
    member_count: int
    is_test: bool
    """Whether it is never billed."""
    timezone: str
    """IANA name; its periods begin by the clocks of this zone."""
    created_at: datetime


class TestUser(BaseModel):
    """A member of a test organization; the email serves as user id unless one is given."""

    __test__ = False
    model_config = ConfigDict(extra="forbid")

    email: Annotated[UserId, Field(min_length=3)]
    allocated_credits: Annotated[int, Field(ge=0, le=MAX_CREDITS)] = 0
    user_id: UserId | None = None
    role: Annotated[str, Field(pattern="^(member|admin)$")] = "member"

    @property
    def id(self) -> str:
        """Who the user is to the ledger."""
        return self.user_id or self.email


class TestOrganization(BaseModel):
    """The test-organization document of contract.md §4; credits are whole."""

    __test__ = False
    model_config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        json_schema_extra={
            "examples": [
                {
                    "org_name": "acme-test",
                    "display_name": "Acme (test)",
                    "subscription_plan": "platform",
                    "initial_credits": 10_000,
                    "test_users": [
                        {"email": "ada@acme.example", "allocated_credits": 2_500, "role": "admin"},
                        {"email": "ben@acme.example", "allocated_credits": 1_000},
                    ],
                }
            ]
        },
    )

    org_name: Annotated[DisplayName, StringConstraints(strip_whitespace=True)]
    display_name: DisplayName | None = None
    subscription_plan: PlanName = PlanName.PLATFORM
    initial_credits: Annotated[int, Field(ge=0, le=MAX_CREDITS)] = 0
    test_users: list[TestUser] = Field(default_factory=list, max_length=MAX_TEST_USERS)
    timezone: Annotated[str, Field(max_length=100)] = "UTC"
    """IANA name; resets keep the wall-clock time of this zone."""
    anchor: Annotated[AwareDatetime, Field(ge=_EARLIEST_ANCHOR, le=_LATEST_ANCHOR)] | None = None
    """From when its periods are counted; the time it is made unless given."""

    @field_validator("timezone")
    @classmethod
    def _zone_exists(cls, name: str) -> str:
        try:
            zone_of(name)
        except InvalidRequest as error:
            raise ValueError(error.message) from None
        return name

    @property
    def shown_name(self) -> str:
        """What people see."""
        return self.display_name or self.org_name

    @property
    def allocated_credits(self) -> int:
        """What the users get together."""
        return sum(user.allocated_credits for user in self.test_users)

    @model_validator(mode="after")
    def _credits_suffice(self) -> "TestOrganization":
        if self.allocated_credits > self.initial_credits:
            raise ValueError(
                f"test_users are allocated {self.allocated_credits} credits together, "
                f"initial_credits are only {self.initial_credits}"
            )
        ids = [user.id for user in self.test_users]
        if len(ids) != len(set(ids)):
            raise ValueError("test_users name one user twice")
        return self


class CreatedUser(BaseModel):
    """A user of a new test organization."""

    user_id: str
    email: str
    role: str
    allocated_credits: int


class CreatedOrganization(BaseModel):
    """A new test organization; `monthly_price` is in USD and never billed."""

    org_id: UUID
    org_name: str
    display_name: str
    subscription_plan: PlanName
    monthly_price: Decimal
    total_credits: int
    available_credits: int
    users: list[CreatedUser]


def listed(database: Database, user_id: str, window: Window, *, of_all: bool) -> Page[Organization]:
    """The organizations that a user belongs to, or all there are, by name."""
    with database.snapshot() as connection:
        return pages.read(
            connection, Organization, _LISTED, "o.name", window, user_id=user_id, of_all=of_all
        )


def check_exists(connection: Connection, org_id: UUID) -> None:
    """Refuse an organization that there is not.

    Raises:
        NotFound: there is no such organization.
    """
    if not run(connection, _EXISTS, org_id=org_id).scalar_one():
        raise NotFound(f"no organization {org_id}")


def create_test_organization(
    database: Database, document: TestOrganization, actor: str, key: str | None = None
) -> CreatedOrganization:
    """Make an organization with subscription, pool, members and allocations, marked `is_test`.

    Idempotent by `key`, whoever asks: its id is derived from the key.

    Raises:
        InvalidRequest: the key was used for another document.
        OrganizationExists: there is one of this name; nothing was made.
    """
    if key is not None:
        check_id("Idempotency-Key", key)
    org_id = uuid4() if key is None else uuid5(_IDS_OF_KEYS, key)
    now = utc_now()
    anchor = document.anchor or now

    def perform(connection: Connection) -> CreatedOrganization:
        if not is_new:
            raise OrganizationExists(f"organization {org_id} exists already")
        _furnish(connection, org_id, document, anchor, actor)
        return _created(org_id, document)

    act = Act("organizations.create", org_id, document.model_dump(mode="json"), actor, key, now)
    with _taken_name_told(document.org_name), database.transaction() as connection:
        is_new = _insert(connection, org_id, document, anchor)
        return once_within(connection, act, CreatedOrganization, perform)


@contextmanager
def _taken_name_told(name: str) -> Iterator[None]:
    try:
        yield
    except IntegrityError as error:
        if "organizations_name_key" not in str(error):
            raise
        raise OrganizationExists(f"an organization named {name} exists already") from None


def _insert(
    connection: Connection, org_id: UUID, document: TestOrganization, anchor: datetime
) -> bool:
    """Make the organization alone; false if an earlier call with this id has."""
    inserted = run(
        connection,
        _CREATE,
        id=org_id,
        name=document.org_name,
        display_name=document.shown_name,
        max_seats=max(MIN_SEATS, len(document.test_users)),
        timezone=document.timezone,
        anchor=anchor,
    )
    return inserted.rowcount > 0


def _furnish(
    connection: Connection, org_id: UUID, document: TestOrganization, anchor: datetime, actor: str
) -> None:
    """Give a new organization all else that its document says."""
    since = {"org_id": org_id, "anchor": anchor}
    plan = document.subscription_plan
    run(connection, _SUBSCRIBE, plan=plan.value, price=PLANS[plan].monthly_price, **since)
    if document.initial_credits:
        run(connection, _ADD_CREDITS, credits=document.initial_credits, actor=actor, **since)
    for user in document.test_users:
        who = {"org_id": org_id, "user_id": user.id}
        run(connection, _ADD_MEMBER, role=user.role, email=user.email, **who)
        if user.allocated_credits:
            credits = user.allocated_credits
            run(connection, _ALLOCATE, credits=credits, actor=actor, anchor=anchor, **who)


def _created(org_id: UUID, document: TestOrganization) -> CreatedOrganization:
    return CreatedOrganization(
        org_id=org_id,
        org_name=document.org_name,
        display_name=document.shown_name,
        subscription_plan=document.subscription_plan,
        monthly_price=PLANS[document.subscription_plan].monthly_price,
        total_credits=document.initial_credits,
        available_credits=document.initial_credits - document.allocated_credits,
        users=[
            CreatedUser(
                user_id=user.id,
                email=user.email,
                role=user.role,
                allocated_credits=user.allocated_credits,
            )
            for user in document.test_users
        ],
    )
