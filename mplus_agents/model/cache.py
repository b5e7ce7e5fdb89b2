"""Everything that belongs to one call travels in its transformers cache; the module tree holds no per-call state.

A `ReadCache` starts with a layer's [bos | retrieved Θ | θ] as keys and values, filled in when that layer's attention
is about to run, because only then is its retrieval query known. A `WriteCache` starts with [bos | last K tokens of θ]
and collects the new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from mplus_agents.config import LongTermUse
from mplus_agents.memory import MemoryState
from mplus_agents.memory.types import IntArray
from mplus_agents.model.families import project_key_value, rotate

if TYPE_CHECKING:
    from mplus_agents.model.mplus import MPlusModel


class BufferLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer in a buffer allocated once: a prefix, then what attention adds.

    Args:
        num_prefix: Slots of the prefix, reported from the start so that positions and masks come out right.
        capacity: Slots in all.
    """

    is_sliding = False
    keys: torch.Tensor  # made by `allocate`
    values: torch.Tensor

    def __init__(self, num_prefix: int, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.length = num_prefix
        self.capacity = capacity

    def allocate(self, shape: tuple[int, int, int], like: torch.Tensor) -> None:
        """Make the buffers.

        Args:
            shape: Batch size, key/value heads, head width.
            like: A tensor with the device and dtype to use.
        """
        batch_size, num_heads, width = shape
        self.keys = like.new_zeros((batch_size, num_heads, self.capacity, width))
        self.values = like.new_zeros((batch_size, num_heads, self.capacity, width))
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: `allocate` is called before attention runs."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [b, h_kv, n, d_h] and return all keys and values so far."""
        end = self.length + key_states.shape[2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of key slots a mask must span, and its offset."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Return the slots taken, the prefix included."""
        return self.length

    def get_max_length(self) -> int:
        """Return the capacity in slots."""
        return self.capacity

    def get_max_cache_shape(self) -> int:
        """Return the capacity in slots, under the name that older transformers releases call."""
        return self.capacity


class PrefixCache(Cache):
    """A transformers cache whose layers start with a prefix of memory slots.

    Args:
        num_layers: Layers L.
        num_prefix: Slots of the prefix.
        capacity: Slots in all.
    """

    def __init__(self, num_layers: int, num_prefix: int, capacity: int) -> None:
        self.buffers = [BufferLayer(num_prefix, capacity) for _ in range(num_layers)]
        super().__init__(layers=list(self.buffers))


@dataclass(frozen=True, slots=True)
class ReadLayout:
    """How many slots every layer of every memory of a batch needs.

    A layer's slots are right-aligned: [empty | bos | retrieved Θ | θ], then the prompt.

    Attributes:
        retrieved: [b, L] int64, tokens retrieved from Θ.
        theta: [b] int64, tokens in θ.
    """

    retrieved: IntArray
    theta: IntArray

    @classmethod
    def of(cls, memories: Sequence[MemoryState], long_term: bool = True) -> ReadLayout:
        """Lay out a batch of memories, with or without their Θ."""
        retrieved = np.array([memory.num_retrieved_slots() for memory in memories])
        retrieved = retrieved if long_term else np.zeros_like(retrieved)
        return cls(retrieved, np.array([memory.theta_size for memory in memories]))

    @property
    def row_lengths(self) -> IntArray:
        """[b], slots before the prompt: where its positions start."""
        lengths: IntArray = 1 + self.retrieved.max(axis=1) + self.theta
        return lengths

    @property
    def num_prefix(self) -> int:
        """Slots before the prompt in the widest row."""
        return int(self.row_lengths.max())

    def empty_slots(self) -> IntArray:
        """[b, L], empty slots in front of each row and layer."""
        empty: IntArray = self.num_prefix - (1 + self.retrieved + self.theta[:, None])
        return empty


class ReadCache(PrefixCache):
    """The cache of one read: prompt, then decoding, over a batch of memories.

    Args:
        model: The model that reads.
        memories: One memory per row of the batch.
        num_prompt: Prompt tokens n.
        query_mask: [b, n] bool, the prompt tokens that query Θ; all if None.
        max_new_tokens: Tokens that will be decoded after the prompt.
        long_term: How Θ is read.
        seed: Seed of a read at random.
    """

    def __init__(
        self,
        model: MPlusModel,
        memories: Sequence[MemoryState],
        num_prompt: int,
        query_mask: torch.Tensor | None = None,
        max_new_tokens: int = 0,
        long_term: LongTermUse = "retrieved",
        seed: int = 0,
    ) -> None:
        self._model = model
        self._memories = memories
        self._query_mask = None if query_mask is None else query_mask.to(model.device)
        self._is_random, self._seed = long_term == "random", seed
        self.layout = ReadLayout.of(memories, long_term != "off")
        self._empty = self.layout.empty_slots()
        num_prefix = self.layout.num_prefix
        capacity = num_prefix + num_prompt + max_new_tokens
        super().__init__(len(self._empty[0]), num_prefix, capacity)
        self.retrieved: list[list[IntArray]] = [[] for _ in memories]
        self._cos, self._sin = model.rope_table(num_prefix)

    def before_attention(
        self, layer_idx: int, normed: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Fill the layer's memory slots the first time, and mask the empty ones.

        Args:
            layer_idx: The layer.
            normed: [b, n, d], what attention is about to see.
            attention_mask: The mask that transformers made: none, [b, kv], or [b, 1, n, kv].

        Returns:
            The mask to use.
        """
        layer = self.buffers[layer_idx]
        if not layer.is_initialized:
            layer.allocate((len(self._memories), *self._model.head_shape), like=normed)
            for row, memory in enumerate(self._memories):
                self._fill(layer_idx, row, memory, normed[row])
        empty = self._empty[:, layer_idx]
        if not empty.any():
            return attention_mask
        return self._mask_empty(empty, layer.get_seq_length() + normed.shape[1], normed, attention_mask)

    def _fill(self, layer_idx: int, row: int, memory: MemoryState, normed: torch.Tensor) -> None:
        keys, values = self.buffers[layer_idx].keys[row], self.buffers[layer_idx].values[row]
        num_prefix, num_theta = self.layout.num_prefix, int(self.layout.theta[row])
        num_retrieved = int(self.layout.retrieved[row, layer_idx])
        first = num_prefix - num_theta - num_retrieved - 1
        theta_position = 1 + int(self.layout.retrieved[row].max())
        bos_keys, bos_values = self._model.bos_key_value(layer_idx)
        keys[:, first], values[:, first] = bos_keys, bos_values  # position 0 does not rotate
        if num_retrieved:
            rows = self._choose(layer_idx, row, memory, normed)
            self.retrieved[row].append(rows)
            picked_keys, picked_values = memory.long_term_tokens(layer_idx, rows)
            places = slice(theta_position - num_retrieved, theta_position)
            slots = slice(first + 1, first + 1 + num_retrieved)
            keys[:, slots] = rotate(picked_keys, self._cos[places], self._sin[places]).transpose(0, 1)
            values[:, slots] = picked_values.transpose(0, 1)
        else:
            self.retrieved[row].append(np.empty(0, dtype=np.int64))
        if num_theta:
            places_of_slots = memory.theta_positions()[layer_idx] + theta_position
            cos, sin = self._cos[places_of_slots], self._sin[places_of_slots]
            slots = slice(num_prefix - num_theta, num_prefix)
            keys[:, slots] = rotate(memory.theta.keys[layer_idx], cos, sin).transpose(0, 1)
            values[:, slots] = memory.theta.values[layer_idx].transpose(0, 1)

    def _choose(self, layer_idx: int, row: int, memory: MemoryState, normed: torch.Tensor) -> IntArray:
        if self._is_random:
            return memory.retrieve_at_random(layer_idx, self._seed, row)
        mask = None if self._query_mask is None else self._query_mask[row]
        queries = self._model.retriever(layer_idx).queries(normed if mask is None else normed[mask])
        return memory.retrieve(layer_idx, queries)

    def _mask_empty(
        self, empty: IntArray, num_slots: int, normed: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        starts = torch.from_numpy(empty).to(normed.device)
        is_empty = torch.arange(num_slots, device=normed.device)[None] < starts[:, None]  # [b, kv]
        if self._model.uses_flash_attention:
            base = torch.ones_like(is_empty) if attention_mask is None else attention_mask.bool()
            return (base & ~is_empty).long()
        if attention_mask is None:  # a single query token sees every slot
            return ~is_empty[:, None, None].expand(-1, 1, normed.shape[1], -1)
        blocked = is_empty[:, None, None].expand_as(attention_mask)
        fill = False if attention_mask.dtype == torch.bool else torch.finfo(attention_mask.dtype).min
        return attention_mask.masked_fill(blocked, fill)


class WriteCache(PrefixCache):
    """The cache of one write: a prefix per layer, and what the layers put out.

    Args:
        model: The model that writes.
        tail: [b, L, m, d], the memory tokens of θ before the text; with m below K a bos row stands in for each one
            that a short text needs as a query row and θ does not have.
        num_text: Text tokens n.
    """

    def __init__(self, model: MPlusModel, tail: torch.Tensor, num_text: int) -> None:
        self._model = model
        self._tail = tail
        self.num_new = model.config.memory.tokens_per_injection
        self.num_queries = max(num_text, self.num_new)
        self.num_memory_queries = self.num_queries - num_text
        self.num_prefix = 1 + tail.shape[2] - self.num_memory_queries
        capacity = self.num_prefix + self.num_queries
        super().__init__(tail.shape[1], self.num_prefix, capacity)
        self._cos, self._sin = model.rope_table(self.num_prefix)
        self.new_hidden: list[torch.Tensor] = []

    def before_layer(self, layer_idx: int, hidden: torch.Tensor) -> torch.Tensor:
        """Take the memory's query rows anew, mark the last K rows, and fill the layer's prefix.

        Args:
            layer_idx: The layer.
            hidden: [b, q, d], its input.

        Returns:
            [b, q, d], the input to use.
        """
        tail = self._tail[:, layer_idx]
        num_prefix_tail = self.num_prefix - 1
        if self.num_memory_queries:
            hidden = torch.cat([tail[:, num_prefix_tail:], hidden[:, self.num_memory_queries :]], dim=1)
        marked = hidden[:, -self.num_new :] + self._model.new_memory_positional_emb
        hidden = torch.cat([hidden[:, : -self.num_new], marked], dim=1)
        bos = self._model.bos_embedding[layer_idx].expand(len(tail), 1, -1)
        prefix = torch.cat([bos, tail[:, :num_prefix_tail]], dim=1)
        keys, values = project_key_value(self._model.write_layer(layer_idx), prefix)
        layer = self.buffers[layer_idx]
        layer.allocate((len(tail), *self._model.head_shape), like=hidden)
        for row in range(len(tail)):
            layer.keys[row, :, : self.num_prefix] = rotate(keys[row], self._cos, self._sin).transpose(0, 1)
            layer.values[row, :, : self.num_prefix] = values[row].transpose(0, 1)
        return hidden

    def after_layer(self, hidden: torch.Tensor) -> None:
        """Keep a layer's last K outputs, [b, K, d]."""
        self.new_hidden.append(hidden[:, -self.num_new :])
