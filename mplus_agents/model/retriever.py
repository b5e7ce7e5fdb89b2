"""The co-trained retriever f_q, f_k of every layer (paper 3.2.2)."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn


def two_layer_perceptron(hidden_size: int, inner_size: int, retrieval_dim: int) -> nn.Sequential:
    """Build f_q or f_k: two linear maps without bias, SiLU between (sizes and SiLU: published code).

    Args:
        hidden_size: d.
        inner_size: Width between the two maps.
        retrieval_dim: p.
    """
    return nn.Sequential(
        nn.Linear(hidden_size, inner_size, bias=False),
        nn.SiLU(),
        nn.Linear(inner_size, retrieval_dim, bias=False),
    )


class LayerRetriever(nn.Module):
    """f_q and f_k of one layer; both take hidden states after the layer's input norm.

    Args:
        hidden_size: d.
        inner_size: Width between the two maps (published: 2p).
        retrieval_dim: p.
    """

    def __init__(self, hidden_size: int, inner_size: int, retrieval_dim: int) -> None:
        super().__init__()
        self.query_proj = two_layer_perceptron(hidden_size, inner_size, retrieval_dim)
        self.key_proj = two_layer_perceptron(hidden_size, inner_size, retrieval_dim)

    def queries(self, normed: torch.Tensor) -> torch.Tensor:
        """Map normed hidden states [n, d] to queries [n, p]."""
        return cast(torch.Tensor, self.query_proj(normed))

    def keys(self, normed: torch.Tensor) -> torch.Tensor:
        """Map normed hidden states [m, d] to retrieval keys [m, p]."""
        return cast(torch.Tensor, self.key_proj(normed))
