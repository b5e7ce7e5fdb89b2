"""Checkpoints of a running training: each appears whole or not at all, so that a process may be killed at any time.

Only tensors and plain values are stored, and `torch.load` is told to accept nothing else.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from mplus_agents.errors import CheckpointError

NUM_KEPT = 2
_PREFIX = "step-"
_UNFINISHED = ".unfinished-"
_OLD = ".old-"


class CheckpointFolder:
    """The checkpoints of one stage.

    Args:
        folder: Where they are; made when the first one is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def newest(self) -> Path | None:
        """Return the newest checkpoint."""
        found = self._all()
        return found[-1] if found else None

    def begin(self, step: int) -> Path:
        """Return an empty folder to write a checkpoint into; one process calls this.

        Args:
            step: Steps done.
        """
        self.clean()
        unfinished = self.unfinished(step)
        unfinished.mkdir(parents=True)
        return unfinished

    def unfinished(self, step: int) -> Path:
        """Return where a checkpoint is written before it counts; every process writes its part there.

        Args:
            step: Steps done.
        """
        return self.folder / f"{_UNFINISHED}{step:08d}"

    def finish(self, step: int) -> Path:
        """Make what was written the newest checkpoint, and drop the oldest; one process calls this.

        Args:
            step: As given to `begin`.
        """
        unfinished, target = self.unfinished(step), self.folder / f"{_PREFIX}{step:08d}"
        sync_tree(unfinished)
        if target.exists():  # saved at this step already, by an earlier run
            target.rename(self.folder / f"{_OLD}{target.name}")
        unfinished.rename(target)
        _sync(self.folder)
        for old in self._all()[:-NUM_KEPT]:
            old.rename(self.folder / f"{_OLD}{old.name}")  # gone at once; a half-deleted one is never taken for whole
        self.clean()
        return target

    def clean(self) -> None:
        """Remove what killed processes left."""
        for pattern in (f"{_UNFINISHED}*", f"{_OLD}*"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path)

    def remove(self) -> None:
        """Remove all checkpoints."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _all(self) -> list[Path]:
        found = self.folder.glob(f"{_PREFIX}*")
        return sorted(path for path in found if path.name.removeprefix(_PREFIX).isdecimal() and path.is_dir())


def save_values(values: Any, path: Path) -> None:
    """Write tensors and plain values.

    Args:
        values: Dicts, lists, tuples, tensors, numbers, strings, None.
        path: Where to.
    """
    torch.save(_compact(values), path)


def _compact(values: Any) -> Any:
    """Copy tensors that are part of a larger one, as torch would write all of it."""
    if isinstance(values, torch.Tensor):
        is_part = values.untyped_storage().nbytes() > values.nbytes
        return values.detach().clone() if is_part else values.detach()
    if isinstance(values, dict):
        return {key: _compact(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return type(values)(_compact(value) for value in values)
    return values


def load_values(path: Path) -> Any:
    """Read what `save_values` wrote, and nothing else.

    Args:
        path: Where from.

    Raises:
        CheckpointError: The file is missing or damaged, or holds objects, which are never loaded.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read ({reason}); remove its folder to go on from the one before"
        ) from error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that appears whole or not at all.

    Args:
        path: The file.
        write: Writes it at the path it is given.
    """
    unfinished = path.with_name(f".{path.name}.unfinished{path.suffix}")
    write(unfinished)
    _sync(unfinished)
    unfinished.rename(path)


def replace_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Write a folder that appears whole or not at all.

    Args:
        path: The folder; what was there is replaced.
        write: Fills the empty folder it is given.
    """
    unfinished, old = (path.with_name(f"{prefix}{path.name}") for prefix in (_UNFINISHED, _OLD))
    for left in (unfinished, old):
        shutil.rmtree(left, ignore_errors=True)
    unfinished.mkdir(parents=True)
    write(unfinished)
    sync_tree(unfinished)
    if path.exists():
        path.rename(old)
    unfinished.rename(path)
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Bring every file of a folder to the disk.

    Args:
        folder: The folder.
    """
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
