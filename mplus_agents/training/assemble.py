"""Makes a stage's recipe on its data, and hands the memory of the stage before on to it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, cast

from mplus_agents.engine.text import TextCodec
from mplus_agents.language.prose import packaged_prose
from mplus_agents.training.checkpoints import CheckpointFolder, load_values
from mplus_agents.training.config import PREVIOUS, SmallSettings, StageConfig
from mplus_agents.training.network import TrainableMPlus
from mplus_agents.training.stage_run import Recipe

_CARRIED_BY_SMALL = ("queue", "tail")
_CARRIED_BY_DOCUMENTS = "pool"


def build_recipe(
    stage: StageConfig, network: TrainableMPlus, codec: TextCodec, rank: int = 0, world_size: int = 1
) -> Recipe:
    """Make a stage's recipe.

    Args:
        stage: The stage.
        network: The network, where it will be trained.
        codec: The tokenizer.
        rank: Number of this process; each draws other data.
        world_size: Number of processes.

    Raises:
        ConfigError: A setting is not allowed, or the data cannot be opened.
    """
    settings = stage.recipe
    if isinstance(settings, SmallSettings):
        from mplus_agents.training.episodes import EpisodeSource
        from mplus_agents.training.small import SmallRecipe
        from mplus_agents.training.small_stage import SmallStage

        texts = [packaged_prose(name) for name in stage.data.prose]
        source = EpisodeSource.load(codec, texts, draw_seed(stage, rank))
        small = SmallStage(steps=stage.steps, **settings.model_dump(exclude={"type"}))
        return SmallRecipe(network, source, small)
    from mplus_agents.training.document_recipe import build_document_recipe

    # One seed for all processes: the recipe itself tells apart what they share and what they do not.
    return build_document_recipe(
        network, codec, settings.options, stage.data.sources, draw_seed(stage), rank, world_size
    )


def draw_seed(stage: StageConfig, rank: int = 0) -> int:
    """Return the seed of a stage's draws, so that no stage and no process repeats those of another.

    Args:
        stage: The stage.
        rank: Number of the process.
    """
    digest = hashlib.blake2b(f"{stage.seed}/{stage.name}/{rank}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")


def carry_over(recipe: Recipe, stage: StageConfig, previous: Path | None, rank: int = 0) -> bool:
    """Give a fresh recipe the memory that the stage before ended with.

    Args:
        recipe: The recipe.
        stage: The stage.
        previous: Output folder of the stage before.
        rank: Number of this process.

    Returns:
        Whether there was a memory to carry over.
    """
    start = stage.model.start
    if start is None or not start.carry_memory:
        return False
    folder = previous if start.path == PREVIOUS else Path(start.path)
    newest = CheckpointFolder(folder / "checkpoints").newest() if folder is not None else None
    path = newest / f"process-{rank}.pt" if newest is not None else None
    if path is None or not path.is_file():
        return False
    before, now = load_values(path)["recipe"], recipe.state_dict()
    if _CARRIED_BY_DOCUMENTS in before and _CARRIED_BY_DOCUMENTS in now:
        cast(Any, recipe).pool.load_state_dict(before[_CARRIED_BY_DOCUMENTS])
        return True
    carried = {name: before[name] for name in _CARRIED_BY_SMALL if name in before and name in now}
    recipe.load_state_dict({**now, **carried})
    return bool(carried)
