"""Runs code in a real process and kills it at a moment it does not choose. For any test of what survives a crash."""

from __future__ import annotations

import mmap
import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch

Acknowledge = Callable[[int], None]
InTransaction = Callable[[], AbstractContextManager[None]]
Body = Callable[[Acknowledge, InTransaction], None]


@dataclass(frozen=True)
class Killed:
    """How a killed process stood.

    Args:
        acknowledged: The number it acknowledged last.
        was_in_transaction: Whether it was between the begin and the end of `in_transaction()`.
    """

    acknowledged: int
    was_in_transaction: bool


def run_until_killed(body: Body, *, delay_s: float, start_timeout_s: float = 60.0) -> Killed:
    """Fork, run `body` there, and end it by SIGKILL some time after its first acknowledgement.

    The process is a copy of this one: what is imported and loaded here is there too. Close databases before. torch
    uses one thread in it, since its pool of threads does not survive a fork.

    Args:
        body: Loops forever, given `ack(number)`, to call when something has become durable, numbers going up, and
            `in_transaction()`, a context manager to hold while a transaction is open.
        delay_s: From its first acknowledgement to the kill, in seconds.
        start_timeout_s: Longest wait for the first acknowledgement, in seconds.

    Returns:
        How the process stood.

    Raises:
        AssertionError: If it ended by itself, with its traceback, or acknowledged nothing in time.
    """
    # Shared memory outlives the process, and one aligned word is written whole or not at all.
    with mmap.mmap(-1, 16) as shared, memoryview(shared) as raw, raw.cast("Q") as words:
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks in processes with threads
            child = os.fork()
        if child == 0:
            _run_child(body, words, writer)
        os.close(writer)
        try:
            _wait_for_first(words, child, start_timeout_s)
            time.sleep(delay_s)
        finally:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            with os.fdopen(reader, "rb") as pipe:
                report = pipe.read().decode()
        assert os.WIFSIGNALED(status), f"the process ended by itself:\n{report}"
        assert words[0] > 0, f"the process acknowledged nothing in {start_timeout_s:g} s"
        return Killed(words[0] - 1, bool(words[1]))


def _run_child(body: Body, words: memoryview, writer: int) -> None:
    @contextmanager
    def in_transaction() -> Iterator[None]:
        words[1] = 1
        yield
        words[1] = 0

    def acknowledge(number: int) -> None:
        words[0] = number + 1

    try:
        torch.set_num_threads(1)
        body(acknowledge, in_transaction)
        os.write(writer, b"the body returned")
    except BaseException:  # noqa: BLE001 - reported through the pipe
        os.write(writer, traceback.format_exc().encode()[:60_000])
    finally:
        os._exit(1)  # without the parent's clean-up: pytest's and torch's exit handlers are not for this process


def _wait_for_first(words: memoryview, child: int, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while words[0] == 0 and time.monotonic() < deadline:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.001)
