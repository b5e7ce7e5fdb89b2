"""Tags: names of commits."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "mplus_tag",
        sa.Column("agent_id", _ID, autoincrement=False, nullable=False),
        sa.Column("name", sa.LargeBinary(), nullable=False),
        sa.Column("commit_id", _ID, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("agent_id", "name", name="pk_mplus_tag"),
        sa.ForeignKeyConstraint(["agent_id"], ["mplus_agent.id"], name="fk_mplus_tag_agent_id", ondelete="CASCADE"),
        sa.ForeignKeyConstraint(
            ["commit_id"], ["mplus_commit.id"], name="fk_mplus_tag_commit_id", deferrable=True, initially="DEFERRED"
        ),
    )
    op.create_index("ix_mplus_tag_commit_id", "mplus_tag", ["commit_id"])


def downgrade() -> None:
    """Drop the table."""
    op.drop_table("mplus_tag")
