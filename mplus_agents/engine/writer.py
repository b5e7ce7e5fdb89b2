"""Batching of writes: what waits, what is injected together, and what goes to the store in one transaction.

Every injection spends K tokens of θ whatever its length, so short turns wait in the window until about a chunk is
there. The transaction that commits an injection takes exactly the turns it injected out of the window.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from mplus_agents.engine.prompts import POLICY_VERSION, write_turn
from mplus_agents.engine.records import Document, Message, Receipt
from mplus_agents.engine.resident import Resident, Waiting
from mplus_agents.engine.text import TextCodec
from mplus_agents.errors import InvalidInputError, StoreError
from mplus_agents.memory import MemoryDelta, MemoryReceipt
from mplus_agents.model import MPlusModel
from mplus_agents.store import InjectionTensors, Store, WriteTransaction

# A full snapshot of the bookkeeping every so many commits: opening replays at most that many.
_SNAPSHOT_EVERY = 64
# Injections that share a transaction, and so a flush to disk. A document is also committed after some time.
_MAX_GROUP = 16
_MAX_GROUP_BYTES = 256 * 2**20
_MAX_GROUP_S = 0.5
_NO_EVICTION = torch.iinfo(torch.int64).min


@dataclass(slots=True)
class _Injection:
    items: list[Waiting]
    delta: MemoryDelta
    receipt: MemoryReceipt
    snapshot: dict[str, object] | None


@dataclass(frozen=True, slots=True)
class _Progress:
    source_id: str
    next_offset: int
    prefix_digest: str
    is_done: bool


class Writer:
    """One call's writes to one agent; what it has told to nobody is lost if it fails, and the agent must be reopened.

    Args:
        model: The model.
        codec: The tokenizer.
        store: The store.
        resident: The agent's state, changed in place.
        on_progress: Called with the characters taken and the tokens injected after every step of a document.
    """

    def __init__(
        self,
        model: MPlusModel,
        codec: TextCodec,
        store: Store,
        resident: Resident,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._model = model
        self._codec = codec
        self._store = store
        self._resident = resident
        self._on_progress = on_progress or (lambda num_chars, num_tokens: None)
        self._new_items: list[Waiting] = []
        self._group: list[_Injection] = []
        self._progress: _Progress | None = None
        self._has_flush = False
        self._group_started = time.monotonic()
        self._injection_ids: list[int] = []
        self._num_text_tokens = self._num_dropped = self._num_evicted = self._num_bytes = 0
        self._notes: list[str] = []

    @property
    def _chunk_tokens(self) -> int:
        return self._model.config.chunk_tokens

    @property
    def _min_tokens(self) -> int:
        return self._model.config.min_chunk_tokens

    def add_message(self, message: Message) -> None:
        """Let a turn wait, after injecting what no longer fits beside it; a turn longer than a chunk is cut.

        Args:
            message: The turn, checked.
        """
        ids = self._codec.encode(write_turn(message.role, message.content))
        if len(ids) <= self._chunk_tokens:
            self._add(Waiting(message.role, message.content, ids))
            return
        # Every part carries the speaker's label, so a part's text gets a little less than a chunk.
        room = max(1, self._chunk_tokens - len(self._codec.encode(write_turn(message.role, ""))))
        start = 0
        while start < len(message.content):
            piece, _ = self._codec.next_piece(message.content, start, room)
            ids = self._codec.encode(write_turn(message.role, piece))
            self._add(Waiting(message.role, piece, ids, offset=start))
            start += len(piece)

    def add_document(self, document: Document) -> None:
        """Read a document from where the agent stopped; its last piece, if short, waits in the window.

        Args:
            document: The document, its text checked.

        Raises:
            InvalidInputError: The part read before has changed.
        """
        self.commit()  # what was given before it stays, whatever is wrong with the document
        text = document.text
        source_id = document.source_id or content_id(text)
        start, digest = self._resume(source_id, text)
        while start < len(text):
            waiting = self._resident.num_waiting_tokens
            room = self._chunk_tokens - waiting
            if room < self._min_tokens <= waiting:
                self._inject(self._resident.window, source_id)
                room = self._chunk_tokens
            piece, ids = self._codec.next_piece(text, start, room)
            self._take(Waiting(None, piece, ids, source_id, start))
            digest.update(piece.encode())
            start += len(piece)
            self._progress = _Progress(source_id, start, digest.copy().hexdigest(), start == len(text))
            waiting = self._resident.num_waiting_tokens
            if waiting >= (self._min_tokens if start < len(text) else self._chunk_tokens):
                self._inject(self._resident.window, source_id if start < len(text) else None)
            self._on_progress(len(piece), len(ids))
            self._commit_if_due()
            if self._group and time.monotonic() - self._group_started > _MAX_GROUP_S:
                self.commit()
        self.commit()

    def flush(self) -> None:
        """Inject what waits, unless it is under the model's minimum."""
        waiting = self._resident.num_waiting_tokens
        if waiting >= self._min_tokens:
            self._inject(self._resident.window)
            self._has_flush = True
        elif waiting:
            self._notes.append(
                f"{waiting} tokens keep waiting in the window: an injection takes at least {self._min_tokens}"
            )
        else:
            self._notes.append("nothing was waiting")

    def commit(self) -> None:
        """Store everything done so far in one transaction.

        Raises:
            ConflictError: Another writer moved the agent; nothing of this was stored.
            StoreError: The database failed; nothing of this was stored.
        """
        if not (self._new_items or self._group or self._progress or self._has_flush):
            return
        try:
            with self._store.write(self._resident.record) as tx:
                staying = self._store_all(tx)
        except StoreError as error:
            lost = f"{len(self._new_items)} new turns or pieces and {len(self._group)} injections"
            raise type(error)(f"{error} (not stored: {lost} of agent {self._resident.record.name!r})") from error
        self._resident.record = tx.agent
        for item in staying:
            item.is_stored_in_window = True
        self._new_items, self._group, self._progress, self._has_flush = [], [], None, False
        self._group_started = time.monotonic()

    def receipt(self) -> Receipt:
        """Return what this call has made durable; call it after `commit`."""
        waiting = self._resident.num_waiting_tokens
        notes = list(self._notes)
        if not self._injection_ids and waiting and not notes:
            notes.append(
                f"{waiting} of {self._chunk_tokens} tokens wait verbatim in the window; they are part of every prompt, "
                "and are injected when a chunk is full or by flush()"
            )
        elif not (self._injection_ids or waiting or notes):
            notes.append("nothing was given")
        return Receipt(
            num_injections=len(self._injection_ids),
            injection_ids=tuple(self._injection_ids),
            num_text_tokens=self._num_text_tokens,
            num_memory_tokens=len(self._injection_ids) * self._model.config.memory.tokens_per_injection,
            num_dropped=self._num_dropped,
            num_evicted=self._num_evicted,
            num_bytes=self._num_bytes,
            num_waiting_tokens=waiting,
            note="; ".join(notes),
        )

    def _add(self, item: Waiting) -> None:
        """Let an item wait; what waits is injected when the item does not fit beside it, or makes a chunk full."""
        waiting = self._resident.num_waiting_tokens
        if waiting >= self._min_tokens and waiting + len(item.ids) > self._chunk_tokens:
            self._inject(self._resident.window)
        self._take(item)
        if self._resident.num_waiting_tokens >= self._chunk_tokens:
            self._inject(self._resident.window)
        self._commit_if_due()

    def _take(self, item: Waiting) -> None:
        self._new_items.append(item)
        self._resident.window.append(item)

    def _inject(self, items: Sequence[Waiting], goes_on: str | None = None) -> None:
        """Write items, the oldest in the window, into the memory; they reach the store with the next commit.

        What ends here has its line ended, as if more followed: a fact in the last words of an injection is kept better
        with a token after it (docs/decisions/0002-curriculum.md).

        Args:
            items: What is written.
            goes_on: The document whose text goes on in the next injection, if there is one.
        """
        memory = self._resident.memory
        ids = list(items[0].ids)
        for item, following in pairwise(items):
            if item.needs_break_before(following):
                ids += self._codec.encode("\n")
            ids += following.ids
        if items[-1].is_open_line and items[-1].source_id != goes_on:
            ids += self._codec.encode("\n")
        delta = self._model.write(torch.tensor([ids], device=self._model.device), memory)
        receipt = memory.apply(delta)
        takes_snapshot = (receipt.step + 1) % _SNAPSHOT_EVERY == 0
        snapshot: dict[str, object] | None = dict(memory.index.to_arrays()) if takes_snapshot else None
        self._group.append(_Injection(list(items), delta, receipt, snapshot))
        self._resident.window = self._resident.window[len(items) :]

    def _commit_if_due(self) -> None:
        if not self._group:
            return
        delta = self._group[0].delta
        num_bytes = len(self._group) * sum(part.nbytes for part in (delta.keys, delta.values, delta.retrieval_keys))
        if len(self._group) >= _MAX_GROUP or num_bytes >= _MAX_GROUP_BYTES:
            self.commit()

    def _resume(self, source_id: str, text: str) -> tuple[int, hashlib.blake2b]:
        digest = hashlib.blake2b(digest_size=16)
        source = self._store.source(self._resident.record.id, source_id)
        if source is None:
            return 0, digest
        digest.update(text[: source.next_offset].encode())
        if digest.hexdigest() != source.prefix_digest:
            raise InvalidInputError(
                "memories",
                f"a text that differs in the first {source.next_offset:,} characters from what was read as {source_id}",
                "the same text, unchanged or grown at its end; or another source_id",
            )
        if source.next_offset == len(text):
            self._notes.append(f"{source_id} was read before; nothing of it is stored twice")
        elif source.next_offset:
            self._notes.append(f"{source_id} went on at character {source.next_offset:,}")
        self._on_progress(source.next_offset, 0)
        return source.next_offset, digest

    def _store_all(self, tx: WriteTransaction) -> list[Waiting]:
        """Put everything done so far into a transaction; return what enters the stored window."""
        for item in self._new_items:
            self._log(tx, item)
        for injection in self._group:
            self._store_injection(tx, injection)
        staying = [item for item in self._resident.window if not item.is_stored_in_window]
        tx.add_to_window([item.seq for item in staying if item.seq is not None])
        if self._has_flush:
            tx.add_event("flush", policy_version=POLICY_VERSION)
        if self._progress is not None:
            tx.set_source(
                self._progress.source_id,
                next_offset=self._progress.next_offset,
                prefix_digest=self._progress.prefix_digest,
                is_done=self._progress.is_done,
            )
        return staying

    def _log(self, tx: WriteTransaction, item: Waiting) -> None:
        item.seq = tx.add_event(
            "piece" if item.role is None else "message",
            role=item.role,
            source_id=item.source_id,
            offset=item.offset,
            text=item.content,
            num_tokens=len(item.ids),
            policy_version=POLICY_VERSION,
        ).seq

    def _store_injection(self, tx: WriteTransaction, injection: _Injection) -> None:
        stored = [item.seq for item in injection.items if item.is_stored_in_window and item.seq is not None]
        tx.remove_from_window(stored)
        delta, receipt = injection.delta, injection.receipt
        num_text_tokens = sum(len(item.ids) for item in injection.items)
        result = tx.add_commit(
            step=receipt.step,
            tensors=InjectionTensors(delta.keys, delta.values, delta.retrieval_keys),
            dropped=receipt.dropped.to(torch.int32),
            evicted=_rectangle(receipt),
            tail_hidden=delta.hidden,
            event_seqs=[item.seq for item in injection.items if item.seq is not None],
            num_text_tokens=num_text_tokens,
            snapshot=injection.snapshot,  # type: ignore[arg-type]
        )
        self._resident.injection_ids[receipt.step] = result.injection_id
        self._injection_ids.append(result.injection_id)
        self._num_text_tokens += num_text_tokens
        self._num_dropped += receipt.num_dropped
        self._num_evicted += receipt.num_evicted
        self._num_bytes += result.num_bytes


def content_id(text: str) -> str:
    """Return the source id of a document that was given without one.

    Args:
        text: The document.
    """
    return f"text:{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"


def _rectangle(receipt: MemoryReceipt) -> torch.Tensor:
    """[L, e]: evicted births; layers that evicted fewer are filled up with the smallest int64."""
    width = max(map(len, receipt.evicted), default=0)
    filled = torch.full((len(receipt.evicted), width), _NO_EVICTION, dtype=torch.int64)
    for layer, births in enumerate(receipt.evicted):
        filled[layer, : len(births)] = torch.from_numpy(births)
    return filled
