"""Organizations as the ledger needs them: made whole in one step, for tests and trials."""

from decimal import Decimal
from typing import Annotated, Final
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from sqlalchemy.exc import IntegrityError

from ledger.database import Database, run
from schema.errors import Conflict
from schema.plans import PLANS, PlanName

_CREATE: Final = """
    INSERT INTO organizations (name, display_name, max_seats, is_test)
    VALUES (%(name)s, %(display_name)s, %(max_seats)s, true)
    RETURNING id
"""

_SUBSCRIBE: Final = """
    INSERT INTO organization_subscriptions (org_id, subscription_plan, monthly_price)
    VALUES (%(org_id)s, %(plan)s, %(price)s)
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
    with database.transaction() as connection:
        org_id: UUID = run(
            connection,
            _CREATE,
            name=document.org_name,
            display_name=display_name,
            max_seats=max(MIN_SEATS, len(document.test_users)),
        ).scalar_one()
        plan = document.subscription_plan.value
        run(connection, _SUBSCRIBE, org_id=org_id, plan=plan, price=price)
        if document.initial_credits:
            add = "SELECT add_credits_to_pool(%(org_id)s, %(credits)s)"
            run(connection, add, org_id=org_id, credits=document.initial_credits)
        for user in document.test_users:
            who = {"org_id": org_id, "user_id": user.id}
            run(connection, _ADD_MEMBER, role=user.role, email=user.email, **who)
            if user.allocated_credits:
                run(
                    connection,
                    "SELECT allocate_credits_to_user("
                    "%(org_id)s, %(user_id)s, %(credits)s, %(actor)s)",
                    credits=user.allocated_credits,
                    actor=actor,
                    **who,
                )
        return org_id
