"""Copies an agent whole from one database to another, of whichever kinds: a move, a backup, an export to one file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from mplus_agents.errors import AgentNotFoundError, ConflictError
from mplus_agents.store.blobs import decode_arrays, decode_tensor, decode_text, open_tensor
from mplus_agents.store.chains import chain_ids, injection_batches
from mplus_agents.store.deletion import NAMELESS
from mplus_agents.store.records import AgentRecord
from mplus_agents.store.rows import MAX_IDS_PER_QUERY, batched, inserted_id, to_agent, to_key
from mplus_agents.store.schema import AGENT, COMMIT, EVENT, HEAD_HIDDEN, INJECTION, PAGE, SOURCE, TAG, WINDOW

if TYPE_CHECKING:
    from mplus_agents.store.store import Store

__all__ = ["copy_agent"]

_ROWS_PER_INSERT = 500

OnProgress = Callable[[int, int], None]


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
        copy = _Copy(read, written, to_agent(row))
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

    def __init__(self, source: sa.Connection, target: sa.Connection, agent: AgentRecord) -> None:
        self._source, self._target, self._agent = source, target, agent
        self._agent_ids: dict[int, int] = {}
        self._injection_ids: dict[int, int] = {}
        self._commit_ids: dict[int, int] = {}
        self._makers_events: set[tuple[int, int]] = set()

    def create(self, namespace: bytes, name: bytes) -> int:
        row = self._source.execute(sa.select(AGENT).where(AGENT.c.id == self._agent.id)).one()
        values = {**row._mapping, "namespace": namespace, "name": name, "head_commit_id": None, "version": 0}
        del values["id"]
        self._agent_ids[self._agent.id] = new_id = inserted_id(self._target.execute(sa.insert(AGENT), values))
        return new_id

    def log_and_window(self) -> None:
        for table in (EVENT, WINDOW, SOURCE):
            rows = self._source.execute(sa.select(table).where(table.c.agent_id == self._agent.id))
            self._insert(table, (self._with_agent(row._mapping) for row in rows))

    def commits(self, on_progress: OnProgress) -> None:
        """Copy all that the head and the tags reach, parents before children."""
        rows = self._reached()
        for batch in batched(rows, MAX_IDS_PER_QUERY):
            new = [row.injection_id for row in batch if row.injection_id not in self._injection_ids]
            for ids in injection_batches(self._source, new):
                self._injections(ids)
                on_progress(len(self._injection_ids), len(rows))
            self._insert_commits([row.id for row in batch])

    def head_and_tags(self, agent_id: int) -> None:
        tags = self._source.execute(sa.select(TAG).where(TAG.c.agent_id == self._agent.id))
        self._insert(TAG, (self._with_commit(row._mapping) for row in tags))
        hidden = self._source.execute(sa.select(HEAD_HIDDEN).where(HEAD_HIDDEN.c.agent_id == self._agent.id)).all()
        for row in hidden:
            open_tensor(row.blob, f"mplus_head_hidden(agent {row.agent_id})")
        self._insert(HEAD_HIDDEN, (self._with_commit(row._mapping) for row in hidden))
        head = self._agent.head_commit_id
        if head is not None:
            moved = sa.update(AGENT).where(AGENT.c.id == agent_id)
            self._target.execute(moved, {"head_commit_id": self._commit_ids[head]})

    def _reached(self) -> list[sa.Row[*tuple[Any, ...]]]:
        tagged = self._source.execute(sa.select(TAG.c.commit_id).where(TAG.c.agent_id == self._agent.id)).scalars()
        rows: dict[int, sa.Row[*tuple[Any, ...]]] = {}
        for begin in {self._agent.head_commit_id, *tagged}:
            rows |= {row.id: row for row in self._source.execute(sa.select(chain_ids), {"commit_id": begin})}
        return sorted(rows.values(), key=lambda row: row.step)

    def _injections(self, ids: list[int]) -> None:
        for row in self._source.execute(sa.select(INJECTION).where(INJECTION.c.id.in_(ids))).all():
            decode_tensor(row.retrieval_keys, f"mplus_injection(id {row.id}).retrieval_keys")
            if row.agent_id != self._agent.id:
                self._makers_texts(row.agent_id, json.loads(row.event_seqs))
            values = self._with_agent(row._mapping)
            del values["id"]
            self._injection_ids[row.id] = inserted_id(self._target.execute(sa.insert(INJECTION), values))
        pages = self._source.execute(sa.select(PAGE).where(PAGE.c.injection_id.in_(ids)))
        self._insert(PAGE, map(self._checked_page, pages))

    def _checked_page(self, row: sa.Row[*tuple[Any, ...]]) -> dict[str, Any]:
        open_tensor(row.blob, f"mplus_page(injection {row.injection_id}, layer {row.layer}, page {row.page_idx}).blob")
        return {**row._mapping, "injection_id": self._injection_ids[row.injection_id]}

    def _makers_texts(self, agent_id: int, seqs: Sequence[int]) -> None:
        """Copy the texts of an injection from before a fork, to a nameless agent that stands for its maker."""
        if agent_id not in self._agent_ids:
            self._create_maker(agent_id)
        new = [seq for seq in seqs if (agent_id, seq) not in self._makers_events]
        for batch in batched(new, MAX_IDS_PER_QUERY):
            rows = self._source.execute(sa.select(EVENT).where(EVENT.c.agent_id == agent_id, EVENT.c.seq.in_(batch)))
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
        for row in self._source.execute(query).all():
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

    def _insert(self, table: sa.Table, rows: Iterable[dict[str, Any]]) -> None:
        for batch in batched(rows, _ROWS_PER_INSERT):
            self._target.execute(sa.insert(table), batch)
