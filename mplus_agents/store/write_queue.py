"""One writing thread at a time, in the order in which they came.

A KeyboardInterrupt may come between any two steps of Python code, also between taking a lock and the `try` that would
let go of it. So nothing here has to be undone at the end of a turn: it lasts as long as its own lock is held, which
`with` takes and lets go without a step between, and a turn that was broken off is seen to be over.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["WriteQueue"]

# Of the order of the shortest write: a commit that reaches the disk.
_POLL_S = 0.001


class WriteQueue:
    """The threads of a process that write to one database, or wait to.

    Args:
        is_shared: Whether they need not wait for each other, and only a thread that writes already is known here.
    """

    def __init__(self, *, is_shared: bool = False) -> None:
        self._is_shared = is_shared
        self._turns: deque[threading.Lock] = deque()
        self._guard = threading.Lock()
        self._thread = threading.local()

    @property
    def is_mine(self) -> bool:
        """Whether this thread writes or waits to."""
        turn: threading.Lock | None = getattr(self._thread, "turn", None)
        return turn is not None and turn.locked()

    @contextmanager
    def turn(self, timeout_s: float) -> Iterator[bool]:
        """Wait for this thread's turn, which ends with the block.

        Args:
            timeout_s: How long to wait for the threads before, in seconds.

        Yields:
            Whether it is this thread's turn: False if the threads before it took longer.
        """
        deadline = time.monotonic() + timeout_s
        turn = threading.Lock()
        with turn:
            self._thread.turn = turn
            if self._is_shared:
                yield True
                return
            with self._guard:
                self._turns.append(turn)
            while not (is_first := self._is_first(turn)) and time.monotonic() < deadline:
                time.sleep(_POLL_S)
            yield is_first

    def _is_first(self, turn: threading.Lock) -> bool:
        with self._guard:
            while not self._turns[0].locked():
                self._turns.popleft()
            return self._turns[0] is turn
