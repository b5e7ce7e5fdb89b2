"""Processes that share the work of an experiment, and end with it whatever happens."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from types import FrameType
from typing import TypeVar

import torch

T = TypeVar("T")
_GRACE_S = 5.0  # for a worker to delete its temporary database when its parent has ended


def run_in_workers(num_workers: int, tasks: Iterable[tuple[Callable[..., T], tuple[object, ...]]]) -> Iterator[T]:
    """Run tasks in processes of their own, each with one thread.

    If the caller is interrupted or ends, so do they, and what they had in temporary folders is deleted.

    Args:
        num_workers: Processes.
        tasks: Functions of a module with their arguments.

    Yields:
        The results, in the order in which they come.
    """
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(num_workers, context, _start_worker) as pool:
        futures = [pool.submit(function, *arguments) for function, arguments in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            raise


def _start_worker() -> None:
    """Leave Ctrl-C to the parent; end when told to, or when the parent has ended."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # `with` blocks clean up


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_S)
    os._exit(1)  # the main thread waits for work that nobody will send
