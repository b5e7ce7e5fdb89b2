"""The state of one agent in this process: opened when it is needed, and again when another process wrote to it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from mplus_agents.engine.resident import Resident, open_resident
from mplus_agents.engine.text import TextCodec
from mplus_agents.errors import AgentNotFoundError, ConflictError, InvalidInputError, StoreError
from mplus_agents.model import MPlusModel
from mplus_agents.store import Store

# An agent that another process writes to meanwhile is read again, at most so many times in all.
_MAX_OPENINGS = 8


class AgentState:
    """Keeps an agent's memory opened, one caller at a time.

    Args:
        model: The model.
        codec: Its tokenizer.
        store: Where the agent is kept.
        namespace: Where its name is unique.
        name: Its name.
        agent_id: Its row in the store.
    """

    def __init__(
        self, model: MPlusModel, codec: TextCodec, store: Store, namespace: str, name: str, agent_id: int
    ) -> None:
        self._model, self._codec, self._store = model, codec, store
        self._namespace, self._name, self._agent_id = namespace, name, agent_id
        self._lock = threading.RLock()
        self._resident: Resident | None = None
        self._is_writing = False

    @contextmanager
    def open(self) -> Iterator[Resident]:
        """Lock the agent and bring its state up to date; if that fails, the state is what the store has.

        Yields:
            The state.

        Raises:
            AgentNotFoundError: The agent was deleted.
            ConflictError: Other processes write to it all the time.
            StoreError: The database failed.
        """
        with self._lock:
            resident = self._resident
            for _ in range(_MAX_OPENINGS):
                version = self._store.agent_version(self._agent_id)
                if version is None:
                    raise AgentNotFoundError(f"agent {self._name!r} was deleted")
                if resident is not None and resident.record.version == version:
                    break
                # Opening takes several reads. If another process wrote between them, they do not belong together.
                resident = self._reopen()
            else:
                raise ConflictError(f"other processes write to agent {self._name!r} faster than it opens; call again")
            self._resident = resident
            yield resident

    @contextmanager
    def open_to_write(self) -> Iterator[Resident]:
        """Do `open`; if the call fails, what it left in memory is dropped and the next call asks the store.

        Yields:
            The state.

        Raises:
            InvalidInputError: The agent is being written to already, by the same thread.
        """
        with self.open() as resident:
            if self._is_writing:
                given = "an iterator that writes to the agent while the agent reads from it"
                raise InvalidInputError("memories", given, "an iterator that leaves the agent alone")
            try:
                self._is_writing = True
                yield resident
            except BaseException:
                self._resident = None
                raise
            finally:
                self._is_writing = False

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Lock the agent and, if what is done meanwhile succeeds, let go of its state."""
        with self._lock:
            yield
            self._resident = None

    def _reopen(self) -> Resident | None:
        """Rebuild the state from the store; None if another process wrote at the same time."""
        record = self._store.find_agent(self._namespace, self._name)
        if record is None or record.id != self._agent_id:
            raise AgentNotFoundError(f"agent {self._name!r} was deleted")
        try:
            return open_resident(self._model, self._codec, self._store, record)
        except StoreError:
            if self._store.agent_version(self._agent_id) == record.version:
                raise
            return None
