"""What the dry run says, against real networks, published numbers and torch's own counter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from mplus_agents.training.build import build_network
from mplus_agents.training.dry_run import _flops, _small_work, _Work, estimate
from mplus_agents.training.stage_files import load_stage, ready_recipes
from tests.training.stages import stage
from tests.training.test_build import ThetaOnly, base_folder

LLAMA_8B: dict[str, Any] = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def test_parameters_from_scratch_are_those_of_the_network() -> None:
    config = stage()
    network, codec = build_network(config)
    [cost] = estimate([config])
    missing = (400 - len(codec.tokenizer)) * 32 * 2  # the tokenizer of a test may not find as many tokens
    assert cost.num_parameters == sum(weight.numel() for weight in network.parameters()) + missing
    assert cost.num_trained == cost.num_parameters


def test_parameters_with_adapters_are_those_of_the_network(tmp_path: Path) -> None:
    memory = {"tokens_per_injection": 4, "max_short_term": 16, "num_retrieved": 4, "max_long_term": 50}
    config = stage(model={"base": {"path": str(base_folder(tmp_path)), "adapter_rank": 3, "memory": memory}})
    network, _ = build_network(config)
    [cost] = estimate([config])
    assert cost.num_parameters == sum(weight.numel() for weight in network.parameters())
    assert cost.num_trained == sum(weight.numel() for weight in network.parameters() if weight.requires_grad)


def test_llama_3_1_8b_has_the_published_sizes(tmp_path: Path) -> None:
    LlamaConfig(**LLAMA_8B).save_pretrained(str(tmp_path))
    files = ready_recipes()["llama-3.1-8b"]
    stages = [load_stage(path, [f"model.base.path={tmp_path}"] if "1-" in path.name else ()) for path in files]
    first, second, third = estimate(stages)
    own = 32 * 4096 + 4096  # bos rows, positional embedding
    retrievers = 32 * 2 * (4096 * 512 + 512 * 256)
    assert first.num_trained == 2 * 37_748_736 + own  # each adapter 37.75 M (published)
    assert first.num_parameters == 8_030_261_248 + first.num_trained  # Llama-3.1-8B's own count
    assert second.num_trained == third.num_trained == first.num_trained + retrievers
    assert first.weight_bytes == 2 * first.num_parameters + 4 * first.num_trained
    assert first.memory_bytes == 12_800 * 32 * 4096 * 2
    assert third.memory_bytes == (10_240 * 4096 + 150_000 * (4096 + 256)) * 32 * 2


@pytest.mark.parametrize("has_gradient", [False, True])
def test_operations_are_those_that_torch_counts(has_gradient: bool) -> None:
    config = stage(attention="eager")  # torch does not count its fused attention on a CPU
    network, _ = build_network(config)
    num_tokens, num_theta = 90, 24
    ids = torch.randint(3, 300, (1, num_tokens))
    counter = FlopCounterMode(display=False)
    with counter, torch.set_grad_enabled(has_gradient):
        theta = [torch.randn(1, num_theta, 32) for _ in range(2)]
        logits = network.logits(network.read(ids, ThetaOnly(network, theta)))
        if has_gradient:
            logits.sum().backward()
    told = _flops(_Work(1, num_tokens, 1 + num_theta, has_gradient), config, network)
    assert told == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(
    ("kind", "hard", "times"),
    [("theta", (1.0, 1.0), 0), ("long_term", (1.0, 1.0), 8 / 3), ("long_term", (0.0, 1.0), 11 / 6)],
)
def test_questions_of_the_small_recipe_read_a_mean_of_two_and_two_thirds_k0(
    kind: str, hard: tuple[float, float], times: float
) -> None:
    config = stage(recipe={"type": "small", "kind": kind, "hard_from": hard[0], "hard_to": hard[1]})
    network, _ = build_network(config)
    memory = network.config.memory
    read = round(times * memory.num_retrieved)
    assert _small_work(config, network)[1].num_slots == 1 + memory.max_short_term + read
