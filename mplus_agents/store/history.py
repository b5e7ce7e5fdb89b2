"""An agent's past: the log of its commits, tags, and forks, which share what was written before them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from mplus_agents.errors import AgentNotFoundError, ConflictError, InvalidInputError
from mplus_agents.store.chains import chain_ids, read_infos
from mplus_agents.store.connection import Database
from mplus_agents.store.deletion import NAMELESS
from mplus_agents.store.records import AgentRecord, CommitInfo, EventRecord, InjectionInfo
from mplus_agents.store.rows import (
    MAX_IDS_PER_QUERY,
    batched,
    check_int,
    from_key,
    inserted_id,
    to_agent,
    to_event,
    to_key,
)
from mplus_agents.store.schema import AGENT, EVENT, HEAD_HIDDEN, SOURCE, TAG, WINDOW

__all__ = ["SELECT_WINDOW", "History"]

_PREVIEW_CHARS = 80

_SELECT_LOG = sa.select(chain_ids).order_by(chain_ids.c.step.desc())
_SELECT_TAGS = sa.select(TAG.c.name, TAG.c.commit_id).where(TAG.c.agent_id == sa.bindparam("agent_id"))
_SELECT_EVENTS = sa.select(EVENT).where(
    EVENT.c.agent_id == sa.bindparam("agent_id"), EVENT.c.seq.in_(sa.bindparam("seqs", expanding=True))
)
SELECT_WINDOW = (
    sa.select(EVENT)
    .join(WINDOW, sa.and_(WINDOW.c.agent_id == EVENT.c.agent_id, WINDOW.c.event_seq == EVENT.c.seq))
    .where(WINDOW.c.agent_id == sa.bindparam("agent_id"))
    .order_by(EVENT.c.seq)
)
"""The events in the window of the agent that `agent_id` is bound to."""


class History:
    """Commits, tags and forks; `Store.history` is one.

    Args:
        database: The database.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def log(self, agent: AgentRecord, commit_id: int | None = None, *, limit: int | None = None) -> list[CommitInfo]:
        """List commits, newest first.

        Args:
            agent: The agent, whose tags are shown.
            commit_id: Where to begin; the agent's head if None.
            limit: At most so many; None for all.

        Returns:
            The commits with what they injected. The text of a commit that a deleted agent made is gone.

        Raises:
            InvalidInputError: If the limit is negative.
            CorruptBlobError: If a text is altered.
            StoreError: If the database fails.
        """
        begin = agent.head_commit_id if commit_id is None else commit_id
        query = _SELECT_LOG if limit is None else _SELECT_LOG.limit(check_int("limit", limit))
        with self._database.read() as connection:
            rows = connection.execute(query, {"commit_id": begin}).all()
            infos = read_infos(connection, [row.injection_id for row in rows])
            events = _events_of(connection, infos)
            tags = _tags_of(connection, agent.id)
        names: dict[int, list[str]] = {}
        for name, tagged in tags.items():
            names.setdefault(tagged, []).append(name)
        return [_to_info(row, infos[row.injection_id], events, names.get(row.id, [])) for row in rows]

    def tags(self, agent_id: int) -> dict[str, int]:
        """Return an agent's tags: by name, the commit.

        Args:
            agent_id: The agent.

        Raises:
            StoreError: If the database fails.
        """
        with self._database.read() as connection:
            return _tags_of(connection, agent_id)

    def set_tag(self, agent: AgentRecord, tag: str, commit_id: int) -> None:
        """Give a commit of the agent's past a name; a tag of that name is moved. What has a tag is kept.

        Args:
            agent: The agent.
            tag: 1 to 1,000 bytes of UTF-8, and not a number, which would read as a commit's id.
            commit_id: The commit.

        Raises:
            InvalidInputError: If the name is not allowed, or the commit is none of the agent's past.
            AgentNotFoundError: If the agent was deleted.
            StoreError: If the database fails.
        """
        key = {"agent_id": agent.id, "name": to_key("tag", tag)}
        if tag.isdecimal():
            raise InvalidInputError("tag", tag, "a name that is not a number: commits have numbers")
        with self._database.write() as connection:
            _locked(connection, agent)
            _check_past(connection, agent.id, commit_id)
            connection.execute(sa.delete(TAG).where(TAG.c.agent_id == key["agent_id"], TAG.c.name == key["name"]))
            connection.execute(sa.insert(TAG), {**key, "commit_id": commit_id, "created_at": datetime.now(UTC)})

    def remove_tag(self, agent: AgentRecord, tag: str) -> None:
        """Take a tag away.

        Args:
            agent: The agent.
            tag: The tag.

        Raises:
            InvalidInputError: If there is no such tag.
            AgentNotFoundError: If the agent was deleted.
            StoreError: If the database fails.
        """
        key = to_key("tag", tag)
        with self._database.write() as connection:
            _locked(connection, agent)
            removed = connection.execute(sa.delete(TAG).where(TAG.c.agent_id == agent.id, TAG.c.name == key))
            if removed.rowcount == 0:
                raise InvalidInputError("tag", tag, f"a tag of agent {agent.name!r}: {_listed(connection, agent.id)}")

    def resolve(self, agent: AgentRecord, commit: int | str) -> int:
        """Find a commit of an agent's past.

        Args:
            agent: The agent.
            commit: A commit's id, or a tag.

        Returns:
            The commit's id.

        Raises:
            InvalidInputError: If there is no such commit in the agent's past, and no such tag.
            StoreError: If the database fails.
        """
        with self._database.read() as connection:
            if isinstance(commit, str):
                tags = _tags_of(connection, agent.id)
                if commit not in tags:
                    allowed = f"a commit's id, or a tag of agent {agent.name!r}: {_listed(connection, agent.id)}"
                    raise InvalidInputError("commit", commit, allowed)
                return tags[commit]
            return _check_past(connection, agent.id, commit)

    def fork(self, agent: AgentRecord, namespace: str, name: str) -> AgentRecord:
        """Create an agent that begins where another one is now; nothing of the memory is copied.

        Copied are what waits in the window, how far documents were read, and the newest hidden rows. Later writes of
        one are never seen by the other. Equal texts from here on give equal memories, as both keep the seed.

        Args:
            agent: The agent to begin from, as last read or written.
            namespace: Where the new name is unique.
            name: The new agent's name.

        Returns:
            The new agent.

        Raises:
            InvalidInputError: If a name is not allowed.
            ConflictError: If the new name is taken, or another writer wrote to the agent.
            AgentNotFoundError: If the agent was deleted.
            StoreError: If the database fails.
        """
        key = {"namespace": to_key("namespace", namespace), "name": to_key("name", name)}
        taken = ConflictError(f"agent {name!r} exists already in namespace {namespace!r}")
        with self._database.write() as connection:
            source = _locked(connection, agent)
            if source.version != agent.version:
                raise ConflictError(f"another writer wrote to agent {agent.name!r}; nothing was forked")
            is_named = sa.and_(AGENT.c.namespace == key["namespace"], AGENT.c.name == key["name"])
            if connection.execute(sa.select(AGENT.c.id).where(is_named)).first():
                raise taken
            waiting = connection.execute(SELECT_WINDOW, {"agent_id": agent.id}).mappings().all()
            values = {**source._mapping, **key, "version": 0, "created_at": datetime.now(UTC)}
            del values["id"]
            try:
                fork_id = inserted_id(connection.execute(sa.insert(AGENT), {**values, "next_event_seq": len(waiting)}))
            except IntegrityError as error:  # where several write at once, another one has created it just now
                raise taken from error
            _copy_window(connection, waiting, fork_id)
            for table in (SOURCE, HEAD_HIDDEN):
                _copy_rows(connection, table, agent.id, fork_id)
            return to_agent(connection.execute(sa.select(AGENT).where(AGENT.c.id == fork_id)).one())


def _locked(connection: sa.Connection, agent: AgentRecord) -> sa.Row[*tuple[Any, ...]]:
    """Lock an agent's row, so that nobody writes to the agent or deletes it meanwhile, and read it."""
    is_there = sa.and_(AGENT.c.id == agent.id, AGENT.c.namespace != NAMELESS)
    row = connection.execute(sa.select(AGENT).where(is_there).with_for_update()).first()
    if row is None:
        raise AgentNotFoundError(f"agent {agent.name!r} was deleted")
    return row


def _copy_window(connection: sa.Connection, waiting: Sequence[sa.RowMapping], fork_id: int) -> None:
    """Log what waits in the fork's own log, from its number 0."""
    if not waiting:
        return
    events = [{**event, "agent_id": fork_id, "seq": seq} for seq, event in enumerate(waiting)]
    connection.execute(sa.insert(EVENT), events)
    rows = [{"agent_id": fork_id, "event_seq": event["seq"]} for event in events]
    connection.execute(sa.insert(WINDOW), rows)


def _copy_rows(connection: sa.Connection, table: sa.Table, agent_id: int, fork_id: int) -> None:
    rest = [column for column in table.c if column.name != "agent_id"]
    rows = sa.select(sa.literal(fork_id), *rest).where(table.c.agent_id == agent_id)
    connection.execute(sa.insert(table).from_select(["agent_id", *(column.name for column in rest)], rows))


def _check_past(connection: sa.Connection, agent_id: int, commit_id: int) -> int:
    """Check that a commit can be reached from an agent's head or one of its tags."""
    check_int("commit", commit_id)
    head = connection.scalar(sa.select(AGENT.c.head_commit_id).where(AGENT.c.id == agent_id))
    for begin in (head, *sorted(set(_tags_of(connection, agent_id).values()), reverse=True)):
        found = sa.select(chain_ids.c.id).where(chain_ids.c.id == sa.bindparam("wanted"))
        if connection.execute(found, {"commit_id": begin, "wanted": commit_id}).first():
            return commit_id
    raise InvalidInputError("commit", commit_id, "the id of a commit in the agent's history, or a tag")


def _tags_of(connection: sa.Connection, agent_id: int) -> dict[str, int]:
    rows = connection.execute(_SELECT_TAGS, {"agent_id": agent_id}).all()
    return dict(sorted((from_key(row.name, f"mplus_tag(agent {agent_id}).name"), row.commit_id) for row in rows))


def _listed(connection: sa.Connection, agent_id: int) -> str:
    return ", ".join(map(repr, _tags_of(connection, agent_id))) or "it has none"


def _events_of(connection: sa.Connection, infos: Mapping[int, InjectionInfo]) -> dict[tuple[int, int], EventRecord]:
    """By agent and number, the events that injections name and that are still there."""
    wanted: dict[int, list[int]] = {}
    for info in infos.values():
        wanted.setdefault(info.agent_id, []).extend(info.event_seqs)
    events = {}
    for agent_id, seqs in wanted.items():
        for batch in batched(seqs, MAX_IDS_PER_QUERY):
            for row in connection.execute(_SELECT_EVENTS, {"agent_id": agent_id, "seqs": batch}):
                events[agent_id, row.seq] = to_event(row)
    return events


def _to_info(
    row: sa.Row[*tuple[Any, ...]],
    info: InjectionInfo,
    events: Mapping[tuple[int, int], EventRecord],
    tags: Sequence[str],
) -> CommitInfo:
    injected = [events[info.agent_id, seq] for seq in info.event_seqs if (info.agent_id, seq) in events]
    sources = dict.fromkeys(event.source_id for event in injected if event.source_id is not None)
    text = " ".join(" ".join(event.text or "" for event in injected).split())
    return CommitInfo(
        commit_id=row.id,
        parent_id=row.parent_id,
        agent_id=row.agent_id,
        step=row.step,
        injection_id=row.injection_id,
        created_at=row.created_at,
        num_text_tokens=info.num_text_tokens,
        source_ids=tuple(sources),
        text=text if len(text) <= _PREVIEW_CHARS else text[: _PREVIEW_CHARS - 1] + "…",
        tags=tuple(tags),
    )
