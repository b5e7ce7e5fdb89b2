"""The memory's rules, written down a second time in the plainest way: lists of tokens, no arrays, no cleverness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st

from mplus_agents.config import MemoryConfig
from mplus_agents.memory import GenesisIndex


@dataclass
class Entry:
    """A token in Θ; `age` is counted up by hand, injection after injection."""

    birth: int
    age: int
    count: np.float32
    is_staged: bool


@dataclass
class ReferenceMemory:
    """θ and Θ of one agent, per layer, as lists of births and entries."""

    config: MemoryConfig
    genesis: GenesisIndex | None
    num_injections: int = 0
    theta: list[list[int]] = field(default_factory=list)
    long_term: list[list[Entry]] = field(default_factory=list)
    evicted: list[set[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        num_theta = self.genesis.theta_size if self.genesis else 0
        for layer in range(self.config.num_layers):
            self.theta.append(list(range(-num_theta, 0)))
            self.evicted.append(set())
            ages = self.genesis.long_term_ages[layer].tolist() if self.genesis else []
            oldest_first = sorted(range(len(ages)), key=lambda place: -ages[place])
            birth_of = {place: rank - len(ages) - num_theta for rank, place in enumerate(oldest_first)}
            counts: list[float] = self.genesis.recall_counts[layer].tolist() if self.genesis else []
            self.long_term.append(
                [Entry(birth_of[place], ages[place], np.float32(counts[place]), False) for place in range(len(ages))]
            )

    @property
    def num_overflow(self) -> int:
        return max(0, len(self.theta[0]) + self.config.tokens_per_injection - self.config.max_short_term)

    def inject(self, dropped: Sequence[Sequence[int]]) -> list[list[int]]:
        """Do one injection; return the births that leave Θ, per layer."""
        num_new = self.config.tokens_per_injection
        step = self.num_injections
        self.num_injections += 1
        is_merge = self.config.rule == "released" and self.num_injections % self.config.merge_every == 0
        left: list[list[int]] = []
        for layer, places in enumerate(dropped):
            theta = self.theta[layer]
            leaving = [theta[place] for place in sorted(places)]
            new = [step * num_new + slot for slot in range(num_new)]
            self.theta[layer] = [birth for birth in theta if birth not in leaving] + new
            if not self.config.has_long_term:
                self.evicted[layer].update(leaving)
                left.append([])
                continue
            for entry in self.long_term[layer]:
                entry.age += num_new
            first_count = np.float32(self.config.initial_recall_count)
            self.long_term[layer] += [Entry(birth, self._offset(birth), first_count, True) for birth in leaving]
            gone = self._merge(layer) if is_merge else self._overfull(layer)
            self.long_term[layer] = [entry for entry in self.long_term[layer] if entry.birth not in gone]
            self.evicted[layer] |= gone
            left.append(sorted(gone))
        return left

    def theta_ages(self, layer: int) -> list[int]:
        if self.config.rule == "released":
            return [self._offset(birth) for birth in self.theta[layer]]
        return [self._since_birth(birth) for birth in self.theta[layer]]

    def merged(self, layer: int) -> list[Entry]:
        return [entry for entry in self.long_term[layer] if not (entry.is_staged and self.config.rule == "released")]

    def long_term_ages(self, layer: int) -> list[int]:
        if self.config.rule == "released":
            return [entry.age for entry in self.merged(layer)]
        return [self._since_birth(entry.birth) for entry in self.merged(layer)]

    def placed(self, layer: int, births: set[int]) -> list[int]:
        """Put retrieved births in the order of reading: oldest first; equal ages, the later entry first."""
        entries = [entry for entry in self.long_term[layer] if entry.birth in births]
        if self.config.rule == "paper":
            return sorted(births)
        latest_first = list(reversed(entries))
        return [entry.birth for entry in sorted(latest_first, key=lambda entry: -entry.age)]

    def _offset(self, birth: int) -> int:
        num_new = self.config.tokens_per_injection
        return 0 if birth < 0 else num_new - 1 - birth % num_new

    def _since_birth(self, birth: int) -> int:
        return self.num_injections * self.config.tokens_per_injection - 1 - birth

    def _overfull(self, layer: int) -> set[int]:
        if self.config.rule == "released":
            return set()
        births = sorted(entry.birth for entry in self.long_term[layer])
        return set(births[: max(0, len(births) - self.config.max_long_term)])

    def _merge(self, layer: int) -> set[int]:
        entries = self.long_term[layer]
        for entry in entries:
            entry.is_staged = False
            entry.count = entry.count - np.float32(self.config.recall_decay)
        used_up = {entry.birth for entry in entries if entry.count <= 0.01}
        return used_up if len(entries) - len(used_up) > self.config.num_retrieved else set()


@st.composite
def configs(draw: st.DrawFn) -> MemoryConfig:
    """Small memories of every kind: K does not divide N, M is smaller than K, Θ is missing."""
    num_new = draw(st.integers(1, 5))
    has_long_term = draw(st.integers(0, 5)) > 0
    return MemoryConfig(
        num_layers=draw(st.integers(1, 3)),
        hidden_size=3,
        num_kv_heads=2,
        head_dim=2,
        retrieval_dim=3 if has_long_term else 0,
        tokens_per_injection=num_new,
        max_short_term=draw(st.integers(num_new, 4 * num_new + 3)),
        num_retrieved=draw(st.integers(1, 6)) if has_long_term else 0,
        max_long_term=draw(st.integers(1, 24)) if has_long_term else 0,
        rule=draw(st.sampled_from(["paper", "released"])),
        merge_every=draw(st.integers(1, 4)),
        initial_recall_count=draw(st.sampled_from([0.0, 1.0, 2.0, 2.5])),
        recall_decay=draw(st.sampled_from([0.0, 0.5, 1.0])),
    )


@st.composite
def genesis_indices(draw: st.DrawFn, config: MemoryConfig) -> GenesisIndex | None:
    """No genesis, or a full θ and a Θ whose layers differ in size, with repeated ages."""
    if not draw(st.booleans()):
        return None
    sizes = [draw(st.integers(0, 9)) if config.has_long_term else 0 for _ in range(config.num_layers)]
    ages = tuple(np.array(draw(st.lists(st.integers(0, 12), min_size=n, max_size=n)), dtype=np.int64) for n in sizes)
    counts = tuple(
        np.array(draw(st.lists(st.sampled_from([0.5, 1.0, 3.0, 9.0]), min_size=n, max_size=n)), dtype=np.float32)
        for n in sizes
    )
    return GenesisIndex(config.max_short_term, ages, counts)
