"""Transactions on a database, whichever it is, and what becomes of its errors.

Knows no tables. What differs between databases is in `sqlite.py` and `postgresql.py`; other ones are refused by name.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError

from mplus_agents.errors import InvalidInputError, StoreError
from mplus_agents.store.backend import Backend
from mplus_agents.store.postgresql import PostgresqlBackend, create_postgresql_engine
from mplus_agents.store.sqlite import LOCKED, SqliteBackend, create_sqlite_engine
from mplus_agents.store.write_queue import WriteQueue

__all__ = ["Database"]

_ALLOWED_TARGET = (
    "an SQLAlchemy Engine, or a URL such as 'sqlite:///mplus.db' ('sqlite://' for one in memory) or "
    "'postgresql://user@host/database'"
)
_DRIVERS = ("sqlite+pysqlite", "postgresql+psycopg")


class Database:
    """Transactions on one database, from many threads.

    Args:
        target: A URL, or an Engine of the caller's, whose pool is then shared and never disposed here.
        busy_timeout_s: How long to wait for another writer, in seconds.
        schema: PostgreSQL's schema for the tables, created if need be; the user's default schema if None.

    Raises:
        InvalidInputError: If the URL cannot be used, the Engine or URL is of another database or driver, or a schema is
            given that the database does not have.
    """

    def __init__(self, target: str | sa.Engine, *, busy_timeout_s: float, schema: str | None = None) -> None:
        if not 0 <= busy_timeout_s <= 86_400:
            raise InvalidInputError("busy_timeout_s", busy_timeout_s, "seconds from 0 to 86,400")
        self._busy_timeout_s = busy_timeout_s
        self._owns_engine = not isinstance(target, sa.Engine)
        self._engine = target if isinstance(target, sa.Engine) else _create_engine(target, busy_timeout_s)
        self.url = self._engine.url.render_as_string(hide_password=True)
        self._backend = _backend_of(self._engine, busy_timeout_s, schema, self.url)
        # Writers of this process queue here, if the database takes one at a time; those of other processes meet there.
        self._queue = WriteQueue(is_shared=not self._backend.has_one_writer)
        # A database in memory is one connection. Threads take turns, and reads inside a write use the write's.
        self._turn = threading.RLock() if self._backend.has_one_connection else None
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
        with self._transaction(is_write=False) as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """Open a write transaction; it commits at the end or rolls back. SQLite's holds the write lock from the start.

        Yields:
            The connection.

        Raises:
            StoreError: If the database fails or stays locked, or this thread is writing already.
        """
        if self._queue.is_mine:
            raise StoreError(f"this thread already has a write transaction open on {self.url}")
        with self._queue.turn(self._busy_timeout_s) as is_my_turn:
            if not is_my_turn:
                raise StoreError(f"{LOCKED} of {self._busy_timeout_s:g} s ({self.url})")
            with self._transaction(is_write=True) as connection:
                yield connection

    def lock_schema(self, connection: sa.Connection) -> None:
        """Let one process at a time, until its write transaction ends, create or upgrade the tables.

        Args:
            connection: The connection that `write` gave.
        """
        self._backend.lock_schema(connection)

    def lock_deletions(self, connection: sa.Connection) -> None:
        """Let one process at a time, until its write transaction ends, delete agents.

        Args:
            connection: The connection that `write` gave.
        """
        self._backend.lock_deletions(connection)

    def close(self) -> None:
        """Refuse further transactions, and close all connections unless the Engine is the caller's."""
        self._is_closed = True
        if self._owns_engine:
            self._engine.dispose()

    @contextmanager
    def _transaction(self, *, is_write: bool) -> Iterator[sa.Connection]:
        if self._is_closed:
            raise StoreError(f"the store is closed ({self.url})")
        with self._turn or nullcontext(), self.translated_errors():
            # A closed one is what an interrupt has left here.
            if self._shared is not None and not self._shared.closed:
                yield self._shared
                return
            self._backend.check_free(self._engine)
            with self._engine.connect() as connection:
                self._backend.prepare(connection, is_write=is_write)
                try:
                    with connection.begin():
                        self._backend.begin(connection, is_write=is_write)
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
    def translated_errors(self) -> Iterator[None]:
        """Turn every error of SQLAlchemy and its driver into a StoreError: the only place that does."""
        handled_before = sys.exception()
        try:
            yield
        except Exception as error:
            # An interrupt inside SQLAlchemy breaks what it assumes of itself; the caller is to see the interrupt.
            interrupt = _interrupt_behind(error, handled_before)
            if interrupt is not None:
                try:
                    raise interrupt from None
                finally:
                    del interrupt  # it and its traceback would hold each other, and with them what it interrupted
            if not isinstance(error, (SQLAlchemyError, self._engine.dialect.loaded_dbapi.Error)):
                raise
            reason = self._backend.reason(error.orig if isinstance(error, DBAPIError) else error)
            raise StoreError(f"{reason} ({self.url})") from error


def _create_engine(target: str, busy_timeout_s: float) -> sa.Engine:
    if not isinstance(target, str):
        raise InvalidInputError("target", target, _ALLOWED_TARGET)
    try:
        url = sa.make_url(target)
        url.get_dialect()
    except (ArgumentError, NoSuchModuleError, ImportError) as error:
        raise InvalidInputError("target", _without_password(target), _ALLOWED_TARGET) from error
    if url.drivername in ("sqlite", "sqlite+pysqlite"):
        return create_sqlite_engine(url, busy_timeout_s)
    if url.drivername in ("postgresql", "postgresql+psycopg"):
        return create_postgresql_engine(url)
    raise InvalidInputError("target", url.render_as_string(hide_password=True), _ALLOWED_TARGET)


def _backend_of(engine: sa.Engine, busy_timeout_s: float, schema: str | None, url: str) -> Backend:
    found = f"{engine.dialect.name}+{engine.dialect.driver}"
    if found not in _DRIVERS:
        raise InvalidInputError("target", found, f"an Engine of {' or '.join(_DRIVERS)}")
    if engine.dialect.name == "postgresql":
        if schema is not None and not _is_schema_name(schema):
            raise InvalidInputError("schema", schema, "a printable name of 1 to 63 bytes that does not begin with pg_")
        return PostgresqlBackend(busy_timeout_s, schema)
    if schema is not None:
        raise InvalidInputError("schema", schema, "None: SQLite has no schemas; use another file")
    return SqliteBackend(engine, busy_timeout_s, url)


def _is_schema_name(name: object) -> bool:
    is_text = isinstance(name, str) and name.isprintable() and not name.startswith("pg_")
    return is_text and 0 < len(str(name).encode()) < 64


def _interrupt_behind(error: BaseException, until: BaseException | None) -> BaseException | None:
    """Return the KeyboardInterrupt or SystemExit during whose handling an error arose, unless it was handled before."""
    context = error.__context__
    while context is not None and context is not until:
        if not isinstance(context, Exception):
            return context
        context = context.__context__
    return None


def _without_password(target: str) -> str:
    return re.sub(r"//[^/]*@", "//***@", target)
