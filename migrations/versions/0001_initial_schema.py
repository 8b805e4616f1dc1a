"""Initial schema: all tables, the price book, the public functions and views."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from migrations import sql
from schema.prices import INITIAL_PRICES
from schema.tables import service_prices

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "dead_letters",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("org_id", sa.Uuid(), nullable=True),
        sa.Column("request_id", sa.String(length=255), nullable=True),
        sa.Column("user_id", sa.String(length=255), nullable=True),
        sa.Column("service_type", sa.String(length=100), nullable=True),
        sa.Column("credits", sa.BigInteger(), nullable=True),
        sa.Column("fingerprint", sa.LargeBinary(), nullable=True),
        sa.Column("occurred_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.Column("stream", sa.Text(), nullable=True),
        sa.Column("entry_id", sa.Text(), nullable=True),
        sa.Column("state", sa.Text(), server_default=sa.text("'open'"), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("resolved_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "state IN ('open', 'charged', 'discarded')", name=op.f("dead_letters_state_check")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("dead_letters_pkey")),
    )
    op.create_index(
        "dead_letters_entry_key",
        "dead_letters",
        ["stream", "entry_id"],
        unique=True,
        postgresql_where=sa.text("fingerprint IS NULL"),
    )
    op.create_index(
        "dead_letters_open_idx",
        "dead_letters",
        ["reason"],
        unique=False,
        postgresql_where=sa.text("state = 'open'"),
    )
    op.create_index(
        "dead_letters_request_key",
        "dead_letters",
        ["org_id", "request_id", "fingerprint"],
        unique=True,
        postgresql_where=sa.text("fingerprint IS NOT NULL"),
    )
    op.create_table(
        "organizations",
        sa.Column("id", sa.Uuid(), server_default=sa.text("gen_random_uuid()"), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("display_name", sa.Text(), nullable=False),
        sa.Column("max_seats", sa.Integer(), server_default=sa.text("10"), nullable=False),
        sa.Column("status", sa.Text(), server_default=sa.text("'active'"), nullable=False),
        sa.Column("timezone", sa.Text(), server_default=sa.text("'UTC'"), nullable=False),
        sa.Column("is_test", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.CheckConstraint(
            "status IN ('active', 'suspended', 'closed')", name=op.f("organizations_status_check")
        ),
        sa.CheckConstraint("max_seats > 0", name=op.f("organizations_max_seats_check")),
        sa.PrimaryKeyConstraint("id", name=op.f("organizations_pkey")),
        sa.UniqueConstraint("name", name=op.f("organizations_name_key")),
    )
    op.create_table(
        "service_prices",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("service_type", sa.String(length=100), nullable=False),
        sa.Column("variant", sa.String(length=100), nullable=True),
        sa.Column("credits", sa.Numeric(precision=18, scale=6), nullable=False),
        sa.Column("unit", sa.Text(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("effective_from", sa.DateTime(timezone=True), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.CheckConstraint("credits > 0", name=op.f("service_prices_credits_check")),
        sa.PrimaryKeyConstraint("id", name=op.f("service_prices_pkey")),
        sa.UniqueConstraint(
            "service_type",
            "variant",
            "effective_from",
            name=op.f("service_prices_service_type_variant_effective_from_key"),
            postgresql_nulls_not_distinct=True,
        ),
    )
    op.create_table(
        "usage_requests",
        sa.Column("org_id", sa.Uuid(), nullable=False),
        sa.Column("request_id", sa.String(length=255), nullable=False),
        sa.Column("user_id", sa.String(length=255), nullable=False),
        sa.Column("service_type", sa.String(length=100), nullable=False),
        sa.Column("fingerprint", sa.LargeBinary(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("credits", sa.BigInteger(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("occurred_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("settled_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "(state IN ('dead', 'discarded')) = (reason IS NOT NULL)",
            name=op.f("usage_requests_dead_reason_check"),
        ),
        sa.CheckConstraint(
            "state <> 'charged' OR credits > 0", name=op.f("usage_requests_charged_credits_check")
        ),
        sa.CheckConstraint(
            "state IN ('held', 'charged', 'released', 'expired', 'dead', 'discarded')",
            name=op.f("usage_requests_state_check"),
        ),
        sa.PrimaryKeyConstraint("org_id", "request_id", name=op.f("usage_requests_pkey")),
    )
    op.create_table(
        "organization_credit_pools",
        sa.Column("id", sa.Uuid(), server_default=sa.text("gen_random_uuid()"), nullable=False),
        sa.Column("org_id", sa.Uuid(), nullable=False),
        sa.Column("total_credits", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column(
            "allocated_credits", sa.BigInteger(), server_default=sa.text("0"), nullable=False
        ),
        sa.Column("used_credits", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column(
            "available_credits",
            sa.BigInteger(),
            sa.Computed("total_credits - allocated_credits", persisted=True),
            nullable=True,
        ),
        sa.Column(
            "monthly_refresh_amount", sa.BigInteger(), server_default=sa.text("0"), nullable=False
        ),
        sa.Column("last_refresh_date", sa.DateTime(timezone=True), nullable=True),
        sa.Column("next_refresh_date", sa.DateTime(timezone=True), nullable=True),
        sa.Column("allow_overage", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("overage_limit", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column(
            "overage_rate",
            sa.Numeric(precision=12, scale=6),
            server_default=sa.text("0"),
            nullable=False,
        ),
        sa.Column(
            "lifetime_purchased_credits",
            sa.BigInteger(),
            server_default=sa.text("0"),
            nullable=False,
        ),
        sa.Column(
            "lifetime_spent_amount",
            sa.Numeric(precision=14, scale=2),
            server_default=sa.text("0"),
            nullable=False,
        ),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.CheckConstraint(
            "allocated_credits BETWEEN 0 AND total_credits",
            name=op.f("organization_credit_pools_allocated_check"),
        ),
        sa.CheckConstraint(
            "monthly_refresh_amount >= 0", name=op.f("organization_credit_pools_refresh_check")
        ),
        sa.CheckConstraint(
            "overage_limit >= 0 AND overage_rate >= 0",
            name=op.f("organization_credit_pools_overage_check"),
        ),
        sa.CheckConstraint("used_credits >= 0", name=op.f("organization_credit_pools_used_check")),
        sa.ForeignKeyConstraint(
            ["org_id"], ["organizations.id"], name=op.f("organization_credit_pools_org_id_fkey")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("organization_credit_pools_pkey")),
        sa.UniqueConstraint("org_id", name=op.f("organization_credit_pools_org_id_key")),
        postgresql_with={"fillfactor": "70"},
    )
    op.create_table(
        "organization_members",
        sa.Column("org_id", sa.Uuid(), nullable=False),
        sa.Column("user_id", sa.String(length=255), nullable=False),
        sa.Column("role", sa.Text(), server_default=sa.text("'member'"), nullable=False),
        sa.Column("email", sa.Text(), nullable=True),
        sa.Column("name", sa.Text(), nullable=True),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.CheckConstraint(
            "role IN ('member', 'admin')", name=op.f("organization_members_role_check")
        ),
        sa.ForeignKeyConstraint(
            ["org_id"], ["organizations.id"], name=op.f("organization_members_org_id_fkey")
        ),
        sa.PrimaryKeyConstraint("org_id", "user_id", name=op.f("organization_members_pkey")),
    )
    op.create_index(
        op.f("organization_members_user_id_idx"), "organization_members", ["user_id"], unique=False
    )
    op.create_table(
        "organization_subscriptions",
        sa.Column("id", sa.Uuid(), server_default=sa.text("gen_random_uuid()"), nullable=False),
        sa.Column("org_id", sa.Uuid(), nullable=False),
        sa.Column("subscription_plan", sa.Text(), nullable=False),
        sa.Column("monthly_price", sa.Numeric(precision=12, scale=2), nullable=False),
        sa.Column("billing_cycle", sa.Text(), server_default=sa.text("'monthly'"), nullable=False),
        sa.Column("status", sa.Text(), server_default=sa.text("'active'"), nullable=False),
        sa.Column("trial_ends_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column(
            "current_period_start",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column(
            "current_period_end",
            sa.DateTime(timezone=True),
            server_default=sa.text("now() + interval '1 month'"),
            nullable=False,
        ),
        sa.Column("canceled_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("lago_subscription_id", sa.Text(), nullable=True),
        sa.Column("stripe_subscription_id", sa.Text(), nullable=True),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.CheckConstraint(
            "billing_cycle IN ('monthly', 'yearly', 'custom')",
            name=op.f("organization_subscriptions_billing_cycle_check"),
        ),
        sa.CheckConstraint(
            "status IN ('active', 'trialing', 'past_due', 'canceled', 'paused')",
            name=op.f("organization_subscriptions_status_check"),
        ),
        sa.CheckConstraint(
            "subscription_plan IN ('platform', 'byok', 'hybrid')",
            name=op.f("organization_subscriptions_subscription_plan_check"),
        ),
        sa.CheckConstraint(
            "monthly_price >= 0", name=op.f("organization_subscriptions_monthly_price_check")
        ),
        sa.ForeignKeyConstraint(
            ["org_id"], ["organizations.id"], name=op.f("organization_subscriptions_org_id_fkey")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("organization_subscriptions_pkey")),
    )
    op.create_index(
        "organization_subscriptions_one_live_key",
        "organization_subscriptions",
        ["org_id"],
        unique=True,
        postgresql_where=sa.text("status IN ('active', 'trialing', 'past_due', 'paused')"),
    )
    op.create_table(
        "user_credit_allocations",
        sa.Column("id", sa.Uuid(), server_default=sa.text("gen_random_uuid()"), nullable=False),
        sa.Column("org_id", sa.Uuid(), nullable=False),
        sa.Column("user_id", sa.String(length=255), nullable=False),
        sa.Column(
            "allocated_credits", sa.BigInteger(), server_default=sa.text("0"), nullable=False
        ),
        sa.Column("used_credits", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column(
            "remaining_credits",
            sa.BigInteger(),
            sa.Computed("allocated_credits - used_credits", persisted=True),
            nullable=True,
        ),
        sa.Column("held_credits", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("reset_period", sa.Text(), server_default=sa.text("'monthly'"), nullable=False),
        sa.Column("last_reset_date", sa.DateTime(timezone=True), nullable=True),
        sa.Column("next_reset_date", sa.DateTime(timezone=True), nullable=True),
        sa.Column("is_active", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("allocated_by", sa.String(length=255), nullable=True),
        sa.Column("notes", sa.Text(), nullable=True),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.CheckConstraint(
            "reset_period IN ('daily', 'weekly', 'monthly', 'never')",
            name=op.f("user_credit_allocations_reset_period_check"),
        ),
        sa.CheckConstraint(
            "used_credits + held_credits <= allocated_credits",
            name=op.f("user_credit_allocations_not_overspent_check"),
        ),
        sa.CheckConstraint(
            "used_credits >= 0 AND held_credits >= 0",
            name=op.f("user_credit_allocations_used_check"),
        ),
        sa.ForeignKeyConstraint(
            ["org_id"], ["organizations.id"], name=op.f("user_credit_allocations_org_id_fkey")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("user_credit_allocations_pkey")),
        sa.UniqueConstraint(
            "org_id", "user_id", name=op.f("user_credit_allocations_org_id_user_id_key")
        ),
        postgresql_with={"fillfactor": "70"},
    )
    op.create_table(
        "credit_transactions",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("org_id", sa.Uuid(), nullable=False),
        sa.Column("user_id", sa.String(length=255), nullable=True),
        sa.Column("allocation_id", sa.Uuid(), nullable=True),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("credits", sa.BigInteger(), nullable=False),
        sa.Column(
            "amount", sa.Numeric(precision=14, scale=2), server_default=sa.text("0"), nullable=False
        ),
        sa.Column("actor", sa.String(length=255), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.CheckConstraint(
            "(kind = 'allocation') = (allocation_id IS NOT NULL)",
            name=op.f("credit_transactions_allocation_check"),
        ),
        sa.CheckConstraint(
            "kind IN ('purchase', 'grant', 'refund', 'adjustment', 'refresh', 'allocation')",
            name=op.f("credit_transactions_kind_check"),
        ),
        sa.CheckConstraint("credits <> 0", name=op.f("credit_transactions_credits_check")),
        sa.ForeignKeyConstraint(
            ["allocation_id"],
            ["user_credit_allocations.id"],
            name=op.f("credit_transactions_allocation_id_fkey"),
        ),
        sa.ForeignKeyConstraint(
            ["org_id"], ["organizations.id"], name=op.f("credit_transactions_org_id_fkey")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("credit_transactions_pkey")),
    )
    op.create_index(
        op.f("credit_transactions_org_id_created_at_idx"),
        "credit_transactions",
        ["org_id", "created_at"],
        unique=False,
    )
    op.create_table(
        "credit_usage_attribution",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("org_id", sa.Uuid(), nullable=False),
        sa.Column("user_id", sa.String(length=255), nullable=False),
        sa.Column("allocation_id", sa.Uuid(), nullable=False),
        sa.Column("credits_used", sa.BigInteger(), nullable=False),
        sa.Column("service_type", sa.String(length=100), nullable=False),
        sa.Column("service_name", sa.String(length=200), nullable=True),
        sa.Column("variant", sa.String(length=100), nullable=True),
        sa.Column("quantity", sa.Numeric(), server_default=sa.text("1"), nullable=False),
        sa.Column(
            "api_cost",
            sa.Numeric(precision=14, scale=6),
            server_default=sa.text("0"),
            nullable=False,
        ),
        sa.Column(
            "markup_applied",
            sa.Numeric(precision=14, scale=6),
            server_default=sa.text("0"),
            nullable=False,
        ),
        sa.Column(
            "total_cost",
            sa.Numeric(precision=15, scale=6),
            sa.Computed("api_cost + markup_applied", persisted=True),
            nullable=True,
        ),
        sa.Column("key_source", sa.Text(), server_default=sa.text("'managed'"), nullable=False),
        sa.Column("request_id", sa.String(length=255), nullable=False),
        sa.Column(
            "request_metadata",
            postgresql.JSONB(astext_type=sa.Text()),
            server_default=sa.text("'{}'"),
            nullable=False,
        ),
        sa.Column("source", sa.Text(), server_default=sa.text("'loopnet'"), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column(
            "occurred_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.ForeignKeyConstraint(
            ["allocation_id"],
            ["user_credit_allocations.id"],
            name=op.f("credit_usage_attribution_allocation_id_fkey"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("credit_usage_attribution_pkey")),
    )
    op.create_index(
        op.f("credit_usage_attribution_org_id_occurred_at_idx"),
        "credit_usage_attribution",
        ["org_id", "occurred_at"],
        unique=False,
    )
    op.create_table(
        "org_billing_history",
        sa.Column("id", sa.Uuid(), server_default=sa.text("gen_random_uuid()"), nullable=False),
        sa.Column("org_id", sa.Uuid(), nullable=False),
        sa.Column("subscription_id", sa.Uuid(), nullable=True),
        sa.Column("event_type", sa.Text(), nullable=False),
        sa.Column(
            "amount", sa.Numeric(precision=14, scale=2), server_default=sa.text("0"), nullable=False
        ),
        sa.Column("currency", sa.Text(), server_default=sa.text("'USD'"), nullable=False),
        sa.Column("payment_status", sa.Text(), server_default=sa.text("'pending'"), nullable=False),
        sa.Column("payment_method", sa.Text(), nullable=True),
        sa.Column("paid_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("period_start", sa.DateTime(timezone=True), nullable=True),
        sa.Column("period_end", sa.DateTime(timezone=True), nullable=True),
        sa.Column(
            "event_metadata",
            postgresql.JSONB(astext_type=sa.Text()),
            server_default=sa.text("'{}'"),
            nullable=False,
        ),
        sa.Column("notes", sa.Text(), nullable=True),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.CheckConstraint(
            "event_type IN ('invoice_created', 'invoice_paid', 'invoice_failed', 'subscription_created', 'subscription_upgraded', 'subscription_downgraded', 'subscription_canceled', 'credit_purchase', 'credit_refund', 'overage_charged')",
            name=op.f("org_billing_history_event_type_check"),
        ),
        sa.ForeignKeyConstraint(
            ["org_id"], ["organizations.id"], name=op.f("org_billing_history_org_id_fkey")
        ),
        sa.ForeignKeyConstraint(
            ["subscription_id"],
            ["organization_subscriptions.id"],
            name=op.f("org_billing_history_subscription_id_fkey"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("org_billing_history_pkey")),
    )
    op.create_index(
        op.f("org_billing_history_org_id_created_at_idx"),
        "org_billing_history",
        ["org_id", "created_at"],
        unique=False,
    )
    for name in (*sql.FUNCTIONS, *sql.VIEWS):
        op.execute(sql.statement(name))
    op.bulk_insert(
        service_prices,
        [
            {
                "service_type": price.service_type,
                "variant": price.variant,
                "credits": price.credits,
                "unit": price.unit,
                "position": price.position,
                "effective_from": price.effective_from,
            }
            for price in INITIAL_PRICES
        ],
    )


def downgrade() -> None:
    for view in sql.VIEWS:
        op.execute(f"DROP VIEW {view}")
    op.drop_index(
        op.f("org_billing_history_org_id_created_at_idx"), table_name="org_billing_history"
    )
    op.drop_table("org_billing_history")
    op.drop_index(
        op.f("credit_usage_attribution_org_id_occurred_at_idx"),
        table_name="credit_usage_attribution",
    )
    op.drop_table("credit_usage_attribution")
    op.drop_index(
        op.f("credit_transactions_org_id_created_at_idx"), table_name="credit_transactions"
    )
    op.drop_table("credit_transactions")
    op.drop_table("user_credit_allocations")
    op.drop_index(
        "organization_subscriptions_one_live_key",
        table_name="organization_subscriptions",
        postgresql_where=sa.text("status IN ('active', 'trialing', 'past_due', 'paused')"),
    )
    op.drop_table("organization_subscriptions")
    op.drop_index(op.f("organization_members_user_id_idx"), table_name="organization_members")
    op.drop_table("organization_members")
    op.drop_table("organization_credit_pools")
    op.drop_table("usage_requests")
    op.drop_table("service_prices")
    op.drop_table("organizations")
    op.drop_index(
        "dead_letters_request_key",
        table_name="dead_letters",
        postgresql_where=sa.text("fingerprint IS NOT NULL"),
    )
    op.drop_index(
        "dead_letters_open_idx",
        table_name="dead_letters",
        postgresql_where=sa.text("state = 'open'"),
    )
    op.drop_index(
        "dead_letters_entry_key",
        table_name="dead_letters",
        postgresql_where=sa.text("fingerprint IS NULL"),
    )
    op.drop_table("dead_letters")
    for function in sql.FUNCTIONS:
        op.execute(f"DROP FUNCTION {function}")
