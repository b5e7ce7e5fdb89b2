"""The database: how connections are set up, how transactions begin, and what errors become.

Knows no tables. SQLite only so far; other databases are refused by name.
"""

from __future__ import annotations

import re
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import SingletonThreadPool, StaticPool

from mplus_agents.errors import InvalidInputError, StoreError
from mplus_agents.store.write_queue import WriteQueue

__all__ = ["Database"]

_ALLOWED_TARGET = "an SQLAlchemy Engine, or a URL such as 'sqlite:///mplus.db' ('sqlite://' for one in memory)"

# By prefix of SQLite's own name of the error, the most telling first.
_SQLITE_REASONS = {
    "SQLITE_BUSY": "the database is locked: another writer held it longer than the timeout",
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


class Database:
    """Transactions on one database, from many threads.

    Every connection it hands out has a write-ahead log, synchronous=FULL, foreign keys and a busy timeout. Reads begin
    plainly; writes take the write lock at once, so that they cannot fail half way because of another writer.

    Args:
        target: A URL, or an Engine of the caller's, whose pool is then shared and never disposed here.
        busy_timeout_s: How long to wait for another writer, in seconds.

    Raises:
        InvalidInputError: If the URL cannot be used, or the Engine or URL is none of SQLite's standard driver.
    """

    def __init__(self, target: str | sa.Engine, *, busy_timeout_s: float) -> None:
        if not 0 <= busy_timeout_s <= 86_400:
            raise InvalidInputError("busy_timeout_s", busy_timeout_s, "seconds from 0 to 86,400")
        self._busy_timeout_s = busy_timeout_s
        self._owns_engine = not isinstance(target, sa.Engine)
        self._engine = target if isinstance(target, sa.Engine) else _create_engine(target, busy_timeout_s)
        _check_driver(self._engine)
        self.url = self._engine.url.render_as_string(hide_password=True)
        sa.event.listen(self._engine, "invalidate", _roll_back)
        if isinstance(self._engine.pool, StaticPool):
            sa.event.listen(self._engine, "handle_error", _keep_connection)
        # Writers of this process queue here; those of other processes meet in SQLite.
        self._queue = WriteQueue()
        # A database in memory is one connection. Threads take turns, and reads inside a write use the write's.
        self._turn = threading.RLock() if isinstance(self._engine.pool, StaticPool) else None
        self._shared: sa.Connection | None = None
        self._is_closed = False

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """Open a read transaction: one consistent view of the database.

        Yields:
            The connection. In memory, inside this thread's write, it is that write's and sees its changes.

        Raises:
            StoreError: If the database fails.
        """
        with self._transaction("BEGIN") as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """Open a write transaction; it holds the write lock from the start, commits at the end or rolls back.

        Yields:
            The connection.

        Raises:
            StoreError: If the database fails or stays locked, or this thread is writing already.
        """
        if self._queue.is_mine:
            raise StoreError(f"this thread already has a write transaction open on {self.url}")
        with self._queue.turn(self._busy_timeout_s) as is_my_turn:
            if not is_my_turn:
                reason = _SQLITE_REASONS["SQLITE_BUSY"]
                raise StoreError(f"{reason} of {self._busy_timeout_s:g} s ({self.url})")
            with self._transaction("BEGIN IMMEDIATE") as connection:
                yield connection

    def close(self) -> None:
        """Refuse further transactions, and close all connections unless the Engine is the caller's."""
        self._is_closed = True
        if self._owns_engine:
            self._engine.dispose()

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[sa.Connection]:
        if self._is_closed:
            raise StoreError(f"the store is closed ({self.url})")
        with self._turn or nullcontext(), self._translated_errors():
            # A closed one is what an interrupt has left here.
            if self._shared is not None and not self._shared.closed:
                yield self._shared
                return
            self._check_free()
            with self._engine.connect() as connection:
                driver = self._set_up(connection)
                try:
                    with connection.begin():
                        # Begun by us: sqlite3 by itself would begin late, and without the write lock. What a listener
                        # of a caller's Engine has begun just now has nothing in it yet.
                        if driver.in_transaction:
                            driver.execute("ROLLBACK")
                        driver.execute(begin)
                        self._shared = connection if self._turn is not None else None
                        yield connection
                except BaseException as error:
                    # A statement that was interrupted lives on in the traceback, and keeps its old view of the
                    # database: nobody else is to get this connection. One in memory is the database itself.
                    if not isinstance(error, Exception) and self._turn is None:
                        connection.invalidate()
                    raise
                finally:
                    self._shared = None

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
        """Turn every error of SQLAlchemy and its driver into a StoreError: the only place that does."""
        handled_before = sys.exception()
        try:
            yield
        except Exception as error:
            # An interrupt inside SQLAlchemy breaks what it assumes of itself; the caller is to see the interrupt.
            interrupt = _interrupt_behind(error, handled_before)
            if interrupt is not None:
                raise interrupt from None
            if not isinstance(error, (SQLAlchemyError, sqlite3.Error)):
                raise
            cause = error.orig if isinstance(error, DBAPIError) else error
            raise StoreError(f"{_reason(cause)} ({self.url})") from error

    def _check_free(self) -> None:
        pool = self._engine.pool
        if isinstance(pool, StaticPool):
            driver = pool.connection.dbapi_connection
            if isinstance(driver, sqlite3.Connection) and driver.in_transaction:
                raise StoreError("the Engine's only connection is in a transaction that is not the store's")

    def _set_up(self, connection: sa.Connection) -> sqlite3.Connection:
        driver = connection.connection.dbapi_connection
        assert isinstance(driver, sqlite3.Connection)  # _check_driver saw to it
        # Every time: a caller's Engine shares its connections with code that may set them otherwise.
        driver.execute(f"PRAGMA busy_timeout = {int(self._busy_timeout_s * 1000)}")
        driver.execute("PRAGMA synchronous = FULL")
        driver.execute("PRAGMA foreign_keys = ON")
        if "mplus_journal_mode" not in connection.info:
            connection.info["mplus_journal_mode"] = self._use_write_ahead_log(driver)
        return driver

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
            raise StoreError(f"the database cannot keep a write-ahead log, its journal mode stays {mode} ({self.url})")
        return mode


def _roll_back(driver: sqlite3.Connection, record: object, error: BaseException | None) -> None:
    """Let go of the write lock before a connection is given up.

    SQLAlchemy closes a connection that a KeyboardInterrupt hit; SQLite keeps the lock until its last cursor is gone.
    """
    with suppress(sqlite3.Error):
        driver.rollback()


def _keep_connection(context: sa.ExceptionContext) -> None:
    """Let an interrupt not close the only connection of a database in memory, and lose all of it."""
    context.is_disconnect = False


def _create_engine(target: str, busy_timeout_s: float) -> sa.Engine:
    if not isinstance(target, str):
        raise InvalidInputError("target", target, _ALLOWED_TARGET)
    try:
        url = sa.make_url(target)
        url.get_dialect()
        is_sqlite = (url.get_backend_name(), url.get_driver_name()) == ("sqlite", "pysqlite")
    except (ArgumentError, NoSuchModuleError, ImportError) as error:
        raise InvalidInputError("target", _without_password(target), _ALLOWED_TARGET) from error
    if not is_sqlite:
        raise InvalidInputError("target", url.render_as_string(hide_password=True), _ALLOWED_TARGET)
    if isinstance(sa.create_engine(url).pool, SingletonThreadPool):  # SQLAlchemy's choice for a database in memory
        return sa.create_engine(url, poolclass=StaticPool, connect_args={"check_same_thread": False})
    folder = Path(url.database or "").parent
    if not (url.database or "").startswith("file:") and not folder.is_dir():
        raise StoreError(f"the folder of the database does not exist ({url.render_as_string(hide_password=True)})")
    connect_args = {"timeout": busy_timeout_s, "check_same_thread": False}
    return sa.create_engine(url, connect_args=connect_args, pool_size=8, max_overflow=56)


def _check_driver(engine: sa.Engine) -> None:
    found = f"{engine.dialect.name}+{engine.dialect.driver}"
    if found != "sqlite+pysqlite":
        raise InvalidInputError("target", found, "an Engine of sqlite+pysqlite; other databases are not supported yet")
    if isinstance(engine.pool, SingletonThreadPool):
        allowed = "for a database in memory, an Engine with poolclass=StaticPool (or the URL 'sqlite://')"
        raise InvalidInputError("target", engine, allowed)


def _interrupt_behind(error: BaseException, until: BaseException | None) -> BaseException | None:
    """Return the KeyboardInterrupt or SystemExit during whose handling an error arose, unless it was handled before."""
    context = error.__context__
    while context is not None and context is not until:
        if not isinstance(context, Exception):
            return context
        context = context.__context__
    return None


def _reason(error: BaseException | None) -> str:
    name = getattr(error, "sqlite_errorname", "") or ""
    for prefix, reason in _SQLITE_REASONS.items():
        if name.startswith(prefix):
            return f"{reason}: {error}" if prefix == "SQLITE_CONSTRAINT" else reason
    return f"the database failed: {error}"


def _without_password(target: str) -> str:
    return re.sub(r"//[^/]*@", "//***@", target)
