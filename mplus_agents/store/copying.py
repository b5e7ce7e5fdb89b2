"""Copies an agent whole from one database to another, of whichever kinds: a move, a backup, an export to one file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from mplus_agents.errors import AgentNotFoundError, ConflictError
from mplus_agents.store.blobs import decode_arrays, decode_tensor, decode_text, open_tensor
from mplus_agents.store.chains import chain_ids, injection_batches, read_chain, read_injections
from mplus_agents.store.deletion import NAMELESS
from mplus_agents.store.records import AgentRecord
from mplus_agents.store.rows import MAX_IDS_PER_QUERY, batched, inserted_id, to_agent, to_key
from mplus_agents.store.schema import AGENT, COMMIT, EVENT, HEAD_HIDDEN, INJECTION, PAGE, SOURCE, TAG, WINDOW

if TYPE_CHECKING:
    from mplus_agents.store.store import Store

__all__ = ["copy_agent"]

_ROWS_PER_INSERT = 500

OnProgress = Callable[[int, int], None]
ErrorsOf = Callable[[], AbstractContextManager[None]]


def copy_agent(
    source: Store,
    agent: AgentRecord,
    target: Store,
    *,
    namespace: str | None = None,
    name: str | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> AgentRecord:
    """Copy an agent whole into another database, all or nothing; SQLite and PostgreSQL go either way.

    Args:
        source: The store it is in.
        agent: The agent.
        target: The other store; in the same one, `history.fork` makes an agent without copying.
        namespace: Where the copy's name is unique; the agent's own namespace if None.
        name: The copy's name; the agent's own if None.
        on_progress: Called with the injections copied and the commits in all.

    Returns:
        The copy. Its memory, window, log, documents and tags are the agent's, the ids in the database are new.

    Raises:
        InvalidInputError: If a name is not allowed.
        ConflictError: If the name is taken in the target.
        AgentNotFoundError: If the agent was deleted.
        CorruptBlobError: If something of the agent is damaged; nothing is copied then.
        StoreError: If a database fails.
    """
    namespace = agent.namespace if namespace is None else namespace
    name = agent.name if name is None else name
    key = {"namespace": to_key("namespace", namespace), "name": to_key("name", name)}
    with source.database.read() as read, target.database.write() as written:
        row = read.execute(sa.select(AGENT).where(AGENT.c.id == agent.id, AGENT.c.namespace != NAMELESS)).first()
        if row is None:
            raise AgentNotFoundError(f"agent {agent.name!r} was deleted")
        taken = ConflictError(f"agent {name!r} exists already in namespace {namespace!r}")
        is_named = sa.and_(AGENT.c.namespace == key["namespace"], AGENT.c.name == key["name"])
        if written.execute(sa.select(AGENT.c.id).where(is_named)).first():
            raise taken
        copy = _Copy(read, source.database.translated_errors, written, to_agent(row))
        try:
            copy_id = copy.create(**key)
        except IntegrityError as error:  # where several write at once, another one has created it just now
            raise taken from error
        copy.log_and_window()
        copy.commits(on_progress)
        copy.head_and_tags(copy_id)
        return to_agent(written.execute(sa.select(AGENT).where(AGENT.c.id == copy_id)).one())


class _Copy:
    """One agent on its way: rows are read, checked, given their new ids, and written."""

    def __init__(
        self, source: sa.Connection, errors_of_source: ErrorsOf, target: sa.Connection, agent: AgentRecord
    ) -> None:
        self._source, self._errors_of_source, self._target, self._agent = source, errors_of_source, target, agent
        self._agent_ids: dict[int, int] = {}
        self._injection_ids: dict[int, int] = {}
        self._commit_ids: dict[int, int] = {}
        self._makers_events: set[tuple[int, int]] = set()

    def create(self, namespace: bytes, name: bytes) -> int:
        """Make the copy's row, without a head yet, and return its id."""
        (row,) = self._read(sa.select(AGENT).where(AGENT.c.id == self._agent.id))
        values = {**row._mapping, "namespace": namespace, "name": name, "head_commit_id": None, "version": 0}
        del values["id"]
        self._agent_ids[self._agent.id] = new_id = inserted_id(self._target.execute(sa.insert(AGENT), values))
        return new_id

    def log_and_window(self) -> None:
        """Copy the event log, what waits, and how far documents were read."""
        own, after = sa.select(EVENT).where(EVENT.c.agent_id == self._agent.id).order_by(EVENT.c.seq), -1
        while rows := self._read(own.where(EVENT.c.seq > after).limit(_ROWS_PER_INSERT)):
            self._insert(EVENT, (self._with_agent(row._mapping) for row in rows))
            after = rows[-1].seq
        for table in (WINDOW, SOURCE):
            rows = self._read(sa.select(table).where(table.c.agent_id == self._agent.id))
            self._insert(table, (self._with_agent(row._mapping) for row in rows))

    def commits(self, on_progress: OnProgress) -> None:
        """Copy all that the head and the tags reach, parents before children."""
        rows = self._reached()
        for batch in batched(rows, MAX_IDS_PER_QUERY):
            new = [row.injection_id for row in batch if row.injection_id not in self._injection_ids]
            with self._errors_of_source():
                batches = injection_batches(self._source, new)
            for ids in batches:
                self._injections(ids)
                on_progress(len(self._injection_ids), len(rows))
            self._insert_commits([row.id for row in batch])

    def head_and_tags(self, agent_id: int) -> None:
        """Copy what names commits, once they are all there."""
        tags = self._read(sa.select(TAG).where(TAG.c.agent_id == self._agent.id))
        self._insert(TAG, (self._with_commit(row._mapping) for row in tags))
        hidden = self._read(sa.select(HEAD_HIDDEN).where(HEAD_HIDDEN.c.agent_id == self._agent.id))
        for row in hidden:
            open_tensor(row.blob, f"mplus_head_hidden(agent {row.agent_id})")
        self._insert(HEAD_HIDDEN, (self._with_commit(row._mapping) for row in hidden))
        head = self._agent.head_commit_id
        if head is not None:
            moved = sa.update(AGENT).where(AGENT.c.id == agent_id)
            self._target.execute(moved, {"head_commit_id": self._commit_ids[head]})

    def _reached(self) -> list[sa.Row[*tuple[Any, ...]]]:
        tags = self._read(sa.select(TAG.c.commit_id).where(TAG.c.agent_id == self._agent.id))
        rows: dict[int, sa.Row[*tuple[Any, ...]]] = {}
        for begin in {self._agent.head_commit_id, *(row.commit_id for row in tags)} - {None}:
            with self._errors_of_source():
                read_chain(self._source, begin)  # finds gaps
            rows |= {row.id: row for row in self._read(sa.select(chain_ids), {"commit_id": begin})}
        return sorted(rows.values(), key=lambda row: row.step)

    def _injections(self, ids: list[int]) -> None:
        with self._errors_of_source():
            for _ in read_injections(self._source, ids):  # finds what is damaged or missing
                pass
        for row in self._read(sa.select(INJECTION).where(INJECTION.c.id.in_(ids))):
            if row.agent_id != self._agent.id:
                self._makers_texts(row.agent_id, json.loads(row.event_seqs))
            values = self._with_agent(row._mapping)
            del values["id"]
            self._injection_ids[row.id] = inserted_id(self._target.execute(sa.insert(INJECTION), values))
        pages = self._read(sa.select(PAGE).where(PAGE.c.injection_id.in_(ids)))
        renamed = ({**row._mapping, "injection_id": self._injection_ids[row.injection_id]} for row in pages)
        self._insert(PAGE, renamed)

    def _makers_texts(self, agent_id: int, seqs: Sequence[int]) -> None:
        """Copy the texts of an injection from before a fork, to a nameless agent that stands for its maker."""
        if agent_id not in self._agent_ids:
            self._create_maker(agent_id)
        new = [seq for seq in seqs if (agent_id, seq) not in self._makers_events]
        for batch in batched(new, MAX_IDS_PER_QUERY):
            rows = self._read(sa.select(EVENT).where(EVENT.c.agent_id == agent_id, EVENT.c.seq.in_(batch)))
            self._insert(EVENT, (self._with_agent(row._mapping) for row in rows))
        self._makers_events |= {(agent_id, seq) for seq in new}

    def _create_maker(self, agent_id: int) -> None:
        values = {
            "namespace": NAMELESS,
            "name": f"copy of {agent_id} for {self._agent_ids[self._agent.id]}".encode(),
            "fingerprint": "{}",
            "settings": "{}",
            "seed": 0,
            "head_commit_id": None,
            "version": 0,
            "next_event_seq": 0,
            "created_at": datetime.now(UTC),
        }
        self._agent_ids[agent_id] = inserted_id(self._target.execute(sa.insert(AGENT), values))

    def _insert_commits(self, ids: list[int]) -> None:
        query = sa.select(COMMIT).where(COMMIT.c.id.in_(ids)).order_by(COMMIT.c.step)
        for row in self._read(query):
            what = f"mplus_commit(id {row.id}, step {row.step})"
            decode_tensor(row.dropped, f"{what}.dropped")
            decode_tensor(row.evicted, f"{what}.evicted")
            if row.snapshot is not None:
                decode_arrays(row.snapshot, f"{what}.snapshot")
            values = {
                **self._with_agent(row._mapping),
                "injection_id": self._injection_ids[row.injection_id],
                "parent_id": None if row.parent_id is None else self._commit_ids[row.parent_id],
            }
            del values["id"]
            self._commit_ids[row.id] = inserted_id(self._target.execute(sa.insert(COMMIT), values))

    def _with_agent(self, row: sa.RowMapping) -> dict[str, Any]:
        if row.get("text") is not None:
            decode_text(row["text"], f"mplus_event(agent {row['agent_id']}, seq {row['seq']}).text")
        return {**row, "agent_id": self._agent_ids[row["agent_id"]]}

    def _with_commit(self, row: sa.RowMapping) -> dict[str, Any]:
        return {**self._with_agent(row), "commit_id": self._commit_ids[row["commit_id"]]}

    def _read(self, query: sa.Select[Any], values: dict[str, Any] | None = None) -> Sequence[sa.Row[Any]]:
        with self._errors_of_source():  # those of the target are told apart by its own transaction
            return self._source.execute(query, values or {}).all()

    def _insert(self, table: sa.Table, rows: Iterable[dict[str, Any]]) -> None:
        for batch in batched(rows, _ROWS_PER_INSERT):
            self._target.execute(sa.insert(table), batch)
