"""What an injection makes and what it changes: plain records of tensors and integers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class MemoryDelta:
    """The K new tokens per layer that a write makes (paper 3.1); the memory itself is not changed by them yet.

    Attributes:
        hidden: [L, K, d], the layers' last K outputs.
        keys: [L, K, h_kv, d_h], keys of the read pass before RoPE.
        values: [L, K, h_kv, d_h], values of the read pass.
        retrieval_keys: [L, K, p], the retriever's keys; p is 0 without a retriever.
    """

    hidden: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    retrieval_keys: torch.Tensor


@dataclass(frozen=True, slots=True)
class IndexChange:
    """What one injection did to the bookkeeping.

    Attributes:
        step: Number of the injection, from 0.
        dropped: [L, k] int64, positions in θ's order that left θ.
        dropped_slots: [L, k] int64, the storage slots of θ they left from.
        new_slots: [L, K] int64, the storage slots of θ that the new tokens take.
        first_row: Θ row that the first dropped token takes; the others follow.
        evicted: Per layer, the births of the tokens that left Θ.
        evicted_rows: Per layer, the Θ rows they left, ascending.
    """

    step: int
    dropped: IntArray
    dropped_slots: IntArray
    new_slots: IntArray
    first_row: int
    evicted: tuple[IntArray, ...]
    evicted_rows: tuple[IntArray, ...]


@dataclass(frozen=True, slots=True)
class MemoryReceipt:
    """What one injection did to a memory.

    Attributes:
        step: Number of the injection, from 0.
        num_written: New tokens per layer.
        dropped: [L, k] int64, positions in θ's order (before the injection) that went from θ to Θ.
        evicted: Per layer, the births of the tokens that left Θ for good.
    """

    step: int
    num_written: int
    dropped: torch.Tensor
    evicted: tuple[IntArray, ...]

    @property
    def num_dropped(self) -> int:
        """Tokens per layer that left θ."""
        return int(self.dropped.shape[1])

    @property
    def num_evicted(self) -> int:
        """Tokens that left Θ, summed over the layers."""
        return sum(len(births) for births in self.evicted)
