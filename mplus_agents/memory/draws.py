"""The random draws of an agent's memory: which θ tokens an injection drops, and which of Θ a read at random sees.

A draw depends on a seed, a number (of the injection, or of the row in a batch) and the layer alone, so that nothing has
to be stored to repeat it, and every device agrees.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from mplus_agents.memory.types import IntArray


def draw_dropped(seed: int, step: int, *, num_layers: int, theta_size: int, num_dropped: int) -> IntArray:
    """Draw the θ positions that one injection drops, independently per layer (paper 3.1).

    Args:
        seed: The agent's seed.
        step: Number of the injection, from 0.
        num_layers: Layers to draw for.
        theta_size: Tokens in θ per layer before the injection.
        num_dropped: Tokens to drop per layer, at most `theta_size`.

    Returns:
        [num_layers, num_dropped] int64, positions in θ's order (oldest first), ascending, without repetition.
    """
    drawn = np.empty((num_layers, num_dropped), dtype=np.int64)
    for layer in range(num_layers):
        generator = torch.Generator(device="cpu").manual_seed(_layer_seed(seed, step, layer))
        drawn[layer] = torch.randperm(theta_size, generator=generator)[:num_dropped].numpy()
    drawn.sort(axis=1)
    return drawn


def draw_places(seed: int, row: int, layer: int, *, num_places: int, num_drawn: int) -> IntArray:
    """Draw places in Θ uniformly, in one layer.

    Args:
        seed: The call's seed.
        row: The row of the call's batch.
        layer: The layer.
        num_places: Tokens to draw from.
        num_drawn: Tokens to draw, at most `num_places`.

    Returns:
        [num_drawn] int64, ascending, without repetition.
    """
    generator = torch.Generator(device="cpu").manual_seed(_layer_seed(seed, row, layer))
    drawn: IntArray = torch.randperm(num_places, generator=generator)[:num_drawn].numpy()
    drawn.sort()
    return drawn


def _layer_seed(seed: int, step: int, layer: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{step}/{layer}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch takes seeds below 2**63
