"""The write and the read adapter, served from one set of weights.

Reading must cost nothing extra, so the read adapter is fused into the weights; writing runs the same tensors plus the
low-rank difference write − read. Fusing is one-way: the original base weights are not kept.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

WRITE_ADAPTER = "default"  # names in published files
READ_ADAPTER = "decoder_adapter"
ADAPTER_NAMES = (WRITE_ADAPTER, READ_ADAPTER)


@dataclass(frozen=True, slots=True)
class LoraPair:
    """Both adapters of one linear layer.

    Attributes:
        write_down: A of the write adapter, [r, in].
        write_up: B of the write adapter, [out, r].
        read_down: A of the read adapter, [r, in].
        read_up: B of the read adapter, [out, r].
        scaling: Factor on B·A.
    """

    write_down: torch.Tensor
    write_up: torch.Tensor
    read_down: torch.Tensor
    read_up: torch.Tensor
    scaling: float

    def fuse_read(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight with the read adapter added, computed in float32.

        Args:
            weight: [out, in].

        Returns:
            [out, in], in the weight's dtype.
        """
        if not self.read_up.any():
            return weight
        return (weight.float() + self.scaling * (self.read_up.float() @ self.read_down.float())).to(weight.dtype)

    def write_minus_read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the difference of the adapters as one of rank 2r: down [2r, in] and up [out, 2r]."""
        down = torch.cat([self.write_down, self.read_down])
        up = self.scaling * torch.cat([self.write_up, -self.read_up], dim=1)
        return down, up


class WriteLinear(nn.Module):
    """A linear layer of the write pass: the read pass's own weight tensor plus the difference of the adapters.

    Args:
        read_linear: The layer of the read pass; its tensors are shared.
        pair: Both adapters.
    """

    def __init__(self, read_linear: nn.Linear, pair: LoraPair) -> None:
        super().__init__()
        self.out_features = read_linear.out_features
        self.weight = read_linear.weight
        self.bias = read_linear.bias
        down, up = pair.write_minus_read()
        dtype = read_linear.weight.dtype
        self.down = nn.Parameter(down.to(dtype), requires_grad=False)
        self.up = nn.Parameter(up.to(dtype), requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map [..., in] to [..., out]."""
        difference = functional.linear(functional.linear(hidden, self.down), self.up)
        return functional.linear(hidden, self.weight, self.bias) + difference


def build_write_decoder(read_decoder: nn.Module, pairs: Mapping[str, LoraPair]) -> nn.Module:
    """Build the module tree of the write pass, which shares every weight tensor with the read pass.

    Args:
        read_decoder: The decoder without its head, the read adapter fused.
        pairs: Adapters by the name of their linear layer in `read_decoder`.
    """
    shared = {id(tensor): tensor for tensor in (*read_decoder.parameters(), *read_decoder.buffers())}
    write_decoder = copy.deepcopy(read_decoder, memo=shared)
    for name, pair in pairs.items():
        parent_name, _, child_name = name.rpartition(".")
        parent = write_decoder.get_submodule(parent_name)
        linear = getattr(parent, child_name)
        assert isinstance(linear, nn.Linear)
        setattr(parent, child_name, WriteLinear(linear, pair))
    return write_decoder
