"""`MemoryIndex` against the plain rules of `reference.py`, over random histories."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mplus_agents.config import MemoryConfig
from mplus_agents.errors import InvalidInputError
from mplus_agents.memory import GenesisIndex, MemoryIndex
from mplus_agents.memory import index as index_module
from mplus_agents.memory.draws import draw_dropped
from mplus_agents.memory.types import IndexChange, IntArray
from tests.memory.reference import ReferenceMemory, configs, genesis_indices

_SETTINGS = settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@contextmanager
def blocks_of(num_injections: int) -> Iterator[None]:
    """Make Θ's blocks small, so that short histories fill, straddle and trim several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "_BLOCK_INJECTIONS", num_injections)
        yield


def draw_places(random: np.random.Generator, index: MemoryIndex) -> IntArray:
    """Any places that may be dropped: mostly at random, now and then the oldest or the newest, which is harder on Θ."""
    size, num_dropped, num_layers = index.theta_size, index.num_overflow, index.config.num_layers
    kind = random.choice(["random", "random", "newest", "oldest"])
    if kind == "newest":
        return np.tile(np.arange(size - num_dropped, size), (num_layers, 1))
    if kind == "oldest":
        return np.tile(np.arange(num_dropped), (num_layers, 1))
    drawn = [np.sort(random.permutation(size)[:num_dropped]) for _ in range(num_layers)]
    return np.array(drawn, dtype=np.int64).reshape(num_layers, num_dropped)


def check_index(index: MemoryIndex, reference: ReferenceMemory) -> None:
    """Compare all that an index says with the reference."""
    config, log = index.config, index.long_term
    ages = index.theta_ages()
    num_genesis = reference.genesis.theta_size if reference.genesis else 0
    first_births = [
        -num_genesis - (len(reference.genesis.long_term_ages[layer]) if reference.genesis else 0)
        for layer in range(config.num_layers)
    ]
    assert index.num_injections == reference.num_injections
    assert index.theta_size <= config.max_short_term
    assert index.num_overflow == reference.num_overflow
    for layer in range(config.num_layers):
        births = index.theta_births[layer, index.theta_order[layer]].tolist()
        assert births == reference.theta[layer]
        assert ages[layer].tolist() == reference.theta_ages(layer)
        assert sorted(index.theta_order[layer].tolist()) == list(range(index.theta_size))
        positions = index.theta_positions(layer)
        assert positions[index.theta_order[layer]].tolist() == list(range(index.theta_size))
        rows = log.alive_rows(layer)
        entries = reference.long_term[layer]
        columns = rows - log.base_row
        assert log.births[layer, columns].tolist() == [entry.birth for entry in entries]
        assert log.sizes[layer] == len(entries)
        if config.rule == "paper":
            assert len(entries) <= max(config.max_long_term, 0 if reference.num_injections else len(entries))
        merged = rows[rows < log.num_merged_rows]
        assert index.long_term_ages(layer, merged).tolist() == reference.long_term_ages(layer)
        assert log.births[layer, merged - log.base_row].tolist() == [entry.birth for entry in reference.merged(layer)]
        assert len(rows) - len(merged) == (index.num_staged if config.rule == "released" else 0)
        if config.rule == "released":
            counts = log.recall_counts[layer, columns].tolist()
            assert counts == [float(entry.count) for entry in entries]
        in_theta, in_long_term = set(births), {entry.birth for entry in entries}
        everything = set(range(first_births[layer], reference.num_injections * config.tokens_per_injection))
        assert len(in_theta) + len(in_long_term) + len(reference.evicted[layer]) == len(everything)
        assert in_theta | in_long_term | reference.evicted[layer] == everything
        placement = index.placement_keys(slice(log.base_row, log.num_rows))[layer, columns]
        placed = log.births[layer, columns][np.argsort(placement, kind="stable")].tolist()
        assert placed == reference.placed(layer, in_long_term)


def same_arrays(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    """Tell whether two snapshots agree in names, dtypes and values."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and np.array_equal(left[name], right[name]) for name in left
    )


def rebuilt(index: MemoryIndex, genesis: GenesisIndex | None) -> MemoryIndex:
    arrays = {name: array.copy() for name, array in index.to_arrays().items()}
    return MemoryIndex.from_arrays(index.config, genesis, arrays)


@_SETTINGS
@given(data=st.data(), config=configs(), seed=st.integers(0, 2**32 - 1), block=st.integers(1, 3))
def test_index_follows_plain_rules(data: st.DataObject, config: MemoryConfig, seed: int, block: int) -> None:
    genesis = data.draw(genesis_indices(config))
    restarts = data.draw(st.sets(st.integers(0, 39), max_size=3))
    random = np.random.default_rng(seed)
    with blocks_of(block):
        index, reference = MemoryIndex(config, genesis), ReferenceMemory(config, genesis)
        check_index(index, reference)
        for step in range(40):
            if step in restarts:
                before = index.to_arrays()
                index = rebuilt(index, genesis)
                assert same_arrays(before, index.to_arrays())
            places = draw_places(random, index)
            change = index.apply(places)
            evicted = reference.inject(places.tolist())
            assert change.step == step
            assert [births.tolist() for births in change.evicted] == evicted
            assert np.array_equal(change.dropped, places)
            check_index(index, reference)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data(), config=configs(), seed=st.integers(0, 2**32 - 1), restart=st.integers(0, 30))
def test_snapshot_continues_the_same(data: st.DataObject, config: MemoryConfig, seed: int, restart: int) -> None:
    genesis = data.draw(genesis_indices(config))
    random = np.random.default_rng(seed)
    with blocks_of(2):
        index = MemoryIndex(config, genesis)
        for _ in range(restart):
            index.apply(draw_places(random, index))
        twin = rebuilt(index, genesis)
        for _ in range(15):
            places = draw_places(random, index)
            assert _same_change(index.apply(places), twin.apply(places))
            assert same_arrays(index.to_arrays(), twin.to_arrays())


def _same_change(left: IndexChange, right: IndexChange) -> bool:
    pairs: list[tuple[Any, Any]] = [
        (left.dropped, right.dropped),
        (left.dropped_slots, right.dropped_slots),
        (left.new_slots, right.new_slots),
        *zip(left.evicted, right.evicted, strict=True),
        *zip(left.evicted_rows, right.evicted_rows, strict=True),
    ]
    same_numbers = (left.step, left.first_row) == (right.step, right.first_row)
    return same_numbers and all(np.array_equal(one, other) for one, other in pairs)


def _config(**changes: Any) -> MemoryConfig:
    values = {
        "num_layers": 2,
        "hidden_size": 4,
        "num_kv_heads": 1,
        "head_dim": 2,
        "retrieval_dim": 2,
        "tokens_per_injection": 4,
        "max_short_term": 16,
        "num_retrieved": 2,
        "max_long_term": 12,
    }
    return MemoryConfig(**{**values, **changes})


@example(seed=14)
@example(seed=21)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000))
def test_token_older_than_all_before_does_not_push_out_younger_ones(seed: int) -> None:
    # A token that stays long in θ enters Θ after younger ones; the table of births then grows in front.
    index = MemoryIndex(_config(num_layers=1))
    reference = ReferenceMemory(index.config, None)
    for step in range(60):
        places = draw_dropped(seed, step, num_layers=1, theta_size=index.theta_size, num_dropped=index.num_overflow)
        evicted = [births.tolist() for births in index.apply(places).evicted]
        assert evicted == reference.inject(places.tolist())


@pytest.mark.parametrize("rule", ["paper", "released"])
def test_table_of_births_stays_small(rule: str) -> None:
    index = MemoryIndex(_config(rule=rule, merge_every=3, initial_recall_count=3.0))
    log = index.long_term
    for step in range(3_000):
        places = draw_dropped(0, step, num_layers=2, theta_size=index.theta_size, num_dropped=index.num_overflow)
        index.apply(places)
    assert log.births.shape[1] <= 4 * log.block_rows
    assert log._row_of.shape[1] <= 4 * log.block_rows


def test_bytes_of_index_stay_bounded_while_theta_and_long_term_are_full() -> None:
    index = MemoryIndex(_config())
    sizes = []
    for step in range(1_500):
        places = draw_dropped(3, step, num_layers=2, theta_size=index.theta_size, num_dropped=index.num_overflow)
        index.apply(places)
        sizes.append(sum(array.nbytes for array in index.to_arrays().values()))
    assert max(sizes[750:]) <= 2 * max(sizes[:750])


def test_draws_are_repeatable_and_differ() -> None:
    shape = {"num_layers": 3, "theta_size": 40, "num_dropped": 8}
    first = draw_dropped(7, 5, **shape)
    assert first.shape == (3, 8)
    assert first.dtype == np.int64
    assert (np.diff(first, axis=1) > 0).all()
    assert np.array_equal(first, draw_dropped(7, 5, **shape))
    assert not np.array_equal(first, draw_dropped(8, 5, **shape))
    assert not np.array_equal(first, draw_dropped(7, 6, **shape))
    assert not np.array_equal(first[0], first[1])
    # A layer's draw does not depend on how many layers there are, nor on the seeds before it.
    assert np.array_equal(first[:2], draw_dropped(7, 5, num_layers=2, theta_size=40, num_dropped=8))


def test_draws_do_not_touch_the_global_generator() -> None:
    import torch

    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    draw_dropped(0, 0, num_layers=2, theta_size=10, num_dropped=4)
    assert torch.equal(torch.rand(3), expected)


def test_draws_are_uniform_and_layers_independent() -> None:
    theta_size, num_dropped, num_steps, num_layers = 20, 5, 2_000, 2
    hits = np.zeros((num_layers, theta_size))
    both = 0
    for step in range(num_steps):
        drawn = draw_dropped(11, step, num_layers=num_layers, theta_size=theta_size, num_dropped=num_dropped)
        for layer in range(num_layers):
            hits[layer, drawn[layer]] += 1
        both += len(set(drawn[0].tolist()) & set(drawn[1].tolist()))
    expected = num_steps * num_dropped / theta_size
    # Without replacement the variance of a cell is expected · (1 − k/n), so this is χ² with 19 degrees of freedom:
    # 43.8 is its 99.9 % point.
    chi_square = ((hits - expected) ** 2 / expected / (1 - num_dropped / theta_size)).sum(axis=1) * (1 - 1 / theta_size)
    assert (chi_square < 43.8).all()
    mean_both = both / num_steps  # hypergeometric: mean 5 · 5 / 20, standard deviation below 1 per step
    assert abs(mean_both - 1.25) < 4 / np.sqrt(num_steps)


def _full_index() -> MemoryIndex:
    index = MemoryIndex(_config())
    for _ in range(4):
        index.apply(np.empty((2, 0), dtype=np.int64))
    assert index.num_overflow == 4
    return index


@pytest.mark.parametrize(
    ("dropped", "reason"),
    [
        (np.zeros((2, 3), dtype=np.int64), r"shape \[2, 3\].*shape \[2, 4\]"),
        (np.zeros((1, 4), dtype=np.int64), r"shape \[1, 4\]"),
        (np.zeros(8, dtype=np.int64), r"shape \[8\]"),
        (np.array([[0, 1, 2, 2], [0, 1, 2, 3]]), "repeated"),
        (np.array([[0, 1, 2, 16], [0, 1, 2, 3]]), "dropped is 16.*0 to 15"),
        (np.array([[0, 1, 2, 3], [-1, 1, 2, 3]]), "0 to 15"),
    ],
)
def test_dropped_is_checked(dropped: IntArray, reason: str) -> None:
    index = _full_index()
    before = index.to_arrays()
    with pytest.raises(InvalidInputError, match=reason):
        index.check_dropped(dropped)
    assert same_arrays(before, index.to_arrays())


def test_dropped_is_sorted_and_layers_keep_theirs() -> None:
    ordered = _full_index().check_dropped(np.array([[9, 3, 0, 15], [4, 3, 2, 1]]))
    assert ordered.tolist() == [[0, 3, 9, 15], [1, 2, 3, 4]]


def test_nothing_is_dropped_until_theta_is_full() -> None:
    index = MemoryIndex(_config(max_short_term=18))
    overflows = []
    for step in range(6):
        overflows.append(index.num_overflow)
        places = draw_dropped(0, step, num_layers=2, theta_size=index.theta_size, num_dropped=index.num_overflow)
        index.apply(places)
    assert overflows == [0, 0, 0, 0, 2, 4]
    assert index.theta_size == 18
