"""What the scheduled runs found, and the role that may add to the books but not rewrite them."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from migrations import sql

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "scheduled_runs",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("task", sa.Text(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("figures", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("scheduled_runs_pkey")),
    )
    op.create_index(
        op.f("scheduled_runs_task_started_at_idx"), "scheduled_runs", ["task", "started_at"]
    )
    op.execute(sql.statement("service_role"))


def downgrade() -> None:
    op.execute("DROP OWNED BY metering_service")
    op.drop_table("scheduled_runs")
