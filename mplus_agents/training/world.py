"""The batch as the world: every chunk of a step is a distractor to the questions about all others.

No memory is simulated chunk by chunk. Each question draws its own history: an order of the chunks of this step and of
a queue of earlier ones. From it follow θ with the losses of random dropping, drawn per layer, and a Θ that holds
all the rest. What such a read sees is what a real agent's read sees after as many injections.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from mplus_agents.config import MemoryConfig
from mplus_agents.model.families import layer_parts, project_key_value
from mplus_agents.training.network import LayerPrefix, TrainableMPlus, rotate
from mplus_agents.training.objectives import RetrieverLoss

# A token's chance to be in θ after 8 N/K further injections is e^-8.
_OLDEST_IN_THETA = 8


@dataclass(frozen=True, slots=True)
class Histories:
    """The past of every question.

    Attributes:
        ages: [r, c] int64, injections since each chunk's own; −1 if it is not part of this past.
        has_long_term: [r] bool, whether Θ is read.
    """

    ages: torch.Tensor
    has_long_term: torch.Tensor


def draw_histories(
    allowed: torch.Tensor, targets: torch.Tensor, target_ages: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """Draw an order of chunks for every question.

    Args:
        allowed: [r, c] bool, chunks that may be part of the past.
        targets: [r] int64, the chunk asked about, or −1 if it may stand anywhere.
        target_ages: [r] int64, its wanted age; less than its length.
        lengths: [r] int64, most injections of the past.

    Returns:
        [r, c] int64 ages, −1 for a chunk outside.
    """
    num_rows, num_chunks = allowed.shape
    rows = torch.arange(num_rows)
    has_target = targets >= 0
    keys = torch.rand(num_rows, num_chunks)
    keys[~allowed] = 2.0
    keys[rows[has_target], targets[has_target]] = 3.0  # out of the draw of the others
    order = keys.argsort(dim=1)
    ages = torch.empty_like(order).scatter_(1, order, torch.arange(num_chunks).expand(num_rows, -1))
    wanted = torch.where(has_target, target_ages, torch.full_like(target_ages, num_chunks))[:, None]
    ages = torch.where(ages >= wanted, ages + 1, ages)
    ages[rows[has_target], targets[has_target]] = target_ages[has_target]
    is_outside = ~allowed | (ages >= lengths[:, None])
    is_outside[rows[has_target], targets[has_target]] = False
    return ages.masked_fill(is_outside, -1)


def draw_theta(ages: torch.Tensor, num_layers: int, memory: MemoryConfig) -> torch.Tensor:
    """Draw what random dropping left of a past in θ, for each layer by itself.

    Each token of age a was at risk in every injection since its own in which θ was full already; it survived one with
    probability 1 − K/N. Exponential lifetimes stand for these draws, and the N longest ones stay.

    Args:
        ages: [r, c] int64, −1 for a chunk outside.
        num_layers: L.
        memory: Shape of the memory.

    Returns:
        [L, r, N] int64, tokens (chunk · K + slot), oldest first; −1 for an empty slot, empty ones in front.
    """
    num_slots, per_chunk = memory.max_short_term, memory.tokens_per_injection
    num_rows = len(ages)
    horizon = min(int(ages.max()) + 1, _OLDEST_IN_THETA * num_slots // per_chunk)
    chunk_of_age = ages.new_full((num_rows, horizon), -1)  # [r, age]
    row, chunk = ((ages >= 0) & (ages < horizon)).nonzero(as_tuple=True)
    chunk_of_age[row, ages[row, chunk]] = chunk
    lengths = ages.max(dim=1).values + 1
    at_risk = torch.minimum(torch.arange(horizon)[None], (lengths[:, None] - num_slots // per_chunk).clamp(min=0))
    rate = -torch.log(torch.tensor(1 - per_chunk / num_slots))
    left = torch.empty(num_layers, num_rows, horizon, per_chunk).exponential_() - at_risk[None, :, :, None] * rate
    left[:, :, :1] = torch.inf  # what was written last is there as a whole
    left.masked_fill_((chunk_of_age < 0)[None, :, :, None], -torch.inf)
    left = left.flatten(2)
    num_kept = min(num_slots, left.shape[2])
    kept, places = left.topk(num_kept, dim=2)
    age = places // per_chunk
    token = chunk_of_age[None].expand(num_layers, -1, -1).gather(2, age) * per_chunk + places % per_chunk
    token.masked_fill_(kept == -torch.inf, -1)
    entry = places % per_chunk - age * per_chunk  # grows with the birth
    entry.masked_fill_(kept == -torch.inf, -(10**9))
    token = token.gather(2, entry.argsort(dim=2))
    return functional.pad(token, (num_slots - num_kept, 0), value=-1)


class WorldMemory:
    """One memory per question, made of the tokens of one pool.

    Args:
        network: The network.
        pool: Per layer [p, d], all memory tokens of the world, chunk by chunk.
        histories: The past of every question.
        theta: [L, r, N] as `draw_theta` returns it.
        is_query: [r, n] bool, the prompt tokens that query Θ.
        num_retrieved: K0.
        loss: Collects the retriever's loss; None to leave it out.
        helped: [r, p] bool, tokens that are retrieved whatever their score; none if None.
    """

    def __init__(
        self,
        network: TrainableMPlus,
        pool: list[torch.Tensor],
        histories: Histories,
        theta: torch.Tensor,
        is_query: torch.Tensor,
        num_retrieved: int,
        loss: RetrieverLoss | None = None,
        helped: torch.Tensor | None = None,
    ) -> None:
        self._network = network
        device = pool[0].device
        theta, is_query, past = theta.to(device), is_query.to(device), histories.ages.to(device)
        self._pool = pool
        self._theta = theta
        self._num_retrieved = num_retrieved
        self._loss = loss
        self._helped = None if helped is None else helped.to(device)
        self.num_slots = 1 + num_retrieved + theta.shape[2]
        per_chunk = network.config.memory.tokens_per_injection
        ages = past.repeat_interleave(per_chunk, dim=1)
        self._is_past = ages >= 0  # [r, p]
        slots = torch.arange(per_chunk, device=device).repeat(past.shape[1])
        self._entry = slots - ages * per_chunk  # grows with the birth
        self._has_long_term = histories.has_long_term.to(device)
        self._row, self._column = is_query.nonzero(as_tuple=True)
        self._num_queries = is_query.sum(dim=1)
        self.retrieved: list[torch.Tensor] = []  # per layer [r, K0], −1 for none
        places = torch.arange(self.num_slots, device=device)
        self._cos, self._sin = network.rope(places[None])

    def prefix(self, layer_idx: int, layer: nn.Module, normed: torch.Tensor) -> LayerPrefix:
        """Return bos, the retrieved tokens of Θ, oldest first, and θ; empty slots in front.

        Args:
            layer_idx: The layer.
            layer: The decoder layer.
            normed: [r, n, d].
        """
        pool = self._pool[layer_idx]
        rows = torch.cat([pool, self._network.bos_embedding[layer_idx].to(pool.dtype)])
        keys, values = project_key_value(layer, rows)
        theta = self._theta[layer_idx]
        if self._num_retrieved or self._loss is not None:  # the retriever may learn before it is used
            tokens = torch.cat([self._retrieve(layer_idx, layer, normed, theta), theta], dim=1)
        else:
            tokens = theta
        is_taken = tokens >= 0
        order = is_taken.long().argsort(dim=1, stable=True)
        tokens = tokens.gather(1, order)
        num_empty = (~is_taken).sum(dim=1)
        # bos stands right before the first token that is there
        tokens = functional.pad(tokens, (1, 0), value=-1)
        tokens[torch.arange(len(tokens), device=tokens.device), num_empty] = len(pool)
        mask = tokens >= 0
        heads, width = keys.shape[1:]
        table = torch.cat([keys.flatten(1), values.flatten(1)], dim=1)
        picked = functional.embedding(tokens.clamp(min=0), table)
        picked_keys, picked_values = picked.view(*tokens.shape, 2, heads, width).unbind(2)
        rotated = rotate(picked_keys, self._cos, self._sin)
        return LayerPrefix(rotated.transpose(1, 2), picked_values.transpose(1, 2), mask)

    def _retrieve(self, layer_idx: int, layer: nn.Module, normed: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        """[r, K0] tokens of Θ, oldest first, −1 for none."""
        retriever = self._network.retriever(layer_idx)
        pool = self._pool[layer_idx]
        asked = normed[self._row, self._column]
        stored = layer_parts(layer)[0](pool)
        if self._loss is not None and self._loss.detach_hidden:
            asked, stored = asked.detach(), stored.detach()
        queries, keys = retriever.queries(asked), retriever.keys(stored)
        with torch.no_grad():
            scores = self.scores(queries, keys)
            is_in_theta = torch.zeros(len(theta), len(pool) + 1, dtype=torch.bool, device=pool.device)
            is_in_theta.scatter_(1, theta.clamp(min=-1) % (len(pool) + 1), True)
            is_candidate = self._is_past & ~is_in_theta[:, : len(pool)] & self._has_long_term[:, None]
            ranked = scores if self._helped is None else scores + 2.0 * self._helped  # a score is at most 1
            top, tokens = ranked.masked_fill(~is_candidate, -1.0).topk(self._num_retrieved, dim=1)
            entry = self._entry.gather(1, tokens).masked_fill(top < 0, -(10**9))
            tokens = tokens.masked_fill(top < 0, -1).gather(1, entry.argsort(dim=1))
        self.retrieved.append(tokens)
        if self._loss is not None:
            self._loss.add(queries, keys, self._row, scores, self._is_past)
        return tokens

    def scores(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Return the mean over a row's query tokens of sigmoid(q·k), [r, p] in float32."""
        summed = torch.zeros(len(self._num_queries), len(keys), device=keys.device)
        summed.index_add_(0, self._row, torch.sigmoid(queries @ keys.T).float())
        return summed / self._num_queries[:, None]
