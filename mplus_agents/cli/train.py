"""`mplus train`: trains a model by a recipe, stage by stage; the same command goes on where it was broken off."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mplus_agents.cli.host_memory import keep_freed_memory
from mplus_agents.cli.output import format_bytes, new_table, note, print_json, print_table
from mplus_agents.errors import ConfigError

if TYPE_CHECKING:
    from mplus_agents.training.config import StageConfig
    from mplus_agents.training.dry_run import StageCost
    from mplus_agents.training.stage_run import StageResult

# Of stage files; importing them from there would load PyTorch for every `--help`. A test compares them.
STAGE_SUFFIXES = (".yaml", ".yml", ".toml")
_NEEDED = {"accelerate": "accelerate", "peft": "peft", "yaml": "pyyaml"}


def train(
    recipe: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE",
            help="A ready recipe (tiny, llama-3.2-1b, llama-3.1-8b), a folder of stage files, or stage files.",
        ),
    ],
    *,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Where to write; runs/RECIPE if not given.")
    ] = None,
    stage: Annotated[str | None, typer.Option(metavar="NAME", help="Train this stage alone.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Go on from what is there, or remove it and start anew.")
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it will cost, load no weights and train nothing.")
    ] = False,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change a setting, optimizer.lr=1e-3; of one stage: NAME:KEY=VALUE."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print an array with one entry per stage.")] = False,
) -> None:
    """Train a model that has a memory.

    A recipe is a list of stages, each a YAML or TOML file; a stage starts from
    the model that the one before made. Every stage has its folder in DIR:
    checkpoints, log.csv, curves.png, and at the end the model, which --model of
    the other commands takes. Interrupted or killed, the same command goes on.

      [dim]$[/] mplus train tiny --dry-run
      [dim]$[/] mplus train tiny --output runs/tiny
      [dim]$[/] mplus chat --model runs/tiny/8-conversation/model --store sqlite:///trained.db
    """
    _require_packages()
    if not dry_run:
        keep_freed_memory()
    from mplus_agents.training.stage_files import find_stages, load_stage

    files = find_stages(recipe)
    stages = [load_stage(path, _changes_of(path, changes or [], files)) for path in files]
    names = [each.name or "" for each in stages]
    if len(set(names)) < len(names):
        raise ConfigError(f"two stages have the same name: {', '.join(names)}")
    if stage is not None and stage not in names:
        raise ConfigError(f"--stage is {stage!r}; allowed: {', '.join(names)}")
    folder = output or _default_output(recipe[0])
    chosen = [place for place, name in enumerate(names) if stage in (None, name)]
    if dry_run:
        _print_costs(stages, chosen, folder, as_json)
        return
    _estimate(stages, chosen, folder)  # what does not fit a later stage is found before the first one is trained
    replaced = [] if resume else [folder / str(stages[place].name) for place in chosen]
    done = []
    for place in chosen:
        result = _train_stage(stages, place, folder, replaced)
        replaced = []
        done.append((str(stages[place].name), result))
        if not as_json and _is_main_process():
            typer.echo(_describe(*done[-1]))
        if result.was_interrupted and place != chosen[-1]:
            note("stopped before the next stage; the same command (not --fresh) goes on there")
            raise typer.Exit(130)
    if as_json and _is_main_process():
        print_json([_to_json(*each) for each in done])


def _default_output(recipe: str) -> Path:
    path = Path(recipe)
    return Path("runs") / (path.stem if path.suffix in STAGE_SUFFIXES else path.name)


def _require_packages() -> None:
    missing = [package for module, package in _NEEDED.items() if find_spec(module) is None]
    if missing:
        raise ConfigError(f"training needs {', '.join(missing)}: pip install 'mplus-agents[train]'")


def _changes_of(path: Path, changes: Sequence[str], files: Sequence[Path]) -> list[str]:
    """Return the changes that are meant for one stage: those without a stage's name, and those with its own."""
    chosen = []
    for change in changes:
        stage, has_stage, rest = change.partition(":")
        if not has_stage or "=" in stage:
            chosen.append(change)
        elif stage not in [file.stem for file in files]:
            raise ConfigError(f"--set {change!r}: there is no stage {stage!r}")
        elif stage == path.stem:
            chosen.append(rest)
    return chosen


def _previous(stages: Sequence[StageConfig], place: int, folder: Path) -> Path | None:
    return folder / str(stages[place - 1].name) if place else None


def _train_stage(stages: Sequence[StageConfig], place: int, folder: Path, replaced: Sequence[Path]) -> StageResult:
    from mplus_agents.training.loop import train as train_stage
    from mplus_agents.training.stage_run import TrainingInterruptedError

    stage = stages[place]
    name = str(stage.name)

    def report(step: int, values: Mapping[str, float]) -> None:
        numbers = ", ".join(f"{key} {value:.4g}" for key, value in values.items() if key not in ("seconds", "lr"))
        note(f"{name}: step {step:,} of {stage.steps:,}, {numbers}")

    on_log = None if sys.stderr.isatty() else report  # on a terminal there is a bar
    previous = _previous(stages, place, folder)
    try:
        return train_stage(stage, folder / name, previous=previous, replace=replaced, on_log=on_log)
    except TrainingInterruptedError as stop:
        note(f"{name}: {stop}")
        raise typer.Exit(130) from stop


def _to_json(name: str, result: StageResult) -> dict[str, Any]:
    return {
        "stage": name,
        "model": str(result.model),
        "num_steps": result.num_steps,
        "reason": result.reason,
        "was_finished": result.was_finished,
        "metrics": result.metrics,
    }


def _describe(name: str, result: StageResult) -> str:
    why = {"steps": "", "stop_when": ", its aim reached", "early_stop": ", as it got no better"}[result.reason]
    before = "was finished before: " if result.was_finished else ""
    loss = f", loss {result.metrics['loss']:.4g}" if "loss" in result.metrics else ""
    return f"{name}: {before}{result.num_steps:,} steps{why}{loss}; the model is in {result.model}"


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _estimate(stages: Sequence[StageConfig], chosen: Sequence[int], folder: Path) -> list[StageCost]:
    from mplus_agents.training.dry_run import estimate

    # A stage gets its shape from the one before: of a stage alone, from what that one has made, if it has.
    first = chosen[0]
    previous = _previous(stages, first, folder)
    if previous is not None and not (previous / "model" / "config.json").is_file():
        return estimate(stages[: chosen[-1] + 1])[first:]
    return estimate(stages[first : chosen[-1] + 1], previous)


def _print_costs(stages: Sequence[StageConfig], chosen: Sequence[int], folder: Path, as_json: bool) -> None:
    costs = _estimate(stages, chosen, folder)
    if as_json:
        print_json([cost.to_dict() for cost in costs])
        return
    columns = ("steps", "parameters", "trained", "tokens/step", "FLOPs/step", "weights", "gradients", "optimizer")
    table = new_table("stage", *(f"#{column}" for column in (*columns, "memory", "activations", "total")))
    for cost in costs:
        sizes = (cost.weight_bytes, cost.gradient_bytes, cost.optimizer_bytes, cost.memory_bytes)
        table.add_row(
            cost.stage,
            f"{cost.num_steps:,}",
            f"{cost.num_parameters:,}",
            f"{cost.num_trained:,}",
            f"{cost.tokens_per_step:,}",
            f"{cost.flops_per_step:.2e}",
            *(format_bytes(size) for size in (*sizes, cost.activation_bytes, cost.total_bytes)),
        )
    print_table(table)
    note("parameters are counted; tokens, operations and bytes are estimates for one process")
