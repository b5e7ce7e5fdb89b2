"""What differs between databases: how an Engine is made, how transactions begin, and what errors mean."""

from __future__ import annotations

from typing import Protocol

import sqlalchemy as sa

__all__ = ["Backend"]


class Backend(Protocol):
    """A kind of database, for one Engine.

    Attributes:
        has_one_writer: Whether the database takes one writer at a time, so that the writers of a process queue.
        has_one_connection: Whether all threads share one connection, which is the database.
    """

    has_one_writer: bool
    has_one_connection: bool

    def check_free(self, engine: sa.Engine) -> None:
        """Raise `StoreError` if the only connection is in use by somebody else."""
        ...

    def prepare(self, connection: sa.Connection, *, is_write: bool) -> None:
        """Set a connection up for a transaction that has not begun yet."""
        ...

    def begin(self, connection: sa.Connection, *, is_write: bool) -> None:
        """Begin the transaction in the database, SQLAlchemy's having begun."""
        ...

    def lock_schema(self, connection: sa.Connection) -> None:
        """Let one process at a time, until its write transaction ends, create or upgrade the tables."""
        ...

    def lock_deletions(self, connection: sa.Connection) -> None:
        """Let one process at a time, until its write transaction ends, delete agents."""
        ...

    def reason(self, error: BaseException | None) -> str:
        """Say what a driver's error means, in one line."""
        ...
