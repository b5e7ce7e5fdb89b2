"""PostgreSQL through psycopg: writers of one agent wait for each other, those of different agents do not."""

from __future__ import annotations

import sqlalchemy as sa

from mplus_agents.errors import InvalidInputError

__all__ = ["PostgresqlBackend", "create_postgresql_engine"]

# By prefix of the SQLSTATE, the most telling first.
_REASONS = {
    "55P03": "the agent is locked: another writer held it longer than the timeout",
    "40": "the database gave the transaction up because of others at the same time; call again",
    "53100": "the disk is full",
    "53300": "the server has no connection left",
    "08": "the connection to the server is lost",
    "57P0": "the server is shutting down or starting up",
    "25006": "the database is read-only",
    "42501": "no permission; the user needs to create and use tables in the schema, and to create it if there is none",
    "23": "a constraint of the schema does not hold",
}
_LOCK = 0x6D706C7573  # "mplus"; any number that no other application uses


def create_postgresql_engine(url: sa.URL) -> sa.Engine:
    """Make an Engine whose connections are checked before use, as servers restart.

    Args:
        url: The URL; its driver is psycopg, also if it names none.

    Raises:
        InvalidInputError: If psycopg is not installed.
    """
    try:
        return sa.create_engine(
            url.set(drivername="postgresql+psycopg"), pool_size=8, max_overflow=56, pool_pre_ping=True
        )
    except ImportError as error:
        allowed = "such a URL with psycopg installed (pip install 'mplus-agents[postgres]')"
        raise InvalidInputError("target", url.render_as_string(hide_password=True), allowed) from error


class PostgresqlBackend:
    """PostgreSQL.

    Reads see one moment. Writes lock their agent's row, and are on disk when they return, whatever the server's setting
    of synchronous_commit.

    Args:
        busy_timeout_s: How long to wait for another writer of the same agent, in seconds.
        schema: Where the tables are; the user's default schema if None.
    """

    has_one_writer = False
    has_one_connection = False

    def __init__(self, busy_timeout_s: float, schema: str | None) -> None:
        timeout_ms = max(1, int(busy_timeout_s * 1000))  # 0 would mean to wait for ever
        durable = f"SET LOCAL lock_timeout = {timeout_ms}; SET LOCAL synchronous_commit = on"
        self._schema = schema
        # Doubled once for SQL, and once for psycopg, where % is a placeholder.
        self._quoted = '"' + (schema or "").replace('"', '""').replace("%", "%%") + '"'
        self._read_settings = "" if schema is None else f"SET LOCAL search_path TO {self._quoted}"
        self._write_settings = "; ".join(filter(None, (durable, self._read_settings)))

    def check_free(self, engine: sa.Engine) -> None:
        """Do nothing: there are as many connections as are needed."""

    def prepare(self, connection: sa.Connection, *, is_write: bool) -> None:
        """Set the isolation: writes see what others have committed when they get their lock, reads see one moment.

        Args:
            connection: The connection; its pool resets it afterwards.
            is_write: Whether the transaction writes.
        """
        connection.execution_options(
            isolation_level="READ COMMITTED" if is_write else "REPEATABLE READ", postgresql_readonly=not is_write
        )

    def begin(self, connection: sa.Connection, *, is_write: bool) -> None:
        """Set what holds until the transaction ends.

        Args:
            connection: The connection.
            is_write: Whether the transaction writes.
        """
        settings = self._write_settings if is_write else self._read_settings
        if settings:
            connection.exec_driver_sql(settings)

    def lock_schema(self, connection: sa.Connection) -> None:
        """Let one process at a time create or upgrade the tables, and make the schema if need be.

        Args:
            connection: In a write transaction.
        """
        self.lock_deletions(connection)
        # Not IF NOT EXISTS, which needs the right to create schemas also where this one is there already.
        if self._schema is not None and not sa.inspect(connection).has_schema(self._schema):
            connection.exec_driver_sql(f"CREATE SCHEMA {self._quoted}")

    def lock_deletions(self, connection: sa.Connection) -> None:
        """Let one process at a time delete agents, so that each sees what the one before left.

        Args:
            connection: In a write transaction.
        """
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))

    def reason(self, error: BaseException | None) -> str:
        """Say what an error of psycopg means, in one line.

        Args:
            error: The error.
        """
        first_line = str(error).strip().split("\n")[0]
        state = getattr(error, "sqlstate", None)
        for prefix, reason in _REASONS.items():
            if state is not None and state.startswith(prefix):
                return f"{reason}: {first_line}" if prefix in ("08", "23") else reason
        if state is None and type(error).__name__ == "OperationalError":
            return f"the server cannot be reached: {first_line}"
        return f"the database failed: {first_line}"
