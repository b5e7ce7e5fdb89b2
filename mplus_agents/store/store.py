"""The store: agents by name, and everything that is read of them. Writes go through `WriteTransaction`.

Knows no model and no rule of memory: what is dropped, evicted or kept in a snapshot is decided above.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

import sqlalchemy as sa
import torch
from sqlalchemy.exc import IntegrityError

from mplus_agents.errors import ConflictError, StoreError
from mplus_agents.store.blobs import decode_tensor
from mplus_agents.store.chains import check_commits, injection_batches, read_chain, read_infos, read_injections
from mplus_agents.store.connection import Database
from mplus_agents.store.deletion import NAMELESS, delete_agent
from mplus_agents.store.history import SELECT_WINDOW, History
from mplus_agents.store.migrate import upgrade_schema
from mplus_agents.store.records import (
    AgentRecord,
    Chain,
    EventRecord,
    InjectionInfo,
    SourceRecord,
    StoredInjection,
    StoreStats,
)
from mplus_agents.store.rows import (
    MAX_IDS_PER_QUERY,
    batched,
    check_int,
    inserted_id,
    to_agent,
    to_event,
    to_json,
    to_key,
    to_source,
)
from mplus_agents.store.schema import AGENT, EVENT, HEAD_HIDDEN, SOURCE
from mplus_agents.store.stats import read_stats
from mplus_agents.store.transaction import WriteTransaction

_SELECT_NAMED = sa.select(AGENT).where(
    AGENT.c.namespace == sa.bindparam("namespace"), AGENT.c.name == sa.bindparam("name")
)
_SELECT_VERSION = sa.select(AGENT.c.version).where(
    AGENT.c.id == sa.bindparam("agent_id"), AGENT.c.namespace != NAMELESS
)
_EVENTS_PER_CHECK = 1_000
_SELECT_SOURCE = sa.select(SOURCE).where(
    SOURCE.c.agent_id == sa.bindparam("agent_id"), SOURCE.c.source_id == sa.bindparam("source_id")
)


class Store:
    """Agents' memories in a database; safe to use from many threads.

    Args:
        target: An SQLAlchemy URL, or an Engine of the caller's, which is never disposed here. The tables are created or
            upgraded if need be. "sqlite://" is a database in memory, gone when the store is closed.
        busy_timeout_s: How long to wait for another writer, in seconds.
        schema: PostgreSQL's schema for the tables, created if need be; the user's default schema if None.

    Raises:
        InvalidInputError: If the URL, Engine or schema cannot be used.
        SchemaVersionError: If the database has a newer schema; nothing is changed then.
        StoreError: If the database cannot be opened.
    """

    def __init__(
        self,
        target: str | sa.Engine = "sqlite:///mplus.db",
        *,
        busy_timeout_s: float = 30.0,
        schema: str | None = None,
    ) -> None:
        self._database = Database(target, busy_timeout_s=busy_timeout_s, schema=schema)
        self.url = self._database.url
        self.history = History(self._database)
        try:
            upgrade_schema(self._database)
        except StoreError:
            self._database.close()
            raise

    @property
    def database(self) -> Database:
        """The database, for what works on two stores."""
        return self._database

    def close(self) -> None:
        """Refuse further use, and close all connections unless the Engine is the caller's."""
        self._database.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def create_agent(
        self,
        namespace: str,
        name: str,
        *,
        fingerprint: Mapping[str, str],
        seed: int,
        settings: Mapping[str, str | int],
    ) -> AgentRecord:
        """Create an agent without any memory.

        Args:
            namespace: Where the name is unique; not empty, at most 1,000 bytes of UTF-8.
            name: The agent's name; likewise.
            fingerprint: What identifies the model, by field.
            seed: Seed of the agent's random draws, 64 bits.
            settings: The agent's settings, by name.

        Returns:
            The agent, at version 0.

        Raises:
            InvalidInputError: If an argument is not allowed.
            ConflictError: If the agent exists.
            StoreError: If the database fails.
        """
        values: dict[str, Any] = {
            "namespace": to_key("namespace", namespace),
            "name": to_key("name", name),
            "fingerprint": to_json("fingerprint", fingerprint, (str,)),
            "seed": check_int("seed", seed, min_value=-(2**63)),
            "settings": to_json("settings", settings, (str, int)),
            "head_commit_id": None,
            "version": 0,
            "next_event_seq": 0,
            "created_at": datetime.now(UTC),
        }
        with self._database.write() as connection:
            exists = ConflictError(f"agent {name!r} exists already in namespace {namespace!r}")
            if connection.execute(_SELECT_NAMED, {"namespace": values["namespace"], "name": values["name"]}).first():
                raise exists
            try:
                agent_id = inserted_id(connection.execute(sa.insert(AGENT), values))
            except IntegrityError as error:  # where several write at once, another one has created it just now
                raise exists from error
        texts = {"namespace": namespace, "name": name, "fingerprint": dict(fingerprint), "settings": dict(settings)}
        return AgentRecord(id=agent_id, **{**values, **texts})

    def find_agent(self, namespace: str, name: str) -> AgentRecord | None:
        """Look an agent up by name.

        Args:
            namespace: Its namespace.
            name: Its name.

        Returns:
            The agent as it is now; None if there is none.

        Raises:
            InvalidInputError: If a name is not allowed.
            StoreError: If the database fails.
        """
        key = {"namespace": to_key("namespace", namespace), "name": to_key("name", name)}
        with self._database.read() as connection:
            row = connection.execute(_SELECT_NAMED, key).first()
            return None if row is None else to_agent(row)

    def agent_version(self, agent_id: int) -> int | None:
        """Read an agent's version, by one cheap query.

        Args:
            agent_id: The agent.

        Returns:
            How many write transactions it has seen; None if it was deleted.

        Raises:
            StoreError: If the database fails.
        """
        with self._database.read() as connection:
            version: int | None = connection.scalar(_SELECT_VERSION, {"agent_id": agent_id})
            return version

    def list_agents(self, namespace: str | None = None) -> list[AgentRecord]:
        """List agents, in the order they were created.

        Args:
            namespace: Only this one; None for all.

        Returns:
            The agents.

        Raises:
            InvalidInputError: If the namespace is not allowed.
            StoreError: If the database fails.
        """
        query = sa.select(AGENT).where(AGENT.c.namespace != NAMELESS).order_by(AGENT.c.id)
        if namespace is not None:
            query = query.where(AGENT.c.namespace == to_key("namespace", namespace))
        with self._database.read() as connection:
            return [to_agent(row) for row in connection.execute(query)]

    def delete_agent(self, agent_id: int) -> None:
        """Delete an agent with its log, window, documents, tags and memory; forks keep what they share with it.

        Args:
            agent_id: The agent.

        Raises:
            AgentNotFoundError: If there is none.
            StoreError: If the database fails.
        """
        with self._database.write() as connection:
            self._database.lock_deletions(connection)
            delete_agent(connection, agent_id)

    @contextmanager
    def write(self, agent: AgentRecord) -> Iterator[WriteTransaction]:
        """Open a write transaction on an agent; nothing of it is seen by others, or stays, before it ends well.

        Args:
            agent: The agent as last read or written.

        Yields:
            The transaction. At the end it raises the agent's version by one and commits; `tx.agent` is the new record
            then. On any exception everything is rolled back.

        Raises:
            ConflictError: If another writer was first.
            AgentNotFoundError: If the agent was deleted.
            StoreError: If the database fails.
        """
        with self._database.write() as connection:
            transaction = WriteTransaction(connection, agent)
            try:
                yield transaction
                after = transaction.finish()
            finally:
                transaction.is_open = False
        transaction.agent = after

    def window(self, agent_id: int) -> list[EventRecord]:
        """Read the events whose text waits and is not in the memory yet.

        Args:
            agent_id: The agent.

        Returns:
            The events, in order.

        Raises:
            CorruptBlobError: If a text is altered.
            StoreError: If the database fails.
        """
        with self._database.read() as connection:
            return [to_event(row) for row in connection.execute(SELECT_WINDOW, {"agent_id": agent_id})]

    def events(self, agent_id: int, *, after: int = -1, limit: int | None = None) -> list[EventRecord]:
        """Read an agent's log.

        Args:
            agent_id: The agent.
            after: Only events with a higher number.
            limit: At most so many; None for all.

        Returns:
            The events, in order.

        Raises:
            InvalidInputError: If the limit is negative.
            CorruptBlobError: If a text is altered.
            StoreError: If the database fails.
        """
        query = sa.select(EVENT).where(EVENT.c.agent_id == agent_id, EVENT.c.seq > after).order_by(EVENT.c.seq)
        if limit is not None:
            query = query.limit(check_int("limit", limit))
        with self._database.read() as connection:
            return [to_event(row) for row in connection.execute(query)]

    def check_log(self, agent_id: int, head_commit_id: int | None) -> None:
        """Compare every text of an agent's log, and all that the commits of a chain say, with their checksums.

        Args:
            agent_id: The agent.
            head_commit_id: The last commit of the chain; None if there is none.

        Raises:
            CorruptBlobError: If one is altered; the message names it.
            StoreError: If the database fails.
        """
        after = -1
        while events := self.events(agent_id, after=after, limit=_EVENTS_PER_CHECK):
            after = events[-1].seq
        with self._database.read() as connection:
            check_commits(connection, head_commit_id)

    def source(self, agent_id: int, source_id: str) -> SourceRecord | None:
        """Read how far a document has been taken.

        Args:
            agent_id: The agent.
            source_id: The document.

        Returns:
            The record; None if nothing of the document has been taken.

        Raises:
            InvalidInputError: If the source id is not allowed.
            StoreError: If the database fails.
        """
        key = {"agent_id": agent_id, "source_id": to_key("source_id", source_id)}
        with self._database.read() as connection:
            row = connection.execute(_SELECT_SOURCE, key).first()
            return None if row is None else to_source(row)

    def chain(self, commit_id: int | None) -> Chain:
        """Walk from a commit to the first one.

        Args:
            commit_id: The last commit, such as an agent's head; None for an agent without any.

        Returns:
            All steps' injections, the newest snapshot, and the commits after it.

        Raises:
            CorruptBlobError: If a blob is altered.
            StoreError: If there is no such commit, its chain has a gap, or the database fails.
        """
        if commit_id is None:
            return Chain({}, None, [])
        with self._database.read() as connection:
            return read_chain(connection, commit_id)

    def injections(self, injection_ids: Iterable[int]) -> Iterator[StoredInjection]:
        """Read the tokens of injections, a bounded number of bytes at a time.

        Args:
            injection_ids: Any number of ids, in any order.

        Yields:
            The injections, in the order asked for. No transaction is open in between: injections never change.

        Raises:
            CorruptBlobError: If a blob is altered, or a page is missing.
            StoreError: If an injection does not exist, or the database fails.
        """
        for ids in batched(injection_ids, MAX_IDS_PER_QUERY):
            with self._database.read() as connection:
                batches = injection_batches(connection, ids)
            for batch in batches:
                with self._database.read() as connection:
                    read = list(read_injections(connection, batch))
                yield from read

    def injection_infos(self, injection_ids: Iterable[int]) -> dict[int, InjectionInfo]:
        """Read where injections come from, without their tokens.

        Args:
            injection_ids: Any number of ids.

        Returns:
            By id, in the order asked for.

        Raises:
            StoreError: If an injection does not exist, or the database fails.
        """
        with self._database.read() as connection:
            return read_infos(connection, injection_ids)

    def head_hidden(self, agent: AgentRecord) -> torch.Tensor | None:
        """Read the newest hidden rows, which the next write needs.

        Args:
            agent: The agent as last read or written.

        Returns:
            [L, K, d] on the CPU; None if none are stored.

        Raises:
            CorruptBlobError: If the blob is altered.
            StoreError: If the stored rows belong to another commit than the agent's head, or the database fails.
        """
        with self._database.read() as connection:
            row = connection.execute(sa.select(HEAD_HIDDEN).where(HEAD_HIDDEN.c.agent_id == agent.id)).first()
        if row is None:
            return None
        if row.commit_id != agent.head_commit_id:
            raise StoreError(
                f"the hidden rows of agent {agent.name!r} are those of commit {row.commit_id}, not of the head "
                f"{agent.head_commit_id}: another writer was first, or the record is an old one"
            )
        return decode_tensor(row.blob, f"mplus_head_hidden(agent {agent.id}, commit {row.commit_id}).blob")

    def stats(self, agent_id: int, commit_id: int | None = None) -> StoreStats:
        """Measure what an agent's memory takes up.

        Args:
            agent_id: The agent.
            commit_id: Where its chain ends; at the agent's head if None.

        Returns:
            Bytes by kind and counts, along the chain.

        Raises:
            AgentNotFoundError: If there is none.
            StoreError: If the database fails.
        """
        with self._database.read() as connection:
            return read_stats(connection, agent_id, commit_id)
