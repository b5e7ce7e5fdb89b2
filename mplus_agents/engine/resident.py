"""An agent's state in memory, as its last durable commit left it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from mplus_agents.engine.prompts import write_turn
from mplus_agents.engine.text import TextCodec
from mplus_agents.memory import MemoryIndex, MemoryState, TokenTensors, needed_steps
from mplus_agents.model import MPlusModel
from mplus_agents.store import AgentRecord, Chain, EventRecord, Store


@dataclass(slots=True)
class Waiting:
    """A turn, or a piece of a document, that waits verbatim in the window.

    Attributes:
        role: Who said it; None for a piece.
        content: The text as given.
        ids: Its tokens as they will be injected.
        source_id: The document; None for a turn.
        offset: Where in the document, or in a long turn, it starts, in characters.
        seq: Its number in the event log; None until it is stored.
        is_stored_in_window: Whether the store's window holds it.
    """

    role: str | None
    content: str
    ids: list[int]
    source_id: str | None = None
    offset: int | None = None
    seq: int | None = None
    is_stored_in_window: bool = False

    @property
    def text(self) -> str:
        """The text as it is shown and injected."""
        return write_turn(self.role, self.content)

    @property
    def is_open_line(self) -> bool:
        """Whether the text stops within a line. Turns end theirs."""
        return self.role is None and not self.content[-1:].isspace()

    def needs_break_before(self, following: Waiting) -> bool:
        """Tell whether a new line must part this from what follows: the end of a document is not the next one's start.

        Args:
            following: What stands after it.
        """
        if not self.is_open_line:
            return False
        end = (self.offset or 0) + len(self.content)
        return following.source_id != self.source_id or following.offset != end


@dataclass(slots=True)
class Resident:
    """Everything about an agent that its calls work on.

    Attributes:
        record: The agent as the store has it.
        memory: θ and Θ.
        window: What waits verbatim, oldest first.
        injection_ids: The injection of every step.
    """

    record: AgentRecord
    memory: MemoryState
    window: list[Waiting] = field(default_factory=list)
    injection_ids: dict[int, int] = field(default_factory=dict)

    @property
    def num_waiting_tokens(self) -> int:
        """Text tokens in the window."""
        return sum(len(item.ids) for item in self.window)

    @property
    def window_text(self) -> str:
        """The window as a prompt shows it."""
        breaks = [item.needs_break_before(following) for item, following in pairwise(self.window)]
        return "".join(
            f"{item.text}\n" if is_broken else item.text
            for item, is_broken in zip(self.window, [*breaks, False], strict=False)
        )


def open_resident(model: MPlusModel, codec: TextCodec, store: Store, record: AgentRecord) -> Resident:
    """Rebuild an agent from the store: its bookkeeping by replay, its tokens page by page. No model pass is made.

    Args:
        model: The model whose fingerprint the agent has.
        codec: The tokenizer.
        store: The store.
        record: The agent.

    Raises:
        CorruptBlobError: A stored blob does not match its checksum.
        StoreError: The database fails.
    """
    memory = model.initial_memory(record.seed)
    store.check_log(record.id, record.head_commit_id)
    chain = store.chain(record.head_commit_id)
    index = replay(model, chain)
    memory.restore(index, store.head_hidden(record), _fetch(store, chain, index))
    window = [_waiting(codec, event) for event in store.window(record.id)]
    return Resident(record, memory, window, dict(chain.injection_ids))


def open_past(model: MPlusModel, store: Store, record: AgentRecord, commit_id: int) -> Resident:
    """Rebuild an agent's memory as it was right after a commit, to be read only.

    Args:
        model: The model whose fingerprint the agent has.
        store: The store.
        record: The agent.
        commit_id: A commit of its past.

    Raises:
        CorruptBlobError: A stored blob does not match its checksum.
        StoreError: The database fails.
    """
    memory = model.initial_memory(record.seed)
    chain = store.chain(commit_id)
    index = replay(model, chain)
    memory.restore(index, None, _fetch(store, chain, index))
    return Resident(replace(record, head_commit_id=commit_id), memory, [], dict(chain.injection_ids))


def replay(model: MPlusModel, chain: Chain) -> MemoryIndex:
    """Replay a chain's commits on the nearest snapshot.

    Args:
        model: The model, for the memory's shape and genesis.
        chain: The chain.
    """
    genesis = model.genesis.index if model.genesis else None
    config = model.config.memory
    index = MemoryIndex(config, genesis)
    if chain.snapshot is not None:
        index = MemoryIndex.from_arrays(config, genesis, chain.snapshot.arrays)
    for commit in chain.commits:
        index.apply(commit.dropped.numpy().astype(np.int64))
    return index


def _fetch(store: Store, chain: Chain, index: MemoryIndex) -> Iterator[tuple[int, TokenTensors]]:
    steps = needed_steps(index)
    injections = store.injections([chain.injection_ids[step] for step in steps])
    for step, injection in zip(steps, injections, strict=True):
        yield step, TokenTensors(injection.keys, injection.values, injection.retrieval_keys)


def _waiting(codec: TextCodec, event: EventRecord) -> Waiting:
    content = event.text or ""
    ids = codec.encode(write_turn(event.role, content))
    return Waiting(event.role, content, ids, event.source_id, event.offset, event.seq, is_stored_in_window=True)
