"""θ and Θ as data: tokens, state, update rule, drop and evict. Tensors and integers only."""

from __future__ import annotations

from mplus_agents.memory.index import GenesisIndex, MemoryIndex
from mplus_agents.memory.state import Genesis, MemoryState, TokenTensors, needed_steps
from mplus_agents.memory.types import MemoryDelta, MemoryReceipt

__all__ = [
    "Genesis",
    "GenesisIndex",
    "MemoryDelta",
    "MemoryIndex",
    "MemoryReceipt",
    "MemoryState",
    "TokenTensors",
    "needed_steps",
]
