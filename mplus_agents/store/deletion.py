"""Deleting agents, some of whose commits may be part of others' chains.

A commit belongs to the agent that made it. If a fork still needs some, the agent's row stays as a nameless one that
holds just these, until the last fork is gone; its log, window, documents and tags go at once.
"""

from __future__ import annotations

from collections.abc import Iterable

import sqlalchemy as sa

from mplus_agents.errors import AgentNotFoundError
from mplus_agents.store.rows import MAX_IDS_PER_QUERY, batched
from mplus_agents.store.schema import AGENT, COMMIT, EVENT, HEAD_HIDDEN, INJECTION, SOURCE, TAG, WINDOW

__all__ = ["NAMELESS", "delete_agent"]

NAMELESS = b""
"""Namespace of the rows that only hold commits; no agent can have it."""


def delete_agent(connection: sa.Connection, agent_id: int) -> None:
    """Delete an agent, and of its commits those that no other agent's head or tag reaches.

    Args:
        connection: In a write transaction, deletions locked.
        agent_id: The agent.

    Raises:
        AgentNotFoundError: If there is none.
    """
    is_named = sa.and_(AGENT.c.id == agent_id, AGENT.c.namespace != NAMELESS)
    if connection.execute(sa.select(AGENT.c.id).where(is_named).with_for_update()).first() is None:
        raise AgentNotFoundError(f"there is no agent with id {agent_id}")
    if _is_needed(connection, agent_id):
        for table in (WINDOW, EVENT, SOURCE, HEAD_HIDDEN, TAG):
            connection.execute(sa.delete(table).where(table.c.agent_id == agent_id))
        nameless = {"namespace": NAMELESS, "name": str(agent_id).encode(), "head_commit_id": None, "settings": "{}"}
        connection.execute(sa.update(AGENT).where(AGENT.c.id == agent_id), nameless)
    else:
        connection.execute(sa.delete(AGENT).where(AGENT.c.id == agent_id))
    _sweep(connection)


def _is_needed(connection: sa.Connection, agent_id: int) -> bool:
    """Tell whether another agent builds on a commit of this one."""
    # One statement, and so one moment: a fork's head that moves meanwhile is seen before or after.
    parent = COMMIT.alias("parent")
    names = ((COMMIT, COMMIT.c.parent_id), (AGENT, AGENT.c.head_commit_id), (TAG, TAG.c.commit_id))
    uses = []
    for table, commit_id in names:
        owner = table.c.id if table is AGENT else table.c.agent_id
        used = sa.select(commit_id).join_from(table, parent, parent.c.id == commit_id)
        uses.append(used.where(parent.c.agent_id == agent_id, owner != agent_id))
    return connection.execute(sa.union_all(*uses).limit(1)).first() is not None


def _sweep(connection: sa.Connection) -> None:
    """Delete what nameless agents hold and nobody reaches any more, and those that hold nothing."""
    nameless = connection.execute(sa.select(AGENT.c.id).where(AGENT.c.namespace == NAMELESS)).scalars().all()
    if not nameless:
        return
    reached = set(connection.execute(_SELECT_REACHED).scalars())
    for agent_id in nameless:
        rows = connection.execute(sa.select(COMMIT.c.id, COMMIT.c.injection_id).where(COMMIT.c.agent_id == agent_id))
        held = {row.id: row.injection_id for row in rows}
        gone = held.keys() - reached
        if len(gone) == len(held):
            connection.execute(sa.delete(AGENT).where(AGENT.c.id == agent_id))
            continue
        _delete_ids(connection, COMMIT, gone)
        _delete_ids(connection, INJECTION, {held[commit_id] for commit_id in gone})


def _delete_ids(connection: sa.Connection, table: sa.Table, ids: Iterable[int]) -> None:
    for batch in batched(ids, MAX_IDS_PER_QUERY):
        connection.execute(sa.delete(table).where(table.c.id.in_(batch)))


def _reached() -> sa.Select[int]:
    begins = sa.union(sa.select(AGENT.c.head_commit_id), sa.select(TAG.c.commit_id)).subquery()
    columns = (COMMIT.c.id, COMMIT.c.parent_id)
    walk = sa.select(*columns).where(COMMIT.c.id.in_(sa.select(begins))).cte("reached", recursive=True)
    walk = walk.union(sa.select(*columns).join(walk, COMMIT.c.id == walk.c.parent_id))
    return sa.select(walk.c.id)


_SELECT_REACHED = _reached()
