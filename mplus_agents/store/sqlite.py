"""SQLite: durable connections, and transactions that begin when they are told to."""

from __future__ import annotations

import sqlite3
import time
from contextlib import suppress
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.pool import SingletonThreadPool, StaticPool

from mplus_agents.errors import InvalidInputError, StoreError

__all__ = ["LOCKED", "SqliteBackend", "create_sqlite_engine"]

LOCKED = "the database is locked: another writer held it longer than the timeout"

# By prefix of SQLite's own name of the error, the most telling first.
_REASONS = {
    "SQLITE_BUSY": LOCKED,
    "SQLITE_LOCKED": "the database is locked by another connection",
    "SQLITE_FULL": "the disk, or the database at its size limit, is full",
    "SQLITE_READONLY": "the database is read-only",
    "SQLITE_CANTOPEN": "the database file cannot be opened (does its folder exist, and may this user write there?)",
    "SQLITE_NOTADB": "the file is not an SQLite database",
    "SQLITE_CORRUPT": "the database file is damaged",
    "SQLITE_IOERR": "reading or writing the database file failed",
    "SQLITE_PERM": "no permission to use the database file",
    "SQLITE_TOOBIG": "a value is larger than SQLite stores in one row",
    "SQLITE_CONSTRAINT": "a constraint of the schema does not hold",
}


def create_sqlite_engine(url: sa.URL, busy_timeout_s: float) -> sa.Engine:
    """Make an Engine whose connections are shared by threads.

    Args:
        url: The URL, of SQLite's standard driver.
        busy_timeout_s: How long to wait for another writer, in seconds.

    Raises:
        StoreError: If the folder of the file does not exist.
    """
    if isinstance(sa.create_engine(url).pool, SingletonThreadPool):  # SQLAlchemy's choice for a database in memory
        return sa.create_engine(url, poolclass=StaticPool, connect_args={"check_same_thread": False})
    folder = Path(url.database or "").parent
    if not (url.database or "").startswith("file:") and not folder.is_dir():
        raise StoreError(f"the folder of the database does not exist ({url.render_as_string(hide_password=True)})")
    connect_args = {"timeout": busy_timeout_s, "check_same_thread": False}
    return sa.create_engine(url, connect_args=connect_args, pool_size=8, max_overflow=56)


class SqliteBackend:
    """SQLite through Python's own driver.

    Every connection has a write-ahead log, synchronous=FULL, foreign keys and a busy timeout. Writes take the write
    lock at once, so that they cannot fail half way because of another writer.

    Args:
        engine: The Engine.
        busy_timeout_s: How long to wait for another writer, in seconds.
        url: How messages name the database.

    Raises:
        InvalidInputError: If the Engine gives every thread a database of its own.
    """

    has_one_writer = True

    def __init__(self, engine: sa.Engine, busy_timeout_s: float, url: str) -> None:
        if isinstance(engine.pool, SingletonThreadPool):
            allowed = "for a database in memory, an Engine with poolclass=StaticPool (or the URL 'sqlite://')"
            raise InvalidInputError("target", engine, allowed)
        self._busy_timeout_s, self._url = busy_timeout_s, url
        self.has_one_connection = isinstance(engine.pool, StaticPool)
        sa.event.listen(engine, "invalidate", _roll_back)
        if self.has_one_connection:
            sa.event.listen(engine, "handle_error", _keep_connection)

    def check_free(self, engine: sa.Engine) -> None:
        """Raise `StoreError` if the only connection of a database in memory is in a transaction of somebody else."""
        pool = engine.pool
        if isinstance(pool, StaticPool):
            driver = pool.connection.dbapi_connection
            if isinstance(driver, sqlite3.Connection) and driver.in_transaction:
                raise StoreError("the Engine's only connection is in a transaction that is not the store's")

    def prepare(self, connection: sa.Connection, *, is_write: bool) -> None:
        """Set the connection up, every time: a caller's Engine shares its connections with code that may do otherwise.

        Args:
            connection: The connection.
            is_write: Whether the transaction writes.
        """
        driver = _driver(connection)
        driver.execute(f"PRAGMA busy_timeout = {int(self._busy_timeout_s * 1000)}")
        driver.execute("PRAGMA synchronous = FULL")
        driver.execute("PRAGMA foreign_keys = ON")
        if "mplus_journal_mode" not in connection.info:
            connection.info["mplus_journal_mode"] = self._use_write_ahead_log(driver)

    def begin(self, connection: sa.Connection, *, is_write: bool) -> None:
        """Begin, as sqlite3 by itself would begin late, and without the write lock.

        Args:
            connection: The connection.
            is_write: Whether to take the write lock.
        """
        driver = _driver(connection)
        if driver.in_transaction:  # what a listener of a caller's Engine has begun just now has nothing in it yet
            driver.execute("ROLLBACK")
        driver.execute("BEGIN IMMEDIATE" if is_write else "BEGIN")

    def lock_schema(self, connection: sa.Connection) -> None:
        """Do nothing: a write transaction has the database for itself."""

    def lock_deletions(self, connection: sa.Connection) -> None:
        """Do nothing: a write transaction has the database for itself."""

    def reason(self, error: BaseException | None) -> str:
        """Say what an error of sqlite3 means, in one line.

        Args:
            error: The error.
        """
        name = getattr(error, "sqlite_errorname", "") or ""
        for prefix, reason in _REASONS.items():
            if name.startswith(prefix):
                return f"{reason}: {error}" if prefix == "SQLITE_CONSTRAINT" else reason
        return f"the database failed: {error}"

    def _use_write_ahead_log(self, driver: sqlite3.Connection) -> str:
        deadline = time.monotonic() + self._busy_timeout_s
        while True:
            try:
                mode = str(driver.execute("PRAGMA journal_mode").fetchone()[0])
                if mode not in ("wal", "memory"):
                    mode = str(driver.execute("PRAGMA journal_mode = WAL").fetchone()[0])
                break
            except sqlite3.OperationalError as error:
                # SQLite does not wait here by itself when another process switches the same new file just now.
                if not error.sqlite_errorname.startswith("SQLITE_BUSY") or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        if mode not in ("wal", "memory"):
            raise StoreError(f"the database cannot keep a write-ahead log, its journal mode stays {mode} ({self._url})")
        return mode


def _driver(connection: sa.Connection) -> sqlite3.Connection:
    driver = connection.connection.dbapi_connection
    assert isinstance(driver, sqlite3.Connection)  # other drivers are refused when the database is opened
    return driver


def _roll_back(driver: sqlite3.Connection, record: object, error: BaseException | None) -> None:
    """Let go of the write lock before a connection is given up.

    SQLAlchemy closes a connection that a KeyboardInterrupt hit; SQLite keeps the lock until its last cursor is gone.
    """
    with suppress(sqlite3.Error):
        driver.rollback()


def _keep_connection(context: sa.ExceptionContext) -> None:
    """Let an interrupt not close the only connection of a database in memory, and lose all of it."""
    context.is_disconnect = False
