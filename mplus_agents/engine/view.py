"""A memory as it was: to be asked and looked at, not written."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mplus_agents.engine.reader import MemoryReader
from mplus_agents.engine.resident import Resident

if TYPE_CHECKING:
    from mplus_agents.engine.mplus import MPlus


class MemoryView(MemoryReader):
    """An agent's memory right after a commit, made by `Agent.at`. Its window is empty.

    In `stats()` the entries of the log, and the bytes of texts and of the newest hidden rows, are those of now.

    Args:
        mplus: The engine.
        resident: The memory.
        commit_id: The commit.
    """

    def __init__(self, mplus: MPlus, resident: Resident, commit_id: int) -> None:
        super().__init__(mplus, resident.record.namespace, resident.record.name)
        self.commit_id = commit_id
        self._resident = resident
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return f"MemoryView({self.name!r}, namespace={self.namespace!r}, commit={self.commit_id})"

    @contextmanager
    def _open(self) -> Iterator[Resident]:
        with self._lock:
            yield self._resident
