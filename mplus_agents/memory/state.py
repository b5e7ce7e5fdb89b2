"""One agent's memory: θ and Θ as tensors, and the update that an injection makes.

It knows no model and no database. A model makes a `MemoryDelta` from text and this memory; `apply` takes it in.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from mplus_agents.config import MemoryConfig
from mplus_agents.errors import InvalidInputError
from mplus_agents.memory.draws import draw_dropped, draw_places
from mplus_agents.memory.index import GenesisIndex, MemoryIndex, TokenPlaces
from mplus_agents.memory.long_term import LongTermMemory
from mplus_agents.memory.types import BoolArray, IntArray, MemoryDelta, MemoryReceipt


@dataclass(frozen=True, slots=True)
class TokenTensors:
    """Memory tokens as reading needs them.

    Attributes:
        keys: [L, m, h_kv, d_h], before RoPE.
        values: [L, m, h_kv, d_h].
        retrieval_keys: [L, m, p].
    """

    keys: torch.Tensor
    values: torch.Tensor
    retrieval_keys: torch.Tensor


@dataclass(frozen=True, slots=True)
class Genesis:
    """A checkpoint's own memory, loaded once and shared by all agents of the model; never written to.

    Attributes:
        index: Its integers.
        theta: θ's tokens, oldest first.
        long_term: Θ's tokens in storage order; layers with fewer are filled up with dead rows.
        tail_hidden: [L, K, d], the hidden states of θ's newest K tokens.
    """

    index: GenesisIndex
    theta: TokenTensors
    long_term: TokenTensors
    tail_hidden: torch.Tensor


class MemoryState:
    """θ and Θ of one agent; reading never changes it, `apply` changes it in place.

    Args:
        config: Shape and rule.
        seed: The agent's seed, from which every draw follows.
        genesis: The checkpoint's own memory; without one, θ and Θ start empty.
        device: Where the tensors live.
        dtype: Their dtype.
    """

    def __init__(
        self,
        config: MemoryConfig,
        *,
        seed: int,
        genesis: Genesis | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.config = config
        self.seed = seed
        self.device = device
        self.dtype = dtype
        self._genesis = genesis
        self.tail_hidden: torch.Tensor | None = None
        self._start(MemoryIndex(config, genesis.index if genesis else None))
        if genesis:
            self.theta, self.tail_hidden = genesis.theta, genesis.tail_hidden
            self.long_term.attach_genesis(*_parts(genesis.long_term))

    def _start(self, index: MemoryIndex) -> None:
        self.index = index
        self.long_term = LongTermMemory(index, self.device, self.dtype)
        self.tail_hidden = None
        self.theta = self._new_theta(0)
        self._owns_theta = False
        self._theta_positions: torch.Tensor | None = None

    @property
    def num_injections(self) -> int:
        """Injections taken in so far."""
        return self.index.num_injections

    @property
    def theta_size(self) -> int:
        """Tokens in θ, per layer."""
        return self.index.theta_size

    def theta_ages(self) -> torch.Tensor:
        """Return the ages of θ's tokens, oldest first in θ's order, [L, theta_size] int64."""
        return torch.from_numpy(self.index.theta_ages())

    @property
    def long_term_sizes(self) -> torch.Tensor:
        """[L] int64, tokens in Θ; staged ones are not counted."""
        return torch.from_numpy(self.index.long_term.sizes - self.num_staged)

    @property
    def num_staged(self) -> int:
        """Tokens per layer that were dropped, are searched, and are not merged into Θ yet (rule `released`)."""
        return self.index.num_staged

    def long_term_ages(self, layer: int) -> torch.Tensor:
        """Return the ages of Θ's tokens in the order of entry, staged ones left out, [size] int64.

        Args:
            layer: The layer.
        """
        return torch.from_numpy(self.index.long_term_ages(layer, self._merged_rows(layer)))

    def recall_counts(self, layer: int) -> torch.Tensor:
        """Return the recall counts of Θ's tokens in the order of entry, [size] float32; all 0 under the rule `paper`.

        Args:
            layer: The layer.
        """
        columns = self._merged_rows(layer) - self.index.long_term.base_row
        return torch.from_numpy(self.index.long_term.recall_counts[layer, columns])

    def num_retrieved_slots(self) -> IntArray:
        """Return how many tokens of Θ a read places per layer, [L] int64.

        Under `paper` at most as many as there are. Under `released` always K0 once anything is merged: fewer merged
        tokens are repeated cyclically, and staged ones ignored, as the published code does.
        """
        available = self.long_term_sizes.numpy()
        num_retrieved = self.config.num_retrieved
        is_released = self.config.rule == "released"
        slots: IntArray = (
            np.where(available > 0, num_retrieved, 0) if is_released else np.minimum(available, num_retrieved)
        )
        return slots

    def retrieve(self, layer: int, queries: torch.Tensor) -> IntArray:
        """Find the rows of Θ that a read places in one layer, oldest first (paper 3.2.1, 3.2.2).

        Args:
            layer: The layer.
            queries: [n, p], the retriever's queries.

        Returns:
            [num_retrieved_slots of the layer] int64, rows of Θ.
        """
        repeated = self._repeated_rows(layer)
        return self.long_term.search(layer, queries, self.config.num_retrieved) if repeated is None else repeated

    def retrieve_at_random(self, layer: int, seed: int, row: int = 0) -> IntArray:
        """Draw the rows of Θ that a read places in one layer uniformly, to be compared with `retrieve`.

        Args:
            layer: The layer.
            seed: The call's seed.
            row: The row of the call's batch; every row has its own draw.

        Returns:
            [num_retrieved_slots of the layer] int64, rows of Θ, oldest first.
        """
        repeated = self._repeated_rows(layer)
        if repeated is not None:
            return repeated
        rows = self.index.long_term.alive_rows(layer)
        num_drawn = min(self.config.num_retrieved, len(rows))
        drawn = draw_places(seed, row, layer, num_places=len(rows), num_drawn=num_drawn)
        return self.long_term.oldest_first(layer, rows[drawn])

    def entry_positions(self, layer: int, rows: IntArray) -> torch.Tensor:
        """Return the places of rows in the order of entry of Θ's tokens, staged ones last, [r] int64.

        Args:
            layer: The layer.
            rows: [r] int64, rows of Θ.
        """
        return torch.from_numpy(np.searchsorted(self.index.long_term.alive_rows(layer), rows))

    def long_term_tokens(self, layer: int, rows: IntArray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys (before RoPE) and values of rows of Θ, each [r, h_kv, d_h].

        Args:
            layer: The layer.
            rows: [r] int64, rows of Θ.
        """
        shape = (len(rows), self.config.num_kv_heads, self.config.head_dim)
        keys, values = (torch.empty(shape, device=self.device, dtype=self.dtype) for _ in range(2))
        self.long_term.gather(layer, rows, keys, values)
        return keys, values

    def theta_positions(self) -> torch.Tensor:
        """Return the position in θ's order of every slot of θ's tensors, [L, theta_size] int64, on their device."""
        if self._theta_positions is None:
            positions = np.stack([self.index.theta_positions(layer) for layer in range(self.config.num_layers)])
            self._theta_positions = torch.from_numpy(positions).to(self.device)
        return self._theta_positions

    def theta_tokens(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys (before RoPE) and values of θ in its order, oldest first, each [theta_size, h_kv, d_h].

        Args:
            layer: The layer.
        """
        order = torch.from_numpy(self.index.theta_order[layer]).to(self.device)
        return self.theta.keys[layer][order], self.theta.values[layer][order]

    def apply(self, delta: MemoryDelta, dropped: torch.Tensor | None = None) -> MemoryReceipt:
        """Take in the new tokens of one injection, in place (paper 3.1, 3.2.1).

        K random θ tokens per layer move to Θ, as far as θ is full, and the new ones are appended; then Θ keeps to its
        capacity by the rule in force.

        Args:
            delta: The new tokens.
            dropped: [L, k] int64, positions in θ's order that leave, in place of the random draw; k is what θ would
                hold too many.

        Returns:
            What was written, dropped and evicted.

        Raises:
            InvalidInputError: A tensor has the wrong shape, or `dropped` is not allowed; nothing has been changed.
        """
        self._check_delta(delta)
        if dropped is None:
            positions = draw_dropped(
                self.seed,
                self.index.num_injections,
                num_layers=self.config.num_layers,
                theta_size=self.theta_size,
                num_dropped=self.index.num_overflow,
            )
        else:
            positions = self.index.check_dropped(dropped.cpu().numpy())
        change = self.index.apply(positions)
        self._theta_positions = None
        layers = torch.arange(self.config.num_layers, device=self.device)[:, None]
        if self.config.has_long_term and positions.shape[1]:
            slots = torch.from_numpy(change.dropped_slots).to(self.device)
            keys, values, retrieval_keys = (part[layers, slots] for part in _parts(self.theta))
            self.long_term.append(keys, values, retrieval_keys, change.first_row)
        self._grow_theta()
        slots = torch.from_numpy(change.new_slots).to(self.device)
        for part, new in zip(_parts(self.theta), (delta.keys, delta.values, delta.retrieval_keys), strict=True):
            part[layers, slots] = new.to(self.device, self.dtype)
        self.tail_hidden = delta.hidden.to(self.device, self.dtype)
        self.long_term.drop_trimmed()
        for layer, rows in enumerate(change.evicted_rows):
            self.long_term.forget(layer, rows)
        return MemoryReceipt(change.step, self.config.tokens_per_injection, torch.from_numpy(positions), change.evicted)

    def restore(
        self, index: MemoryIndex, tail_hidden: torch.Tensor | None, injections: Iterable[tuple[int, TokenTensors]]
    ) -> None:
        """Become the memory that `index` describes, by fetching the tokens it still holds; self must be new.

        Args:
            index: The replayed bookkeeping.
            tail_hidden: [L, K, d], the hidden states of the newest K tokens, None if there are none.
            injections: Step and tokens [L, K, ...] of every injection in `needed_steps(index)`.
        """
        genesis_theta = self.theta
        self._start(index)
        if self._genesis:
            self.long_term.attach_genesis(*_parts(self._genesis.long_term))
            self.tail_hidden = self._genesis.tail_hidden
        if index.num_injections == 0:
            self.theta = genesis_theta
            return
        self.theta, self._owns_theta = self._new_theta(index.theta_size), True
        self.long_term.allocate()
        places = index.locate()
        num_genesis = genesis_theta.keys.shape[1]
        self._place(places, -num_genesis, 0, genesis_theta)
        num_new = self.config.tokens_per_injection
        for step, tokens in injections:
            self._place(places, step * num_new, (step + 1) * num_new, tokens)
        if tail_hidden is not None:
            self.tail_hidden = tail_hidden.to(self.device, self.dtype)

    def num_bytes(self) -> int:
        """Return the bytes of all tensors, what is shared with other agents included."""
        tail = self.tail_hidden.nbytes if self.tail_hidden is not None else 0
        return sum(part.nbytes for part in _parts(self.theta)) + tail + self.long_term.num_bytes()

    def _place(self, places: TokenPlaces, first_birth: int, end_birth: int, tokens: TokenTensors) -> None:
        """Put the tokens with births in [first_birth, end_birth) where `places` says."""
        start, end = np.searchsorted(places.births, [first_birth, end_birth])
        if start == end:
            return
        layers, spots = places.layers[start:end], places.places[start:end]
        offsets, in_long_term = places.births[start:end] - first_birth, places.in_long_term[start:end]
        device_tokens = [part.to(self.device, self.dtype) for part in _parts(tokens)]

        def pick(mask: BoolArray) -> tuple[torch.Tensor, ...]:
            where = (torch.from_numpy(layers[mask]).to(self.device), torch.from_numpy(offsets[mask]).to(self.device))
            return tuple(part[where] for part in device_tokens)

        in_theta = ~in_long_term
        target = (torch.from_numpy(layers[in_theta]).to(self.device), torch.from_numpy(spots[in_theta]).to(self.device))
        for part, picked in zip(_parts(self.theta), pick(in_theta), strict=True):
            part[target] = picked
        if in_long_term.any():
            keys, values, retrieval_keys = pick(in_long_term)
            self.long_term.scatter(layers[in_long_term], spots[in_long_term], (keys, values, retrieval_keys))

    def _repeated_rows(self, layer: int) -> IntArray | None:
        """Return what every read places where the published code repeats too few tokens of Θ; None elsewhere."""
        num_retrieved = self.config.num_retrieved
        merged = self._merged_rows(layer) if self.config.rule == "released" else None
        if merged is None or len(merged) >= num_retrieved:
            return None
        places = np.resize(np.arange(len(merged)), num_retrieved + (-num_retrieved) % len(merged))
        chosen = merged[places[-num_retrieved:]]
        # Repeats tie in age; a stable sort reversed puts the later copy first, as in the published code.
        ages = self.index.long_term_ages(layer, chosen)
        return chosen[np.argsort(ages, kind="stable")[::-1]]

    def _merged_rows(self, layer: int) -> IntArray:
        rows = self.index.long_term.alive_rows(layer)
        return rows[rows < self.index.long_term.num_merged_rows]

    def _new_theta(self, num_tokens: int) -> TokenTensors:
        config = self.config
        heads = (config.num_layers, num_tokens, config.num_kv_heads, config.head_dim)
        retrieval = (config.num_layers, num_tokens, config.retrieval_dim)
        keys, values, retrieval_keys = (
            torch.empty(shape, device=self.device, dtype=self.dtype) for shape in (heads, heads, retrieval)
        )
        return TokenTensors(keys, values, retrieval_keys)

    def _grow_theta(self) -> None:
        """Make θ's tensors this agent's own and as large as the index says."""
        old_size = self.theta.keys.shape[1]
        if self._owns_theta and old_size == self.index.theta_size:
            return
        grown = self._new_theta(self.index.theta_size)
        for new, old in zip(_parts(grown), _parts(self.theta), strict=True):
            new[:, :old_size] = old
        self.theta, self._owns_theta = grown, True

    def _check_delta(self, delta: MemoryDelta) -> None:
        config = self.config
        first = (config.num_layers, config.tokens_per_injection)
        heads = (*first, config.num_kv_heads, config.head_dim)
        expected = {
            "hidden": (*first, config.hidden_size),
            "keys": heads,
            "values": heads,
            "retrieval_keys": (*first, config.retrieval_dim),
        }
        for name, shape in expected.items():
            given = tuple(getattr(delta, name).shape)
            if given != shape:
                raise InvalidInputError(f"delta.{name}", f"shape {list(given)}", f"shape {list(shape)}")


def needed_steps(index: MemoryIndex) -> list[int]:
    """Return the injections of which a memory still holds tokens, ascending.

    Args:
        index: The bookkeeping.
    """
    births = index.locate().births
    return [int(step) for step in np.unique(births[births >= 0] // index.config.tokens_per_injection)]


def _parts(tokens: TokenTensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tokens.keys, tokens.values, tokens.retrieval_keys
