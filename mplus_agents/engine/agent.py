"""One agent: a name, a memory that outlives the process, and the calls that write to it; `reader.py` has the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from mplus_agents.engine.answering import Answering
from mplus_agents.engine.inputs import check_name, parse_memories, parse_message
from mplus_agents.engine.progress import ProgressBar
from mplus_agents.engine.prompts import chat_prompt
from mplus_agents.engine.reader import MemoryReader
from mplus_agents.engine.records import Document, MemoryDiff, Message, Receipt
from mplus_agents.engine.resident import Resident, open_past
from mplus_agents.engine.state import AgentState
from mplus_agents.engine.view import MemoryView
from mplus_agents.engine.writer import Writer
from mplus_agents.errors import AgentNotFoundError, InvalidInputError
from mplus_agents.store import AgentRecord, CommitInfo

if TYPE_CHECKING:
    from mplus_agents.engine.mplus import MPlus


class Agent(MemoryReader):
    """An agent's memory and voice; made by `MPlus.agent`, safe to use from many threads.

    Args:
        mplus: The engine.
        namespace: Where the name is unique.
        name: The agent's name.
        agent_id: Its row in the store.
    """

    def __init__(self, mplus: MPlus, namespace: str, name: str, agent_id: int) -> None:
        super().__init__(mplus, namespace, name)
        self._agent_id = agent_id
        self._state = AgentState(mplus.model, mplus.codec, mplus.store, namespace, name, agent_id)

    def __repr__(self) -> str:
        return f"Agent({self.name!r}, namespace={self.namespace!r}, model={self._mplus.name!r})"

    def has_id(self, agent_id: int) -> bool:
        """Tell whether this is the agent of a row in the store; a name may be deleted and created again.

        Args:
            agent_id: The row.
        """
        return self._agent_id == agent_id

    def remember(self, memories: object, *, source_id: str | None = None, progress: bool | None = None) -> Receipt:
        """Take turns or documents into the memory.

        Short texts wait verbatim in the window, which every prompt shows, until about a chunk is there. A document that
        was read before is not read twice, and one that was interrupted goes on where it stopped.

        Turns given together as a list are stored all or nothing, as far as they make at most 16 injections.

        Args:
            memories: A text (str or UTF-8 bytes), a `Document`, a `Message` or `{"role", "content"}`, an open file, a
                path (`pathlib.Path`), or an iterable of these.
            source_id: A stable name of a single document; its hash if None.
            progress: Show a progress bar; if None, for long texts on a terminal.

        Returns:
            What was made durable, or why nothing was injected.

        Raises:
            InvalidInputError: Something cannot be remembered. Nothing was stored, but for what came before it in an
                iterator, or before a document that has changed.
            ConflictError: Another process wrote to the agent at the same time; call again.
            StoreError: The database failed; the message says so, and everything acknowledged before is still there.
        """
        items = parse_memories(memories, source_id)
        with self._state.open_to_write() as resident, ProgressBar(progress) as bar:
            writer = self._writer(resident, bar)
            for item in _until_error(items, writer):
                if isinstance(item, Document):
                    bar.expect(len(item.text))
                    writer.add_document(item)
                else:
                    writer.add_message(item)
            writer.commit()
            return writer.receipt()

    def flush(self) -> Receipt:
        """Inject what waits in the window now, unless it is under the model's minimum.

        Returns:
            What was injected, or why nothing was.

        Raises:
            ConflictError: Another process wrote to the agent at the same time; call again.
            StoreError: The database failed.
        """
        with self._state.open_to_write() as resident:
            writer = self._writer(resident)
            writer.flush()
            writer.commit()
            return writer.receipt()

    def chat(self, message: str | Message, *, max_new_tokens: int | None = None, **options: Any) -> str:
        """Answer a turn of a conversation, then remember the turn and the answer.

        Args:
            message: What the user says.
            max_new_tokens: Most tokens of the answer; as many as fit, at most 128, if None.
            **options: As for `ask`.

        Returns:
            The answer.

        Raises:
            InvalidInputError: The message or an option's value is not allowed.
            ConfigError: An option is unknown.
            PromptTooLongError: Message, window and answer do not fit the generation window; nothing was remembered.
            StoreError: The answer was given but could not be remembered.
        """
        return "".join(self.stream(message, max_new_tokens=max_new_tokens, **options))

    def stream(self, message: str | Message, *, max_new_tokens: int | None = None, **options: Any) -> Iterator[str]:
        """Do `chat` piece by piece; the turn is remembered when the answer is complete, not if it is broken off.

        Args:
            message: What the user says.
            max_new_tokens: Most tokens of the answer; as many as fit, at most 128, if None.
            **options: As for `ask`.

        Returns:
            Pieces of the answer.

        Raises:
            InvalidInputError: The message or an option's value is not allowed.
            ConfigError: An option is unknown.
            PromptTooLongError: Message, window and answer do not fit the generation window.
        """
        turn = parse_message("message", message)
        with self._state.open() as resident:
            prompt = chat_prompt(self._mplus.codec, [turn], lead=resident.window_text)
            answering = self._begin(resident, prompt, max_new_tokens, options)
        return self._stream_and_remember(turn, answering)

    def clear_window(self) -> int:
        """Forget what waits in the window without injecting it; a document whose end waits there is not read again.

        Returns:
            How many turns were dropped.

        Raises:
            ConflictError: Another process wrote to the agent at the same time; call again.
            StoreError: The database failed.
        """
        with self._state.open_to_write() as resident:
            seqs = [item.seq for item in resident.window if item.seq is not None]
            if seqs:
                with self._mplus.store.write(resident.record) as tx:
                    tx.remove_from_window(seqs)
                resident.record, resident.window = tx.agent, []
            return len(seqs)

    def history(self, *, limit: int | None = None) -> list[CommitInfo]:
        """List the commits that made this memory, newest first; each is one injection. The memory is not opened.

        Args:
            limit: At most so many; all if None.

        Raises:
            InvalidInputError: The limit is negative.
            AgentNotFoundError: The agent was deleted.
            StoreError: The database failed.
        """
        return self._mplus.store.history.log(self._record(), limit=limit)

    def at(self, commit: int | str) -> MemoryView:
        """Open the memory as it was right after a commit; it can be read, and not written.

        Args:
            commit: Id of a commit in `history()`, or a tag.

        Raises:
            InvalidInputError: There is no such commit in the agent's past, and no such tag.
            AgentNotFoundError: The agent was deleted.
            CorruptBlobError: What is stored is damaged.
            StoreError: The database failed.
        """
        mplus, record = self._mplus, self._record()
        commit_id = mplus.store.history.resolve(record, commit)
        return MemoryView(mplus, open_past(mplus.model, mplus.store, record, commit_id), commit_id)

    def tag(self, name: str, commit: int | str | None = None) -> None:
        """Give a commit a name; a tag that has the name already is moved.

        Args:
            name: 1 to 200 printable characters without `/`, not a number.
            commit: Id of a commit in `history()`, or another tag; the newest commit if None.

        Raises:
            InvalidInputError: The name is not allowed, there is no such commit, or nothing was injected yet.
            AgentNotFoundError: The agent was deleted.
            StoreError: The database failed.
        """
        history, record = self._mplus.store.history, self._record()
        if commit is None and record.head_commit_id is None:
            allowed = "a commit; there is none before the first injection, and what waits in the window is in none"
            raise InvalidInputError("commit", commit, allowed)
        commit_id = record.head_commit_id if commit is None else history.resolve(record, commit)
        assert commit_id is not None
        history.set_tag(record, check_name("name", name), commit_id)

    def untag(self, name: str) -> None:
        """Take a tag away.

        Args:
            name: The tag.

        Raises:
            InvalidInputError: There is no such tag.
            AgentNotFoundError: The agent was deleted.
            StoreError: The database failed.
        """
        self._mplus.store.history.remove_tag(self._record(), name)

    @property
    def tags(self) -> dict[str, int]:
        """The tags, and the commit that each names."""
        return self._mplus.store.history.tags(self._record().id)

    def fork(self, name: str, *, namespace: str | None = None) -> Agent:
        """Create an agent that begins with this memory, window and documents; no memory token is copied.

        What is written to one later is never seen by the other. Both draw alike, so equal texts give equal memories.
        Tags stay with this agent.

        Args:
            name: The new agent's name.
            namespace: Where the name is unique; this agent's namespace if None.

        Returns:
            The new agent.

        Raises:
            InvalidInputError: A name is not allowed.
            ConflictError: There is an agent of that name, or this one was just written to.
            AgentNotFoundError: The agent was deleted.
            StoreError: The database failed.
        """
        namespace = self.namespace if namespace is None else check_name("namespace", namespace)
        self._mplus.store.history.fork(self._record(), namespace, check_name("name", name))
        return self._mplus.agent(name, namespace=namespace, create=False)

    def diff(self, other: Agent | int | str) -> MemoryDiff:
        """Compare two memories by what was injected: what both have, and what only one of them has.

        Args:
            other: An agent of the same store, or a commit of this agent's past by its id or tag.

        Raises:
            InvalidInputError: The agent is of another store, or there is no such commit.
            AgentNotFoundError: One of the two was deleted.
            StoreError: The database failed.
        """
        history, record = self._mplus.store.history, self._record()
        here = history.log(record)
        if not isinstance(other, Agent):
            there = history.log(record, history.resolve(record, other))
        elif other.mplus.store is self._mplus.store:
            there = history.log(other._record())
        else:
            raise InvalidInputError("other", other, f"an agent of {self._mplus.store.url}, in the same `Store`")
        shared = {item.commit_id for item in here} & {item.commit_id for item in there}
        return MemoryDiff(
            common=next((item for item in here if item.commit_id in shared), None),
            only_here=tuple(item for item in here if item.commit_id not in shared),
            only_there=tuple(item for item in there if item.commit_id not in shared),
        )

    def delete(self) -> None:
        """Delete the agent with its memory, window, documents, tags and log; it cannot be used afterwards.

        Forks keep the memory that they share with it; where it came from can no longer be looked up.

        Raises:
            AgentNotFoundError: It was deleted already.
            StoreError: The database failed.
        """
        with self._state.closed():
            self._mplus.store.delete_agent(self._agent_id)
            self._mplus.forget(self)

    def _open(self) -> AbstractContextManager[Resident]:
        return self._state.open()

    def _record(self) -> AgentRecord:
        """Read the agent as the store has it, without its memory."""
        record = self._mplus.store.find_agent(self.namespace, self.name)
        if record is None or record.id != self._agent_id:
            raise AgentNotFoundError(f"agent {self.name!r} was deleted")
        return record

    def _writer(self, resident: Resident, bar: ProgressBar | None = None) -> Writer:
        advance = bar.advance if bar is not None else None
        return Writer(self._mplus.model, self._mplus.codec, self._mplus.store, resident, advance)

    def _stream_and_remember(self, turn: Message, answering: Answering) -> Iterator[str]:
        pieces = []
        for piece in answering:
            pieces.append(piece)
            yield piece
        answer = "".join(pieces)
        turns = [turn, Message("assistant", answer)] if answer.strip() else [turn]
        self.remember(turns, progress=False)


def _until_error(items: Iterator[Message | Document], writer: Writer) -> Iterator[Message | Document]:
    """Go through items; if the next one cannot be had, what came before it is stored first."""
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except BaseException:
            writer.commit()
            raise
        yield item
