"""What the training loop and its users share: recipes, errors, results, and what a checkpoint must agree with."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from mplus_agents.errors import CheckpointError, MPlusError
from mplus_agents.training.config import StageConfig

Reason = Literal["steps", "stop_when", "early_stop"]
RESULT, MODEL = "result.json", "model"
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
    """

    model: Path
    num_steps: int
    reason: Reason
    metrics: dict[str, float]
    was_finished: bool = False


def read_result(output: Path, num_steps: int = 0) -> StageResult | None:
    """Return how a stage ended; None if it has not.

    Args:
        output: The stage's folder.
        num_steps: Steps wanted; a stage that ended after fewer, as no more were wanted, has not ended.
    """
    path = output / RESULT
    if not path.is_file() or not (output / MODEL / "config.json").is_file():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    if values["reason"] == "steps" and values["num_steps"] < num_steps:
        return None
    return StageResult(output / MODEL, values["num_steps"], values["reason"], values["metrics"], was_finished=True)


def remove_results(output: Path) -> None:
    """Remove what training has written into a stage's folder, and nothing else.

    Args:
        output: The folder.
    """
    for name in (RESULT, "log.csv", "curves.png"):
        (output / name).unlink(missing_ok=True)
    for name in (MODEL, "checkpoints", "tensorboard"):
        shutil.rmtree(output / name, ignore_errors=True)


def check_same(state: Mapping[str, Any], stage: StageConfig, num_processes: int, newest: Path) -> None:
    """Refuse to go on from another training's checkpoint.

    Args:
        state: What the checkpoint says of itself.
        stage: The settings now.
        num_processes: The processes now.
        newest: The checkpoint, for the message.

    Raises:
        CheckpointError: Settings that decide the result differ, or the number of processes does.
    """
    now = stage.model_dump(mode="json")
    changed = [key for key in now if key not in _FREE_KEYS and now[key] != state["stage"].get(key)]
    if changed:
        listed = "; ".join(f"{key}: {state['stage'].get(key)} before, {now[key]} now" for key in changed)
        raise CheckpointError(f"{newest} was made with other settings ({listed}); start anew with --fresh or elsewhere")
    if state["num_processes"] != num_processes:
        raise CheckpointError(f"{newest} was made by {state['num_processes']} processes; there are {num_processes} now")


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
