"""Steps of the small recipe: every kind has a loss with gradients, on each device."""

from __future__ import annotations

import pytest
import torch

from mplus_agents.engine.prompts import Prompt
from mplus_agents.errors import ConfigError
from mplus_agents.training.build import build_network
from mplus_agents.training.episodes import ACKNOWLEDGEMENT, EpisodeSource
from mplus_agents.training.small import SmallRecipe
from mplus_agents.training.small_stage import SmallStage, StepKind
from tests.training.stages import stage

_PROSE = "There was a long road to the sea and back again. " * 60
_KINDS: tuple[StepKind, ...] = ("repeat", "recall", "context", "write", "theta", "long_term")
_DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def small_recipe(kind: StepKind, device: str, num_chunks: int) -> tuple[torch.nn.Module, SmallRecipe]:
    network, codec = build_network(stage())
    network.to(device)
    options = SmallStage(kind, 4, num_chunks, 6, queue_steps=2, long_prompt_every=2, chat_share=0.2)
    return network, SmallRecipe(network, EpisodeSource.load(codec, [_PROSE], seed=1), options)


@pytest.mark.parametrize("device", _DEVICES)
@pytest.mark.parametrize("kind", _KINDS)
def test_steps_of_every_kind_train_what_they_use(kind: StepKind, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    network, recipe = small_recipe(kind, device, num_chunks=8)
    for step in range(4):
        loss, metrics = recipe.loss(step)
        loss.backward()
        assert loss.isfinite()
        assert metrics
    moved = {
        name for name, weight in network.named_parameters() if weight.grad is not None and weight.grad.abs().sum() > 0
    }
    writes, retrieves = kind in ("write", "theta", "long_term"), kind in ("theta", "long_term")
    assert "decoder.lm_head.weight" in moved
    assert ("new_memory_positional_emb" in moved) == writes
    assert any(name.startswith("retrievers.") for name in moved) == retrieves


def test_a_fact_told_after_text_in_the_prompt_is_acknowledged(monkeypatch: pytest.MonkeyPatch) -> None:
    _, recipe = small_recipe("long_term", "cpu", num_chunks=8)
    recipe._source.chat_share = 1.0  # as a memory step leaves it; every turn tells something now
    answers: list[str] = []

    def collect(rows: list[list[tuple[Prompt, str]]], lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        answers.extend(answer for row in rows for _, answer in row)
        return torch.zeros(()), torch.ones(1)

    monkeypatch.setattr(recipe._context, "_answer_in_context", collect)
    recipe._context.context(2)
    assert set(answers) == {ACKNOWLEDGEMENT}


def test_fewer_tokens_in_a_step_than_are_retrieved_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_chunks is 2, which write 8 memory tokens .* numbers that write 12"):
        small_recipe("long_term", "cpu", num_chunks=2)
