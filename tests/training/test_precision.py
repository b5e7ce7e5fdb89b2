"""Master weights: what bfloat16 cannot hold is not lost, and the prototype's algorithm is followed bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from mplus_agents.language.prose import packaged_prose
from mplus_agents.training.assemble import draw_seed
from mplus_agents.training.build import build_network
from mplus_agents.training.episodes import EpisodeSource
from mplus_agents.training.loop import train
from mplus_agents.training.precision import MasterWeights
from mplus_agents.training.small import SmallRecipe
from mplus_agents.training.small_stage import SmallStage
from tests.training.stages import stage


def test_small_updates_are_not_lost() -> None:
    torch.manual_seed(0)
    network = nn.Linear(64, 64, bias=False)
    start = network.weight.detach().clone()
    pure = copy.deepcopy(network).bfloat16()
    masters = MasterWeights(network)
    assert network.weight.dtype == torch.bfloat16
    step, num_steps = 1e-5, 100
    for _ in range(num_steps):
        with torch.no_grad():
            pure.weight += step
            masters.weights["weight"].add_(step)
        masters.copy_to_working()
    torch.testing.assert_close(masters.weights["weight"].detach(), start + step * num_steps, rtol=0, atol=1e-6)
    rounding = masters.weights["weight"].detach().abs() * 2**-8
    assert ((network.weight.float() - masters.weights["weight"]).abs() <= rounding).all()
    assert (pure.weight == start.bfloat16()).float().mean() > 0.9  # each step alone is less than half a unit there


def test_gradients_are_summed_in_float32() -> None:
    network = nn.Linear(1, 1, bias=False)
    masters = MasterWeights(network)
    for value in (1.0, 2**-12):
        network.weight.grad = torch.full((1, 1), value, dtype=torch.bfloat16)
        masters.collect_gradients()
        assert network.weight.grad is None
    assert float(masters.weights["weight"].grad or 0) == 1 + 2**-12  # bfloat16 would say 1


def test_frozen_weights_have_no_master_and_buffers_keep_their_precision() -> None:
    network = nn.BatchNorm1d(3)
    network.bias.requires_grad_(False)
    masters = MasterWeights(network)
    assert list(masters.weights) == ["weight"]
    assert network.bias.dtype == torch.bfloat16
    assert masters.originals["bias"].dtype == torch.float32  # what is saved
    assert "weight" not in masters.originals
    assert network.running_mean is not None
    assert network.running_mean.dtype == torch.float32


def test_small_recipe_is_trained_as_by_the_prototype(tmp_path: Path) -> None:
    config = stage(precision="bf16_master", attention="grouped", steps=3, save_every=50)
    trained = load_file(train(config, tmp_path, show_progress=False).model / "model.safetensors")

    network, codec = build_network(config)
    work = copy.deepcopy(network)
    for weight in work.parameters():
        weight.data = weight.data.bfloat16()
    source = EpisodeSource.load(codec, [packaged_prose("kjv"), packaged_prose("jargon")], draw_seed(config))
    torch.manual_seed(draw_seed(config))
    recipe = SmallRecipe(work, source, SmallStage("repeat", 3))
    pairs = list(zip(network.parameters(), work.parameters(), strict=True))
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    for step in range(3):
        factor = min(1, (step + 1) / 3) * (1 - 0.95 * (step - 1.5) / 1.5 if step >= 1.5 else 1)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * factor
        loss, _ = recipe.loss(step)
        loss.backward()
        for master, working in pairs:
            master.grad = None if working.grad is None else working.grad.float()
            working.grad = None
        torch.nn.utils.clip_grad_norm_([master for master, _ in pairs], 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_([working.data for _, working in pairs], [master.data for master, _ in pairs])
    expected = {name.removeprefix("decoder."): weight for name, weight in network.state_dict().items()}
    names = [name for name in expected if name in trained]
    assert "model.layers.1.mlp.up_proj.weight" in names
    assert [name for name in names if not torch.equal(trained[name], expected[name])] == []
