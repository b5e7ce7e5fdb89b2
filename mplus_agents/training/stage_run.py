"""What the training loop and its users share: recipes, errors, results, and what a checkpoint must agree with."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from mplus_agents.errors import CheckpointError, ConfigError, MPlusError
from mplus_agents.training.checkpoints import write_atomically
from mplus_agents.training.config import PREVIOUS, StageConfig
from mplus_agents.training.folders import model_folder

Reason = Literal["steps", "stop_when", "early_stop"]
RESULT, MODEL = "result.json", "model"
_STARTED_FROM = "started_from.json"
# What may change between two runs of the same training.
_FREE_KEYS = ("name", "steps", "save_every", "log_every", "tensorboard", "stop_when", "early_stop")


class TrainingError(MPlusError):
    """Training cannot go on; the message says from where it can."""


class TrainingInterruptedError(TrainingError):
    """Training was asked to stop, saved a checkpoint and stopped."""


class Recipe(Protocol):
    """What a stage's steps compute."""

    def loss(self, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the loss of a step, and numbers to log."""
        ...

    def after_step(self) -> None:
        """Prepare the next loss, after the gradient of this one was taken."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what the next step depends on beside weights, optimizer and the global generators; plain values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        ...


@dataclass(frozen=True, slots=True)
class StageResult:
    """How a stage ended.

    Attributes:
        model: The folder of the trained model.
        num_steps: Steps done.
        reason: Why it ended.
        metrics: The last row of the log.
        was_finished: Whether it had been finished before, and nothing was done.
        was_interrupted: Whether a signal asked to stop while it came to its end.
    """

    model: Path
    num_steps: int
    reason: Reason
    metrics: dict[str, float]
    was_finished: bool = False
    was_interrupted: bool = False


def read_result(output: Path, stage: StageConfig) -> StageResult | None:
    """Return how a stage ended; None if it has not, or would go on with the settings of now.

    Args:
        output: The stage's folder.
        stage: The settings now.

    Raises:
        CheckpointError: It was trained with other settings, or its result cannot be read.
    """
    path = output / RESULT
    if not path.is_file() or not (output / MODEL / "config.json").is_file():
        return None
    values = read_values(path, ("num_steps", "reason", "metrics", "stage"))
    check_settings(values["stage"], stage, output)
    if not has_ended(values["reason"], values["num_steps"], values["stage"], stage):
        return None
    return StageResult(output / MODEL, values["num_steps"], values["reason"], values["metrics"], was_finished=True)


def has_ended(reason: Reason | None, num_steps: int, before: Mapping[str, Any], stage: StageConfig) -> bool:
    """Tell whether what ended a training ends it with the settings of now as well.

    Args:
        reason: Why it ended; None if it did not.
        num_steps: Steps done.
        before: The settings then.
        stage: The settings now.
    """
    if reason is None or reason == "steps":
        return num_steps >= stage.steps
    return bool(before.get(reason) == stage.model_dump(mode="json")[reason])  # a rule is called as its key


def write_result(output: Path, result: StageResult, stage: StageConfig) -> None:
    """Write what `read_result` reads.

    Args:
        output: The stage's folder.
        result: How the stage ended.
        stage: Its settings.
    """
    values = {"num_steps": result.num_steps, "reason": result.reason, "metrics": result.metrics}
    text = json.dumps({**values, "stage": stage.model_dump(mode="json")}, indent=1) + "\n"
    write_atomically(output / RESULT, lambda path: path.write_text(text, encoding="utf-8"))


def read_values(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """Read a JSON file of training.

    Args:
        path: The file.
        keys: What it must hold.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); remove {path.parent} to do without it") from error
    missing = [key for key in keys if not isinstance(values, dict) or key not in values]
    if missing:
        raise CheckpointError(f"{path} holds no {missing[0]!r}; remove {path.parent} to do without it")
    return dict(values)


def remove_results(output: Path) -> None:
    """Remove what training has written into a stage's folder, and nothing else.

    Args:
        output: The folder.
    """
    for name in (RESULT, _STARTED_FROM, "log.csv", "curves.png"):
        (output / name).unlink(missing_ok=True)
    for name in (MODEL, "checkpoints", "tensorboard"):
        shutil.rmtree(output / name, ignore_errors=True)


def start_digest(stage: StageConfig, previous: Path | None) -> str | None:
    """Return a digest of the weights that a stage starts from; None if it starts from no model of ours that is there.

    Args:
        stage: The stage.
        previous: Output folder of the stage before.
    """
    start = stage.model.start
    folder = None if start is None else previous if start.path == PREVIOUS else Path(start.path)
    if folder is None or not any((path / "config.json").is_file() for path in (folder / MODEL, folder)):
        return None
    digest = hashlib.sha256()
    for path in sorted(model_folder(folder).glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def check_start(output: Path, digest: str | None) -> None:
    """Refuse to go on with a stage whose start has changed since.

    Args:
        output: The stage's folder.
        digest: What `start_digest` returns now.

    Raises:
        CheckpointError: It was started from other weights.
    """
    path = output / _STARTED_FROM
    if digest is not None and path.is_file() and read_values(path, ("weights",))["weights"] != digest:
        raise CheckpointError(
            f"{output} was started from other weights than those of the stage before now, which has been trained on or "
            "anew since; train this stage and those after it with --fresh"
        )


def note_start(output: Path, digest: str | None) -> None:
    """Write what `check_start` reads, unless it is there.

    Args:
        output: The stage's folder.
        digest: What `start_digest` returned.
    """
    path, text = output / _STARTED_FROM, json.dumps({"weights": digest}) + "\n"
    if digest is not None and not path.exists():
        write_atomically(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def check_settings(before: Mapping[str, Any], stage: StageConfig, where: Path) -> None:
    """Refuse what another training made.

    Args:
        before: The settings that it was made with.
        stage: The settings now.
        where: A checkpoint or a stage's folder, for the message.

    Raises:
        CheckpointError: Settings that decide the result differ.
    """
    now = stage.model_dump(mode="json")
    keys = [key for key in now if key not in _FREE_KEYS]
    changed = [found for key in keys for found in _differences(key, before.get(key), now[key])]
    if changed:
        raise CheckpointError(
            f"{where} was made with other settings ({'; '.join(changed)}); start anew with --fresh or elsewhere"
        )


def _differences(key: str, before: Any, now: Any) -> list[str]:
    """Say which values differ, each by its key with dots."""
    if isinstance(before, dict) and isinstance(now, dict):
        pairs = [(f"{key}.{name}", before.get(name), now.get(name)) for name in {**before, **now}]
        return [difference for pair in pairs for difference in _differences(*pair)]
    return [] if before == now else [f"{key}: {before} before, {now} now"]


def check_output(output: Path) -> None:
    """Check that a stage's folder can be written, before hours are spent on what goes there.

    Args:
        output: The folder; it need not exist.

    Raises:
        ConfigError: It is no folder, or may not be written.
    """
    nearest = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(f"output is {str(output)!r}; allowed: a folder that can be written, which {nearest} is not")


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keep other trainings out of a stage's folder.

    Args:
        output: The folder; made if it is missing.

    Raises:
        ConfigError: It cannot be made or written.
        TrainingError: Another process is training there.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(output / ".lock")
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:  # an OSError too
        raise TrainingError(f"another process is training in {output}; wait for it, or write elsewhere") from error
    except OSError as error:
        raise ConfigError(f"output is {str(output)!r}; allowed: a folder that can be written ({error})") from error
    try:
        yield
    finally:
        lock.release()


def generator_states() -> dict[str, Any]:
    """Return the states of Python's and torch's global generators as plain values."""
    version, numbers, gauss = random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": [version, list(numbers), gauss], "torch": torch.get_rng_state(), "cuda": cuda}


def set_generator_states(state: Mapping[str, Any]) -> None:
    """Set the global generators.

    Args:
        state: What `generator_states` returned.
    """
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
