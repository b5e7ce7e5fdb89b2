"""What the store gives and takes: frozen records, no behaviour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import torch

__all__ = [
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
    "StoreStats",
    "StoredInjection",
]


@dataclass(frozen=True, slots=True)
class AgentRecord:
    """An agent as it was when read.

    Args:
        id: The agent's row; never given to another agent, also after deletion.
        namespace: Where the name is unique.
        name: The agent's name.
        fingerprint: What identifies the model that made the memory, by field.
        seed: Seed of the agent's random draws.
        settings: The agent's settings, by name.
        head_commit_id: Its newest commit; None before the first.
        version: Counts the write transactions; a write through an older record is refused.
        next_event_seq: Number the next event gets.
        created_at: When it was created, UTC.
    """

    id: int
    namespace: str
    name: str
    fingerprint: Mapping[str, str]
    seed: int
    settings: Mapping[str, str | int]
    head_commit_id: int | None
    version: int
    next_event_seq: int
    created_at: datetime


@dataclass(frozen=True, slots=True)
class EventRecord:
    """One entry of an agent's log.

    Args:
        agent_id: The agent.
        seq: Position in the agent's log, from 0, without gaps.
        kind: "message", "piece" (of a document) or "flush".
        role: Who said it, for messages.
        source_id: The document, for pieces.
        offset: Where in the document the piece begins, in characters.
        text: The text, as given.
        num_tokens: Length of the text, in tokens.
        policy_version: Version of the batching policy that was at work.
        created_at: When it was added, UTC.
    """

    agent_id: int
    seq: int
    kind: str
    role: str | None
    source_id: str | None
    offset: int | None
    text: str | None
    num_tokens: int
    policy_version: int
    created_at: datetime


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """How far a document has been taken.

    Args:
        agent_id: The agent.
        source_id: The document.
        next_offset: Characters already taken.
        prefix_digest: Hex digest of the UTF-8 of those characters.
        is_done: Whether the document ended there.
    """

    agent_id: int
    source_id: str
    next_offset: int
    prefix_digest: str
    is_done: bool


@dataclass(frozen=True, slots=True, eq=False)
class InjectionTensors:
    """What an injection keeps of its tokens.

    Args:
        keys: [L, K, h_kv, d_h], any device.
        values: Like `keys`.
        retrieval_keys: [L, K, p], any device; p may be 0.
    """

    keys: torch.Tensor
    values: torch.Tensor
    retrieval_keys: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class StoredInjection:
    """An injection's tokens, read back on the CPU, bit for bit.

    Args:
        id: The injection.
        keys: [L, K, h_kv, d_h].
        values: [L, K, h_kv, d_h].
        retrieval_keys: [L, K, p].
    """

    id: int
    keys: torch.Tensor
    values: torch.Tensor
    retrieval_keys: torch.Tensor


@dataclass(frozen=True, slots=True)
class InjectionInfo:
    """Where an injection comes from.

    Args:
        id: The injection.
        agent_id: The agent that made it, whose log `event_seqs` counts in.
        num_text_tokens: Length of the injected text, in tokens.
        event_seqs: The events whose text it holds.
        created_at: When it was stored, UTC.
    """

    id: int
    agent_id: int
    num_text_tokens: int
    event_seqs: tuple[int, ...]
    created_at: datetime


@dataclass(frozen=True, slots=True)
class CommitResult:
    """A commit as it was added.

    Args:
        commit_id: The commit.
        injection_id: Its injection.
        num_bytes: Bytes of all its blobs. The newest hidden rows are not counted: they replace the ones before.
    """

    commit_id: int
    injection_id: int
    num_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class CommitRecord:
    """One step of a chain.

    Args:
        id: The commit.
        parent_id: The commit before; None for the first.
        agent_id: The agent that made it.
        step: Number of its injection in the chain, from 0.
        injection_id: Its injection.
        dropped: int32 [L, k], positions in θ's order that left at each layer; k may be 0.
        evicted: int64 [L, e], births of what left Θ at each layer; e may be 0.
        created_at: When it was stored, UTC.
    """

    id: int
    parent_id: int | None
    agent_id: int
    step: int
    injection_id: int
    dropped: torch.Tensor
    evicted: torch.Tensor
    created_at: datetime


@dataclass(frozen=True, slots=True)
class CommitInfo:
    """One commit as a log shows it.

    Args:
        commit_id: The commit.
        parent_id: The commit before; None for the first.
        agent_id: The agent that made it; another one before a fork.
        step: Number of its injection in the chain, from 0.
        injection_id: Its injection.
        created_at: When it was stored, UTC.
        num_text_tokens: Length of the injected text, in tokens.
        source_ids: The documents that pieces of it come from.
        text: The beginning of the injected text, in one line; empty if the agent that made it was deleted.
        tags: Names that the agent gave it.
    """

    commit_id: int
    parent_id: int | None
    agent_id: int
    step: int
    injection_id: int
    created_at: datetime
    num_text_tokens: int
    source_ids: tuple[str, ...]
    text: str
    tags: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """The whole membership of θ and Θ right after a commit.

    Args:
        commit_id: The commit.
        step: Its step.
        arrays: Named arrays, as they were given.
    """

    commit_id: int
    step: int
    arrays: dict[str, np.ndarray]


@dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """The commits from the first to a given one.

    Args:
        injection_ids: For every step, its injection.
        snapshot: The newest snapshot of the chain; None if it has none.
        commits: The commits after the snapshot, oldest first.
    """

    injection_ids: dict[int, int]
    snapshot: Snapshot | None
    commits: list[CommitRecord]

    @property
    def num_commits(self) -> int:
        """Commits in the whole chain."""
        return len(self.injection_ids)


@dataclass(frozen=True, slots=True)
class StoreStats:
    """What an agent's memory takes up, counted along its chain.

    Args:
        page_bytes: Keys and values.
        retrieval_key_bytes: Retrieval keys.
        commit_bytes: What was dropped and evicted.
        snapshot_bytes: Snapshots.
        hidden_bytes: The newest hidden rows.
        text_bytes: Texts of the event log.
        num_commits: Commits in the chain.
        num_events: Events in the log.
        num_window_events: Events that wait in the window.
    """

    page_bytes: int
    retrieval_key_bytes: int
    commit_bytes: int
    snapshot_bytes: int
    hidden_bytes: int
    text_bytes: int
    num_commits: int
    num_events: int
    num_window_events: int

    @property
    def total_bytes(self) -> int:
        """All blobs together; tables and indexes of the database come on top."""
        memory = self.page_bytes + self.retrieval_key_bytes + self.commit_bytes + self.snapshot_bytes
        return memory + self.hidden_bytes + self.text_bytes
