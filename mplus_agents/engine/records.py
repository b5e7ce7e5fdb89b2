"""What callers give an agent and what they get back: frozen records, no behaviour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mplus_agents.store import CommitInfo

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: `system`, `user`, `assistant` or `tool`.
        content: What was said.
    """

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Document:
    """A text to be read.

    Attributes:
        text: The text.
        source_id: A name that stays the same when the same document is given again; the text's hash if None.
    """

    text: str
    source_id: str | None = None


@dataclass(frozen=True, slots=True)
class Receipt:
    """What `remember` or `flush` did; everything it counts is durable.

    Attributes:
        num_injections: Injections made.
        injection_ids: Their ids, oldest first.
        num_text_tokens: Text tokens injected.
        num_memory_tokens: New memory tokens per layer.
        num_dropped: Tokens per layer that went from θ to Θ.
        num_evicted: Tokens that left Θ for good, summed over the layers.
        num_bytes: Bytes added to the store by the injections.
        num_waiting_tokens: Text tokens that wait verbatim in the window after this call.
        note: Why less was injected than was given; empty if nothing is worth saying.
    """

    num_injections: int
    injection_ids: tuple[int, ...] = field(repr=False)
    num_text_tokens: int
    num_memory_tokens: int
    num_dropped: int
    num_evicted: int
    num_bytes: int
    num_waiting_tokens: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class Generation:
    """An answer and how it came about.

    Attributes:
        text: The answer.
        num_prompt_tokens: Tokens of the prompt; memory tokens are not counted.
        num_new_tokens: Tokens decoded.
        finish_reason: `stop` at an end token or a stop string, `length` at the limit.
    """

    text: str
    num_prompt_tokens: int
    num_new_tokens: int
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """Where one memory token is and where it comes from.

    Attributes:
        layer: The layer.
        place: `short_term` (θ), `long_term` (Θ), or `staged` (dropped from θ, not merged into Θ yet).
        injection_id: The injection that made it; None for the checkpoint's own memory.
        step: Number of that injection in the agent's life, from 0; None for the checkpoint's own memory.
        slot: Its slot in the injection; None for the checkpoint's own memory.
        birth: step · K + slot; negative for the checkpoint's own memory.
        age: By the rule in force, in tokens.
    """

    layer: int
    place: Literal["short_term", "long_term", "staged"]
    injection_id: int | None
    step: int | None
    slot: int | None
    birth: int
    age: int


@dataclass(frozen=True, slots=True)
class AgentStats:
    """An agent's memory in numbers.

    Attributes:
        name: The agent.
        namespace: Its namespace.
        memory_rule: `paper` or `released`.
        num_injections: Injections so far.
        short_term_tokens: Tokens in θ, per layer.
        short_term_capacity: N.
        long_term_tokens: Tokens in Θ, per layer; staged ones are not counted.
        long_term_capacity: M; None where the rule has no such limit.
        num_staged: Dropped tokens per layer that are not merged yet.
        oldest_age: Age of the oldest token in θ or Θ, in tokens; None if there is none.
        num_waiting_messages: Turns and pieces that wait verbatim in the window.
        num_waiting_tokens: Their text tokens.
        num_events: Entries of the event log.
        stored_bytes: Bytes in the store, by kind.
        resident_bytes: Bytes of the memory's tensors now in use, what is shared with other agents included.
    """

    name: str
    namespace: str
    memory_rule: str
    num_injections: int
    short_term_tokens: int
    short_term_capacity: int
    long_term_tokens: tuple[int, ...]
    long_term_capacity: int | None
    num_staged: int
    oldest_age: int | None
    num_waiting_messages: int
    num_waiting_tokens: int
    num_events: int
    stored_bytes: Mapping[str, int]
    resident_bytes: int


@dataclass(frozen=True, slots=True)
class MemoryDiff:
    """Two memories compared by what was injected.

    Attributes:
        common: The newest commit that both have; None if they share nothing.
        only_here: Commits that only the first one has, newest first.
        only_there: Commits that only the second one has, newest first.
    """

    common: CommitInfo | None
    only_here: tuple[CommitInfo, ...]
    only_there: tuple[CommitInfo, ...]
