"""Stage settings and toy recipes that the tests of training share."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn

from mplus_agents.training.config import StageConfig
from mplus_agents.training.loop import make_accelerator
from mplus_agents.training.stage_files import parse_stage
from mplus_agents.training.trainer import Trainer

TINY_MODEL: dict[str, Any] = {
    "new": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 16,
        "memory": {
            "retrieval_dim": 16,
            "tokens_per_injection": 4,
            "max_short_term": 16,
            "num_retrieved": 8,
            "max_long_term": 1000,
            "chunk_tokens": 64,
            "max_prompt_tokens": 512,
        },
        "tokenizer": {"vocab_size": 400, "num_samples": 20, "prose_chars": 2000},
    }
}


def stage_values(**changes: Any) -> dict[str, Any]:
    """Return the values of a stage file."""
    return {
        "name": "toy",
        "model": TINY_MODEL,
        "recipe": {"type": "small", "kind": "repeat"},
        "optimizer": {"lr": 0.01, "warm_up_steps": 3, "schedule": "linear", "decay_from": 0.5},
        "steps": 8,
        "save_every": 3,
        "log_every": 2,
        **changes,
    }


def stage(**changes: Any) -> StageConfig:
    """Return a stage of few steps."""
    return parse_stage(stage_values(**changes), "test")


class ToyNetwork(nn.Module):
    """Small, with dropout, so that torch's generator matters, and with a part that is called a retriever."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 1))
        self.retrievers = nn.Linear(4, 1)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        first: torch.Tensor = self.body(rows)
        second: torch.Tensor = self.retrievers(rows)
        return first + second


class ToyRecipe:
    """Regression on rows from a generator of its own, with a memory of the last rows."""

    def __init__(self, network: nn.Module, seed: int = 1, pause_s: float = 0.0) -> None:
        self.network = network
        self.rng = Random(seed)
        self.last = torch.zeros(6, 4)
        self.num_after = 0
        self.nan_at: int | None = None
        self.pause_s = pause_s

    def loss(self, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        time.sleep(self.pause_s)
        rows = torch.tensor([[self.rng.gauss(0, 1) for _ in range(4)] for _ in range(6)])
        dtype = next(self.network.parameters()).dtype
        answer = self.network((rows + 0.1 * self.last).to(dtype)).float()[:, 0]
        self.last = rows
        loss = (answer - rows.sum(dim=1)).pow(2).mean()
        if step == self.nan_at:
            loss = loss * float("nan")
        metrics = {"step_number": float(step)}
        return loss, metrics | ({"rare": 1.0} if step >= 4 else {})

    def after_step(self) -> None:
        self.num_after += 1

    def state_dict(self) -> dict[str, Any]:
        version, numbers, gauss = self.rng.getstate()
        return {"rng": [version, list(numbers), gauss], "last": self.last, "num_after": self.num_after}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        version, numbers, gauss = state["rng"]
        self.rng.setstate((version, tuple(numbers), gauss))
        self.last, self.num_after = state["last"], state["num_after"]


def save_toy(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Stands for writing a model."""
    torch.save({name: weight.clone() for name, weight in weights.items()}, folder / "weights.pt")
    (folder / "config.json").write_text("{}", encoding="utf-8")


def toy_trainer(output: Path, config: StageConfig, recipe: Any = None, **options: Any) -> Trainer:
    """Return a trainer of the toy network; a recipe is made for it if none is given."""
    accelerator = make_accelerator(config)
    network = recipe.network if recipe is not None else ToyNetwork()
    torch.manual_seed(5)
    made = recipe if recipe is not None else ToyRecipe(network)
    return Trainer(network, made, config, output, accelerator, save_toy, show_progress=False, **options)


def toy_weights(output: Path) -> dict[str, torch.Tensor]:
    """Load what `save_toy` wrote."""
    weights: dict[str, torch.Tensor] = torch.load(output / "model" / "weights.pt", weights_only=True)
    return weights


def assert_equal_weights(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> None:
    """Compare bit for bit."""
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
