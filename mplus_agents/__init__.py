"""Lifelong latent memory for LLM agents: M+ (arXiv 2502.00592) as a backend.

Importing this package loads nothing heavy; the names below bring their modules in when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mplus_agents.errors import (
    AgentNotFoundError,
    CheckpointError,
    ConfigError,
    ConflictError,
    CorruptBlobError,
    FingerprintMismatchError,
    InvalidInputError,
    MPlusError,
    PromptTooLongError,
    SchemaVersionError,
    StoreError,
)

if TYPE_CHECKING:
    from mplus_agents.engine import (
        Agent,
        AgentStats,
        Document,
        Generation,
        MemoryDiff,
        MemoryView,
        Message,
        MPlus,
        Receipt,
        TokenInfo,
    )
    from mplus_agents.model import MPlusModel
    from mplus_agents.store import CommitInfo, Store

__version__ = "0.1.0"

_LAZY = {
    **dict.fromkeys(
        (
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
        ),
        "mplus_agents.engine",
    ),
    "CommitInfo": "mplus_agents.store",
    "MPlusModel": "mplus_agents.model",
    "Store": "mplus_agents.store",
}

__all__ = [
    "Agent",
    "AgentNotFoundError",
    "AgentStats",
    "CheckpointError",
    "CommitInfo",
    "ConfigError",
    "ConflictError",
    "CorruptBlobError",
    "Document",
    "FingerprintMismatchError",
    "Generation",
    "InvalidInputError",
    "MPlus",
    "MPlusError",
    "MPlusModel",
    "MemoryDiff",
    "MemoryView",
    "Message",
    "PromptTooLongError",
    "Receipt",
    "SchemaVersionError",
    "Store",
    "StoreError",
    "TokenInfo",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__
