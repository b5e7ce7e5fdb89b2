"""The tables, as SQLAlchemy metadata. docs/schema.md explains them; `migrations/` creates and upgrades them.

Text that users or their tools choose is kept as bytes of UTF-8: PostgreSQL refuses NUL in its text type.
"""

from __future__ import annotations

from datetime import UTC, datetime

import sqlalchemy as sa

__all__ = [
    "AGENT",
    "COMMIT",
    "EVENT",
    "HEAD_HIDDEN",
    "HEAD_REVISION",
    "INJECTION",
    "METADATA",
    "PAGE",
    "PAGE_TOKENS",
    "SOURCE",
    "TAG",
    "VERSION_TABLE",
    "WINDOW",
    "UtcDateTime",
]

PAGE_TOKENS = 32
"""Tokens per page of keys and values."""

VERSION_TABLE = "mplus_alembic_version"
"""Alembic's table; its own name, since a host application may have an `alembic_version` in the same database."""

HEAD_REVISION = "0002"
"""The newest migration. Opening a database that is there already needs no Alembic."""


class UtcDateTime(sa.types.TypeDecorator[datetime]):
    """A point in time: timezone-aware UTC in Python, without a zone in databases that have none."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """Convert to UTC on the way in."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """Name the zone on the way out."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


METADATA = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
    }
)

# SQLite counts ids up by itself only in a column whose type is exactly INTEGER (64 bits there anyway).
_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _created_at() -> sa.Column[datetime]:
    return sa.Column("created_at", UtcDateTime(), nullable=False)


def _agent_fk(*, primary_key: bool = False) -> sa.Column[int]:
    key = sa.ForeignKey("mplus_agent.id", ondelete="CASCADE")
    return sa.Column("agent_id", _ID, key, primary_key=primary_key, autoincrement=False, nullable=False)


AGENT = sa.Table(
    "mplus_agent",
    METADATA,
    sa.Column("id", _ID, primary_key=True, autoincrement=True),
    sa.Column("namespace", sa.LargeBinary, nullable=False),
    sa.Column("name", sa.LargeBinary, nullable=False),
    sa.Column("fingerprint", sa.Text, nullable=False),
    sa.Column("seed", sa.BigInteger, nullable=False),
    sa.Column("settings", sa.Text, nullable=False),
    sa.Column(
        "head_commit_id",
        _ID,
        # Agents name commits and commits name agents: one of the two constraints has to come after the tables.
        sa.ForeignKey("mplus_commit.id", use_alter=True, deferrable=True, initially="DEFERRED"),
        nullable=True,
        index=True,
    ),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("next_event_seq", sa.BigInteger, nullable=False),
    _created_at(),
    sa.UniqueConstraint("namespace", "name"),
    # An id is never given twice: a record of a deleted agent must not match a new one.
    sqlite_autoincrement=True,
)

EVENT = sa.Table(
    "mplus_event",
    METADATA,
    _agent_fk(primary_key=True),
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("role", sa.LargeBinary, nullable=True),
    sa.Column("source_id", sa.LargeBinary, nullable=True),
    sa.Column("offset", sa.BigInteger, nullable=True),
    sa.Column("num_tokens", sa.BigInteger, nullable=False),
    sa.Column("policy_version", sa.Integer, nullable=False),
    _created_at(),
    sa.Column("text", sa.LargeBinary, nullable=True),
)

WINDOW = sa.Table(
    "mplus_window",
    METADATA,
    _agent_fk(primary_key=True),
    sa.Column("event_seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.ForeignKeyConstraint(
        ["agent_id", "event_seq"],
        ["mplus_event.agent_id", "mplus_event.seq"],
        ondelete="CASCADE",
        name="fk_mplus_window_event",
    ),
)

SOURCE = sa.Table(
    "mplus_source",
    METADATA,
    _agent_fk(primary_key=True),
    sa.Column("source_id", sa.LargeBinary, primary_key=True),
    sa.Column("next_offset", sa.BigInteger, nullable=False),
    sa.Column("prefix_digest", sa.String(128), nullable=False),
    sa.Column("is_done", sa.Boolean, nullable=False),
)

INJECTION = sa.Table(
    "mplus_injection",
    METADATA,
    sa.Column("id", _ID, primary_key=True, autoincrement=True),
    _agent_fk(),
    sa.Column("num_text_tokens", sa.BigInteger, nullable=False),
    sa.Column("event_seqs", sa.Text, nullable=False),
    sa.Column("page_bytes", sa.BigInteger, nullable=False),
    _created_at(),
    sa.Column("retrieval_keys", sa.LargeBinary, nullable=False),
    sa.Index("ix_mplus_injection_agent_id", "agent_id"),
    sqlite_autoincrement=True,
)

PAGE = sa.Table(
    "mplus_page",
    METADATA,
    sa.Column(
        "injection_id",
        _ID,
        sa.ForeignKey("mplus_injection.id", ondelete="CASCADE"),
        primary_key=True,
        autoincrement=False,
    ),
    sa.Column("layer", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("page_idx", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("blob", sa.LargeBinary, nullable=False),
)

# The blobs stand last: SQLite then walks a chain without touching their pages.
COMMIT = sa.Table(
    "mplus_commit",
    METADATA,
    sa.Column("id", _ID, primary_key=True, autoincrement=True),
    # No cascade along parents or injections: both may be reached from another agent's chain.
    sa.Column(
        "parent_id",
        _ID,
        sa.ForeignKey("mplus_commit.id", deferrable=True, initially="DEFERRED"),
        nullable=True,
        index=True,
    ),
    _agent_fk(),
    sa.Column("step", sa.BigInteger, nullable=False),
    sa.Column(
        "injection_id",
        _ID,
        sa.ForeignKey("mplus_injection.id", deferrable=True, initially="DEFERRED"),
        nullable=False,
        index=True,
    ),
    _created_at(),
    sa.Column("dropped", sa.LargeBinary, nullable=False),
    sa.Column("evicted", sa.LargeBinary, nullable=False),
    sa.Column("snapshot", sa.LargeBinary, nullable=True),
    sa.Index("ix_mplus_commit_agent_id", "agent_id"),
    sqlite_autoincrement=True,
)

HEAD_HIDDEN = sa.Table(
    "mplus_head_hidden",
    METADATA,
    _agent_fk(primary_key=True),
    sa.Column("commit_id", _ID, sa.ForeignKey("mplus_commit.id", ondelete="CASCADE"), nullable=False, index=True),
    sa.Column("blob", sa.LargeBinary, nullable=False),
)

TAG = sa.Table(
    "mplus_tag",
    METADATA,
    _agent_fk(primary_key=True),
    sa.Column("name", sa.LargeBinary, primary_key=True),
    sa.Column(
        "commit_id",
        _ID,
        sa.ForeignKey("mplus_commit.id", deferrable=True, initially="DEFERRED"),
        nullable=False,
        index=True,
    ),
    _created_at(),
)
