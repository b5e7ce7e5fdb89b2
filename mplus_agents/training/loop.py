"""Trains a stage, from its file to a model that can be served; goes on where it was broken off."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from mplus_agents.errors import ConfigError
from mplus_agents.training.assemble import build_recipe, carry_over, draw_seed
from mplus_agents.training.build import build_network
from mplus_agents.training.config import StageConfig
from mplus_agents.training.folders import save_network
from mplus_agents.training.stage_run import (
    StageResult,
    check_output,
    check_start,
    locked,
    note_start,
    read_result,
    remove_results,
    start_digest,
)
from mplus_agents.training.trainer import Trainer


def train(
    stage: StageConfig,
    output: Path,
    *,
    previous: Path | None = None,
    replace: Sequence[Path] = (),
    on_log: Callable[[int, Mapping[str, float]], None] | None = None,
    show_progress: bool | None = None,
) -> StageResult:
    """Train one stage, from its newest checkpoint if there is one.

    Start it once per process with `accelerate launch` or `torchrun` for several processes.

    Args:
        stage: The stage.
        output: Its folder: checkpoints, log, curves, and at the end the model in `model`.
        previous: Output folder of the stage before, for `start: previous`.
        replace: Folders of stages, this one's or those of later ones, whose results are removed when all settings have
            been checked, before the first step.
        on_log: Called with steps and numbers at every line of the log.
        show_progress: Show a bar on stderr; if None, when that is a terminal.

    Returns:
        How it ended; at once if it had ended before.

    Raises:
        ConfigError: A setting is not allowed.
        CheckpointError: What to start or go on from is missing, damaged, or of another training.
        TrainingError: The loss is not finite, or another process is training there.
        TrainingInterruptedError: A signal asked to stop; a checkpoint was saved.
    """
    accelerator = make_accelerator(stage)
    is_main, rank = accelerator.is_main_process, accelerator.process_index
    digest = start_digest(stage, previous)
    if output not in replace:
        check_start(output, digest)
        finished = read_result(output, stage)
        if finished is not None:
            return finished
    check_output(output)
    network, codec = build_network(stage, previous)
    network.to(accelerator.device)
    recipe = build_recipe(stage, network, codec, rank, accelerator.num_processes)
    carry_over(recipe, stage, previous, rank)
    seed = draw_seed(stage, rank)
    random.seed(seed)
    torch.manual_seed(seed)

    def save(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        save_network(network, codec, folder, weights)

    with locked(output) if is_main else nullcontext():
        if is_main:
            for folder in replace:
                remove_results(folder)
            note_start(output, digest)
        accelerator.wait_for_everyone()
        return Trainer(network, recipe, stage, output, accelerator, save, on_log, show_progress).run()


def make_accelerator(stage: StageConfig) -> Any:
    """Make accelerate's `Accelerator` for a stage.

    Args:
        stage: The stage.

    Raises:
        ConfigError: accelerate is not installed.
    """
    try:
        from accelerate import Accelerator  # type: ignore[import-untyped]
        from accelerate.state import AcceleratorState  # type: ignore[import-untyped]
        from accelerate.utils import DistributedDataParallelKwargs  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError("training needs more packages: pip install 'mplus-agents[train]'") from error
    AcceleratorState._reset_state()  # the stage before may have had another precision; processes stay connected
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="bf16" if stage.precision == "bf16_autocast" else "no",
        # Which weights a step uses depends on its kind.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)],
    )
