"""One model, many agents: prompts, batching of writes, answers, and the Agent."""

from __future__ import annotations

from mplus_agents.engine.agent import Agent
from mplus_agents.engine.mplus import MPlus
from mplus_agents.engine.records import (
    AgentStats,
    Document,
    Generation,
    MemoryDiff,
    Message,
    Receipt,
    TokenInfo,
)
from mplus_agents.engine.view import MemoryView

__all__ = [
    "Agent",
    "AgentStats",
    "Document",
    "Generation",
    "MPlus",
    "MemoryDiff",
    "MemoryView",
    "Message",
    "Receipt",
    "TokenInfo",
]
