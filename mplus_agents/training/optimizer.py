"""AdamW, or Muon for the matrices inside the layers with AdamW for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mplus_agents.training.config import OptimizerSection

# Muon's own momentum and weight update scaled to the size AdamW's has, so that both take one learning rate.
_MOMENTUM = 0.95
_SCALING = "match_rms_adamw"
_RETRIEVERS = "retrievers."
_LAYERS = "decoder.model.layers."


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for the matrices of layers and retrievers, AdamW for embeddings, head and vectors.

    Orthogonalized updates reach all directions of a matrix at once. What a small model has to learn first, finding a
    name and a relation in its context, takes it about half as many steps or fewer (docs/decisions/0002-curriculum.md).

    Args:
        groups: Parameter groups with their `peak` rate and whether they are `matrices`.
        settings: Rates and decay.
    """

    def __init__(self, groups: list[dict[str, Any]], settings: OptimizerSection) -> None:
        super().__init__(groups, {"lr": settings.lr})
        matrices = [group for group in self.param_groups if group["matrices"]]
        others = [group for group in self.param_groups if not group["matrices"]]
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            self._parts.append(
                torch.optim.Muon(
                    matrices,
                    lr=settings.lr,
                    momentum=_MOMENTUM,
                    weight_decay=settings.weight_decay,
                    adjust_lr_fn=_SCALING,
                )
            )
        if others:
            self._parts.append(_adamw(others, settings, is_fused=True))
        # One list of groups: who sets a rate here sets it for the parts.
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move all weights."""
        for part in self._parts:
            part.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients."""
        for part in self._parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the parts."""
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the state of the parts.

        Args:
            state_dict: What `state_dict` returned.
        """
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self._parts for group in part.param_groups]


def build_optimizer(
    weights: Mapping[str, nn.Parameter], settings: OptimizerSection, is_fused: bool = True
) -> torch.optim.Optimizer:
    """Build the optimizer of a stage; every group keeps its peak rate under `peak`.

    Args:
        weights: What is trained, by name.
        settings: Which optimizer, and its rates.
        is_fused: Whether AdamW may use its fused kernel.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, weight in weights.items():
        is_retriever = name.startswith(_RETRIEVERS)
        is_matrix = settings.kind == "muon" and weight.ndim == 2 and name.startswith((_RETRIEVERS, _LAYERS))
        groups.setdefault((is_retriever, is_matrix), []).append(weight)
    listed: list[dict[str, Any]] = [
        {"params": members, "peak": (settings.retriever_lr or settings.lr) if is_retriever else settings.lr}
        for (is_retriever, _), members in groups.items()
    ]
    if settings.kind == "adamw":
        return _adamw(listed, settings, is_fused)
    for group, (_, is_matrix) in zip(listed, groups, strict=True):
        group["matrices"] = is_matrix
    return Muon(listed, settings)


def _adamw(groups: list[dict[str, Any]], settings: OptimizerSection, is_fused: bool) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        groups, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=is_fused
    )
