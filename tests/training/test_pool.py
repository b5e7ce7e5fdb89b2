from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mplus_agents.config import MemoryConfig
from mplus_agents.errors import CheckpointError, ConfigError
from mplus_agents.memory import MemoryIndex
from mplus_agents.training.pool import MemoryPool, PoolShape

LAYERS, WIDTH, NUM_NEW = 2, 3, 4
shapes = st.tuples(st.integers(0, 9), st.integers(0, 12)).map(
    lambda sizes: PoolShape(LAYERS, WIDTH, NUM_NEW, NUM_NEW + sizes[0], 2 if sizes[1] else 0, sizes[1])
)


def hidden_of(layer: int, birth: int) -> torch.Tensor:
    return torch.tensor([float(layer), float(birth), 1.0])


def keys_of(layer: int, hidden: torch.Tensor) -> torch.Tensor:
    return hidden[:, :2] * (layer + 2.0)


def inject(pool: MemoryPool, owner: int = -1, **options: Any) -> Any:
    first = pool.num_injections * NUM_NEW
    new = [torch.stack([hidden_of(layer, first + k) for k in range(NUM_NEW)]) for layer in range(LAYERS)]
    return pool.append(new, keys_of if pool.shape.max_long_term else None, owner, **options)


def check_tokens(pool: MemoryPool, owners: list[int]) -> None:
    """Every row is what its birth says it is, and belongs to the document it was injected with."""
    for layer in range(LAYERS):
        theta_births = pool.theta_births[layer].tolist()
        assert theta_births == sorted(theta_births)
        assert pool.theta_owners[layer].tolist() == [owners[birth // NUM_NEW] for birth in theta_births]
        for row, birth in zip(pool.theta[layer], theta_births, strict=True):
            assert torch.equal(row, hidden_of(layer, birth))
        long_births = pool.long_births[layer].tolist()
        assert pool.long_owners[layer].tolist() == [owners[birth // NUM_NEW] for birth in long_births]
        hidden = pool.long_hidden(layer, torch.arange(len(long_births)))
        for row, key, birth in zip(hidden, pool.long_keys[layer], long_births, strict=True):
            assert torch.equal(row, hidden_of(layer, birth))
            assert torch.equal(key, keys_of(layer, row[None])[0])


@given(shapes, st.lists(st.integers(0, 3), max_size=12), st.integers(0, 5))
@settings(deadline=None)
def test_no_token_is_lost_and_owners_follow_their_tokens(shape: PoolShape, owners: list[int], seed: int) -> None:
    pool = MemoryPool(shape, seed)
    evicted: list[list[int]] = [[] for _ in range(LAYERS)]
    for owner in owners:
        old_theta = [set(row) for row in pool.theta_births.tolist()]
        change = inject(pool, owner)
        for layer in range(LAYERS):
            evicted[layer] += change.evicted[layer].tolist()
            left = old_theta[layer] - set(pool.theta_births[layer].tolist())
            assert sorted(left) == sorted(change.dropped[layer].tolist())
    written = NUM_NEW * len(owners)
    assert pool.num_injections == len(owners)
    assert pool.theta_size == min(written, shape.max_short_term) or written - pool.theta_size > 0
    assert pool.theta_size <= shape.max_short_term
    assert pool.long_term_size == min(written - pool.theta_size, shape.max_long_term)
    for layer in range(LAYERS):
        rest = pool.theta_births[layer].tolist() + pool.long_births[layer].tolist() + evicted[layer]
        assert sorted(rest) == list(range(written))
        newest = list(range(max(0, written - NUM_NEW), written))
        assert pool.theta_births[layer, -NUM_NEW:].tolist() == newest
    check_tokens(pool, owners)


@given(st.integers(0, 9), st.integers(1, 14), st.integers(0, 10), st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_tokens_move_as_in_the_memory_that_serves(extra: int, most: int, steps: int, seed: int) -> None:
    config = MemoryConfig(LAYERS, WIDTH, 1, 2, 2, NUM_NEW, NUM_NEW + extra, 2, most)
    index = MemoryIndex(config)
    pool = MemoryPool(PoolShape(LAYERS, WIDTH, NUM_NEW, NUM_NEW + extra, 2, most))
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        drawn = [rng.permutation(index.theta_size)[: index.num_overflow] for _ in range(LAYERS)]
        dropped = np.sort(np.array(drawn, dtype=np.int64), axis=1)
        served = index.apply(dropped)
        change = inject(pool, dropped=torch.from_numpy(dropped))
        for layer in range(LAYERS):
            assert sorted(change.evicted[layer].tolist()) == served.evicted[layer].tolist()
            log = index.long_term
            alive = log.births[layer, log.alive_rows(layer) - log.base_row]
            assert sorted(pool.long_births[layer].tolist()) == sorted(alive.tolist())
            order = index.theta_births[layer, index.theta_order[layer]]
            assert pool.theta_births[layer].tolist() == order.tolist()


def test_every_layer_rank_and_injection_draws_for_itself_and_alike_again() -> None:
    def drawn(rank: int) -> list[list[list[int]]]:
        pool = MemoryPool(PoolShape(LAYERS, WIDTH, NUM_NEW, 40), seed=1, rank=rank)
        return [inject(pool).dropped.tolist() for _ in range(13)]

    first = drawn(0)
    assert first == drawn(0)
    assert first != drawn(1)
    assert first[-1][0] != first[-1][1]
    assert all(row == [] for row in first[9])
    assert [len(row) for row in first[10]] == [NUM_NEW] * LAYERS


def test_each_token_is_dropped_with_the_same_chance() -> None:
    counts = torch.zeros(20)
    for seed in range(400):
        pool = MemoryPool(PoolShape(1, WIDTH, NUM_NEW, 20), seed)
        for step in range(6):
            change = pool.append([torch.zeros(NUM_NEW, WIDTH)])
            if step == 5:
                counts[change.dropped[0]] += 1
    wanted = counts.sum() / 20
    assert counts.sum() == 400 * NUM_NEW
    assert ((counts - wanted) ** 2 / wanted).sum() < 43.8  # chi-square, 19 degrees of freedom: p = 0.001


def test_a_state_is_tensors_only_and_goes_on_alike() -> None:
    shape = PoolShape(LAYERS, WIDTH, NUM_NEW, 10, 2, 9)
    pool = MemoryPool(shape, seed=3)
    owners = [pool.new_owner() for _ in range(7)]
    for owner in owners:
        inject(pool, owner)
    file = io.BytesIO()
    torch.save(pool.state_dict(), file)
    file.seek(0)
    again = MemoryPool(shape, seed=3)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert again.new_owner() == pool.new_owner() == 7
    for step in range(3):
        left, left_again = inject(pool, 8 + step), inject(again, 8 + step)
        assert torch.equal(left.dropped, left_again.dropped)
        assert torch.equal(left.evicted, left_again.evicted)
    for name, tensor in pool.state_dict().items():
        assert isinstance(tensor, torch.Tensor)
        assert torch.equal(tensor, again.state_dict()[name]), name
    check_tokens(again, [*owners, 8, 9, 10])


def test_a_smaller_theta_sends_the_surplus_of_the_stage_before_to_the_new_long_term_memory() -> None:
    before = MemoryPool(PoolShape(LAYERS, WIDTH, NUM_NEW, 20, 2))
    for owner in range(9):
        inject(before, owner)
    pool = MemoryPool(PoolShape(LAYERS, WIDTH, NUM_NEW, 12, 2, 50))
    pool.load_state_dict(before.state_dict())
    assert pool.theta_size == 20
    change = inject(pool, 9)
    assert pool.theta_size == 12
    assert pool.long_term_size == change.dropped.shape[1] == 12
    check_tokens(pool, list(range(10)))


def test_keys_are_those_of_the_time_of_dropping_until_they_are_refreshed() -> None:
    pool = MemoryPool(PoolShape(LAYERS, WIDTH, NUM_NEW, 8, 2, 30))
    for _ in range(5):
        inject(pool)
    old = pool.long_keys.clone()
    pool.refresh_keys(lambda layer, hidden: hidden[:, 1:] - layer)
    assert not torch.equal(pool.long_keys, old)
    for layer in range(LAYERS):
        hidden = pool.long_hidden(layer, torch.arange(pool.long_term_size))
        assert torch.equal(pool.long_keys[layer], hidden[:, 1:] - layer)


def test_memory_has_no_gradient_and_theta_is_never_changed_in_place() -> None:
    pool = MemoryPool(PoolShape(1, WIDTH, NUM_NEW, 8))
    assert pool.tail is None
    pool.append([torch.ones(NUM_NEW, WIDTH, requires_grad=True)])
    first, copy = pool.theta[0], pool.theta[0].clone()
    for _ in range(4):
        pool.append([torch.zeros(NUM_NEW, WIDTH, requires_grad=True)])
    assert torch.equal(first, copy)
    assert not pool.theta[0].requires_grad
    assert pool.tail is not None
    assert pool.tail[0].shape == (1, NUM_NEW, WIDTH)


@pytest.mark.parametrize("capacity", [0, 4, 40])
def test_of_a_larger_long_term_memory_the_newest_tokens_are_carried(capacity: int) -> None:
    large = MemoryPool(PoolShape(LAYERS, WIDTH, NUM_NEW, 8, 2, 40))
    owners = list(range(6))
    for owner in owners:
        inject(large, owner)
    carried = MemoryPool(PoolShape(LAYERS, WIDTH, NUM_NEW, 8, 2 if capacity else 0, capacity))
    carried.load_state_dict(large.state_dict())
    check_tokens(carried, owners)
    kept = min(capacity, 6 * NUM_NEW - 8)
    for layer in range(LAYERS):
        assert sorted(carried.long_births[layer].tolist()) == sorted(large.long_births[layer].tolist())[-kept or 99 :]
    inject(carried, 6)
    check_tokens(carried, [*owners, 6])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_short_term is 3"):
        PoolShape(LAYERS, WIDTH, NUM_NEW, 3)
    with pytest.raises(ConfigError, match="needs a retriever"):
        PoolShape(LAYERS, WIDTH, NUM_NEW, 8, 0, 8)
    large = MemoryPool(PoolShape(LAYERS, WIDTH, NUM_NEW, 8, 2, 40))
    for _ in range(6):
        inject(large)
    with pytest.raises(CheckpointError, match="does not fit"):
        MemoryPool(PoolShape(3, WIDTH, NUM_NEW, 8)).load_state_dict(large.state_dict())
