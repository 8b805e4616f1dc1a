"""Periods: what an allocation recurs to, its anchor, and a row for every closed period."""

import sqlalchemy as sa
from alembic import op

from migrations import sql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "user_credit_allocations",
        sa.Column("allowance_credits", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
    )
    op.add_column(
        "user_credit_allocations",
        sa.Column(
            "reset_anchor",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
    )
    op.execute(
        """
        UPDATE user_credit_allocations
        SET allowance_credits = allocated_credits,
            last_reset_date = coalesce(last_reset_date, created_at),
            next_reset_date = CASE WHEN reset_period <> 'never' THEN next_reset_date END,
            reset_anchor = coalesce(last_reset_date, created_at)
        """
    )
    op.alter_column(
        "user_credit_allocations",
        "last_reset_date",
        nullable=False,
        server_default=sa.text("now()"),
    )
    op.create_check_constraint(
        op.f("user_credit_allocations_allowance_check"),
        "user_credit_allocations",
        "allowance_credits >= 0",
    )
    op.create_check_constraint(
        op.f("user_credit_allocations_next_reset_check"),
        "user_credit_allocations",
        "next_reset_date > last_reset_date",
    )
    op.create_index(
        "user_credit_allocations_due_idx",
        "user_credit_allocations",
        ["next_reset_date"],
        postgresql_where=sa.text("is_active"),
    )
    op.add_column(
        "organization_credit_pools", sa.Column("refresh_anchor", sa.DateTime(timezone=True))
    )
    op.create_index(
        op.f("organization_credit_pools_next_refresh_date_idx"),
        "organization_credit_pools",
        ["next_refresh_date"],
    )
    op.create_table(
        "allocation_periods",
        sa.Column("allocation_id", sa.Uuid(), nullable=False),
        sa.Column("period_start", sa.DateTime(timezone=True), nullable=False),
        sa.Column("period_end", sa.DateTime(timezone=True), nullable=False),
        sa.Column(
            "allocated_credits", sa.BigInteger(), server_default=sa.text("0"), nullable=False
        ),
        sa.Column("used_credits", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("drawn_credits", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("short_credits", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.CheckConstraint("period_start < period_end", name=op.f("allocation_periods_order_check")),
        sa.CheckConstraint(
            "used_credits BETWEEN 0 AND allocated_credits",
            name=op.f("allocation_periods_used_check"),
        ),
        sa.ForeignKeyConstraint(
            ["allocation_id"],
            ["user_credit_allocations.id"],
            name=op.f("allocation_periods_allocation_id_fkey"),
        ),
        sa.PrimaryKeyConstraint(
            "allocation_id", "period_start", name=op.f("allocation_periods_pkey")
        ),
    )
    op.add_column(
        "credit_usage_attribution", sa.Column("period_start", sa.DateTime(timezone=True))
    )
    # No period was ever closed before this version, so every row is of its allocation's first.
    op.execute("ALTER TABLE credit_usage_attribution DISABLE TRIGGER append_only")
    op.execute(
        """
        UPDATE credit_usage_attribution u
        SET period_start = a.last_reset_date
        FROM user_credit_allocations a
        WHERE a.id = u.allocation_id
        """
    )
    op.execute("ALTER TABLE credit_usage_attribution ENABLE TRIGGER append_only")
    op.alter_column("credit_usage_attribution", "period_start", nullable=False)
    for name in ("period_end", "refuse_unknown_timezone"):
        op.execute(sql.statement(name))


def downgrade() -> None:
    op.execute("DROP TRIGGER timezone_exists ON organizations")
    op.execute("DROP FUNCTION refuse_unknown_timezone")
    op.execute("DROP FUNCTION period_end")
    op.drop_column("credit_usage_attribution", "period_start")
    op.drop_table("allocation_periods")
    op.drop_index(
        op.f("organization_credit_pools_next_refresh_date_idx"),
        table_name="organization_credit_pools",
    )
    op.drop_column("organization_credit_pools", "refresh_anchor")
    op.drop_index("user_credit_allocations_due_idx", table_name="user_credit_allocations")
    op.drop_constraint(
        op.f("user_credit_allocations_next_reset_check"), "user_credit_allocations"
    )
    op.alter_column(
        "user_credit_allocations", "last_reset_date", nullable=True, server_default=None
    )
    op.drop_column("user_credit_allocations", "reset_anchor")
    op.drop_column("user_credit_allocations", "allowance_credits")
