"""The trainer: the same numbers as a plain loop, and nothing lost when it is stopped, killed or goes wrong."""

from __future__ import annotations

import csv
import os
import shutil
import signal
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType  # type: ignore[import-untyped]

from mplus_agents.errors import CheckpointError, ConfigError
from mplus_agents.training import checkpoints
from mplus_agents.training.checkpoints import CheckpointFolder, load_values, save_values
from mplus_agents.training.stage_run import TrainingError, TrainingInterruptedError, locked, read_result
from mplus_agents.training.trainer import Trainer
from tests.store.kill_harness import Acknowledge, InTransaction, run_until_killed
from tests.training.stages import (
    ToyNetwork,
    ToyRecipe,
    assert_equal_weights,
    save_toy,
    stage,
    toy_trainer,
    toy_weights,
)


def rows_of(output: Path) -> list[dict[str, str]]:
    with (output / "log.csv").open(newline="", encoding="utf-8") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def plain_loop(num_steps: int, parts: int = 1, average_over: int = 1) -> dict[str, torch.Tensor]:
    """What the trainer is to do, written down without it (lr 0.01, warm-up 3, linear from half of the steps)."""
    network = ToyNetwork()
    network.train()
    torch.manual_seed(5)
    recipe = ToyRecipe(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01, betas=(0.9, 0.98), weight_decay=0.01)
    mean = {name: weight.clone() for name, weight in network.state_dict().items()}
    for step in range(num_steps):
        factor = min(1, (step + 1) / 3)
        if step >= num_steps / 2:
            factor *= 1 - 0.95 * (step - num_steps / 2) / (num_steps / 2)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * factor
        optimizer.zero_grad()
        for _ in range(parts):
            (recipe.loss(step)[0] / parts).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        for name, weight in network.state_dict().items():
            mean[name] += (weight - mean[name]) / average_over
    return mean


@pytest.mark.parametrize("parts", [1, 3])
def test_steps_are_those_of_a_plain_loop(tmp_path: Path, parts: int) -> None:
    result = toy_trainer(tmp_path, stage(gradient_accumulation=parts)).run()
    assert (result.num_steps, result.reason) == (8, "steps")
    trained, expected = toy_weights(tmp_path), plain_loop(8, parts)
    for name, weight in expected.items():
        torch.testing.assert_close(trained[name], weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("average_over", [1, 3])
def test_the_average_over_the_last_steps_is_saved(tmp_path: Path, average_over: int) -> None:
    toy_trainer(tmp_path, stage(optimizer={**stage().optimizer.model_dump(), "average_over": average_over})).run()
    trained, expected, last = toy_weights(tmp_path), plain_loop(8, 1, average_over), plain_loop(8)
    for name, weight in expected.items():
        torch.testing.assert_close(trained[name], weight, rtol=1e-6, atol=1e-7)
        assert torch.allclose(weight, last[name], rtol=1e-6, atol=1e-7) == (average_over == 1)


def test_retriever_has_its_own_rate(tmp_path: Path) -> None:
    values = {"lr": 1e-12, "retriever_lr": 0.1, "warm_up_steps": 0}
    toy_trainer(tmp_path, stage(optimizer=values)).run()
    before, after = ToyNetwork().state_dict(), toy_weights(tmp_path)
    moved = {name: float((after[name] - before[name]).abs().max()) for name in before}
    assert all((change > 1e-6) == name.startswith("retrievers.") for name, change in moved.items())


@pytest.mark.parametrize("average_over", [0, 4])
@pytest.mark.parametrize("precision", ["float32", "bf16_master"])
def test_stopped_at_any_step_it_goes_on_bit_for_bit(tmp_path: Path, precision: str, average_over: int) -> None:
    averaged = {**stage().optimizer.model_dump(), "average_over": average_over}
    wanted = stage(precision=precision, optimizer=averaged)
    toy_trainer(tmp_path / "whole", wanted).run()
    for steps in (2, 3, 5, 8):

        class Stopping(ToyRecipe):
            last_step = steps - 1

            def loss(self, step: int) -> tuple[torch.Tensor, dict[str, float]]:
                if step == self.last_step:
                    os.kill(os.getpid(), signal.SIGTERM)
                return super().loss(step)

        output = tmp_path / str(steps)
        trainer = toy_trainer(output, wanted, Stopping(ToyNetwork()))
        if steps < 8:
            with pytest.raises(TrainingInterruptedError, match=f"after step {steps}, which is saved"):
                trainer.run()
            assert read_result(output, wanted) is None
            toy_trainer(output, wanted).run()
        else:
            assert trainer.run().was_interrupted  # a wish to stop at the last step ends nothing early
        assert_equal_weights(toy_weights(output), toy_weights(tmp_path / "whole"))
        assert rows_of(output) == rows_of(tmp_path / "whole")
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_killed_again_and_again_it_ends_bit_for_bit(tmp_path: Path) -> None:
    config = stage(steps=150, save_every=2, log_every=1)
    toy_trainer(tmp_path / "whole", config).run()

    def body(ack: Acknowledge, in_transaction: InTransaction) -> None:
        def on_log(step: int, _: Mapping[str, float]) -> None:
            ack(step)

        toy_trainer(tmp_path / "killed", config, ToyRecipe(ToyNetwork(), pause_s=0.01), on_log=on_log).run()

    rng = Random(3)
    for _ in range(4):
        run_until_killed(body, delay_s=0.05 + 0.25 * rng.random())
    toy_trainer(tmp_path / "killed", config).run()
    assert_equal_weights(toy_weights(tmp_path / "killed"), toy_weights(tmp_path / "whole"))
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")


class _CrashError(BaseException):
    """Stands for the end of the process."""


def test_crash_at_every_point_of_saving_loses_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = stage(steps=4, save_every=1)
    toy_trainer(tmp_path / "whole", config).run()
    real_rename, real_sync, real_remove = Path.rename, checkpoints._sync, shutil.rmtree
    num_points = 0
    while True:
        output, calls = tmp_path / str(num_points), 0

        def crashing(real: Any, last: int = num_points) -> Any:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls > last:
                    raise _CrashError
                return real(*args, **kwargs)

            return wrapped

        monkeypatch.setattr(Path, "rename", crashing(real_rename))
        monkeypatch.setattr(checkpoints, "_sync", crashing(real_sync))
        monkeypatch.setattr(shutil, "rmtree", crashing(real_remove))
        crashed = True
        with suppress(_CrashError):
            toy_trainer(output, config).run()
            crashed = False
        monkeypatch.undo()
        toy_trainer(output, config).run()
        assert_equal_weights(toy_weights(output), toy_weights(tmp_path / "whole"))
        assert len(list((output / "checkpoints").iterdir())) == 2
        if not crashed:
            break
        num_points += 5 if num_points > 12 else 1  # every point of the first save, then some of each
    assert num_points > 20


def test_two_checkpoints_are_kept(tmp_path: Path) -> None:
    toy_trainer(tmp_path, stage(save_every=1)).run()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000007", "step-00000008"]


def test_loss_that_is_not_finite(tmp_path: Path) -> None:
    recipe = ToyRecipe(ToyNetwork())
    recipe.nan_at = 4
    with pytest.raises(TrainingError) as caught:
        toy_trainer(tmp_path, stage(), recipe).run()
    assert "the loss is nan at step 5" in str(caught.value)
    assert f"the last checkpoint is {tmp_path}/checkpoints/step-00000003" in str(caught.value)


def test_other_settings_do_not_go_on(tmp_path: Path) -> None:
    toy_trainer(tmp_path, stage()).run()
    with pytest.raises(CheckpointError, match="seed: 0 before, 1 now"):
        toy_trainer(tmp_path, stage(seed=1)).run()
    with pytest.raises(CheckpointError, match=f"{tmp_path} was made with other settings .seed: 0 before, 1 now"):
        read_result(tmp_path, stage(seed=1))
    toy_trainer(tmp_path, stage(log_every=1)).run()


def test_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    toy_trainer(tmp_path, stage()).run()
    path = tmp_path / "checkpoints" / "step-00000008" / "weights.pt"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"step-00000008/weights\.pt cannot be read"):
        toy_trainer(tmp_path, stage()).run()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"step": 8'])
def test_damaged_state_is_named(tmp_path: Path, text: str) -> None:
    toy_trainer(tmp_path, stage()).run()
    (tmp_path / "checkpoints" / "step-00000008" / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"step-00000008/state\.json (cannot be read|holds no)"):
        toy_trainer(tmp_path, stage()).run()
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"result\.json (cannot be read|holds no)"):
        read_result(tmp_path, stage())


def test_what_is_no_checkpoint_is_left_alone(tmp_path: Path) -> None:
    toy_trainer(tmp_path, stage(save_every=1)).run()
    other = tmp_path / "checkpoints" / "step-old"
    other.mkdir()
    (tmp_path / "log.csv").write_bytes(b"a,b\n1,\xff\n")  # not ours any more
    toy_trainer(tmp_path, stage(steps=9, save_every=1)).run()
    assert other.is_dir()
    assert [row["step"] for row in rows_of(tmp_path)] == ["9"]


def test_one_training_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(TrainingError, match="another process is training in"), locked(tmp_path):
        pass
    with locked(tmp_path):  # free again
        pass


def test_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="allowed: a folder that can be written"), locked(tmp_path / "file" / "stage"):
        pass


def test_gradient_that_is_not_finite_is_noticed_without_clipping(tmp_path: Path) -> None:
    network = ToyNetwork()
    next(network.parameters()).register_hook(lambda gradient: gradient * float("nan"))
    recipe = ToyRecipe(network)
    with pytest.raises(TrainingError, match="gradient's norm is nan at step 1"):
        toy_trainer(tmp_path, stage(optimizer={"lr": 0.01, "clip": None}), recipe).run()


class _Anything:
    pass


def test_checkpoints_hold_no_objects(tmp_path: Path) -> None:
    save_values({"thing": _Anything()}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_values(tmp_path / "x.pt")


def test_part_of_a_tensor_is_stored_without_the_rest(tmp_path: Path) -> None:
    save_values({"part": torch.zeros(100_000)[:3]}, tmp_path / "x.pt")
    assert (tmp_path / "x.pt").stat().st_size < 5_000
    assert load_values(tmp_path / "x.pt")["part"].tolist() == [0, 0, 0]


def test_deepspeed_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    network = ToyNetwork()
    accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    with pytest.raises(ConfigError, match="distributed type is DEEPSPEED; allowed: NO, MULTI_GPU, MULTI_CPU, FSDP"):
        Trainer(network, ToyRecipe(network), stage(), tmp_path / "out", accelerator, save_toy)
    assert not (tmp_path / "out").exists()


def test_stop_when_the_aim_is_reached(tmp_path: Path) -> None:
    rule = {"metric": "step_number", "value": 3.4, "mean_over": 2}  # means: 0.5, 2.5, 4.5
    result = toy_trainer(tmp_path, stage(stop_when=rule)).run()
    assert (result.num_steps, result.reason) == (6, "stop_when")
    again = read_result(tmp_path, stage(stop_when=rule))
    assert again is not None
    assert (again.num_steps, again.reason, again.was_finished) == (6, "stop_when", True)


@pytest.mark.parametrize("rule", [{"metric": "step_number", "value": 9.0}, None])
def test_another_aim_goes_on(tmp_path: Path, rule: dict[str, Any] | None) -> None:
    toy_trainer(tmp_path / "whole", stage()).run()
    output, first = tmp_path / "out", {"metric": "step_number", "value": 3.4, "mean_over": 2}
    assert toy_trainer(output, stage(stop_when=first)).run().num_steps == 6
    assert read_result(output, stage(stop_when=rule)) is None
    result = toy_trainer(output, stage(stop_when=rule)).run()
    assert (result.num_steps, result.reason) == (8, "steps")
    assert_equal_weights(toy_weights(output), toy_weights(tmp_path / "whole"))


def test_early_stop(tmp_path: Path) -> None:
    rule = {"metric": "step_number", "patience": 2, "mean_over": 2}  # it only gets worse
    result = toy_trainer(tmp_path, stage(early_stop=rule)).run()
    assert (result.num_steps, result.reason) == (6, "early_stop")


def test_more_steps_go_on_where_it_ended(tmp_path: Path) -> None:
    rate = {"lr": 0.01, "warm_up_steps": 3}
    toy_trainer(tmp_path / "whole", stage(steps=9, optimizer=rate)).run()
    toy_trainer(tmp_path / "longer", stage(steps=4, optimizer=rate)).run()
    assert read_result(tmp_path / "longer", stage(steps=4, optimizer=rate)) is not None
    assert read_result(tmp_path / "longer", stage(steps=9, optimizer=rate)) is None
    assert toy_trainer(tmp_path / "longer", stage(steps=9, optimizer=rate)).run().num_steps == 9
    assert_equal_weights(toy_weights(tmp_path / "longer"), toy_weights(tmp_path / "whole"))
    assert toy_trainer(tmp_path / "longer", stage(steps=5, optimizer=rate)).run().num_steps == 9  # nothing to do


def test_log_and_curves(tmp_path: Path) -> None:
    seen: list[int] = []
    toy_trainer(tmp_path, stage(steps=7), on_log=lambda step, _: seen.append(step)).run()
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == ["2", "4", "6", "7"]
    assert seen == [2, 4, 6, 7]
    assert [row["step_number"] for row in rows] == ["0.5", "2.5", "4.5", "6"]
    assert [row["rare"] for row in rows] == ["", "", "1", "1"]  # a column that came later
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_newest_checkpoint_is_a_whole_one(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    assert folder.newest() is None
    folder.begin(5)
    assert folder.newest() is None
    (folder.begin(7) / "x").write_text("", encoding="utf-8")
    assert folder.finish(7).name == "step-00000007"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007"]
