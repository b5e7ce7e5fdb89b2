"""Creates the schema, or brings it up to this version, through the migrations in this package."""

from __future__ import annotations

import threading
from pathlib import Path

import sqlalchemy as sa

from mplus_agents.errors import SchemaVersionError
from mplus_agents.store.connection import Database
from mplus_agents.store.schema import HEAD_REVISION, VERSION_TABLE

__all__ = ["upgrade_schema"]

# Alembic keeps the migration at work in module globals.
_alembic_lock = threading.Lock()


def upgrade_schema(database: Database) -> None:
    """Create or upgrade the tables; several processes may do so at the same time.

    Args:
        database: The database.

    Raises:
        SchemaVersionError: If the schema is newer than this version of the package; nothing is changed then.
        StoreError: If the database fails; nothing is changed then.
    """
    with database.read() as connection:
        revision = _current_revision(connection)
    if revision == HEAD_REVISION:
        return
    # Imported late: opening a database that is up to date needs none of it.
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    # Found through this package, so that it works from a wheel; ConfigParser reads % as its own.
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    _refuse_unknown(revision, known, database.url)
    with _alembic_lock, database.write() as connection:
        database.lock_schema(connection)
        # Another process may have been first, perhaps a newer one.
        _refuse_unknown(_current_revision(connection), known, database.url)
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _refuse_unknown(revision: str | None, known: set[str], url: str) -> None:
    if revision is not None and revision not in known:
        raise SchemaVersionError(
            f"the database has schema {revision!r}; this version of mplus-agents knows up to {HEAD_REVISION!r} ({url})"
        )


def _current_revision(connection: sa.Connection) -> str | None:
    if not sa.inspect(connection).has_table(VERSION_TABLE):
        return None
    revision: str | None = connection.scalar(sa.select(sa.column("version_num")).select_from(sa.table(VERSION_TABLE)))
    return revision
