"""Compares the two objectives of the retriever: the published one (`bce`) and this package's (`contrastive`).

    python benchmarks/retriever_objectives.py [--model mplus-tiny] [--steps 300] [--output FILE.json]

For each objective the retrievers of a trained model are drawn anew, from the same seed, and trained alone, on the same
episodes for as many steps; everything else is frozen. Then both are asked as `mplus eval retriever` asks: facts by
names that training never saw, told between chunks of an unseen novel. The last column is the ratio of what they find.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from mplus_agents.evaluation.report import RetrieverPoint
from mplus_agents.evaluation.retriever import RetrieverSettings, run_retriever
from mplus_agents.language.prose import packaged_prose
from mplus_agents.model.checkpoint import CheckpointFiles
from mplus_agents.training.build import new_retrievers
from mplus_agents.training.config import OptimizerSection
from mplus_agents.training.episodes import EpisodeSource
from mplus_agents.training.folders import load_network, save_network
from mplus_agents.training.objectives import RetrieverObjective
from mplus_agents.training.optimizer import build_optimizer
from mplus_agents.training.small import SmallRecipe
from mplus_agents.training.small_stage import SmallStage

OBJECTIVES: tuple[RetrieverObjective, ...] = ("bce", "contrastive")
_WARM_UP = 20  # steps


def main() -> None:
    """Train, measure and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="mplus-tiny", help="folder of a trained model, or mplus-tiny")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--sizes", default="1000,10000,100000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    sizes = tuple(int(size) for size in options.sizes.split(","))
    runs: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for objective in OBJECTIVES:
            started = time.monotonic()
            path = Path(folder) / objective
            train(options.model, objective, options.steps, options.rate, options.seed, path)
            seconds = time.monotonic() - started
            result = run_retriever(RetrieverSettings(str(path), options.seed, options.questions, sizes))
            runs[objective] = result
            print(f"{objective}: {options.steps} steps in {seconds:.0f} s", flush=True)
    print_table(sizes, *(runs[objective].points for objective in OBJECTIVES))
    if options.output is not None:
        values = {name: result.model_dump(mode="json") for name, result in runs.items()}
        for result in values.values():
            result["model"] = options.model
        values["settings"] = {"steps": options.steps, "rate": options.rate, "seed": options.seed}
        options.output.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def train(model: str, objective: RetrieverObjective, num_steps: int, rate: float, seed: int, folder: Path) -> None:
    """Train fresh retrievers, nothing else, and save the model.

    Args:
        model: Where it is.
        objective: What they minimize.
        num_steps: How many steps.
        rate: Learning rate of Muon; it falls to nothing over the second half.
        seed: Of the weights and the episodes.
        folder: Where to save.
    """
    torch.manual_seed(seed)
    network, codec = load_network(CheckpointFiles.open(model).folder)
    network.requires_grad_(False)
    for old, new in zip(network.retrievers, new_retrievers(network.config.memory), strict=True):
        old.load_state_dict(new.state_dict())
    network.retrievers.requires_grad_(True)
    weights = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    optimizer = build_optimizer(weights, OptimizerSection(kind="muon", lr=rate, betas=(0.9, 0.98)))
    source = EpisodeSource.load(codec, [packaged_prose("kjv"), packaged_prose("jargon")], seed)
    # At its last step a stage helps the retriever no more; every step here is such a one.
    stage = SmallStage(
        "long_term", 1, num_questions=128, queue_steps=8, common_from=0.05, common_to=0.05, objective=objective
    )
    recipe = SmallRecipe(network, source, stage)
    for step in tqdm(range(num_steps), desc=objective):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min(1.0, (step + 1) / _WARM_UP, 2 * (1 - step / num_steps))
        torch.manual_seed(seed * num_steps + step)  # an objective that draws more must not change the episodes
        loss, _ = recipe.loss(stage.steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_network(network, codec, folder)


def print_table(
    sizes: Iterable[int], published: Sequence[RetrieverPoint], contrastive: Sequence[RetrieverPoint]
) -> None:
    """Print the share of the facts' tokens found, mean and best over layers, and the ratio of the means."""
    table = Table("Θ per layer", "at random", "bce: mean", "best layer", "contrastive: mean", "best layer", "ratio")
    for size in sizes:
        shares = [[point.recall for point in run if point.size == size] for run in (published, contrastive)]
        means = [sum(share) / len(share) for share in shares]
        chance = next(point.random for point in published if point.size == size)
        numbers = (chance, means[0], max(shares[0]), means[1], max(shares[1]))
        table.add_row(f"{size:,}", *(f"{number:.3f}" for number in numbers), f"{means[1] / max(means[0], 1e-9):.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
