"""The tables, as SQLAlchemy Core metadata (contract.md §2; rules from design decisions D4-D7).

Credits are BIGINT, money is NUMERIC in USD, times are `timestamptz`. Constraints hold here what a
database can hold; `ledger.reconcile` checks the sums that it cannot.
"""

from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Computed,
    DateTime,
    Double,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

metadata: Final = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "fk": "%(table_name)s_%(column_0_name)s_fkey",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "ix": "%(table_name)s_%(column_0_N_name)s_idx",
        "ck": "%(table_name)s_%(constraint_name)s_check",
    }
)

LIVE_SUBSCRIPTION: Final = "status IN ('active', 'trialing', 'past_due', 'paused')"
OPEN_DEBT: Final = "state = 'open' AND reason IN ('insufficient_credits', 'no_allocation')"

POOL_KINDS: Final = ("purchase", "grant", "refund", "adjustment", "refresh", "overage")
"""Movements that change what a pool holds in total."""

USER_KINDS: Final = ("allocation", "reset", "reclaim", "late_usage", "correction")
"""Movements between a pool and one of its allocations, or a closed period of one."""


def _id() -> Column[Any]:
    return Column("id", Uuid, primary_key=True, server_default=text("gen_random_uuid()"))


def _row_number() -> Column[Any]:
    return Column("id", BigInteger, Identity(always=True), primary_key=True)


def _org_id() -> Column[Any]:
    return Column("org_id", Uuid, ForeignKey("organizations.id"), nullable=False)


def _user_id() -> Column[Any]:
    return Column("user_id", String(255), nullable=False)


def _credits(name: str) -> Column[Any]:
    return Column(name, BigInteger, nullable=False, server_default=text("0"))


def _usd(name: str, digits: int = 14, places: int = 2) -> Column[Any]:
    return Column(name, Numeric(digits, places), nullable=False, server_default=text("0"))


def _flag(name: str, *, default: bool) -> Column[Any]:
    return Column(name, Boolean, nullable=False, server_default=text(str(default).lower()))


def _word(name: str, default: str) -> Column[Any]:
    return Column(name, Text, nullable=False, server_default=text(f"'{default}'"))


def _time(name: str) -> Column[Any]:
    return Column(name, DateTime(timezone=True))


def _is_now(name: str) -> Column[Any]:
    return Column(name, DateTime(timezone=True), nullable=False, server_default=text("now()"))


def _created_at() -> Column[Any]:
    return _is_now("created_at")


def _listed(*words: str) -> str:
    return ", ".join(f"'{word}'" for word in words)


def _one_of(name: str, *words: str) -> CheckConstraint:
    return CheckConstraint(f"{name} IN ({_listed(*words)})", name=name)


organizations = Table(
    "organizations",
    metadata,
    _id(),
    Column("name", Text, nullable=False, unique=True),
    Column("display_name", Text, nullable=False),
    Column("max_seats", Integer, nullable=False, server_default=text("10")),
    _word("status", "active"),
    _word("timezone", "UTC"),
    _flag("is_test", default=False),
    _created_at(),
    CheckConstraint("max_seats > 0", name="max_seats"),
    _one_of("status", "active", "suspended", "closed"),
)

organization_members = Table(
    "organization_members",
    metadata,
    _org_id(),
    _user_id(),
    _word("role", "member"),
    Column("email", Text),
    Column("name", Text),
    _created_at(),
    PrimaryKeyConstraint("org_id", "user_id"),
    Index(None, "user_id"),
    _one_of("role", "member", "admin"),
)

organization_subscriptions = Table(
    "organization_subscriptions",
    metadata,
    _id(),
    _org_id(),
    Column("subscription_plan", Text, nullable=False),
    Column("monthly_price", Numeric(12, 2), nullable=False),
    _word("billing_cycle", "monthly"),
    _word("status", "active"),
    _time("trial_ends_at"),
    _is_now("current_period_start"),
    Column(
        "current_period_end",
        DateTime(timezone=True),
        nullable=False,
        server_default=text("now() + interval '1 month'"),
    ),
    _time("canceled_at"),
    _is_now("billing_anchor"),
    Column("cycle_days", Integer),
    _flag("cancel_at_period_end", default=False),
    Column("lago_subscription_id", Text),
    Column("stripe_subscription_id", Text),
    _created_at(),
    _one_of("subscription_plan", "platform", "byok", "hybrid"),
    _one_of("billing_cycle", "monthly", "yearly", "custom"),
    _one_of("status", "active", "trialing", "past_due", "canceled", "paused"),
    CheckConstraint("monthly_price >= 0", name="monthly_price"),
    CheckConstraint("current_period_start < current_period_end", name="period"),
    CheckConstraint("cycle_days > 0", name="cycle_days"),
    Index(None, "org_id"),
    Index(
        "organization_subscriptions_one_live_key",
        "org_id",
        unique=True,
        postgresql_where=text(LIVE_SUBSCRIPTION),
    ),
    Index(
        "organization_subscriptions_due_idx",
        "current_period_end",
        postgresql_where=text(LIVE_SUBSCRIPTION),
    ),
)

organization_credit_pools = Table(
    "organization_credit_pools",
    metadata,
    _id(),
    Column("org_id", Uuid, ForeignKey("organizations.id"), nullable=False, unique=True),
    _credits("total_credits"),
    _credits("allocated_credits"),
    _credits("used_credits"),
    Column(
        "available_credits",
        BigInteger,
        Computed("total_credits - allocated_credits", persisted=True),
    ),
    _credits("monthly_refresh_amount"),
    _time("last_refresh_date"),
    _time("next_refresh_date"),
    _time("refresh_anchor"),
    _flag("allow_overage", default=False),
    _credits("overage_limit"),
    _usd("overage_rate", 12, 6),
    _credits("overage_credits"),
    _credits("overage_billed_credits"),
    _credits("lifetime_purchased_credits"),
    _usd("lifetime_spent_amount"),
    _created_at(),
    CheckConstraint("allocated_credits BETWEEN 0 AND total_credits", name="allocated"),
    CheckConstraint("used_credits >= 0", name="used"),
    CheckConstraint("monthly_refresh_amount >= 0", name="refresh"),
    CheckConstraint(
        "overage_limit >= 0 AND overage_rate >= 0 AND overage_credits >= 0", name="overage"
    ),
    Index(None, "next_refresh_date"),
    postgresql_with={"fillfactor": "70"},
)

user_credit_allocations = Table(
    "user_credit_allocations",
    metadata,
    _id(),
    _org_id(),
    _user_id(),
    _credits("allocated_credits"),
    _credits("used_credits"),
    Column(
        "remaining_credits",
        BigInteger,
        Computed("allocated_credits - used_credits", persisted=True),
    ),
    _credits("held_credits"),
    _credits("allowance_credits"),
    _word("reset_period", "monthly"),
    _is_now("reset_anchor"),
    _is_now("last_reset_date"),
    _time("next_reset_date"),
    _flag("is_active", default=True),
    Column("allocated_by", String(255)),
    Column("notes", Text),
    _created_at(),
    UniqueConstraint("org_id", "user_id"),
    _one_of("reset_period", "daily", "weekly", "monthly", "never"),
    CheckConstraint("used_credits >= 0 AND held_credits >= 0", name="used"),
    CheckConstraint("used_credits + held_credits <= allocated_credits", name="not_overspent"),
    CheckConstraint("allowance_credits >= 0", name="allowance"),
    CheckConstraint("next_reset_date > last_reset_date", name="next_reset"),
    Index("user_credit_allocations_due_idx", "next_reset_date", postgresql_where=text("is_active")),
    postgresql_with={"fillfactor": "70"},
)

allocation_periods = Table(
    "allocation_periods",
    metadata,
    # The fence of resets: a period of an allocation is closed once.
    Column("allocation_id", Uuid, ForeignKey("user_credit_allocations.id"), nullable=False),
    Column("period_start", DateTime(timezone=True), nullable=False),
    Column("period_end", DateTime(timezone=True), nullable=False),
    _credits("allocated_credits"),
    _credits("used_credits"),
    _credits("drawn_credits"),
    _credits("short_credits"),
    _created_at(),
    PrimaryKeyConstraint("allocation_id", "period_start"),
    CheckConstraint("period_start < period_end", name="order"),
    CheckConstraint("used_credits BETWEEN 0 AND allocated_credits", name="used"),
)

credit_usage_attribution = Table(
    "credit_usage_attribution",
    metadata,
    _row_number(),
    # The allocation belongs to one organization and user, so one foreign key vouches for all three.
    Column("org_id", Uuid, nullable=False),
    _user_id(),
    Column("allocation_id", Uuid, ForeignKey("user_credit_allocations.id"), nullable=False),
    Column("credits_used", BigInteger, nullable=False),
    Column("service_type", String(100), nullable=False),
    Column("service_name", String(200)),
    Column("variant", String(100)),
    Column("quantity", Numeric, nullable=False, server_default=text("1")),
    _usd("api_cost", 14, 6),
    _usd("markup_applied", 14, 6),
    Column("total_cost", Numeric(15, 6), Computed("api_cost + markup_applied", persisted=True)),
    _word("key_source", "managed"),
    Column("request_id", String(255), nullable=False),
    Column("request_metadata", JSONB, nullable=False, server_default=text("'{}'")),
    _word("source", "loopnet"),
    _created_at(),
    _is_now("occurred_at"),
    Column("period_start", DateTime(timezone=True), nullable=False),
    _credits("overage_credits"),
    # A correction is a row of its own that points to the charge; credits given back are negative.
    Column("corrects", BigInteger, ForeignKey("credit_usage_attribution.id")),
    Column("actor", String(255)),
    Column("reason", Text),
    Index(None, "org_id", "occurred_at"),
    CheckConstraint(
        "CASE WHEN corrects IS NULL THEN credits_used > 0 AND overage_credits >= 0"
        " ELSE credits_used <> 0 AND actor IS NOT NULL AND reason IS NOT NULL END",
        name="correction",
    ),
)

usage_requests = Table(
    "usage_requests",
    metadata,
    # No foreign key: requests of organizations that are not known (yet) are kept as well.
    Column("org_id", Uuid, nullable=False),
    Column("request_id", String(255), nullable=False),
    _user_id(),
    Column("service_type", String(100), nullable=False),
    Column("fingerprint", LargeBinary, nullable=False),
    Column("state", Text, nullable=False),
    Column("credits", BigInteger),
    Column("reason", Text),
    Column("occurred_at", DateTime(timezone=True), nullable=False),
    _created_at(),
    Column("settled_at", DateTime(timezone=True)),
    Column("held_credits", BigInteger),
    Column("hold_expires_at", DateTime(timezone=True)),
    PrimaryKeyConstraint("org_id", "request_id"),
    Index(
        "usage_requests_due_holds_idx",
        "hold_expires_at",
        postgresql_where=text("state = 'held'"),
    ),
    Index(
        "usage_requests_overage_holds_idx",
        "org_id",
        postgresql_where=text("state = 'held' AND held_credits < credits"),
    ),
    CheckConstraint(
        "state <> 'held' OR (held_credits BETWEEN 0 AND credits AND hold_expires_at IS NOT NULL)",
        name="held",
    ),
    _one_of("state", "held", "charged", "released", "expired", "dead", "discarded"),
    CheckConstraint("state <> 'charged' OR credits > 0", name="charged_credits"),
    CheckConstraint("(state IN ('dead', 'discarded')) = (reason IS NOT NULL)", name="dead_reason"),
)

dead_letters = Table(
    "dead_letters",
    metadata,
    _row_number(),
    Column("reason", Text, nullable=False),
    Column("detail", Text, nullable=False),
    Column("org_id", Uuid),
    Column("request_id", String(255)),
    Column("user_id", String(255)),
    Column("service_type", String(100)),
    Column("credits", BigInteger),
    Column("fingerprint", LargeBinary),
    Column("occurred_at", DateTime(timezone=True)),
    Column("payload", LargeBinary, nullable=False),
    Column("stream", Text),
    Column("entry_id", Text),
    _word("state", "open"),
    _created_at(),
    _time("resolved_at"),
    _one_of("state", "open", "charged", "discarded"),
    # A readable request dies once; an entry too broken for that is known by its place.
    Index(
        "dead_letters_request_key",
        "org_id",
        "request_id",
        "fingerprint",
        unique=True,
        postgresql_where=text("fingerprint IS NOT NULL"),
    ),
    Index(
        "dead_letters_entry_key",
        "stream",
        "entry_id",
        unique=True,
        postgresql_where=text("fingerprint IS NULL"),
    ),
    Index("dead_letters_open_idx", "reason", postgresql_where=text("state = 'open'")),
    Index("dead_letters_debts_idx", "org_id", "user_id", postgresql_where=text(OPEN_DEBT)),
)

credit_transactions = Table(
    "credit_transactions",
    metadata,
    _row_number(),
    _org_id(),
    Column("user_id", String(255)),
    Column("allocation_id", Uuid, ForeignKey("user_credit_allocations.id")),
    Column("kind", Text, nullable=False),
    Column("credits", BigInteger, nullable=False),
    _usd("amount"),
    Column("actor", String(255)),
    Column("reason", Text),
    Column("request_id", String(255)),
    _created_at(),
    Index(None, "org_id", "created_at"),
    _one_of("kind", *POOL_KINDS, *USER_KINDS),
    CheckConstraint("credits <> 0", name="credits"),
    CheckConstraint(
        f"(kind IN ({_listed(*USER_KINDS)})) = (allocation_id IS NOT NULL)", name="allocation"
    ),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    _org_id(),
    Column("key", String(255), nullable=False),
    Column("act", Text, nullable=False),
    Column("arguments", JSONB, nullable=False),
    Column("result", JSONB),
    _created_at(),
    PrimaryKeyConstraint("org_id", "key"),
)

scheduled_runs = Table(
    "scheduled_runs",
    metadata,
    _row_number(),
    Column("task", Text, nullable=False),
    Column("started_at", DateTime(timezone=True), nullable=False),
    Column("seconds", Double, nullable=False),
    Column("figures", JSONB, nullable=False),
    Index(None, "task", "started_at"),
)

service_tokens = Table(
    "service_tokens",
    metadata,
    _id(),
    Column("name", Text, nullable=False),
    Column("token_hash", LargeBinary, nullable=False, unique=True),
    Column("scopes", ARRAY(Text), nullable=False),
    Column("created_by", String(255), nullable=False),
    _created_at(),
    _time("expires_at"),
    _time("revoked_at"),
    CheckConstraint("octet_length(token_hash) = 32", name="token_hash"),
    CheckConstraint("cardinality(scopes) > 0", name="scopes"),
    Index(None, "name"),
)

service_prices = Table(
    "service_prices",
    metadata,
    _row_number(),
    Column("service_type", String(100), nullable=False),
    Column("variant", String(100)),
    Column("credits", Numeric(18, 6), nullable=False),
    Column("unit", Text, nullable=False),
    Column("position", Integer, nullable=False),
    Column("effective_from", DateTime(timezone=True), nullable=False),
    _created_at(),
    UniqueConstraint(
        "service_type", "variant", "effective_from", postgresql_nulls_not_distinct=True
    ),
    CheckConstraint("credits > 0", name="credits"),
)

org_billing_history = Table(
    "org_billing_history",
    metadata,
    _id(),
    _org_id(),
    Column("subscription_id", Uuid, ForeignKey("organization_subscriptions.id")),
    Column("event_type", Text, nullable=False),
    _usd("amount"),
    _word("currency", "USD"),
    _word("payment_status", "pending"),
    Column("payment_method", Text),
    _time("paid_at"),
    _time("period_start"),
    _time("period_end"),
    Column("event_metadata", JSONB, nullable=False, server_default=text("'{}'")),
    Column("notes", Text),
    _created_at(),
    Index(None, "org_id", "created_at"),
    _one_of(
        "event_type",
        "invoice_created",
        "invoice_paid",
        "invoice_failed",
        "subscription_created",
        "subscription_upgraded",
        "subscription_downgraded",
        "subscription_canceled",
        "credit_purchase",
        "credit_refund",
        "overage_charged",
    ),
)
