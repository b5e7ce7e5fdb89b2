"""A bfloat16 working copy of the weights with float32 master weights.

Near its end, a training step changes a weight by less than bfloat16 can tell apart (one part in 256), so that a step in
pure bfloat16 is lost in rounding. The optimizer therefore moves float32 weights; the network computes with a rounded
copy.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from mplus_agents.errors import CheckpointError


class MasterWeights:
    """Float32 weights of everything trained; the network itself becomes the working copy.

    Weights that are not trained have no master; where rounding them loses something, their original is kept in main
    memory, to be saved. Buffers, such as RoPE's frequencies, keep their precision.

    Args:
        network: The network, its trained weights in float32. It is changed in place.
        dtype: Precision of the working copy.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
        trained = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
        self._working = list(trained.values())
        self.weights = {name: nn.Parameter(weight.detach().float().clone()) for name, weight in trained.items()}
        self.originals: dict[str, torch.Tensor] = {}
        for name, weight in network.named_parameters():
            if not weight.requires_grad and weight.dtype != dtype:
                self.originals[name] = weight.detach().cpu().clone()
            weight.data = weight.data.to(dtype)

    def collect_gradients(self) -> None:
        """Add the working copy's gradients to those of the masters, and let go of them."""
        for master, working in zip(self.weights.values(), self._working, strict=True):
            if working.grad is None:
                continue
            gradient = working.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            working.grad = None

    @torch.no_grad()
    def copy_to_working(self) -> None:
        """Round the masters into the working copy."""
        torch._foreach_copy_([weight.data for weight in self._working], [each.data for each in self.weights.values()])

    @torch.no_grad()
    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Take over stored masters.

        Args:
            weights: By name.

        Raises:
            CheckpointError: They are not those of this network.
        """
        load_weights(self.weights, weights)
        self.copy_to_working()


@torch.no_grad()
def load_weights(weights: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor]) -> None:
    """Fill weights with stored ones.

    Args:
        weights: What to fill, by name.
        stored: With what.

    Raises:
        CheckpointError: Names or shapes differ.
    """
    wrong = sorted(set(weights) ^ set(stored))
    wrong += [name for name in weights if name in stored and weights[name].shape != stored[name].shape]
    if wrong:
        raise CheckpointError("the stored weights are not those of this network", wrong)
    for name, weight in weights.items():
        weight.copy_(stored[name])
