"""`MemoryState`: tensors follow the bookkeeping, restoring equals living, agents do not meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mplus_agents.config import MemoryConfig
from mplus_agents.errors import InvalidInputError
from mplus_agents.memory import (
    Genesis,
    GenesisIndex,
    MemoryDelta,
    MemoryIndex,
    MemoryState,
    TokenTensors,
    needed_steps,
)
from mplus_agents.memory import long_term as long_term_module
from mplus_agents.memory.long_term import mean_sigmoid_scores
from tests.memory.reference import ReferenceMemory, configs, genesis_indices
from tests.memory.test_index import blocks_of, check_index, draw_places, rebuilt, same_arrays

_CPU = torch.device("cpu")


def random_tokens(config: MemoryConfig, num_tokens: int, generator: torch.Generator) -> TokenTensors:
    heads = (config.num_layers, num_tokens, config.num_kv_heads, config.head_dim)
    shapes = (heads, heads, (config.num_layers, num_tokens, config.retrieval_dim))
    return TokenTensors(*(torch.randn(shape, generator=generator) for shape in shapes))


def random_delta(config: MemoryConfig, seed: int) -> MemoryDelta:
    generator = torch.Generator().manual_seed(seed)
    tokens = random_tokens(config, config.tokens_per_injection, generator)
    hidden = torch.randn((config.num_layers, config.tokens_per_injection, config.hidden_size), generator=generator)
    return MemoryDelta(hidden, tokens.keys, tokens.values, tokens.retrieval_keys)


def make_genesis(config: MemoryConfig, index: GenesisIndex) -> Genesis:
    generator = torch.Generator().manual_seed(99)
    num_rows = max(map(len, index.long_term_ages))
    tail = torch.randn((config.num_layers, config.tokens_per_injection, config.hidden_size), generator=generator)
    theta = random_tokens(config, index.theta_size, generator)
    return Genesis(index, theta, random_tokens(config, num_rows, generator), tail)


def new_state(config: MemoryConfig, genesis: Genesis | None, seed: int = 0) -> MemoryState:
    return MemoryState(config, seed=seed, genesis=genesis, device=_CPU, dtype=torch.float32)


@dataclass
class History:
    """A memory, what was put into it, and the plain rules' opinion of it."""

    config: MemoryConfig
    genesis: Genesis | None
    state: MemoryState
    reference: ReferenceMemory
    deltas: list[MemoryDelta] = field(default_factory=list)

    @classmethod
    def start(cls, config: MemoryConfig, genesis_index: GenesisIndex | None) -> History:
        genesis = make_genesis(config, genesis_index) if genesis_index else None
        return cls(config, genesis, new_state(config, genesis), ReferenceMemory(config, genesis_index))

    def inject(self, random: np.random.Generator) -> None:
        delta = random_delta(self.config, len(self.deltas))
        dropped = torch.from_numpy(draw_places(random, self.state.index)) if random.random() < 0.5 else None
        receipt = self.state.apply(delta, dropped)
        evicted = self.reference.inject(receipt.dropped.tolist())
        assert [births.tolist() for births in receipt.evicted] == evicted
        assert receipt.num_evicted == sum(map(len, evicted))
        assert receipt.num_dropped == receipt.dropped.shape[1]
        assert receipt.num_written == self.config.tokens_per_injection
        self.deltas.append(delta)

    def restored(self, index: MemoryIndex) -> MemoryState:
        """Build the memory again from the index and the deltas that are still needed, as the store does."""
        state = new_state(self.config, self.genesis)
        steps = needed_steps(index)
        kept = [self.deltas[step] for step in steps]
        tokens = [TokenTensors(delta.keys, delta.values, delta.retrieval_keys) for delta in kept]
        tail = self.deltas[-1].hidden if self.deltas else None
        state.restore(index, tail, zip(steps, tokens, strict=True))
        return state

    def token(self, layer: int, birth: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Look up what a token of this birth was written as."""
        num_new = self.config.tokens_per_injection
        tokens: Any
        if birth >= 0:
            tokens, place = self.deltas[birth // num_new], birth % num_new
        else:
            assert self.genesis is not None
            num_theta = self.genesis.index.theta_size
            tokens, place = self.genesis.theta, birth + num_theta
            if place < 0:
                ages = self.genesis.index.long_term_ages[layer].tolist()
                oldest_first = sorted(range(len(ages)), key=lambda row: -ages[row])
                tokens, place = self.genesis.long_term, oldest_first[place + len(ages)]
        return tokens.keys[layer, place], tokens.values[layer, place], tokens.retrieval_keys[layer, place]

    def check_tensors(self) -> None:
        """Compare every token's tensors with what was written."""
        state = self.state
        for layer in range(self.config.num_layers):
            order = torch.from_numpy(state.index.theta_order[layer])
            for position, birth in enumerate(self.reference.theta[layer]):
                keys, values, retrieval_keys = self.token(layer, birth)
                slot = int(order[position])
                assert torch.equal(state.theta.keys[layer, slot], keys)
                assert torch.equal(state.theta.values[layer, slot], values)
                assert torch.equal(state.theta.retrieval_keys[layer, slot], retrieval_keys)
            rows = state.index.long_term.alive_rows(layer)
            placed_keys, placed_values = state.long_term_tokens(layer, rows)
            for place, entry in enumerate(self.reference.long_term[layer]):
                keys, values, _ = self.token(layer, entry.birth)
                assert torch.equal(placed_keys[place], keys)
                assert torch.equal(placed_values[place], values)
        if self.deltas:
            assert state.tail_hidden is not None
            assert torch.equal(state.tail_hidden, self.deltas[-1].hidden)

    def check_search(self, queries: torch.Tensor) -> None:
        """Compare a search with scores worked out one by one in float64."""
        for layer in range(self.config.num_layers if self.config.has_long_term else 0):
            entries = self.reference.long_term[layer]
            scores = {}
            for entry in entries:
                key = self.token(layer, entry.birth)[2].double().numpy()
                scores[entry.birth] = float(
                    np.mean([1 / (1 + np.exp(-query @ key)) for query in queries.double().numpy()])
                )
            best = sorted(scores, key=lambda birth: -scores[birth])
            found = self.state.long_term.search(layer, queries, self.config.num_retrieved)
            births = self.state.index.long_term.births[layer, found - self.state.index.long_term.base_row].tolist()
            num_found = min(self.config.num_retrieved, len(entries))
            assert len(set(births)) == len(births) == num_found
            cut = scores[best[num_found - 1]] if num_found else 0.0
            assert all(scores[birth] >= cut - 1e-6 for birth in births)  # equal but for float32's rounding
            assert births == self.reference.placed(layer, set(births))
            assert self.state.entry_positions(layer, found).tolist() == [
                [entry.birth for entry in entries].index(birth) for birth in births
            ]


def check_same_state(one: MemoryState, other: MemoryState) -> None:
    """Two states are the same bit for bit in all that reading and writing can see."""
    assert same_arrays(one.index.to_arrays(), other.index.to_arrays())
    assert (one.tail_hidden is None) == (other.tail_hidden is None)
    if one.tail_hidden is not None and other.tail_hidden is not None:
        assert torch.equal(one.tail_hidden, other.tail_hidden)
    for left, right in zip(_parts(one.theta), _parts(other.theta), strict=True):
        assert torch.equal(left, right)
    assert torch.equal(one.theta_positions(), other.theta_positions())
    log = one.index.long_term
    assert sorted(one.long_term._blocks) == sorted(other.long_term._blocks)
    for number, block in one.long_term._blocks.items():
        twin, used = (
            other.long_term._blocks[number],
            min(log.num_rows, log.block_start(number + 1)) - log.block_start(number),
        )
        alive = block.alive[:, :used]
        assert torch.equal(alive, twin.alive[:, :used])
        assert not block.alive[:, used:].any()
        assert not twin.alive[:, used:].any()
        start = log.block_start(number) - log.base_row
        assert torch.equal(alive, torch.from_numpy(log.alive[:, start : start + used]))
        for left, right in (
            (block.placement, twin.placement),
            (block.keys, twin.keys),
            (block.values, twin.values),
            (block.retrieval_keys, twin.retrieval_keys),
        ):
            assert torch.equal(left[:, :used][alive], right[:, :used][alive])
    generator = torch.Generator().manual_seed(5)
    queries = torch.randn((3, one.config.retrieval_dim), generator=generator)
    for layer in range(one.config.num_layers):
        assert one.num_retrieved_slots()[layer] == other.num_retrieved_slots()[layer]
        if one.num_retrieved_slots()[layer]:
            rows = one.retrieve(layer, queries)
            assert len(rows) == one.num_retrieved_slots()[layer]
            assert rows.tolist() == other.retrieve(layer, queries).tolist()


def _parts(tokens: TokenTensors) -> tuple[torch.Tensor, ...]:
    return tokens.keys, tokens.values, tokens.retrieval_keys


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data(), config=configs(), seed=st.integers(0, 2**32 - 1), block=st.integers(1, 3))
def test_state_follows_plain_rules(data: st.DataObject, config: MemoryConfig, seed: int, block: int) -> None:
    genesis_index = data.draw(genesis_indices(config))
    random = np.random.default_rng(seed)
    with blocks_of(block):
        history = History.start(config, genesis_index)
        for step in range(30):
            history.inject(random)
            if step % 4 == 0:
                check_index(history.state.index, history.reference)
                history.check_tensors()
                history.check_search(
                    torch.randn((2, config.retrieval_dim), generator=torch.Generator().manual_seed(step))
                )
        state = history.state
        for layer in range(config.num_layers):
            assert state.theta_ages()[layer].tolist() == history.reference.theta_ages(layer)
            assert state.long_term_ages(layer).tolist() == history.reference.long_term_ages(layer)
            merged = history.reference.merged(layer)
            assert int(state.long_term_sizes[layer]) == len(merged)
            if config.rule == "released":
                assert state.recall_counts(layer).tolist() == [float(entry.count) for entry in merged]


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    data=st.data(),
    config=configs(),
    seed=st.integers(0, 2**32 - 1),
    block=st.integers(1, 3),
    num_before=st.integers(0, 30),
)
def test_restored_state_equals_the_live_one(
    data: st.DataObject, config: MemoryConfig, seed: int, block: int, num_before: int
) -> None:
    genesis_index = data.draw(genesis_indices(config))
    random = np.random.default_rng(seed)
    with blocks_of(block):
        history = History.start(config, genesis_index)
        for _ in range(num_before):
            history.inject(random)
        restored = history.restored(rebuilt(history.state.index, genesis_index))
        check_same_state(history.state, restored)
        # The restored memory lives on as the other does, also without draws given.
        for step in range(8):
            delta = random_delta(config, 1_000 + step)
            history.state.apply(delta)
            restored.apply(delta)
            history.deltas.append(delta)
        check_same_state(history.state, restored)


def _config(**changes: Any) -> MemoryConfig:
    values = {
        "num_layers": 2,
        "hidden_size": 3,
        "num_kv_heads": 2,
        "head_dim": 2,
        "retrieval_dim": 3,
        "tokens_per_injection": 4,
        "max_short_term": 10,
        "num_retrieved": 5,
        "max_long_term": 12,
    }
    return MemoryConfig(**{**values, **changes})


def _run(config: MemoryConfig, num_injections: int, seed: int = 0) -> MemoryState:
    state = new_state(config, None, seed)
    for step in range(num_injections):
        state.apply(random_delta(config, step))
    return state


def test_restore_after_trimmed_blocks() -> None:
    config = _config()
    random = np.random.default_rng(0)
    with blocks_of(1):
        history = History.start(config, None)
        for _ in range(60):
            history.inject(random)
        log = history.state.index.long_term
        assert log.base_row > 0
        assert len(needed_steps(history.state.index)) < 60
        check_same_state(history.state, history.restored(rebuilt(history.state.index, None)))
        history.check_tensors()


def test_genesis_block_is_freed_once_all_its_tokens_left() -> None:
    config = _config()
    index = GenesisIndex(10, (np.arange(6), np.arange(4)), (np.ones(6, np.float32), np.ones(4, np.float32)))
    history = History.start(config, index)
    random = np.random.default_rng(1)
    with blocks_of(1):
        history = History.start(config, index)
        assert 0 in history.state.long_term._blocks
        for _ in range(40):
            history.inject(random)
        assert 0 not in history.state.long_term._blocks
        check_same_state(history.state, history.restored(rebuilt(history.state.index, index)))


def test_rows_may_be_trimmed_as_they_enter() -> None:
    # Θ holds fewer tokens than one injection drops, and an injection straddles two blocks.
    config = _config(max_long_term=1, num_retrieved=1, max_short_term=9)
    with blocks_of(1):
        state = _run(config, 60)
        assert state.long_term_sizes.tolist() == [1, 1]
        assert state.index.long_term.base_row > 0
        assert len(state.retrieve(0, torch.zeros((1, 3)))) == 1


def test_restoring_an_unused_memory_gives_the_checkpoints_own() -> None:
    config = _config()
    index = GenesisIndex(10, (np.arange(6), np.arange(4)), (np.ones(6, np.float32), np.ones(4, np.float32)))
    history = History.start(config, index)
    restored = history.restored(MemoryIndex(config, index))
    check_same_state(history.state, restored)
    assert history.genesis is not None
    assert restored.theta.keys is history.genesis.theta.keys
    assert restored.tail_hidden is history.genesis.tail_hidden


@pytest.mark.parametrize("rule", ["paper", "released"])
def test_same_seed_and_tokens_give_the_same_state(rule: str) -> None:
    config = _config(rule=rule, merge_every=2)
    check_same_state(_run(config, 25, seed=3), _run(config, 25, seed=3))
    other = _run(config, 25, seed=4)
    assert not same_arrays(_run(config, 25, seed=3).index.to_arrays(), other.index.to_arrays())


def _snapshot(genesis: Genesis) -> list[torch.Tensor]:
    return [part.clone() for part in (*_parts(genesis.theta), *_parts(genesis.long_term), genesis.tail_hidden)]


@pytest.mark.parametrize("rule", ["paper", "released"])
def test_agents_that_share_a_genesis_do_not_meet(rule: str) -> None:
    config = _config(rule=rule, merge_every=2)
    counts = np.ones(6, np.float32)
    index = GenesisIndex(10, (np.arange(6), np.arange(6)), (counts, counts.copy()))
    genesis = make_genesis(config, index)
    before = _snapshot(genesis)
    integers: list[np.ndarray] = [*index.long_term_ages, *index.recall_counts]
    copies = [array.copy() for array in integers]
    one, other = new_state(config, genesis), new_state(config, genesis)
    assert one.theta.keys.data_ptr() == other.theta.keys.data_ptr()  # shared until written to
    fresh = new_state(config, genesis)
    for step in range(30):
        one.apply(random_delta(config, step))
        check_same_state(other, fresh)
    for left, right in zip(before, _snapshot(genesis), strict=True):
        assert torch.equal(left, right)
    for array, expected in zip(integers, copies, strict=True):
        assert np.array_equal(array, expected)
    twin = new_state(config, genesis)
    for step in range(30):
        twin.apply(random_delta(config, step))
    check_same_state(one, twin)


def test_apply_does_not_keep_the_callers_tensors() -> None:
    config = _config()
    state = _run(config, 3)
    delta = random_delta(config, 3)
    state.apply(delta)
    keys = state.theta.keys.clone()
    delta.keys.zero_()
    delta.values.zero_()
    assert torch.equal(state.theta.keys, keys)
    assert state.theta.values.any(dim=-1).all()


@pytest.mark.parametrize("name", ["hidden", "keys", "values", "retrieval_keys"])
@pytest.mark.parametrize("change", ["fewer_tokens", "wider", "no_layer"])
def test_wrong_shapes_change_nothing(name: str, change: str) -> None:
    config = _config()
    state, twin = _run(config, 5), _run(config, 5)
    delta = random_delta(config, 5)
    tensor = getattr(delta, name)
    wrong = {
        "fewer_tokens": tensor[:, 1:],
        "wider": torch.cat([tensor, tensor], dim=-1),
        "no_layer": tensor[:1],
    }[change]
    with pytest.raises(InvalidInputError, match=rf"delta\.{name} is"):
        state.apply(replace(delta, **{name: wrong}))
    check_same_state(state, twin)


@pytest.mark.parametrize(
    "dropped",
    [torch.zeros((2, 4), dtype=torch.int64), torch.zeros((2, 3), dtype=torch.int64), torch.full((2, 4), 10)],
)
def test_wrong_dropped_changes_nothing(dropped: torch.Tensor) -> None:
    config = _config()
    state, twin = _run(config, 5), _run(config, 5)
    with pytest.raises(InvalidInputError, match="dropped is"):
        state.apply(random_delta(config, 5), dropped)
    check_same_state(state, twin)


def test_dropped_overrides_the_draw_in_any_order() -> None:
    config = _config()
    one, other = _run(config, 5), _run(config, 5)
    receipt = one.apply(random_delta(config, 5), torch.tensor([[3, 1, 0, 2], [9, 8, 7, 6]]))
    other.apply(random_delta(config, 5), torch.tensor([[0, 1, 2, 3], [6, 7, 8, 9]]))
    assert receipt.dropped.tolist() == [[0, 1, 2, 3], [6, 7, 8, 9]]
    check_same_state(one, other)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1_000), num_queries=st.integers(1, 5), num_retrieved=st.integers(1, 40))
def test_search_over_blocks_with_dead_rows(seed: int, num_queries: int, num_retrieved: int) -> None:
    config = _config(max_long_term=30, num_retrieved=num_retrieved, num_layers=3)
    with blocks_of(2), pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_term_module, "_MAX_SCORES", 7)  # several pieces per block too
        history = History.start(config, None)
        random = np.random.default_rng(seed)
        for _ in range(25):
            history.inject(random)
        assert len(history.state.long_term._blocks) > 2
        generator = torch.Generator().manual_seed(seed)
        history.check_search(torch.randn((num_queries, config.retrieval_dim), generator=generator))


def test_scores_are_means_of_sigmoids() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn((4, 6), generator=generator), torch.randn((9, 6), generator=generator)
    expected = [np.mean([1 / (1 + np.exp(-float(query @ key))) for query in queries]) for key in keys]
    assert mean_sigmoid_scores(queries, keys).tolist() == pytest.approx(expected, abs=1e-6)


def test_fewer_merged_tokens_than_asked_for_are_repeated_under_released() -> None:
    config = _config(rule="released", num_retrieved=8)
    ages: Sequence[np.ndarray] = (np.array([5, 0, 5]), np.array([7]))
    index = GenesisIndex(10, tuple(ages), (np.ones(3, np.float32), np.ones(1, np.float32)))
    state = new_state(config, make_genesis(config, index))
    # Indices (0, 1, 2 repeated)[-8:] = 1 2 0 1 2 0 1 2; by age, oldest first, later copies first among equals.
    assert state.retrieve(0, torch.zeros((1, 3))).tolist() == [2, 0, 2, 0, 2, 1, 1, 1]
    assert state.retrieve(1, torch.zeros((1, 3))).tolist() == [0] * 8
    assert state.num_retrieved_slots().tolist() == [8, 8]


def test_num_bytes_stays_bounded() -> None:
    config = _config()
    with blocks_of(2):
        state = new_state(config, None)
        sizes = []
        for step in range(200):
            state.apply(random_delta(config, step))
            sizes.append(state.num_bytes())
    assert max(sizes[100:]) <= 2 * max(sizes[:100])


def test_dtype_of_the_memory_is_kept() -> None:
    config = _config()
    state = MemoryState(config, seed=0, genesis=None, device=_CPU, dtype=torch.bfloat16)
    for step in range(6):
        state.apply(random_delta(config, step))
    assert {part.dtype for part in _parts(state.theta)} == {torch.bfloat16}
    assert state.tail_hidden is not None
    assert state.tail_hidden.dtype == torch.bfloat16
    keys, values = state.long_term_tokens(0, state.index.long_term.alive_rows(0))
    assert (keys.dtype, values.dtype) == (torch.bfloat16, torch.bfloat16)
