"""Movements of credits: more kinds, idempotency keys, overage and corrections."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from migrations import sql

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

FUNCTIONS = (
    "overage_room",
    "lend_overage",
    "add_pool_credits",
    "fund_allocation",
)
REPLACED = (
    "add_credits_to_pool",
    "allocate_credits_to_user",
    "has_sufficient_credits",
    "deduct_credits",
    "place_hold",
)
# Corrections are no requests of their own.
VIEWS = ("top_credit_users_by_org", "org_billing_metrics")
OLD_KINDS = "'purchase', 'grant', 'refund', 'adjustment', 'refresh', 'allocation'"
POOL_KINDS = "'purchase', 'grant', 'refund', 'adjustment', 'refresh', 'overage'"
USER_KINDS = "'allocation', 'reset', 'reclaim', 'late_usage', 'correction'"


def upgrade() -> None:
    op.drop_constraint(op.f("credit_transactions_kind_check"), "credit_transactions")
    op.drop_constraint(op.f("credit_transactions_allocation_check"), "credit_transactions")
    op.create_check_constraint(
        op.f("credit_transactions_kind_check"),
        "credit_transactions",
        f"kind IN ({POOL_KINDS}, {USER_KINDS})",
    )
    op.create_check_constraint(
        op.f("credit_transactions_allocation_check"),
        "credit_transactions",
        f"(kind IN ({USER_KINDS})) = (allocation_id IS NOT NULL)",
    )
    op.add_column("credit_transactions", sa.Column("request_id", sa.String(length=255)))
    op.create_table(
        "idempotency_keys",
        sa.Column("org_id", sa.Uuid(), nullable=False),
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.Column("act", sa.Text(), nullable=False),
        sa.Column("arguments", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("result", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.ForeignKeyConstraint(
            ["org_id"], ["organizations.id"], name=op.f("idempotency_keys_org_id_fkey")
        ),
        sa.PrimaryKeyConstraint("org_id", "key", name=op.f("idempotency_keys_pkey")),
    )
    for column in ("overage_credits", "overage_billed_credits"):
        op.add_column(
            "organization_credit_pools",
            sa.Column(column, sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        )
    op.drop_constraint(
        op.f("organization_credit_pools_overage_check"), "organization_credit_pools"
    )
    op.create_check_constraint(
        op.f("organization_credit_pools_overage_check"),
        "organization_credit_pools",
        "overage_limit >= 0 AND overage_rate >= 0 AND overage_credits >= 0",
    )
    op.add_column(
        "credit_usage_attribution",
        sa.Column("overage_credits", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
    )
    op.add_column("credit_usage_attribution", sa.Column("corrects", sa.BigInteger()))
    op.add_column("credit_usage_attribution", sa.Column("actor", sa.String(length=255)))
    op.add_column("credit_usage_attribution", sa.Column("reason", sa.Text()))
    op.create_foreign_key(
        op.f("credit_usage_attribution_corrects_fkey"),
        "credit_usage_attribution",
        "credit_usage_attribution",
        ["corrects"],
        ["id"],
    )
    op.create_check_constraint(
        op.f("credit_usage_attribution_correction_check"),
        "credit_usage_attribution",
        "CASE WHEN corrects IS NULL THEN credits_used > 0 AND overage_credits >= 0"
        " ELSE credits_used <> 0 AND actor IS NOT NULL AND reason IS NOT NULL END",
    )
    op.drop_constraint(op.f("usage_requests_held_check"), "usage_requests")
    op.create_check_constraint(
        op.f("usage_requests_held_check"),
        "usage_requests",
        "state <> 'held' OR (held_credits BETWEEN 0 AND credits AND hold_expires_at IS NOT NULL)",
    )
    op.create_index(
        "usage_requests_overage_holds_idx",
        "usage_requests",
        ["org_id"],
        postgresql_where=sa.text("state = 'held' AND held_credits < credits"),
    )
    op.create_index(
        "dead_letters_debts_idx",
        "dead_letters",
        ["org_id", "user_id"],
        postgresql_where=sa.text(
            "state = 'open' AND reason IN ('insufficient_credits', 'no_allocation')"
        ),
    )
    for name in (*FUNCTIONS, *REPLACED, *VIEWS):
        op.execute(sql.statement(name))
    op.execute(
        """
        CREATE TRIGGER append_only
        BEFORE UPDATE OR DELETE OR TRUNCATE ON service_prices
        FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()
        """
    )


def downgrade() -> None:
    op.execute("DROP TRIGGER append_only ON service_prices")
    for name in VIEWS:
        op.execute(f"DROP VIEW {name}")
    for name in FUNCTIONS:
        op.execute(f"DROP FUNCTION {name}")
    op.drop_index("dead_letters_debts_idx", table_name="dead_letters")
    op.drop_index("usage_requests_overage_holds_idx", table_name="usage_requests")
    op.drop_constraint(op.f("usage_requests_held_check"), "usage_requests")
    op.execute(
        "UPDATE usage_requests SET state = 'released' WHERE state = 'held' AND held_credits = 0"
    )
    op.create_check_constraint(
        op.f("usage_requests_held_check"),
        "usage_requests",
        "state <> 'held' OR (held_credits > 0 AND hold_expires_at IS NOT NULL)",
    )
    for column in ("reason", "actor", "corrects", "overage_credits"):
        op.drop_column("credit_usage_attribution", column)
    op.drop_constraint(
        op.f("organization_credit_pools_overage_check"), "organization_credit_pools"
    )
    for column in ("overage_billed_credits", "overage_credits"):
        op.drop_column("organization_credit_pools", column)
    op.create_check_constraint(
        op.f("organization_credit_pools_overage_check"),
        "organization_credit_pools",
        "overage_limit >= 0 AND overage_rate >= 0",
    )
    op.drop_table("idempotency_keys")
    op.drop_column("credit_transactions", "request_id")
    op.drop_constraint(op.f("credit_transactions_allocation_check"), "credit_transactions")
    op.drop_constraint(op.f("credit_transactions_kind_check"), "credit_transactions")
    op.execute("ALTER TABLE credit_transactions DISABLE TRIGGER append_only")
    op.execute(
        """
        UPDATE credit_transactions
        SET kind = CASE
            WHEN allocation_id IS NOT NULL THEN 'allocation'
            WHEN kind = 'overage' THEN 'adjustment'
            ELSE kind
        END
        """
    )
    op.execute("ALTER TABLE credit_transactions ENABLE TRIGGER append_only")
    op.create_check_constraint(
        op.f("credit_transactions_kind_check"), "credit_transactions", f"kind IN ({OLD_KINDS})"
    )
    op.create_check_constraint(
        op.f("credit_transactions_allocation_check"),
        "credit_transactions",
        "(kind = 'allocation') = (allocation_id IS NOT NULL)",
    )
