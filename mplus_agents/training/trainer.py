"""The trainer: steps, checkpoints that a killed process goes on from bit for bit, logs, and reasons to stop."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from mplus_agents.errors import CheckpointError, ConfigError
from mplus_agents.training.averaging import AverageWeights
from mplus_agents.training.checkpoints import (
    CheckpointFolder,
    load_values,
    replace_folder,
    save_values,
)
from mplus_agents.training.config import EarlyStop, StageConfig, StopWhen
from mplus_agents.training.log import Means, TrainingLog
from mplus_agents.training.optimizer import build_optimizer
from mplus_agents.training.precision import MasterWeights, load_weights
from mplus_agents.training.signals import StopSignals
from mplus_agents.training.stage_run import (
    MODEL,
    Reason,
    Recipe,
    StageResult,
    TrainingError,
    TrainingInterruptedError,
    check_settings,
    generator_states,
    has_ended,
    read_values,
    set_generator_states,
    write_result,
)

_STATE, _WEIGHTS, _SHARDS = "state.json", "weights.pt", "shards"
_DRAW_EVERY_S = 60.0


class _StepModule(nn.Module):
    """Computes a step's loss in its `forward`, where accelerate's wrappers expect all use of the weights."""

    def __init__(self, network: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.network = network
        self.recipe = recipe

    def forward(self, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        return self.recipe.loss(step)


class Trainer:
    """Trains one network with one recipe.

    Args:
        network: The network; its parameters that require a gradient are trained.
        recipe: Computes losses with that same network.
        stage: Optimizer, precision, steps and so on.
        output: The stage's folder.
        accelerator: accelerate's `Accelerator`.
        save_model: Writes the trained model into an empty folder; given all weights by name.
        on_log: Called with steps and numbers at every line of the log.
        show_progress: Show a bar on stderr; if None, when that is a terminal.
    """

    def __init__(
        self,
        network: nn.Module,
        recipe: Recipe,
        stage: StageConfig,
        output: Path,
        accelerator: Any,
        save_model: Callable[[Path, Mapping[str, torch.Tensor]], None],
        on_log: Callable[[int, Mapping[str, float]], None] | None = None,
        show_progress: bool | None = None,
    ) -> None:
        self._network, self._recipe, self._stage, self._output = network, recipe, stage, output
        self._accelerator, self._save_model = accelerator, save_model
        self._on_log, self._show_progress = on_log, show_progress
        kind = str(accelerator.distributed_type).rpartition(".")[2]
        if kind in ("DEEPSPEED", "MEGATRON_LM"):  # these step inside of their own backward pass
            raise ConfigError(f"accelerate's distributed type is {kind}; allowed: NO, MULTI_GPU, MULTI_CPU, FSDP")
        self._is_sharded = kind == "FSDP"
        self._masters: MasterWeights | None = None
        if stage.precision == "bf16_master":
            if self._is_sharded:
                raise ConfigError("precision is 'bf16_master'; allowed with FSDP: float32, bf16_autocast")
            network.to(accelerator.device)
            self._masters = MasterWeights(network)
        self._module, self._optimizer = self._prepare()
        over = stage.optimizer.average_over
        self._average = AverageWeights(self._weights(), over) if over else None
        self._checkpoints = CheckpointFolder(output / "checkpoints")
        self._log = TrainingLog(output, stage.tensorboard and accelerator.is_main_process)
        self._step = 0
        self._seconds = 0.0
        self._reason: Reason | None = None
        self._means, self._stop_means, self._early_means = Means(), Means(), Means()
        self._best: float | None = None
        self._num_worse = 0
        self._last_row: dict[str, float] = {}
        self._drawn_at = time.monotonic()

    def run(self) -> StageResult:
        """Train to the end, from the newest checkpoint if there is one.

        Raises:
            TrainingError: The loss is not finite.
            TrainingInterruptedError: A signal asked to stop.
            CheckpointError: The checkpoint belongs to another training, or is damaged.
        """
        self._output.mkdir(parents=True, exist_ok=True)
        self._resume()
        if self._step >= self._stage.steps and self._reason is None:  # fewer steps are wanted now than were done
            self._reason = "steps"
        self._network.train()
        started = time.monotonic() - self._seconds
        with StopSignals() as signals:
            with self._progress() as bar:
                while not self._is_at_end():
                    metrics = self._train_step(signals)
                    self._seconds = time.monotonic() - started
                    self._take_note(metrics)
                    bar.set_postfix_str(_brief(self._last_row), refresh=False)
                    bar.update(1)
                    if not self._is_at_end():
                        self._save_if_due(signals)
            result = self._finish()
        return replace(result, was_interrupted=signals.is_raised or signals.is_agreed)

    def _is_at_end(self) -> bool:
        return self._reason is not None

    def _save_if_due(self, signals: StopSignals) -> None:
        if signals.is_agreed or self._step % self._stage.save_every == 0:
            self._save()
        if signals.is_agreed:
            raise TrainingInterruptedError(
                f"stopped after step {self._step:,}, which is saved; the same command (not --fresh) goes on from there"
            )

    def _prepare(self) -> tuple[nn.Module, Any]:
        settings = self._stage.optimizer
        if settings.kind == "muon" and self._is_sharded:
            raise ConfigError("optimizer.kind is 'muon'; allowed with FSDP: adamw")
        if settings.average_over and self._is_sharded:
            raise ConfigError(f"optimizer.average_over is {settings.average_over}; allowed with FSDP: 0")
        module = _StepModule(self._network, self._recipe)
        optimizer: Any = build_optimizer(self._weights(), settings, is_fused=not self._is_sharded)
        if self._masters is not None:
            return cast(nn.Module, self._accelerator.prepare(module)), optimizer
        return cast(tuple[nn.Module, Any], self._accelerator.prepare(module, optimizer))

    def _weights(self) -> dict[str, nn.Parameter]:
        """Return what the optimizer moves, by name."""
        if self._masters is not None:
            return self._masters.weights
        return {name: weight for name, weight in self._network.named_parameters() if weight.requires_grad}

    def _train_step(self, signals: StopSignals) -> dict[str, float]:
        stage = self._stage
        factor = stage.optimizer.factor(self._step, stage.steps)
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        self._optimizer.zero_grad(set_to_none=True)
        sums = Means()
        for part in range(stage.gradient_accumulation):
            is_last = part == stage.gradient_accumulation - 1
            # Gradients of masters are summed in float32, after each part; others wait for the last one.
            waits = not is_last and self._masters is None
            with self._accelerator.no_sync(self._module) if waits else nullcontext():
                loss, metrics = self._module(self._step)
                sums.add({**metrics, "loss": self._check_loss(loss, signals)})
                self._accelerator.backward(loss / stage.gradient_accumulation)
            if self._masters is not None:
                self._masters.collect_gradients()
            self._recipe.after_step()
        values = sums.take()
        values["grad_norm"] = self._clip(stage.optimizer.clip or math.inf)
        self._optimizer.step()
        if self._masters is not None:
            self._masters.copy_to_working()
        if self._average is not None:
            self._average.update()
        self._step += 1
        return values

    def _clip(self, max_norm: float) -> float:
        weights = list(self._weights().values())
        if self._masters is not None:
            norm = float(torch.nn.utils.clip_grad_norm_(weights, max_norm))
        else:
            norm = float(self._accelerator.clip_grad_norm_(self._module.parameters(), max_norm))
        if not math.isfinite(norm):
            raise self._not_finite("gradient's norm", norm)
        return norm

    def _check_loss(self, loss: torch.Tensor, signals: StopSignals) -> float:
        """Return the mean loss over all processes, which learn here, too, whether one of them was told to stop."""
        told = torch.stack([loss.detach().float(), loss.new_tensor(float(signals.is_raised), dtype=torch.float32)])
        if self._accelerator.num_processes > 1:
            told = self._accelerator.reduce(told, "sum") / self._accelerator.num_processes
        value, flag = told.tolist()
        signals.is_agreed = flag > 0
        if not math.isfinite(value):
            raise self._not_finite("loss", value)
        return float(value)

    def _not_finite(self, what: str, value: float) -> TrainingError:
        newest = self._checkpoints.newest()
        saved = f"the last checkpoint is {newest}" if newest else "no checkpoint was saved yet"
        return TrainingError(
            f"the {what} is {value} at step {self._step + 1:,}; {saved}. A lower optimizer.lr, "
            "a smaller optimizer.clip or precision float32 may help"
        )

    def _take_note(self, metrics: Mapping[str, float]) -> None:
        for means in (self._means, self._stop_means, self._early_means):
            means.add(metrics)
        stage, is_last = self._stage, self._step >= self._stage.steps
        if self._step % stage.log_every == 0 or is_last:
            self._write_log()
        if stage.stop_when is not None and self._step % stage.stop_when.mean_over == 0:
            mean = self._stop_means.take().get(stage.stop_when.metric)
            if self._agree(mean is not None and _has_reached(mean, stage.stop_when)):
                self._reason = "stop_when"
        if stage.early_stop is not None and self._step % stage.early_stop.mean_over == 0:
            mean = self._early_means.take().get(stage.early_stop.metric)
            if self._agree(mean is not None and self._is_out_of_patience(mean, stage.early_stop)):
                self._reason = "early_stop"
        if is_last and self._reason is None:
            self._reason = "steps"
        if self._reason is not None and self._means.get("loss") is not None:
            self._write_log()

    def _write_log(self) -> None:
        rate = self._stage.optimizer.lr * self._stage.optimizer.factor(self._step - 1, self._stage.steps)
        self._last_row = {"seconds": round(self._seconds, 1), "lr": rate, **self._means.take()}
        if self._accelerator.is_main_process:
            self._log.add(self._step, self._last_row)
            if self._on_log is not None:
                self._on_log(self._step, self._last_row)

    def _is_out_of_patience(self, mean: float, rule: EarlyStop) -> bool:
        is_better = self._best is None or (mean < self._best if rule.direction == "below" else mean > self._best)
        self._best = mean if is_better else self._best
        self._num_worse = 0 if is_better else self._num_worse + 1
        return self._num_worse >= rule.patience

    def _agree(self, decision: bool) -> bool:
        """Let the first process decide for all."""
        if self._accelerator.num_processes == 1:
            return decision
        word = torch.tensor(float(decision and self._accelerator.is_main_process), device=self._accelerator.device)
        return float(self._accelerator.reduce(word, "sum")) > 0

    def _save(self) -> None:
        accelerator, folder = self._accelerator, self._checkpoints
        unfinished = folder.unfinished(self._step)
        if accelerator.is_main_process:
            folder.begin(self._step)
        accelerator.wait_for_everyone()
        if self._is_sharded:
            accelerator.save_state(str(unfinished / _SHARDS))
        elif accelerator.is_main_process:
            weights = {name: weight.detach() for name, weight in self._weights().items()}
            average = {"average": self._average.values} if self._average is not None else {}
            values = {"weights": weights, "optimizer": self._optimizer.state_dict(), **average}
            save_values(values, unfinished / _WEIGHTS)
        own = {"recipe": self._recipe.state_dict(), "generators": generator_states()}
        save_values(own, unfinished / f"process-{accelerator.process_index}.pt")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            text = json.dumps(self._state(), indent=1)
            (unfinished / _STATE).write_text(text + "\n", encoding="utf-8")
            folder.finish(self._step)
            self._draw()
        accelerator.wait_for_everyone()

    def _draw(self) -> None:
        """Draw the curves, at the end and at most once in a while before."""
        now = time.monotonic()
        if self._is_at_end() or now - self._drawn_at >= _DRAW_EVERY_S:
            self._log.draw()
            self._drawn_at = now

    def _state(self) -> dict[str, Any]:
        return {
            "step": self._step,
            "seconds": self._seconds,
            "reason": self._reason,
            "last_row": self._last_row,
            "means": self._means.state_dict(),
            "stop_means": self._stop_means.state_dict(),
            "early_means": self._early_means.state_dict(),
            "best": self._best,
            "num_worse": self._num_worse,
            "num_processes": self._accelerator.num_processes,
            "stage": self._stage.model_dump(mode="json"),
        }

    def _resume(self) -> None:
        newest = self._checkpoints.newest()
        if newest is None:
            if self._accelerator.is_main_process:
                self._log.cut(0)
            return
        state = read_values(newest / _STATE, tuple(self._state()))
        check_settings(state["stage"], self._stage, newest)
        if state["num_processes"] != self._accelerator.num_processes:
            made_by, there_are = state["num_processes"], self._accelerator.num_processes
            raise CheckpointError(f"{newest} was made by {made_by} processes; there are {there_are} now")
        if self._is_sharded:
            self._accelerator.load_state(str(newest / _SHARDS))
        else:
            stored = load_values(newest / _WEIGHTS)
            if self._masters is not None:
                self._masters.load(stored["weights"])
            else:
                load_weights(self._weights(), stored["weights"])
            self._optimizer.load_state_dict(stored["optimizer"])
            if self._average is not None:
                self._average.load(stored["average"])
        own = load_values(newest / f"process-{self._accelerator.process_index}.pt")
        self._recipe.load_state_dict(own["recipe"])
        self._step, self._seconds = state["step"], state["seconds"]
        is_at_end = has_ended(state["reason"], self._step, state["stage"], self._stage)
        self._reason = state["reason"] if is_at_end else None
        self._best, self._num_worse, self._last_row = state["best"], state["num_worse"], state["last_row"]
        self._means.load_state_dict(state["means"])
        self._stop_means.load_state_dict(state["stop_means"])
        self._early_means.load_state_dict(state["early_means"])
        if self._accelerator.is_main_process:
            self._log.cut(self._step)
        set_generator_states(own["generators"])

    def _finish(self) -> StageResult:
        """Save the last checkpoint, then the model, then the result, which says that all of it is there."""
        self._save()
        assert self._reason is not None
        weights = self._all_weights()
        result = StageResult(self._output / MODEL, self._step, self._reason, self._last_row)
        if self._accelerator.is_main_process:
            replace_folder(result.model, lambda folder: self._save_model(folder, weights))
            write_result(self._output, result, self._stage)
        self._log.close()
        self._accelerator.wait_for_everyone()
        return result

    def _all_weights(self) -> dict[str, torch.Tensor]:
        if self._is_sharded:
            full = cast(dict[str, torch.Tensor], self._accelerator.get_state_dict(self._module))
            return {name.removeprefix("network."): weight for name, weight in full.items()}
        whole = self._network.state_dict()
        if self._average is not None:
            return {**whole, **(self._masters.originals if self._masters else {}), **self._average.values}
        if self._masters is None:
            return whole
        masters = {name: weight.detach() for name, weight in self._masters.weights.items()}
        return {**whole, **self._masters.originals, **masters}

    def _progress(self) -> Any:
        from tqdm.auto import tqdm

        is_hidden = None if self._show_progress is None else not self._show_progress  # None: by the terminal
        if not self._accelerator.is_main_process:
            is_hidden = True
        name = self._stage.name or "training"
        return tqdm(total=self._stage.steps, initial=self._step, desc=name, unit="step", disable=is_hidden)


def _brief(row: Mapping[str, float]) -> str:
    """Return the numbers of the log's last line, as a bar shows them."""
    return ", ".join(f"{name} {value:.3g}" for name, value in row.items() if name not in ("seconds", "lr"))


def _has_reached(mean: float, rule: StopWhen) -> bool:
    return mean >= rule.value if rule.direction == "above" else mean <= rule.value
