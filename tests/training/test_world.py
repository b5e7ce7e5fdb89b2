"""The batch as the world: histories, what dropping leaves of them, and that reading such a memory is serving it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mplus_agents.config import MemoryConfig
from mplus_agents.memory.draws import draw_dropped
from mplus_agents.training.objectives import RetrieverLoss
from mplus_agents.training.world import Histories, WorldMemory, draw_histories, draw_theta
from tests.training.networks import NUM_LAYERS, NUM_NEW, NUM_RETRIEVED, NUM_SHORT, serve, tiny_network, tokens

_CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


def shape(per_chunk: int = 8, capacity: int = 128, num_layers: int = 2) -> MemoryConfig:
    return MemoryConfig(
        num_layers=num_layers,
        hidden_size=16,
        num_kv_heads=1,
        head_dim=16,
        retrieval_dim=4,
        tokens_per_injection=per_chunk,
        max_short_term=capacity,
        num_retrieved=4,
        max_long_term=1_000,
    )


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(2, 30), st.integers(1, 12))
def test_a_history_is_an_order_of_the_allowed_chunks_with_the_target_at_its_age(
    seed: int, num_chunks: int, num_rows: int
) -> None:
    torch.manual_seed(seed)
    allowed = torch.rand(num_rows, num_chunks) < 0.7
    targets = torch.randint(num_chunks, (num_rows,))
    targets[torch.rand(num_rows) < 0.3] = -1
    has_target = targets >= 0
    allowed[torch.arange(num_rows)[has_target], targets[has_target]] = True
    allowed[:, 0] = True
    most = allowed.sum(dim=1)
    lengths = torch.minimum(torch.randint(1, num_chunks + 1, (num_rows,)), most)
    wanted = (torch.rand(num_rows) * lengths).long()
    ages = draw_histories(allowed, targets, wanted, lengths)
    assert not (ages[~allowed] >= 0).any()
    for row in range(num_rows):
        present = ages[row][ages[row] >= 0].tolist()
        assert sorted(present) == list(range(int(lengths[row])))  # every age once, none beyond the length
        if targets[row] >= 0:
            assert ages[row, targets[row]] == wanted[row]


def test_theta_keeps_everything_until_it_is_full_oldest_first() -> None:
    ages = torch.tensor([[2, 0, -1, 1]])
    theta = draw_theta(ages, 3, shape(per_chunk=2, capacity=8))
    assert theta.tolist() == [[[-1, -1, 0, 1, 6, 7, 2, 3]]] * 3  # chunk 0 is the oldest, then 3, then 1


def test_theta_has_the_law_of_random_dropping() -> None:
    memory, num_chunks, num_rows = shape(), 60, 400
    torch.manual_seed(0)
    ages = torch.arange(num_chunks).expand(num_rows, -1)
    theta = draw_theta(ages, 2, memory)
    assert theta.shape == (2, num_rows, 128)
    assert (theta >= 0).all()
    drawn = torch.stack([(theta // 8 == age).sum(dim=2).float().mean() for age in range(num_chunks)])
    simulated = np.zeros(num_chunks)
    num_agents = 60
    for seed in range(num_agents):  # the real rule, injection by injection
        slots = np.empty((1, 0), dtype=np.int64)
        for step in range(num_chunks):
            num_dropped = max(0, slots.shape[1] + 8 - 128)
            dropped = draw_dropped(seed, step, num_layers=1, theta_size=slots.shape[1], num_dropped=num_dropped)
            kept = np.delete(slots[0], dropped[0])
            slots = np.append(kept, np.full(8, step))[None]
        for age in range(num_chunks):
            simulated[age] += (slots == num_chunks - 1 - age).sum() / num_agents
    assert np.abs(drawn.numpy() - simulated).max() < 0.6  # of 8 tokens; the simulation's own error is about 0.2


def test_theta_of_one_row_does_not_depend_on_the_layer_but_each_layer_draws_its_own() -> None:
    torch.manual_seed(1)
    theta = draw_theta(torch.arange(40)[None], 2, shape(num_layers=2))
    assert theta.shape == (2, 1, 128)
    assert not torch.equal(theta[0], theta[1])
    entry = (theta % 8) - (theta // 8) * 8
    assert (entry.diff(dim=2) > 0).all()  # oldest first


@pytest.mark.parametrize("num_chunks", [1, 3, 7])
def test_reading_a_world_is_reading_the_memory_that_serves(num_chunks: int, tmp_path: Path) -> None:
    network = tiny_network(adapters=False, max_long_term=100)
    model = serve(network, tmp_path)
    memory, tail, hidden = model.initial_memory(), None, []
    with torch.no_grad():
        for step in range(num_chunks):
            ids = tokens(9, step)
            delta = model.write(ids, memory)
            new = network.write(ids, tail)
            torch.testing.assert_close(torch.cat(new), delta.hidden, **_CLOSE)
            memory.apply(delta)
            tail = [rows[None] for rows in delta.hidden]
            hidden.append(delta.hidden)
        # chunk c of the world was injected at step num_chunks - 1 - age
        ages = torch.arange(num_chunks).flip(0)[None]
        pool = [torch.cat([rows[layer] for rows in hidden]) for layer in range(NUM_LAYERS)]
        theta = torch.full((NUM_LAYERS, 1, NUM_SHORT), -1)
        for layer in range(NUM_LAYERS):
            births = [int(memory.index.theta_births[layer, slot]) for slot in memory.index.theta_order[layer]]
            theta[layer, 0, NUM_SHORT - len(births) :] = torch.tensor(births)  # a birth is step * K + slot
        prompt, is_query = tokens(6, 50), torch.tensor([[False, True, True, False, True, True]])
        histories = Histories(ages, torch.ones(1, dtype=torch.bool))
        world = WorldMemory(network, pool, histories, theta, is_query, NUM_RETRIEVED)
        logits = network.logits(network.read(prompt, world))
        expected = model.read(prompt, memory, query_mask=is_query)
    torch.testing.assert_close(logits, expected.logits, **_CLOSE)
    for layer, places in enumerate(expected.retrieved):
        log = memory.index.long_term
        rows = log.alive_rows(layer)
        births = log.births[layer, rows - log.base_row][places.numpy()]
        found = world.retrieved[layer][0]
        assert found[found >= 0].tolist() == births.tolist()


def test_rows_without_long_term_memory_retrieve_nothing() -> None:
    network = tiny_network(adapters=False)
    pool = [torch.randn(6 * NUM_NEW, 32) for _ in range(NUM_LAYERS)]
    ages = torch.arange(6).expand(2, -1)
    theta = draw_theta(ages, NUM_LAYERS, network.config.memory)
    histories = Histories(ages, torch.tensor([True, False]))
    world = WorldMemory(network, pool, histories, theta, torch.ones(2, 5, dtype=torch.bool), NUM_RETRIEVED)
    network.read(tokens(5, 1, rows=2), world)
    for tokens_found in world.retrieved:
        assert (tokens_found[0] >= 0).all()
        assert (tokens_found[1] == -1).all()


def test_helped_tokens_are_retrieved_if_they_are_in_long_term_memory() -> None:
    network = tiny_network(adapters=False)
    pool = [torch.randn(9 * NUM_NEW, 32) for _ in range(NUM_LAYERS)]
    ages = torch.arange(9).expand(2, -1)
    theta = draw_theta(ages, NUM_LAYERS, network.config.memory)
    helped = torch.zeros(2, 9 * NUM_NEW, dtype=torch.bool)
    helped[0, 8 * NUM_NEW : 9 * NUM_NEW] = True  # the oldest chunk
    histories = Histories(ages, torch.ones(2, dtype=torch.bool))
    is_query = torch.ones(2, 5, dtype=torch.bool)
    world = WorldMemory(network, pool, histories, theta, is_query, NUM_RETRIEVED, helped=helped)
    network.read(tokens(5, 1, rows=2), world)
    for layer, found in enumerate(world.retrieved):
        wanted = set(range(8 * NUM_NEW, 9 * NUM_NEW)) - set(theta[layer, 0].tolist())
        assert wanted <= set(found[0].tolist())


@pytest.mark.parametrize("objective", ["bce", "contrastive"])
def test_the_retrievers_loss_is_its_formula(objective: str) -> None:
    torch.manual_seed(3)
    queries, keys = torch.randn(5, 4), torch.randn(12, 4)
    rows = torch.tensor([0, 0, 0, 2, 2])  # row 1 asks nothing
    positives = torch.zeros(3, 12, dtype=torch.bool)
    positives[0, 2:4] = True
    positives[2, 7] = True
    is_past = torch.ones(3, 12, dtype=torch.bool)
    is_past[0, 11] = False
    scores = torch.stack(
        [
            torch.stack(
                [
                    torch.sigmoid(queries[rows == row] @ key).mean() if (rows == row).any() else torch.tensor(0.0)
                    for key in keys
                ]
            )
            for row in range(3)
        ]
    )
    loss = RetrieverLoss(positives, objective, num_hard=12, num_random=0)  # type: ignore[arg-type]
    loss.add(queries, keys, rows, scores, is_past)
    total = 0.0
    for row in (0, 2):
        own = [place for place in range(12) if positives[row, place]]
        others = [place for place in range(12) if is_past[row, place] and place not in own]
        s = scores[row].double()
        if objective == "bce":
            hit = sum(-torch.log(s[place] + 1e-5) for place in own) / len(own)
            miss = sum(-torch.log(1 - s[place] + 1e-5) for place in others) / len(others)
            total += float(hit + miss) / 2
        else:
            z = torch.log(s + 1e-5) - torch.log1p(1e-5 - s)
            rest = torch.stack([torch.exp(z[place]) for place in others]).sum()
            mean = sum(-torch.log(torch.exp(z[place]) / (torch.exp(z[place]) + rest)) for place in own) / len(own)
            mine = torch.stack([torch.exp(z[place]) for place in own]).sum()
            total += (float(mean) - float(torch.log(mine / (mine + rest)))) / 2
    assert float(loss.total()) == pytest.approx(total / 2, rel=1e-4)
    named = RetrieverLoss(positives, objective, num_hard=12, num_random=0, others=is_past)  # type: ignore[arg-type]
    named.add(queries, keys, rows, scores, positives)  # a past of the chunk asked about alone, as while writing
    assert float(named.total()) == pytest.approx(total / 2, rel=1e-4)


def test_the_retrievers_loss_reaches_hidden_states_only_if_told_to() -> None:
    network = tiny_network(adapters=False)
    ages = torch.arange(6).expand(2, -1)
    for detach in (True, False):
        pool = [torch.randn(6 * NUM_NEW, 32, requires_grad=True) for _ in range(NUM_LAYERS)]
        theta = draw_theta(ages, NUM_LAYERS, network.config.memory)
        positives = torch.zeros(2, 6 * NUM_NEW, dtype=torch.bool)
        positives[:, :NUM_NEW] = True
        loss = RetrieverLoss(positives, detach_hidden=detach)
        histories = Histories(ages, torch.ones(2, dtype=torch.bool))
        is_query = torch.ones(2, 5, dtype=torch.bool)
        network.read(tokens(5, 1, rows=2), WorldMemory(network, pool, histories, theta, is_query, 4, loss))
        network.zero_grad()
        loss.total().backward()
        gradients = [weight.grad for weight in network.retriever(0).key_proj.parameters()]
        assert all(gradient is not None and gradient.any() for gradient in gradients)
        assert (pool[0].grad is None or not pool[0].grad.any()) == detach
