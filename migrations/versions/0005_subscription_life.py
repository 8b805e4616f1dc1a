"""The life of a subscription: its anchor, the length of custom cycles, the end that was asked for."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "organization_subscriptions",
        sa.Column(
            "billing_anchor",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
    )
    op.add_column("organization_subscriptions", sa.Column("cycle_days", sa.Integer()))
    op.add_column(
        "organization_subscriptions",
        sa.Column(
            "cancel_at_period_end", sa.Boolean(), server_default=sa.text("false"), nullable=False
        ),
    )
    op.execute("UPDATE organization_subscriptions SET billing_anchor = current_period_start")
    op.create_check_constraint(
        op.f("organization_subscriptions_period_check"),
        "organization_subscriptions",
        "current_period_start < current_period_end",
    )
    op.create_check_constraint(
        op.f("organization_subscriptions_cycle_days_check"),
        "organization_subscriptions",
        "cycle_days > 0",
    )
    op.create_index(
        "organization_subscriptions_due_idx",
        "organization_subscriptions",
        ["current_period_end"],
        postgresql_where=sa.text("status IN ('active', 'trialing', 'past_due', 'paused')"),
    )


def downgrade() -> None:
    op.drop_index("organization_subscriptions_due_idx", table_name="organization_subscriptions")
    for name in ("cycle_days", "period"):
        op.drop_constraint(
            op.f(f"organization_subscriptions_{name}_check"), "organization_subscriptions"
        )
    for column in ("cancel_at_period_end", "cycle_days", "billing_anchor"):
        op.drop_column("organization_subscriptions", column)
