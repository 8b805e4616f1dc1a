"""Holds: credits set aside for an operation before it runs."""

import sqlalchemy as sa
from alembic import op

from migrations import sql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

FUNCTIONS = ("price_of", "why_not_spend", "place_hold", "release_hold")


def upgrade() -> None:
    op.add_column("usage_requests", sa.Column("held_credits", sa.BigInteger()))
    op.add_column("usage_requests", sa.Column("hold_expires_at", sa.DateTime(timezone=True)))
    op.create_check_constraint(
        op.f("usage_requests_held_check"),
        "usage_requests",
        "state <> 'held' OR (held_credits > 0 AND hold_expires_at IS NOT NULL)",
    )
    op.create_index(
        "usage_requests_due_holds_idx",
        "usage_requests",
        ["hold_expires_at"],
        postgresql_where=sa.text("state = 'held'"),
    )
    for name in (*FUNCTIONS, "deduct_credits"):
        op.execute(sql.statement(name))


def downgrade() -> None:
    for name in FUNCTIONS:
        op.execute(f"DROP FUNCTION IF EXISTS {name}")
    op.execute(
        "UPDATE usage_requests SET state = 'released' WHERE state = 'held'"
    )
    op.execute("UPDATE user_credit_allocations SET held_credits = 0 WHERE held_credits > 0")
    op.drop_index("usage_requests_due_holds_idx", table_name="usage_requests")
    op.drop_constraint(op.f("usage_requests_held_check"), "usage_requests")
    op.drop_column("usage_requests", "hold_expires_at")
    op.drop_column("usage_requests", "held_credits")
