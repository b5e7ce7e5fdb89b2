"""What an agent's memory takes up."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from mplus_agents.errors import AgentNotFoundError
from mplus_agents.store.chains import chain_ids
from mplus_agents.store.deletion import NAMELESS
from mplus_agents.store.records import StoreStats
from mplus_agents.store.schema import AGENT, COMMIT, EVENT, HEAD_HIDDEN, INJECTION, WINDOW

__all__ = ["read_stats"]


def read_stats(connection: sa.Connection, agent_id: int, commit_id: int | None = None) -> StoreStats:
    """Measure an agent's memory along its chain, and its log.

    Args:
        connection: A connection in a transaction.
        agent_id: The agent.
        commit_id: Where the chain ends; at the agent's head if None.

    Returns:
        Bytes by kind, and counts.

    Raises:
        AgentNotFoundError: If there is no such agent.
    """
    agent = connection.execute(
        sa.select(AGENT.c.head_commit_id).where(AGENT.c.id == agent_id, AGENT.c.namespace != NAMELESS)
    ).first()
    if agent is None:
        raise AgentNotFoundError(f"there is no agent with id {agent_id}")
    head = {"commit_id": agent.head_commit_id if commit_id is None else commit_id}
    commits = connection.execute(_SUM_COMMITS, head).one()
    injections = connection.execute(_SUM_INJECTIONS, head).one()
    events = connection.execute(_sum_bytes(EVENT, EVENT.c.text, agent_id)).one()
    hidden = connection.execute(_sum_bytes(HEAD_HIDDEN, HEAD_HIDDEN.c.blob, agent_id)).one()
    in_window = sa.select(sa.func.count()).select_from(WINDOW).where(WINDOW.c.agent_id == agent_id)
    return StoreStats(
        page_bytes=injections.page_bytes,
        retrieval_key_bytes=injections.retrieval_key_bytes,
        commit_bytes=commits.commit_bytes,
        snapshot_bytes=commits.snapshot_bytes,
        hidden_bytes=hidden.num_bytes,
        text_bytes=events.num_bytes,
        num_commits=commits.num_commits,
        num_events=events.num_rows,
        num_window_events=connection.execute(in_window).scalar_one(),
    )


def _sum(expression: sa.ColumnElement[int], label: str) -> sa.Label[int]:
    # PostgreSQL's sum of large integers is a decimal number.
    return sa.cast(sa.func.coalesce(sa.func.sum(expression), 0), sa.BigInteger).label(label)


def _sum_bytes(table: sa.Table, blob: sa.ColumnElement[bytes], agent_id: int) -> sa.Select[Any, Any]:
    columns = (_sum(sa.func.length(blob), "num_bytes"), sa.func.count().label("num_rows"))
    return sa.select(*columns).select_from(table).where(table.c.agent_id == agent_id)


_SUM_COMMITS = sa.select(
    _sum(sa.func.length(COMMIT.c.dropped) + sa.func.length(COMMIT.c.evicted), "commit_bytes"),
    _sum(sa.func.length(COMMIT.c.snapshot), "snapshot_bytes"),
    sa.func.count().label("num_commits"),
).join_from(chain_ids, COMMIT, COMMIT.c.id == chain_ids.c.id)
_SUM_INJECTIONS = sa.select(
    _sum(INJECTION.c.page_bytes, "page_bytes"),
    _sum(sa.func.length(INJECTION.c.retrieval_keys), "retrieval_key_bytes"),
).join_from(chain_ids, INJECTION, INJECTION.c.id == chain_ids.c.injection_id)
