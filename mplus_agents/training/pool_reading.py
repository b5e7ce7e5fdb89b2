"""What a read of the document recipe sees, and what its retriever is trained on.

Everything is projected when the layer asks for it, inside the layer's own forward. With gradient checkpointing that
happens twice; what is collected on the side is kept from the first time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from mplus_agents.model.families import layer_parts
from mplus_agents.training.network import LayerPrefix, TrainableMPlus
from mplus_agents.training.objectives import RetrieverLoss, RetrieverObjective
from mplus_agents.training.pool import MakeKeys, MemoryPool

_EPSILON = 1e-5  # of the published code


class FreshMemory:
    """The tokens of one write alone, with their gradient: [bos | new tokens] (paper, App. D, two-chunk).

    Args:
        network: The network.
        new: Per layer [1, K, d].
    """

    def __init__(self, network: TrainableMPlus, new: Sequence[torch.Tensor]) -> None:
        self.num_slots = 1 + new[0].shape[1]
        self._network = network
        self._new = new

    def prefix(self, layer_idx: int, layer: nn.Module, normed: torch.Tensor) -> LayerPrefix:
        """Return bos and the new tokens.

        Args:
            layer_idx: The layer.
            layer: The decoder layer.
            normed: [1, n, d].
        """
        new = self._new[layer_idx]
        rows = torch.cat([self._network.bos_embedding[layer_idx][None].to(new.dtype), new], dim=1)
        return self._network.project(layer, rows, torch.arange(self.num_slots, device=rows.device))


class SlotRetrieverLoss:
    """Trains the retriever to find the tokens of one document among all of θ (paper 3.2.2).

    Args:
        positives: [L, n] bool, the slots of θ that are to be found.
        objective: `bce`, the published one: ½ (mean −log s over positives + mean −log(1 − s) over all others), both
            means over the slots of all layers, an empty side counting 0. `contrastive`: see `RetrieverLoss`.
    """

    def __init__(self, positives: torch.Tensor, objective: RetrieverObjective = "bce") -> None:
        self._positives = positives
        self._objective = objective
        self._terms: dict[int, torch.Tensor] = {}

    def add(self, layer_idx: int, queries: torch.Tensor, keys: torch.Tensor) -> None:
        """Add a layer's part.

        Args:
            layer_idx: The layer.
            queries: [q, p].
            keys: [n, p], of θ.
        """
        positives = self._positives[layer_idx]
        scores = torch.sigmoid(queries.float() @ keys.float().T).mean(dim=0)
        if self._objective == "bce":
            hit = -(torch.log(scores + _EPSILON) * positives).sum()
            miss = -(torch.log(1 - scores + _EPSILON) * ~positives).sum()
            term = torch.stack([hit, miss])
        else:
            contrast = RetrieverLoss(positives[None], "contrastive")
            rows = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
            is_past = torch.ones_like(positives[None])
            contrast.add(queries, keys, rows, scores[None].detach(), is_past)
            term = contrast.total()
        self._terms.setdefault(layer_idx, term)

    def total(self) -> torch.Tensor:
        """Return the loss over all layers."""
        terms = torch.stack([self._terms[layer] for layer in sorted(self._terms)])
        if self._objective == "contrastive":
            return terms.mean()
        num_positive = self._positives.sum()
        counts = torch.stack([num_positive, self._positives.numel() - num_positive])
        return 0.5 * (terms.sum(dim=0) / counts.clamp(min=1)).sum()


class PoolMemory:
    """The carried memory: [bos | retrieved Θ, oldest first | θ].

    Args:
        network: The network.
        pool: What is carried.
        num_retrieved: K0; 0 to leave Θ out.
        loss: The retriever's loss; None for none.
        num_select: Tokens at the start of the text that query Θ; None for all of them (paper).
        num_loss: Tokens at its start that the loss takes as queries; None for all of them (paper).
    """

    def __init__(
        self,
        network: TrainableMPlus,
        pool: MemoryPool,
        num_retrieved: int = 0,
        loss: SlotRetrieverLoss | None = None,
        num_select: int | None = None,
        num_loss: int | None = None,
    ) -> None:
        self._network = network
        self._pool = pool
        self._num_retrieved = min(num_retrieved, pool.long_term_size)
        self._loss = loss
        self._num_select = num_select
        self._num_loss = num_loss
        self.num_slots = 1 + self._num_retrieved + pool.theta_size
        self.retrieved: dict[int, torch.Tensor] = {}  # per layer [K0], rows of Θ

    def prefix(self, layer_idx: int, layer: nn.Module, normed: torch.Tensor) -> LayerPrefix:
        """Return bos, retrieved tokens and θ, and collect the retriever's loss.

        Args:
            layer_idx: The layer.
            layer: The decoder layer.
            normed: [1, n, d].
        """
        theta = self._pool.theta[layer_idx]
        bos = self._network.bos_embedding[layer_idx]
        rows = [bos]
        if self._num_retrieved:
            chosen = self._retrieve(layer_idx, normed[0])
            rows.append(self._pool.long_hidden(layer_idx, chosen).to(bos.dtype))
        rows.append(theta.to(bos.dtype))
        if self._loss is not None:
            # Detached after the norm: neither hidden states nor norm are trained by this loss (paper 3.2.2).
            retriever = self._network.retriever(layer_idx)
            queries = retriever.queries(normed[0, : self._num_loss].detach())
            keys = retriever.keys(layer_parts(layer)[0](rows[-1]).detach())
            self._loss.add(layer_idx, queries, keys)
        places = torch.arange(self.num_slots, device=theta.device)
        return self._network.project(layer, torch.cat(rows)[None], places)

    @torch.no_grad()
    def _retrieve(self, layer_idx: int, normed: torch.Tensor) -> torch.Tensor:
        if layer_idx not in self.retrieved:
            queries = self._network.retriever(layer_idx).queries(normed[: self._num_select])
            keys = self._pool.long_keys[layer_idx]
            scores = torch.sigmoid(queries.to(keys.dtype) @ keys.T).mean(dim=0, dtype=torch.float32)
            rows = scores.topk(self._num_retrieved).indices
            births = self._pool.long_births[layer_idx]
            self.retrieved[layer_idx] = rows[births[rows].argsort()]
        return self.retrieved[layer_idx]

    def recalls(self, owner: int) -> dict[str, float]:
        """Return, for each layer that has any in Θ, the share of a document's tokens there that were retrieved.

        Args:
            owner: The document.
        """
        if not self.retrieved:
            return {}
        is_wanted = self._pool.long_owners == owner
        found = torch.stack([is_wanted[layer, rows].sum() for layer, rows in sorted(self.retrieved.items())])
        pairs = zip(found.tolist(), is_wanted.sum(dim=1).tolist(), strict=True)
        return {f"recall_{layer}": hits / wanted for layer, (hits, wanted) in enumerate(pairs) if wanted}


def key_maker(network: TrainableMPlus) -> MakeKeys:
    """Return what makes retrieval keys of dropped tokens.

    It runs outside of a layer's forward: if weights are sharded (FSDP), input norms and retrievers must stay whole.

    Args:
        network: The network.
    """

    def make_keys(layer_idx: int, hidden: torch.Tensor) -> torch.Tensor:
        normed = layer_parts(network.layers[layer_idx])[0](hidden.to(network.bos_embedding.dtype))
        return network.retriever(layer_idx).keys(normed)

    return make_keys


def masked_loss(network: TrainableMPlus, hidden: torch.Tensor, ids: torch.Tensor, num_masked: int) -> torch.Tensor:
    """Return the mean cross-entropy of the next tokens.

    Args:
        network: The network.
        hidden: [n − 1, d], what `TrainableMPlus.read` made of all tokens but the last.
        ids: [n] int64, all tokens.
        num_masked: Tokens at the start that are not predicted; the first never is.
    """
    first = max(1, num_masked)
    return functional.cross_entropy(network.logits(hidden[first - 1 :]).float(), ids[first:])
