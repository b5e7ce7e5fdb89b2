"""Run by Alembic: migrates the connection that `upgrade_schema` passes, inside its transaction."""

from __future__ import annotations

from alembic import context

from mplus_agents.store.schema import METADATA, VERSION_TABLE

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    version_table=VERSION_TABLE,
)
with context.begin_transaction():
    context.run_migrations()
