"""The first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# Written out, not taken from the metadata: a migration must go on making what it made when it was released.
_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Create all tables."""
    _create_agents()
    _create_log()
    _create_memory()
    if op.get_bind().dialect.supports_alter:  # SQLite has the constraint in its CREATE TABLE
        op.create_foreign_key(
            "fk_mplus_agent_head_commit_id",
            "mplus_agent",
            "mplus_commit",
            ["head_commit_id"],
            ["id"],
            deferrable=True,
            initially="DEFERRED",
        )
    if op.get_bind().dialect.name == "postgresql":  # it would try to compress what cannot be compressed
        for table, column in (("page", "blob"), ("injection", "retrieval_keys"), ("head_hidden", "blob")):
            op.execute(f"ALTER TABLE mplus_{table} ALTER COLUMN {column} SET STORAGE EXTERNAL")


def downgrade() -> None:
    """Refuse: there is nothing before the first schema."""
    raise RuntimeError("0001 is the first schema")


def _foreign_key(table: str, column: str, target: str, *, ondelete: str | None = "CASCADE") -> sa.ForeignKeyConstraint:
    name = f"fk_{table}_{column}"
    if ondelete is None:
        return sa.ForeignKeyConstraint([column], [target], name=name, deferrable=True, initially="DEFERRED")
    return sa.ForeignKeyConstraint([column], [target], name=name, ondelete=ondelete)


def _create_agents() -> None:
    op.create_table(
        "mplus_agent",
        sa.Column("id", _ID, autoincrement=True, nullable=False),
        sa.Column("namespace", sa.LargeBinary(), nullable=False),
        sa.Column("name", sa.LargeBinary(), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("settings", sa.Text(), nullable=False),
        sa.Column("head_commit_id", _ID, nullable=True),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("next_event_seq", sa.BigInteger(), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_mplus_agent"),
        sa.UniqueConstraint("namespace", "name", name="uq_mplus_agent_namespace"),
        sa.ForeignKeyConstraint(
            ["head_commit_id"],
            ["mplus_commit.id"],
            name="fk_mplus_agent_head_commit_id",
            deferrable=True,
            initially="DEFERRED",
            use_alter=True,
        ),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_mplus_agent_head_commit_id", "mplus_agent", ["head_commit_id"])


def _create_log() -> None:
    op.create_table(
        "mplus_event",
        sa.Column("agent_id", _ID, autoincrement=False, nullable=False),
        sa.Column("seq", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("role", sa.LargeBinary(), nullable=True),
        sa.Column("source_id", sa.LargeBinary(), nullable=True),
        sa.Column("offset", sa.BigInteger(), nullable=True),
        sa.Column("num_tokens", sa.BigInteger(), nullable=False),
        sa.Column("policy_version", sa.Integer(), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("text", sa.LargeBinary(), nullable=True),
        sa.PrimaryKeyConstraint("agent_id", "seq", name="pk_mplus_event"),
        _foreign_key("mplus_event", "agent_id", "mplus_agent.id"),
    )
    op.create_table(
        "mplus_window",
        sa.Column("agent_id", _ID, autoincrement=False, nullable=False),
        sa.Column("event_seq", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.PrimaryKeyConstraint("agent_id", "event_seq", name="pk_mplus_window"),
        _foreign_key("mplus_window", "agent_id", "mplus_agent.id"),
        sa.ForeignKeyConstraint(
            ["agent_id", "event_seq"],
            ["mplus_event.agent_id", "mplus_event.seq"],
            name="fk_mplus_window_event",
            ondelete="CASCADE",
        ),
    )
    op.create_table(
        "mplus_source",
        sa.Column("agent_id", _ID, autoincrement=False, nullable=False),
        sa.Column("source_id", sa.LargeBinary(), nullable=False),
        sa.Column("next_offset", sa.BigInteger(), nullable=False),
        sa.Column("prefix_digest", sa.String(128), nullable=False),
        sa.Column("is_done", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("agent_id", "source_id", name="pk_mplus_source"),
        _foreign_key("mplus_source", "agent_id", "mplus_agent.id"),
    )


def _create_memory() -> None:
    op.create_table(
        "mplus_injection",
        sa.Column("id", _ID, autoincrement=True, nullable=False),
        sa.Column("agent_id", _ID, nullable=False),
        sa.Column("num_text_tokens", sa.BigInteger(), nullable=False),
        sa.Column("event_seqs", sa.Text(), nullable=False),
        sa.Column("page_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("retrieval_keys", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_mplus_injection"),
        _foreign_key("mplus_injection", "agent_id", "mplus_agent.id"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_mplus_injection_agent_id", "mplus_injection", ["agent_id"])
    op.create_table(
        "mplus_page",
        sa.Column("injection_id", _ID, autoincrement=False, nullable=False),
        sa.Column("layer", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("page_idx", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("blob", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("injection_id", "layer", "page_idx", name="pk_mplus_page"),
        _foreign_key("mplus_page", "injection_id", "mplus_injection.id"),
    )
    op.create_table(
        "mplus_commit",
        sa.Column("id", _ID, autoincrement=True, nullable=False),
        sa.Column("parent_id", _ID, nullable=True),
        sa.Column("agent_id", _ID, nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("injection_id", _ID, nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("dropped", sa.LargeBinary(), nullable=False),
        sa.Column("evicted", sa.LargeBinary(), nullable=False),
        sa.Column("snapshot", sa.LargeBinary(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_mplus_commit"),
        _foreign_key("mplus_commit", "parent_id", "mplus_commit.id", ondelete=None),
        _foreign_key("mplus_commit", "agent_id", "mplus_agent.id"),
        _foreign_key("mplus_commit", "injection_id", "mplus_injection.id", ondelete=None),
        sqlite_autoincrement=True,
    )
    for column in ("parent_id", "agent_id", "injection_id"):
        op.create_index(f"ix_mplus_commit_{column}", "mplus_commit", [column])
    op.create_table(
        "mplus_head_hidden",
        sa.Column("agent_id", _ID, autoincrement=False, nullable=False),
        sa.Column("commit_id", _ID, nullable=False),
        sa.Column("blob", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("agent_id", name="pk_mplus_head_hidden"),
        _foreign_key("mplus_head_hidden", "agent_id", "mplus_agent.id"),
        _foreign_key("mplus_head_hidden", "commit_id", "mplus_commit.id"),
    )
    op.create_index("ix_mplus_head_hidden_commit_id", "mplus_head_hidden", ["commit_id"])
