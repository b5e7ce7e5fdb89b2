"""The small recipe: a decoder from nothing, warmed up, then the paper's three stages with the batch as the world."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mplus_agents.training.episodes import EpisodeSource
from mplus_agents.training.network import TrainableMPlus
from mplus_agents.training.small_context import ContextTasks
from mplus_agents.training.small_memory import MemoryTasks
from mplus_agents.training.small_stage import SmallStage

_ONE_CHUNK_SHARE = 0.5  # of the stage `context`, from its start
# A retriever that finds nothing yet leaves nothing in Θ to learn reading from.
_HELP_SHARE, _HELP_UNTIL = 0.3, 0.4
_RECALL_SHARE = 0.35  # of the steps that read from the prompt


class SmallRecipe:
    """Computes losses for one stage; carries what passes from step to step.

    Args:
        network: The network.
        source: Where episodes come from.
        stage: The stage.
    """

    def __init__(self, network: TrainableMPlus, source: EpisodeSource, stage: SmallStage) -> None:
        self._source = source
        self._stage = stage
        self._context = ContextTasks(network, source)
        self._memory = MemoryTasks(network, source, stage)

    def after_step(self) -> None:
        """Do nothing: what a step leaves for the next one is there when its loss is."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the next step depends on, beside the weights and torch's generator."""
        version, numbers, gauss = self._source.rng.getstate()
        return {"rng": [version, list(numbers), gauss], **self._memory.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where another run was.

        Args:
            state: What `state_dict` returned.
        """
        version, numbers, gauss = state["rng"]
        self._source.rng.setstate((version, tuple(numbers), gauss))
        self._memory.load_state_dict(state)

    def loss(self, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the loss of a step, and numbers to log.

        Args:
            step: Its number within the stage.
        """
        stage = self._stage
        self._source.chat_share = stage.chat_share
        done = step / stage.steps
        self._source.common = stage.common_from + (stage.common_to - stage.common_from) * done
        self._source.hard = stage.hard_from + (stage.hard_to - stage.hard_from) * done
        if stage.kind == "repeat":
            return self._context.repeat()
        if stage.kind == "recall":
            return self._context.recall(min(1.0, max(0.0, step / max(1, stage.easy_steps) - 1)))
        if stage.kind == "context" or (stage.context_every and step % stage.context_every == 0):
            if self._source.rng.random() < _RECALL_SHARE:
                return self._context.recall(1.0)
            is_easy = stage.kind == "context" and step < _ONE_CHUNK_SHARE * stage.steps
            return self._context.context(1 if is_easy else stage.most_context_chunks)
        if stage.kind == "write":
            return self._memory.write_only()
        help_share = max(0.0, _HELP_SHARE * (1 - step / (_HELP_UNTIL * stage.steps)))
        is_long = bool(stage.long_prompt_every) and step % stage.long_prompt_every == 1 % stage.long_prompt_every
        return self._memory.memory(is_long, help_share)
