"""Tokens of services, kept as hashes."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "service_tokens",
        sa.Column("id", sa.Uuid(), server_default=sa.text("gen_random_uuid()"), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("token_hash", sa.LargeBinary(), nullable=False),
        sa.Column("scopes", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("created_by", sa.String(255), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("expires_at", sa.DateTime(timezone=True)),
        sa.Column("revoked_at", sa.DateTime(timezone=True)),
        sa.CheckConstraint(
            "octet_length(token_hash) = 32", name=op.f("service_tokens_token_hash_check")
        ),
        sa.CheckConstraint("cardinality(scopes) > 0", name=op.f("service_tokens_scopes_check")),
        sa.PrimaryKeyConstraint("id", name=op.f("service_tokens_pkey")),
        sa.UniqueConstraint("token_hash", name=op.f("service_tokens_token_hash_key")),
    )
    op.create_index(op.f("service_tokens_name_idx"), "service_tokens", ["name"])
    # Who had access is history: a token ends by being revoked, and stays on record.
    op.execute("REVOKE DELETE, TRUNCATE ON service_tokens FROM metering_service")


def downgrade() -> None:
    op.drop_table("service_tokens")
