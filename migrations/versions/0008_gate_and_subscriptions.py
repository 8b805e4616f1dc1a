"""The gate is for members and plans its statements once; subscriptions are found quickly."""

from alembic import op

from migrations import sql

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

FUNCTIONS = (
    "price_of",
    "usage_fingerprint",
    "why_not_spend",
    "release_hold",
    "place_hold",
    "deduct_credits",
)


def upgrade() -> None:
    op.execute("DROP FUNCTION IF EXISTS release_hold(uuid, varchar, timestamptz)")
    for name in FUNCTIONS:
        op.execute(sql.statement(name))
    op.create_index(
        op.f("organization_subscriptions_org_id_idx"), "organization_subscriptions", ["org_id"]
    )


def downgrade() -> None:
    op.drop_index(op.f("organization_subscriptions_org_id_idx"))
