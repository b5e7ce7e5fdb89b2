"""The mean of the weights over the last steps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mplus_agents.training.precision import load_weights


class AverageWeights:
    """An exponential moving average of weights, in float32 (Izmailov et al. 2018 take a plain mean).

    Args:
        weights: What is trained, by name; the average starts with what they are.
        over: Steps that it looks back: a step's weights count 1/over of it.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], over: int) -> None:
        self._weights = dict(weights)
        self._add = get_ema_multi_avg_fn(1 - 1 / over)
        self.values = {name: weight.detach().float().clone() for name, weight in weights.items()}

    def update(self) -> None:
        """Take what the weights are after a step."""
        now = [weight.detach().float() for weight in self._weights.values()]
        self._add(list(self.values.values()), now, 0)

    def load(self, values: Mapping[str, torch.Tensor]) -> None:
        """Go on from a checkpoint.

        Args:
            values: What `values` was.

        Raises:
            CheckpointError: They are not those of this network.
        """
        load_weights(self.values, values)
