"""One write transaction on one agent: events, window, documents and commits, all or nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import sqlalchemy as sa
import torch

from mplus_agents.errors import AgentNotFoundError, ConflictError, InvalidInputError, StoreError
from mplus_agents.store.blobs import check_dtype, encode_arrays, encode_tensor, encode_text, to_utf8
from mplus_agents.store.deletion import NAMELESS
from mplus_agents.store.records import AgentRecord, CommitResult, EventRecord, InjectionTensors
from mplus_agents.store.rows import MAX_IDS_PER_QUERY, batched, check_int, inserted_id, to_key
from mplus_agents.store.schema import (
    AGENT,
    COMMIT,
    EVENT,
    HEAD_HIDDEN,
    INJECTION,
    PAGE,
    PAGE_TOKENS,
    SOURCE,
    WINDOW,
)

__all__ = ["WriteTransaction"]

_KINDS = ("message", "piece", "flush")

_SELECT_AGENT = (
    sa.select(AGENT.c.version, AGENT.c.head_commit_id, AGENT.c.next_event_seq, COMMIT.c.step)
    .join_from(AGENT, COMMIT, COMMIT.c.id == AGENT.c.head_commit_id, isouter=True)
    .where(AGENT.c.id == sa.bindparam("agent_id"), AGENT.c.namespace != NAMELESS)
    .with_for_update(of=AGENT)  # SQLite, where a write has the whole database, leaves it out
)
_IN_WINDOW = sa.and_(
    WINDOW.c.agent_id == sa.bindparam("agent_id"), WINDOW.c.event_seq.in_(sa.bindparam("seqs", expanding=True))
)
_SELECT_IN_WINDOW = sa.select(WINDOW.c.event_seq).where(_IN_WINDOW)
_DELETE_FROM_WINDOW = sa.delete(WINDOW).where(_IN_WINDOW)
_UPDATE_HEAD_HIDDEN = sa.update(HEAD_HIDDEN).where(HEAD_HIDDEN.c.agent_id == sa.bindparam("of_agent"))
_UPDATE_SOURCE = sa.update(SOURCE).where(
    SOURCE.c.agent_id == sa.bindparam("of_agent"), SOURCE.c.source_id == sa.bindparam("of_source")
)
_UPDATE_AGENT = sa.update(AGENT).where(
    AGENT.c.id == sa.bindparam("of_agent"), AGENT.c.version == sa.bindparam("old_version")
)


class WriteTransaction:
    """Changes to one agent, made by `Store.write`.

    Arguments are checked before anything is written. When the database fails in the middle of a call, the transaction
    can only be rolled back, also if the caller swallows the error.

    Args:
        connection: A connection that holds the write lock.
        agent: The agent as the caller knows it.

    Raises:
        ConflictError: If another writer was first.
        AgentNotFoundError: If the agent was deleted.
    """

    def __init__(self, connection: sa.Connection, agent: AgentRecord) -> None:
        row = connection.execute(_SELECT_AGENT, {"agent_id": agent.id}).first()
        if row is None:
            raise AgentNotFoundError(f"agent {agent.name!r} was deleted")
        if row.version != agent.version:
            raise ConflictError(
                f"agent {agent.name!r} is at version {row.version}, this write is based on version {agent.version}: "
                "another writer was first; nothing of it was stored"
            )
        self.agent = agent
        self.is_open = True
        self._connection = connection
        self._head_commit_id: int | None = row.head_commit_id
        self._next_step = 0 if row.step is None else row.step + 1
        self._next_event_seq: int = row.next_event_seq
        self._pending_events: list[dict[str, Any]] = []
        self._tail_hidden: torch.Tensor | None = None
        self._failure: BaseException | None = None

    def add_event(
        self,
        kind: str,
        *,
        role: str | None = None,
        source_id: str | None = None,
        offset: int | None = None,
        text: str | None = None,
        num_tokens: int = 0,
        policy_version: int = 1,
    ) -> EventRecord:
        """Append an event to the agent's log.

        Args:
            kind: "message", "piece" or "flush".
            role: Who said it.
            source_id: The document; a piece needs one.
            offset: Where in the document the piece begins, in characters; a piece needs it.
            text: The text; a message or piece needs one. Any characters, NUL too, but no lone surrogates.
            num_tokens: Length of the text, in tokens.
            policy_version: Version of the batching policy at work.

        Returns:
            The event, with its number.

        Raises:
            InvalidInputError: If an argument is not allowed; the log is as before.
            StoreError: If the transaction is over.
        """
        self._check_open()
        if kind not in _KINDS:
            raise InvalidInputError("kind", kind, ", ".join(_KINDS))
        if text is None and kind != "flush":
            raise InvalidInputError("text", text, f"a text, since kind is {kind!r}")
        if kind == "piece" and (source_id is None or offset is None):
            raise InvalidInputError("source_id, offset", (source_id, offset), "both given, since kind is 'piece'")
        event: dict[str, Any] = {
            "agent_id": self.agent.id,
            "seq": self._next_event_seq,
            "kind": kind,
            "role": None if role is None else to_utf8("role", role),
            "source_id": None if source_id is None else to_key("source_id", source_id),
            "offset": None if offset is None else check_int("offset", offset),
            "num_tokens": check_int("num_tokens", num_tokens),
            "policy_version": check_int("policy_version", policy_version, max_value=2**31 - 1),
            "created_at": datetime.now(UTC),
            "text": None if text is None else encode_text(text),
        }
        # Written together, just before anything can refer to them.
        self._pending_events.append(event)
        self._next_event_seq += 1
        return EventRecord(**{**event, "role": role, "source_id": source_id, "text": text})

    def add_to_window(self, seqs: Sequence[int]) -> None:
        """Let events wait verbatim.

        Args:
            seqs: Numbers of events in the agent's log, those of this transaction too.

        Raises:
            InvalidInputError: If one is no event of the agent, or named twice; the window is as before.
            StoreError: If one waits already, or the database fails.
        """
        self._check_seqs("seqs", seqs)
        self._flush_events()
        already = self._in_window(seqs)
        if already:
            raise StoreError(f"event {min(already)} of agent {self.agent.name!r} is in the window already")
        if seqs:
            self._execute(sa.insert(WINDOW), [{"agent_id": self.agent.id, "event_seq": seq} for seq in seqs])

    def remove_from_window(self, seqs: Sequence[int]) -> None:
        """Take events out of the window.

        Args:
            seqs: Their numbers.

        Raises:
            InvalidInputError: If one is no event of the agent, or named twice; the window is as before.
            StoreError: If one is not in the window, or the database fails.
        """
        self._check_seqs("seqs", seqs)
        missing = set(seqs) - self._in_window(seqs)
        if missing:
            raise StoreError(f"event {min(missing)} of agent {self.agent.name!r} is not in the window")
        for batch in batched(seqs, MAX_IDS_PER_QUERY):
            self._execute(_DELETE_FROM_WINDOW, {"agent_id": self.agent.id, "seqs": batch})

    def set_source(self, source_id: str, *, next_offset: int, prefix_digest: str, is_done: bool) -> None:
        """Note how far a document has been taken.

        Args:
            source_id: The document.
            next_offset: Characters taken by now.
            prefix_digest: Hex digest of the UTF-8 of those characters.
            is_done: Whether the document ends there.

        Raises:
            InvalidInputError: If an argument is not allowed.
            StoreError: If the database fails.
        """
        self._check_open()
        key = to_key("source_id", source_id)
        if not re.fullmatch("[0-9a-f]{1,128}", prefix_digest):
            raise InvalidInputError("prefix_digest", prefix_digest, "1 to 128 hex digits, in lower case")
        values = {
            "next_offset": check_int("next_offset", next_offset),
            "prefix_digest": prefix_digest,
            "is_done": bool(is_done),
        }
        updated = self._execute(_UPDATE_SOURCE, {"of_agent": self.agent.id, "of_source": key, **values})
        if updated.rowcount == 0:
            self._execute(sa.insert(SOURCE), {"agent_id": self.agent.id, "source_id": key, **values})

    def add_commit(
        self,
        *,
        step: int,
        tensors: InjectionTensors,
        dropped: torch.Tensor,
        evicted: torch.Tensor,
        tail_hidden: torch.Tensor,
        event_seqs: Sequence[int],
        num_text_tokens: int,
        snapshot: Mapping[str, np.ndarray] | None = None,
    ) -> CommitResult:
        """Store an injection and the commit that makes it the agent's newest; may be called again for the next one.

        Args:
            step: Number of the injection in the agent's chain, from 0: one more than the head's.
            tensors: What the injection keeps of its K tokens.
            dropped: Integers [L, k], the θ slots that left at each layer; k may be 0. Kept as int32.
            evicted: Integers [L, e], what left Θ at each layer; e may be 0. Kept as int64.
            tail_hidden: [L, K, d], the newest hidden rows. Encoded when the transaction ends, and only those of its
                last commit: it must not change until then.
            event_seqs: The events whose text was injected.
            num_text_tokens: Length of that text, in tokens.
            snapshot: The whole membership after this commit, as named arrays; None for no snapshot.

        Returns:
            The ids of the new rows, and the bytes of their blobs.

        Raises:
            InvalidInputError: If an argument is not allowed; nothing is written then.
            StoreError: If the database fails.
        """
        self._check_open()
        if step != self._next_step:
            raise InvalidInputError("step", step, f"{self._next_step}, the step after the agent's head")
        _check_tensors(tensors, dropped=dropped, evicted=evicted, tail_hidden=tail_hidden)
        self._check_seqs("event_seqs", event_seqs)
        injection = {
            "agent_id": self.agent.id,
            "num_text_tokens": check_int("num_text_tokens", num_text_tokens),
            "event_seqs": json.dumps(list(event_seqs)),
            "created_at": datetime.now(UTC),
            "retrieval_keys": encode_tensor(tensors.retrieval_keys),
        }
        pages = _encode_pages(tensors)
        page_bytes = sum(len(page["blob"]) for page in pages)
        commit = {
            "parent_id": self._head_commit_id,
            "agent_id": self.agent.id,
            "step": step,
            "created_at": injection["created_at"],
            "dropped": encode_tensor(dropped.to(torch.int32)),
            "evicted": encode_tensor(evicted.to(torch.int64)),
            "snapshot": None if snapshot is None else encode_arrays(snapshot),
        }
        self._flush_events()
        injection_id = inserted_id(self._execute(sa.insert(INJECTION), {**injection, "page_bytes": page_bytes}))
        self._execute(sa.insert(PAGE), [{"injection_id": injection_id, **page} for page in pages])
        commit_id = inserted_id(self._execute(sa.insert(COMMIT), {**commit, "injection_id": injection_id}))
        self._head_commit_id = commit_id
        self._next_step = step + 1
        self._tail_hidden = tail_hidden
        blobs = (injection["retrieval_keys"], commit["dropped"], commit["evicted"], commit["snapshot"])
        num_bytes = page_bytes + sum(len(blob) for blob in blobs if isinstance(blob, bytes))
        return CommitResult(commit_id, injection_id, num_bytes)

    def finish(self) -> AgentRecord:
        """Write what is left: the newest hidden rows, and the agent's head, log position and version.

        Returns:
            The agent as it will be once the transaction is committed.

        Raises:
            StoreError: If the database failed, now or in an earlier call.
        """
        self._check_open()
        self._flush_events()
        if self._tail_hidden is not None:
            hidden = {"commit_id": self._head_commit_id, "blob": encode_tensor(self._tail_hidden)}
            if self._execute(_UPDATE_HEAD_HIDDEN, {"of_agent": self.agent.id, **hidden}).rowcount == 0:
                self._execute(sa.insert(HEAD_HIDDEN), {"agent_id": self.agent.id, **hidden})
        after = replace(
            self.agent,
            head_commit_id=self._head_commit_id,
            next_event_seq=self._next_event_seq,
            version=self.agent.version + 1,
        )
        values = {
            "of_agent": self.agent.id,
            "old_version": self.agent.version,
            "head_commit_id": after.head_commit_id,
            "next_event_seq": after.next_event_seq,
            "version": after.version,
        }
        if self._execute(_UPDATE_AGENT, values).rowcount != 1:
            raise ConflictError(f"agent {self.agent.name!r} was changed by another writer; nothing was stored")
        return after

    def _check_open(self) -> None:
        if self._failure is not None:
            raise StoreError("the database failed earlier in this transaction; it is rolled back") from self._failure
        if not self.is_open:
            raise StoreError("the transaction is over")

    def _execute(self, statement: sa.Executable, values: Any) -> sa.CursorResult[Any]:
        try:
            return self._connection.execute(statement, values)
        except BaseException as error:
            self._failure = error
            raise

    def _flush_events(self) -> None:
        if self._pending_events:
            self._execute(sa.insert(EVENT), self._pending_events)
            self._pending_events = []

    def _in_window(self, seqs: Sequence[int]) -> set[int]:
        found: set[int] = set()
        for batch in batched(seqs, MAX_IDS_PER_QUERY):
            found.update(self._execute(_SELECT_IN_WINDOW, {"agent_id": self.agent.id, "seqs": batch}).scalars())
        return found

    def _check_seqs(self, argument: str, seqs: Sequence[int]) -> None:
        self._check_open()
        for seq in seqs:
            check_int(argument, seq, max_value=self._next_event_seq - 1)
        if len(set(seqs)) != len(seqs):
            raise InvalidInputError(argument, list(seqs), "each event once")


def _check_tensors(
    tensors: InjectionTensors, *, dropped: torch.Tensor, evicted: torch.Tensor, tail_hidden: torch.Tensor
) -> None:
    keys = tensors.keys
    check_dtype("tensors.keys", keys)
    if keys.dim() != 4 or 0 in keys.shape:
        raise InvalidInputError("tensors.keys", tuple(keys.shape), "shape [L, K, h_kv, d_h], none of them 0")
    if tensors.values.shape != keys.shape or tensors.values.dtype != keys.dtype:
        found = (tuple(tensors.values.shape), tensors.values.dtype)
        raise InvalidInputError("tensors.values", found, f"shape {list(keys.shape)} and {keys.dtype}, like the keys")
    num_layers, num_slots = keys.shape[:2]
    for name, tensor in (("tensors.retrieval_keys", tensors.retrieval_keys), ("tail_hidden", tail_hidden)):
        if tensor.dim() != 3 or tensor.shape[:2] != (num_layers, num_slots):
            raise InvalidInputError(name, tuple(tensor.shape), f"shape [{num_layers}, {num_slots}, any]")
        check_dtype(name, tensor)
    for name, tensor in (("dropped", dropped), ("evicted", evicted)):
        if tensor.dim() != 2 or tensor.shape[0] != num_layers:
            raise InvalidInputError(name, tuple(tensor.shape), f"shape [{num_layers}, any]")
        if tensor.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
            raise InvalidInputError(f"{name}.dtype", tensor.dtype, "integers")
    if dropped.numel() and not (int(dropped.min()) >= 0 and int(dropped.max()) < 2**31):
        raise InvalidInputError("dropped", (int(dropped.min()), int(dropped.max())), "slots from 0 to 2**31 - 1")


def _encode_pages(tensors: InjectionTensors) -> list[dict[str, Any]]:
    # One transfer from the device, not one per page.
    stacked = torch.stack((tensors.keys.detach(), tensors.values.detach()), dim=1).to("cpu")  # [L, 2, K, h_kv, d_h]
    return [
        {"layer": layer, "page_idx": page_idx, "blob": encode_tensor(page)}
        for layer, of_layer in enumerate(stacked)
        for page_idx, page in enumerate(of_layer.split(PAGE_TOKENS, dim=1))
    ]
