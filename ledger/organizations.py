"""Organizations as the ledger needs them: made whole in one step, for tests and trials."""

from decimal import Decimal
from typing import Annotated, Final
from uuid import UUID

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)
from sqlalchemy.exc import IntegrityError

from ledger.clock import utc_now
from ledger.database import Database, run
from schema.errors import Conflict, InvalidRequest
from schema.periods import zone_of
from schema.plans import PLANS, PlanName

_CREATE: Final = """
    INSERT INTO organizations (name, display_name, max_seats, timezone, is_test, created_at)
    VALUES (%(name)s, %(display_name)s, %(max_seats)s, %(timezone)s, true, %(anchor)s)
    RETURNING id
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

MIN_SEATS: Final = 10


class TestUser(BaseModel):
    """A member of a test organization; the email serves as user id unless one is given."""

    __test__ = False
    model_config = ConfigDict(extra="forbid")

    email: Annotated[str, Field(min_length=3, max_length=255)]
    allocated_credits: Annotated[int, Field(ge=0)] = 0
    user_id: Annotated[str, Field(min_length=1, max_length=255)] | None = None
    role: Annotated[str, Field(pattern="^(member|admin)$")] = "member"

    @property
    def id(self) -> str:
        """Who the user is to the ledger."""
        return self.user_id or self.email


class TestOrganization(BaseModel):
    """The test-organization document of contract.md §4; credits are whole."""

    __test__ = False
    model_config = ConfigDict(extra="forbid")

    org_name: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200)]
    display_name: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    subscription_plan: PlanName = PlanName.PLATFORM
    initial_credits: Annotated[int, Field(ge=0)] = 0
    test_users: list[TestUser] = Field(default_factory=list)
    timezone: Annotated[str, Field(max_length=100)] = "UTC"
    """IANA name; resets keep the wall-clock time of this zone."""
    anchor: AwareDatetime | None = None
    """From when its periods are counted; the time it is made unless given."""

    @field_validator("timezone")
    @classmethod
    def _zone_exists(cls, name: str) -> str:
        try:
            zone_of(name)
        except InvalidRequest as error:
            raise ValueError(error.message) from None
        return name

    @model_validator(mode="after")
    def _credits_suffice(self) -> "TestOrganization":
        allocated = sum(user.allocated_credits for user in self.test_users)
        if allocated > self.initial_credits:
            raise ValueError(
                f"test_users are allocated {allocated} credits together, "
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


def create_test_organization(
    database: Database, document: TestOrganization, actor: str
) -> CreatedOrganization:
    """Make an organization with subscription, pool, members and allocations, marked `is_test`.

    Raises:
        Conflict: an organization of this name exists; nothing was made.
    """
    display_name = document.display_name or document.org_name
    price = PLANS[document.subscription_plan].monthly_price
    try:
        org_id = _create(database, document, display_name, price, actor)
    except IntegrityError as error:
        if "organizations_name_key" not in str(error):
            raise
        raise Conflict(f"an organization named {document.org_name} exists already") from None
    allocated = sum(user.allocated_credits for user in document.test_users)
    return CreatedOrganization(
        org_id=org_id,
        org_name=document.org_name,
        display_name=display_name,
        subscription_plan=document.subscription_plan,
        monthly_price=price,
        total_credits=document.initial_credits,
        available_credits=document.initial_credits - allocated,
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


def _create(
    database: Database,
    document: TestOrganization,
    display_name: str,
    price: Decimal,
    actor: str,
) -> UUID:
    anchor = document.anchor or utc_now()
    with database.transaction() as connection:
        org_id: UUID = run(
            connection,
            _CREATE,
            name=document.org_name,
            display_name=display_name,
            max_seats=max(MIN_SEATS, len(document.test_users)),
            timezone=document.timezone,
            anchor=anchor,
        ).scalar_one()
        since = {"org_id": org_id, "anchor": anchor}
        run(connection, _SUBSCRIBE, plan=document.subscription_plan.value, price=price, **since)
        if document.initial_credits:
            run(connection, _ADD_CREDITS, credits=document.initial_credits, actor=actor, **since)
        for user in document.test_users:
            who = {"org_id": org_id, "user_id": user.id}
            run(connection, _ADD_MEMBER, role=user.role, email=user.email, **who)
            if user.allocated_credits:
                credits = user.allocated_credits
                run(connection, _ALLOCATE, credits=credits, actor=actor, anchor=anchor, **who)
        return org_id
