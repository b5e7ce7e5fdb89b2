"""The bookkeeping of a whole memory: which token sits where, how old it is, what leaves when.

Integers only, so that the store can replay an agent's history without touching a tensor. A token is named by its
*birth*: injection number × K + its slot in the injection. Genesis tokens have negative births. "Position" is a place in
θ's order, oldest first; "slot" is where θ's tensors keep the token: a new token takes the slot of a dropped one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from mplus_agents.config import MemoryConfig
from mplus_agents.errors import InvalidInputError, SchemaVersionError
from mplus_agents.memory.long_term_index import LongTermIndex
from mplus_agents.memory.types import BoolArray, FloatArray, IndexChange, IntArray

# Tokens at or under this count leave Θ at a merge (published code: 0.01).
_MIN_RECALL_COUNT = 0.01
# Θ's rows are kept in blocks of this many injections' tokens: few pieces to search, small enough to free.
_BLOCK_INJECTIONS = 64
_SNAPSHOT_FORMAT = 1
_NOTHING: IntArray = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class GenesisIndex:
    """Integers of a checkpoint's own memory.

    Attributes:
        theta_size: Tokens in its θ, per layer.
        long_term_ages: Per layer, [size] int64, ages of its Θ in storage order.
        recall_counts: Per layer, [size] float32.
    """

    theta_size: int
    long_term_ages: tuple[IntArray, ...]
    recall_counts: tuple[FloatArray, ...]


@dataclass(frozen=True, slots=True)
class TokenPlaces:
    """Where memory tokens sit; parallel arrays, one entry per token and layer.

    Attributes:
        births: int64, ascending.
        layers: int64.
        places: int64, the slot in θ or the row in Θ.
        in_long_term: bool.
    """

    births: IntArray
    layers: IntArray
    places: IntArray
    in_long_term: BoolArray


class MemoryIndex:
    """θ's order and Θ's rows of one agent, and the rule by which they change.

    Args:
        config: Shape and rule.
        genesis: The checkpoint's own memory; without one, θ and Θ start empty.
    """

    def __init__(self, config: MemoryConfig, genesis: GenesisIndex | None = None) -> None:
        self.config = config
        self.num_injections = 0
        theta_size = genesis.theta_size if genesis else 0
        self._num_genesis_theta = theta_size
        births = np.arange(-theta_size, 0, dtype=np.int64)
        self.theta_births: IntArray = np.tile(births, (config.num_layers, 1))
        self.theta_order: IntArray = np.tile(np.arange(theta_size, dtype=np.int64), (config.num_layers, 1))
        first_block = max((len(ages) for ages in genesis.long_term_ages), default=0) if genesis else 0
        block_rows = _BLOCK_INJECTIONS * config.tokens_per_injection
        self.long_term = LongTermIndex(config.num_layers, block_rows, first_block)
        if genesis and first_block:
            self._add_genesis_rows(genesis, first_block)

    @property
    def theta_size(self) -> int:
        """Tokens in θ, per layer."""
        return int(self.theta_births.shape[1])

    @property
    def num_overflow(self) -> int:
        """Tokens per layer that the next injection drops from θ."""
        return max(0, self.theta_size + self.config.tokens_per_injection - self.config.max_short_term)

    @property
    def num_staged(self) -> int:
        """Rows that were dropped and are not merged into Θ yet (rule `released`)."""
        return self.long_term.num_rows - self.long_term.num_merged_rows if self.config.rule == "released" else 0

    def check_dropped(self, dropped: IntArray) -> IntArray:
        """Check positions that a caller wants dropped.

        Args:
            dropped: [L, k] int64.

        Returns:
            The same, ascending per layer.

        Raises:
            InvalidInputError: The shape is not [L, num_overflow], or a position is repeated or outside θ.
        """
        shape = (self.config.num_layers, self.num_overflow)
        if dropped.shape != shape:
            raise InvalidInputError("dropped", f"shape {list(dropped.shape)}", f"shape {list(shape)}")
        if not np.issubdtype(dropped.dtype, np.integer):
            raise InvalidInputError("dropped", str(dropped.dtype), "whole numbers")
        ordered = np.sort(dropped.astype(np.int64), axis=1)
        if ordered.size and (ordered.min() < 0 or ordered.max() >= self.theta_size):
            wrong = int(ordered.min() if ordered.min() < 0 else ordered.max())
            raise InvalidInputError("dropped", wrong, f"positions in θ, 0 to {self.theta_size - 1}")
        if (np.diff(ordered, axis=1) == 0).any():
            raise InvalidInputError("dropped", "a repeated position", "each position of a layer once")
        return ordered

    def apply(self, dropped: IntArray) -> IndexChange:
        """Account for one injection: `dropped` leaves θ, K new tokens enter it, Θ takes what left.

        Args:
            dropped: [L, num_overflow] int64, positions in θ's order, ascending.

        Returns:
            Where the new tokens go and what left.
        """
        num_layers, num_new = self.config.num_layers, self.config.tokens_per_injection
        step, old_size = self.num_injections, self.theta_size
        dropped_slots = np.take_along_axis(self.theta_order, dropped, axis=1)
        dropped_births = np.take_along_axis(self.theta_births, dropped_slots, axis=1)
        num_free = num_new - dropped.shape[1]
        free_slots = np.tile(np.arange(old_size, old_size + num_free, dtype=np.int64), (num_layers, 1))
        new_slots = np.concatenate([free_slots, dropped_slots], axis=1)
        kept = np.ones((num_layers, old_size), dtype=np.bool_)
        np.put_along_axis(kept, dropped, False, axis=1)
        kept_order = self.theta_order[kept].reshape(num_layers, old_size - dropped.shape[1])
        self.theta_order = np.concatenate([kept_order, new_slots], axis=1)
        if num_free:
            grown = np.zeros((num_layers, num_free), dtype=np.int64)
            self.theta_births = np.concatenate([self.theta_births, grown], axis=1)
        new_births = step * num_new + np.arange(num_new, dtype=np.int64)
        np.put_along_axis(self.theta_births, new_slots, np.tile(new_births, (num_layers, 1)), axis=1)
        self.num_injections += 1
        first_row = self.long_term.num_rows
        rows = [_NOTHING] * num_layers
        if self.config.has_long_term:
            first_row, rows = self._move_to_long_term(dropped_births)
        log = self.long_term
        births = tuple(np.sort(log.births[layer, rows[layer] - log.base_row]) for layer in range(num_layers))
        log.trim()
        return IndexChange(step, dropped, dropped_slots, new_slots, first_row, births, tuple(map(np.sort, rows)))

    def theta_positions(self, layer: int) -> IntArray:
        """Return each θ slot's position in θ's order, [theta_size] int64."""
        positions = np.empty(self.theta_size, dtype=np.int64)
        positions[self.theta_order[layer]] = np.arange(self.theta_size)
        return positions

    def theta_ages(self) -> IntArray:
        """Return the ages of θ's tokens in its order, [L, theta_size] int64, by the rule in force."""
        births = np.take_along_axis(self.theta_births, self.theta_order, axis=1)
        return self._entry_ages(births) if self.config.rule == "released" else self._ages_since_birth(births)

    def long_term_ages(self, layer: int, rows: IntArray) -> IntArray:
        """Return the ages of rows of Θ, [r] int64, by the rule in force.

        Args:
            layer: The layer.
            rows: [r] int64, rows of Θ.
        """
        columns = rows - self.long_term.base_row
        if self.config.rule == "paper":
            return self._ages_since_birth(self.long_term.births[layer, columns])
        since_entry = (self.num_injections - self.long_term.entered[columns]) * self.config.tokens_per_injection
        ages: IntArray = self.long_term.entry_ages[layer, columns] + since_entry
        return ages

    def placement_keys(self, rows: slice) -> IntArray:
        """Return numbers that order rows of Θ oldest first, as they are placed for reading, [L, r] int64.

        Under `released` equal ages are placed in reverse storage order, as the published code's reversed sort does.

        Args:
            rows: Consecutive rows of Θ.
        """
        columns = slice(rows.start - self.long_term.base_row, rows.stop - self.long_term.base_row)
        if self.config.rule == "paper":
            return self.long_term.births[:, columns].copy()
        entered = self.long_term.entered[columns] * self.config.tokens_per_injection
        order = (entered - self.long_term.entry_ages[:, columns]) * (1 << 32)
        keys: IntArray = order - np.arange(rows.start, rows.stop, dtype=np.int64)
        return keys

    def locate(self) -> TokenPlaces:
        """Return where every token of θ and of Θ (the checkpoint's own Θ left out) sits, sorted by birth."""
        layers, slots = np.indices(self.theta_births.shape)
        log = self.long_term
        log_layers, columns = np.nonzero(log.alive[:, log.window])
        log_births = log.births[log_layers, columns]
        copied = log_births >= -self._num_genesis_theta
        births = np.concatenate([self.theta_births.ravel(), log_births[copied]])
        order = np.argsort(births, kind="stable")
        places = (
            births,
            np.concatenate([layers.ravel(), log_layers[copied]]),
            np.concatenate([slots.ravel(), columns[copied] + log.base_row]),
            np.concatenate([np.zeros(slots.size, dtype=np.bool_), np.ones(int(copied.sum()), dtype=np.bool_)]),
        )
        return TokenPlaces(*(array[order] for array in places))

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the whole state as named arrays, to be stored as a snapshot."""
        arrays = {f"long_term.{name}": array for name, array in self.long_term.to_arrays().items()}
        arrays["format"] = np.array([_SNAPSHOT_FORMAT], dtype=np.int64)
        arrays["num_injections"] = np.array([self.num_injections], dtype=np.int64)
        arrays["theta_births"] = self.theta_births.copy()
        arrays["theta_order"] = self.theta_order.copy()
        return arrays

    @classmethod
    def from_arrays(cls, config: MemoryConfig, genesis: GenesisIndex | None, arrays: dict[str, np.ndarray]) -> Self:
        """Rebuild an index from a snapshot.

        Args:
            config: Shape and rule, as when the snapshot was made.
            genesis: The checkpoint's own memory, as when the snapshot was made.
            arrays: What `to_arrays` returned.

        Raises:
            SchemaVersionError: The snapshot has a format that this version does not know.
        """
        found = arrays["format"].tolist() if "format" in arrays else "none"
        if found != [_SNAPSHOT_FORMAT]:
            raise SchemaVersionError(f"snapshot format {found} is unknown; this version reads [{_SNAPSHOT_FORMAT}]")
        index = cls(config, genesis)
        index.num_injections = int(arrays["num_injections"][0])
        index.theta_births = arrays["theta_births"].astype(np.int64)
        index.theta_order = arrays["theta_order"].astype(np.int64)
        block_rows, first_block = index.long_term.block_rows, index.long_term.first_block_rows
        index.long_term = LongTermIndex(config.num_layers, block_rows, first_block)
        prefix = "long_term."
        index.long_term.load_arrays({k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)})
        return index

    def _add_genesis_rows(self, genesis: GenesisIndex, num_rows: int) -> None:
        shape = (self.config.num_layers, num_rows)
        births, ages = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        alive, counts = np.zeros(shape, dtype=np.bool_), np.zeros(shape, dtype=np.float32)
        for layer, layer_ages in enumerate(genesis.long_term_ages):
            size = len(layer_ages)
            # Unique births, all before θ's own, oldest (by the checkpoint's ages) first.
            births[layer, np.argsort(-layer_ages, kind="stable")] = np.arange(-size, 0) - genesis.theta_size
            ages[layer, :size] = layer_ages
            alive[layer, :size] = True
            counts[layer, :size] = genesis.recall_counts[layer]
        self.long_term.append(births, alive=alive, entry_ages=ages, recall_count=counts)
        self.long_term.num_merged_rows = num_rows

    def _move_to_long_term(self, births: IntArray) -> tuple[int, list[IntArray]]:
        released = self.config.rule == "released"
        first_row = self.long_term.append(
            births,
            entered=self.num_injections,
            entry_ages=self._entry_ages(births) if released else None,
            recall_count=self.config.initial_recall_count if released else 0.0,
        )
        if not released:
            self.long_term.num_merged_rows = self.long_term.num_rows
            excess = self.long_term.sizes - self.config.max_long_term
            return first_row, [self.long_term.evict_oldest(layer, int(excess[layer])) for layer in range(len(excess))]
        if self.num_injections % self.config.merge_every == 0:
            return first_row, self._merge()
        return first_row, [_NOTHING] * self.config.num_layers

    def _merge(self) -> list[IntArray]:
        """Merge what is staged; every count decays, and the used-up tokens leave if more than K0 stay."""
        log = self.long_term
        log.num_merged_rows = log.num_rows
        log.recall_counts[:, log.window] -= self.config.recall_decay
        left = []
        for layer in range(self.config.num_layers):
            rows = log.alive_rows(layer)
            used_up = rows[log.recall_counts[layer, rows - log.base_row] <= _MIN_RECALL_COUNT]
            if len(rows) - len(used_up) <= self.config.num_retrieved:
                used_up = _NOTHING
            log.kill(layer, used_up)
            left.append(used_up)
        return left

    def _ages_since_birth(self, births: IntArray) -> IntArray:
        return self.num_injections * self.config.tokens_per_injection - 1 - births

    def _entry_ages(self, births: IntArray) -> IntArray:
        """Offset from the end of its injection; 0 for genesis tokens (the published code starts all θ ages at 0)."""
        num_new = self.config.tokens_per_injection
        return np.where(births < 0, 0, num_new - 1 - births % num_new)
