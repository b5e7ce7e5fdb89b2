"""Θ read by the retriever, at random, or not at all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mplus_agents.config import MemoryConfig
from mplus_agents.errors import InvalidInputError
from mplus_agents.memory import MemoryDelta, MemoryState
from tests.model.samples import grow, published, tokens

_CONFIG = MemoryConfig(
    num_layers=2,
    hidden_size=4,
    num_kv_heads=1,
    head_dim=2,
    retrieval_dim=2,
    tokens_per_injection=4,
    max_short_term=8,
    num_retrieved=6,
    max_long_term=40,
)


def filled(num_injections: int = 16) -> MemoryState:
    memory = MemoryState(_CONFIG, seed=3, genesis=None, device=torch.device("cpu"), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_injections):
        hidden, heads, retrieval = ((2, 4, 4), (2, 4, 1, 2), (2, 4, 2))
        parts = [torch.randn(shape, generator=generator) for shape in (hidden, heads, heads, retrieval)]
        memory.apply(MemoryDelta(*parts))
    return memory


def births(memory: MemoryState, layer: int, rows: np.ndarray) -> np.ndarray:
    log = memory.index.long_term
    found: np.ndarray = log.births[layer, rows - log.base_row]
    return found


def test_a_draw_is_uniform_without_replacement_and_oldest_first() -> None:
    memory, num_draws = filled(), 3_000
    for layer in range(2):
        alive = memory.index.long_term.alive_rows(layer)
        assert len(alive) == _CONFIG.max_long_term  # so that some were evicted
        counts = dict.fromkeys(alive.tolist(), 0)
        for seed in range(num_draws):
            rows = memory.retrieve_at_random(layer, seed)
            assert len(set(rows.tolist())) == _CONFIG.num_retrieved
            assert (np.diff(births(memory, layer, rows)) > 0).all()
            for row in rows.tolist():
                counts[row] += 1  # only rows that are alive have a count
        share = _CONFIG.num_retrieved / _CONFIG.max_long_term
        sigma = (num_draws * share * (1 - share)) ** 0.5
        assert max(abs(count - num_draws * share) for count in counts.values()) < 4.5 * sigma


def test_pairs_are_drawn_as_often_as_chance_says() -> None:
    memory, num_draws = filled(), 3_000
    alive = memory.index.long_term.alive_rows(0)
    together = sum(
        {int(alive[0]), int(alive[1])} <= set(memory.retrieve_at_random(0, s).tolist()) for s in range(num_draws)
    )
    share = 6 / 40 * 5 / 39
    assert abs(together - num_draws * share) < 4.5 * (num_draws * share) ** 0.5


def test_seed_row_and_layer_each_have_draws_of_their_own() -> None:
    memory = filled()
    draws = {
        (seed, row, layer): tuple(births(memory, layer, memory.retrieve_at_random(layer, seed, row)).tolist())
        for seed in range(3)
        for row in range(3)
        for layer in range(2)
    }
    assert len(set(draws.values())) == len(draws)
    again = filled()
    assert (again.retrieve_at_random(1, 2, 1) == memory.retrieve_at_random(1, 2, 1)).all()


def test_fewer_tokens_than_wanted_are_all_read() -> None:
    memory = filled(3)
    assert memory.retrieve_at_random(0, 0).tolist() == memory.retrieve(0, torch.ones(1, 2)).tolist()
    assert len(memory.retrieve_at_random(0, 0)) == 4


def test_a_read_at_random_places_what_was_drawn() -> None:
    model = published("mplus", rule="paper")
    memory = model.initial_memory(seed=1)
    grow(model, memory, [20, 20, 20])
    ids = tokens(5)
    out = model.read(ids, memory, long_term="random", seed=7)
    for layer, places in enumerate(out.retrieved):
        expected = memory.entry_positions(layer, memory.retrieve_at_random(layer, 7))
        assert places.tolist() == expected.tolist()
    assert torch.equal(out.logits, model.read(ids, memory, long_term="random", seed=7).logits)
    others = [model.read(ids, memory, long_term="random", seed=8), model.read(ids, memory)]
    assert all(float((out.logits - other.logits).abs().max()) > 1e-3 for other in others)


def test_rows_of_a_batch_have_draws_of_their_own() -> None:
    model = published("mplus", rule="paper")
    memory = model.initial_memory(seed=1)
    grow(model, memory, [20, 20])
    ids = tokens(5).expand(2, -1)
    out = model.read(ids, [memory, memory], long_term="random", seed=7)
    first, second = (torch.stack(places) for places in out.retrieved)
    assert not torch.equal(first, second)
    assert torch.equal(first, torch.stack(model.read(ids[:1], memory, long_term="random", seed=7).retrieved))


def test_what_the_published_code_repeats_is_the_same_at_random() -> None:
    model = published("mplus_small_long_term")
    memory = model.initial_memory(seed=1)
    size = int(memory.long_term_sizes.min())
    assert 0 < size < model.config.memory.num_retrieved
    out = model.read(tokens(5), memory, long_term="random")
    assert torch.equal(out.logits, model.read(tokens(5), memory).logits)


def test_generate_reads_as_read_does() -> None:
    model = published("mplus", rule="paper")
    memory = model.initial_memory(seed=1)
    grow(model, memory, [20, 20, 20])
    for options in ({"long_term": "off"}, {"long_term": "random", "seed": 3}, {}):
        given: dict[str, Any] = dict(options)
        first = model.generate(tokens(5), memory, max_new_tokens=1, **given)
        assert int(first) == int(model.read(tokens(5), memory, **given).logits[0, -1].argmax())


@pytest.mark.parametrize("wrong", [True, False, None, "on", 1])
def test_other_ways_to_read_are_refused(wrong: Any) -> None:
    model = published("mplus")
    memory = model.initial_memory()
    message = "long_term is .*; allowed: retrieved, random, off"
    with pytest.raises(InvalidInputError, match=message):
        model.read(tokens(5), memory, long_term=wrong)
    with pytest.raises(InvalidInputError, match=message):
        model.generate(tokens(5), memory, long_term=wrong)
