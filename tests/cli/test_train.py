"""`mplus train`: ready recipes and own files, from the first step to a model that answers."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from mplus_agents.cli import train as command
from mplus_agents.training.stage_files import STAGE_SUFFIXES
from tests.cli.conftest import Run
from tests.training.stages import stage_values

DATA = {"prose": ["kjv"]}  # the shortest one, as it is tokenized for every stage
SMALL_WORLD = {"type": "small", "num_chunks": 8, "num_questions": 3, "queue_steps": 1}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Two stages of a tiny network."""
    folder = tmp_path / "mine"
    folder.mkdir()
    write(folder / "1-repeat.yaml", stage_values(steps=5, data=DATA))
    second = {"model": {"start": {"path": "previous"}}, "recipe": {**SMALL_WORLD, "kind": "long_term"}, "steps": 2}
    write(folder / "2-long-term.yaml", stage_values(**second, data=DATA))
    return folder


def write(path: Path, values: dict[str, Any]) -> None:
    values = {key: value for key, value in values.items() if key != "name"}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")


@contextmanager
def interrupted_at_step(last: int) -> Iterator[None]:
    """Send this process a Ctrl-C in the middle of a step."""
    from mplus_agents.training.small import SmallRecipe

    real = SmallRecipe.loss

    def loss(self: SmallRecipe, step: int) -> Any:
        if step == last:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SmallRecipe, "loss", loss)
        yield


def test_trains_all_stages_and_what_comes_out_answers(mplus: Run, recipe: Path) -> None:
    result = mplus("train", str(recipe), "--json")
    assert result.exit_code == 0, result.output
    first, second = json.loads(result.stdout)
    assert (first["stage"], first["num_steps"], first["reason"]) == ("1-repeat", 5, "steps")
    assert second["model"] == "runs/mine/2-long-term/model"
    assert "1-repeat: step 5 of 5" in result.stderr
    assert mplus("read", "-", "--model", second["model"], stdin="The ferry left for Bergen. " * 20).exit_code == 0
    assert mplus("ask", "Where?", "--model", second["model"], "--max-new-tokens", "3").exit_code == 0

    again = mplus("train", str(recipe))
    assert again.stdout.splitlines()[1].startswith("2-long-term: was finished before: 2 steps")
    # A stage whose start has changed is not taken for finished.
    later = mplus("train", str(recipe), "--set", "1-repeat:steps=6")
    assert later.exit_code == 1
    assert later.stdout.startswith("1-repeat: 6 steps")
    assert "2-long-term was started from other weights than those of the stage before now" in later.stderr
    fresh = mplus("train", str(recipe), "--stage", "2-long-term", "--fresh", "--set", "2-long-term:steps=1")
    assert fresh.stdout.startswith("2-long-term: 1 steps")


def test_training_alone_changes_how_the_process_allocates(
    mplus: Run, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(command, "keep_freed_memory", lambda: calls.append(True))
    assert mplus("train", str(recipe), "--dry-run").exit_code == 0
    assert calls == []
    assert mplus("train", str(recipe), "--stage", "1-repeat").exit_code == 0
    assert calls == [True]


def test_dry_run_trains_nothing(mplus: Run, recipe: Path) -> None:
    result = mplus("train", str(recipe), "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    first, second = json.loads(result.stdout)
    assert first["num_parameters"] == second["num_parameters"] > 10_000
    assert not Path("runs").exists()
    table = mplus("train", str(recipe), "--dry-run")
    assert "2-long-term" in table.stdout
    assert f"{first['num_parameters']:,}" in table.stdout


def test_mistakes_are_one_line(mplus: Run, recipe: Path) -> None:
    values = yaml.safe_load((recipe / "1-repeat.yaml").read_text(encoding="utf-8"))
    write(recipe / "1-repeat.yaml", {**values, "seeed": 3})
    result = mplus("train", str(recipe))
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "1-repeat.yaml: unknown key 'seeed'; did you mean 'seed'?" in result.stderr
    assert "ready recipe (llama-3.1-8b, llama-3.2-1b, tiny)" in mplus("train", "big").stderr
    assert "allowed: 1-repeat, 2-recall" in mplus("train", "tiny", "--stage", "x").stderr
    assert "there is no stage 'x'" in mplus("train", "tiny", "--set", "x:steps=1").stderr


def test_missing_packages_are_named(mplus: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(command, "find_spec", lambda name: None if name in ("accelerate", "yaml") else real(name))
    result = mplus("train", "tiny")
    assert result.exit_code == 1
    assert result.stderr == "mplus: error: training needs accelerate, pyyaml: pip install 'mplus-agents[train]'\n"


def test_interrupted_it_says_how_to_go_on(mplus: Run, recipe: Path) -> None:
    with interrupted_at_step(2):
        result = mplus("train", str(recipe))
    assert result.exit_code == 130
    assert (
        "1-repeat: stopped after step 3, which is saved; the same command (not --fresh) goes on from there"
        in result.stderr
    )
    assert Path("runs/mine/1-repeat/checkpoints/step-00000003").is_dir()


def test_other_settings_are_refused_even_when_all_is_trained(mplus: Run, recipe: Path) -> None:
    assert mplus("train", str(recipe)).exit_code == 0
    result = mplus("train", str(recipe), "--set", "1-repeat:seed=7")
    assert result.exit_code == 1
    assert "1-repeat was made with other settings (seed: 0 before, 7 now)" in result.stderr
    nested = mplus("train", str(recipe), "--set", "1-repeat:optimizer.clip=0.25")
    assert "other settings (optimizer.clip: 1.0 before, 0.25 now)" in nested.stderr


def test_folders_of_later_stages_are_looked_for_before_the_first_is_trained(mplus: Run, recipe: Path) -> None:
    later = Path("later.yaml")
    later.write_text(
        "model: {start: {}}\nrecipe: {type: document, options: {paper_stage: 1}}\n"
        "data: {sources: [{location: nowhere}]}\noptimizer: {lr: 1}\nsteps: 1\n"
    )
    first = recipe / "1-repeat.yaml"
    result = mplus("train", str(first), str(later), "--output", "out")
    assert result.exit_code == 1
    assert "later.yaml: data.sources: location is 'nowhere'; allowed: a folder that exists" in result.stderr
    assert not Path("out").exists()


def test_a_change_meant_for_one_stage_is_told_how(mplus: Run) -> None:
    result = mplus("train", "tiny", "--dry-run", "--set", "model.new.hidden_size=96")
    assert "'model.new.intermediate_size' is missing (with --set model.new.hidden_size=96; " in result.stderr
    assert "NAME: changes stage NAME alone" in result.stderr


def test_fresh_replaces_later_stages_too(mplus: Run, recipe: Path) -> None:
    assert mplus("train", str(recipe)).exit_code == 0
    later = Path("runs/mine/2-long-term/model/model.safetensors")
    before = later.read_bytes()
    wrong = mplus("train", str(recipe), "--fresh", "--set", "2-long-term:model.start.memory.tokens_per_injection=2")
    assert wrong.exit_code == 1
    assert "tokens_per_injection is 2; allowed: 4 or more" in wrong.stderr
    assert later.read_bytes() == before  # nothing was lost by a wrong setting

    with interrupted_at_step(2):
        fresh = mplus("train", str(recipe), "--fresh", "--set", "seed=3")
    assert fresh.exit_code == 130
    assert not later.exists()
    assert mplus("train", str(recipe), "--set", "seed=3").exit_code == 0
    assert later.read_bytes() != before


def test_interrupted_at_the_end_of_a_stage_the_next_one_waits(mplus: Run, recipe: Path) -> None:
    with interrupted_at_step(4):
        result = mplus("train", str(recipe))
    assert result.exit_code == 130
    assert result.stdout.startswith("1-repeat: 5 steps")
    assert "stopped before the next stage" in result.stderr
    assert not Path("runs/mine/2-long-term").exists()
    assert mplus("train", str(recipe)).exit_code == 0


def test_more_tokens_per_injection_than_the_stage_before(mplus: Run, recipe: Path) -> None:
    start = {"path": "previous", "memory": {"tokens_per_injection": 8, "max_short_term": 32}}
    values = stage_values(model={"start": start}, recipe={**SMALL_WORLD, "kind": "long_term"}, steps=2, data=DATA)
    write(recipe / "3-more-tokens.yaml", values)
    result = mplus("train", str(recipe))
    assert result.exit_code == 0, result.output


def test_where_it_writes() -> None:
    assert command._default_output("my/stage.yaml") == Path("runs/stage")
    assert command._default_output("llama-3.1-8b") == Path("runs/llama-3.1-8b")
    assert command.STAGE_SUFFIXES == STAGE_SUFFIXES


def test_output_that_is_a_file(mplus: Run, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    result = mplus("train", str(recipe), "--output", str(tmp_path / "file"))
    assert result.exit_code == 1
    assert "allowed: a folder that can be written" in result.stderr
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


@pytest.mark.slow
def test_killed_process_goes_on_bit_for_bit(tmp_path: Path) -> None:
    small = {**SMALL_WORLD, "kind": "theta", "context_every": 3, "long_prompt_every": 2, "chat_share": 0.2}
    values = stage_values(steps=40, save_every=1, recipe=small, precision="bf16_master")
    write(tmp_path / "s.yaml", values)
    arguments = ["train", str(tmp_path / "s.yaml"), "--output"]
    run = [sys.executable, "-m", "mplus_agents.cli.main", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for num_saved in (1, 9):
        process = subprocess.Popen([*run, str(tmp_path / "killed")], env=environment)
        target = tmp_path / "killed" / "s" / "checkpoints" / f"step-{num_saved:08d}"
        while not target.exists():
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
        process.wait()
    subprocess.run([*run, str(tmp_path / "killed")], env=environment, check=True)
    subprocess.run([*run, str(tmp_path / "whole")], env=environment, check=True)
    killed, whole = (tmp_path / name / "s" / "model" / "model.safetensors" for name in ("killed", "whole"))
    assert killed.read_bytes() == whole.read_bytes()
