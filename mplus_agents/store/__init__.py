"""Agents' memories in a SQL database: agents, event logs, windows, and chains of commits.

Imports no model: tensors go in and come out as they are. docs/schema.md describes the tables and the blobs.
"""

from __future__ import annotations

from mplus_agents.store.copying import copy_agent
from mplus_agents.store.records import (
    AgentRecord,
    Chain,
    CommitInfo,
    CommitRecord,
    CommitResult,
    EventRecord,
    InjectionInfo,
    InjectionTensors,
    Snapshot,
    SourceRecord,
    StoredInjection,
    StoreStats,
)
from mplus_agents.store.schema import PAGE_TOKENS
from mplus_agents.store.store import Store
from mplus_agents.store.transaction import WriteTransaction

__all__ = [
    "PAGE_TOKENS",
    "AgentRecord",
    "Chain",
    "CommitInfo",
    "CommitRecord",
    "CommitResult",
    "EventRecord",
    "InjectionInfo",
    "InjectionTensors",
    "Snapshot",
    "SourceRecord",
    "Store",
    "StoreStats",
    "StoredInjection",
    "WriteTransaction",
    "copy_agent",
]
