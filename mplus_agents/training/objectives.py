"""What training minimizes: answers, and a retriever that finds what they need."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional

RetrieverObjective = Literal["bce", "contrastive"]
_EPSILON = 1e-5  # of the published code


class RetrieverLoss:
    """Collects the retriever's loss over the layers of one read.

    Args:
        positives: [r, p] bool, the tokens that answer each question; a row without any adds nothing.
        objective: `bce`, the published one: mean −log s over positives plus mean −log(1 − s) over negatives, s being
            the mean over query tokens of sigmoid(q·k). `contrastive`: positives against many other tokens in one
            softmax over logit(s), which trains the order that top-K0 retrieval depends on.
        detach_hidden: Whether the hidden states get no gradient from it (paper 3.2.2).
        num_hard: Negatives with the highest scores per question. Many of them and few others teach to score all alike
            (docs/decisions/0002-curriculum.md).
        num_random: Other negatives per question.
        others: [r, p] bool, the tokens that may be negatives; those of the past if None.
    """

    def __init__(
        self,
        positives: torch.Tensor,
        objective: RetrieverObjective = "contrastive",
        detach_hidden: bool = True,
        num_hard: int = 16,
        num_random: int = 512,
        others: torch.Tensor | None = None,
    ) -> None:
        self.detach_hidden = detach_hidden
        self._positives = positives
        self._objective = objective
        self._num_hard = num_hard
        self._num_random = num_random
        self._others = others
        self.terms: list[torch.Tensor] = []
        self.recalls: list[float] = []

    def add(
        self, queries: torch.Tensor, keys: torch.Tensor, rows: torch.Tensor, scores: torch.Tensor, is_past: torch.Tensor
    ) -> None:
        """Add a layer's loss.

        Args:
            queries: [q, p], of all query tokens.
            keys: [m, p], of all tokens of the pool.
            rows: [q] int64, whose each query is.
            scores: [r, m], as they are now, without gradient.
            is_past: [r, m] bool, which tokens are part of the past.
        """
        asked = self._positives.any(dim=1).nonzero()[:, 0]
        if not len(asked):
            return
        positives = self._positives[asked]
        negatives = (is_past if self._others is None else self._others)[asked] & ~positives
        if self._objective == "bce":
            picked, wanted = _bce_sample(positives, negatives, self._num_hard + self._num_random)
        else:
            picked, wanted = self._contrast_sample(positives, negatives, scores[asked])
        current = _scores_of(queries, keys, rows, asked, len(scores), picked)
        is_there = picked >= 0
        if self._objective == "bce":
            self.terms.append(_bce(current, wanted & is_there, ~wanted & is_there))
        else:
            self.terms.append(_contrast(current, wanted & is_there, is_there))

    def total(self) -> torch.Tensor:
        """Return the mean over layers."""
        return torch.stack(self.terms).mean() if self.terms else torch.zeros(())

    def _contrast_sample(
        self, positives: torch.Tensor, negatives: torch.Tensor, scores: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_positive = int(positives.sum(dim=1).max())
        found, places = positives.float().topk(num_positive, dim=1)
        own = places.masked_fill(found == 0, -1)
        top, hard = scores.masked_fill(~negatives, -1.0).topk(min(self._num_hard, scores.shape[1]), dim=1)
        hard = hard.masked_fill(top < 0, -1)
        other = torch.randint(scores.shape[1], (len(scores), self._num_random), device=scores.device)
        other = other.masked_fill(~negatives.gather(1, other), -1)
        picked = torch.cat([own, hard, other], dim=1)
        wanted = torch.zeros_like(picked, dtype=torch.bool)
        wanted[:, :num_positive] = True
        return picked, wanted


def _scores_of(
    queries: torch.Tensor,
    keys: torch.Tensor,
    rows: torch.Tensor,
    asked: torch.Tensor,
    num_rows: int,
    picked: torch.Tensor,
) -> torch.Tensor:
    """Mean over each row's query tokens of sigmoid(q·k), for the tokens picked for it: [a, s] with gradient."""
    place = torch.full((num_rows,), -1, device=rows.device)
    place[asked] = torch.arange(len(asked), device=rows.device)
    mine = place[rows]
    kept = (mine >= 0).nonzero()[:, 0]
    mine = mine[kept]
    counts = torch.bincount(mine, minlength=len(asked))
    width = int(counts.max())
    starts = counts.cumsum(0) - counts
    padded = queries.new_zeros((len(asked), width, queries.shape[1]))
    column = torch.arange(len(mine), device=rows.device) - starts[mine]  # queries of a row stand together
    padded = padded.index_put((mine, column), queries[kept])
    is_query = torch.arange(width, device=rows.device)[None] < counts[:, None]
    candidates = functional.embedding(picked.clamp(min=0), keys.float())
    products = torch.sigmoid(padded.float() @ candidates.transpose(1, 2))
    return (products * is_query[:, :, None]).sum(dim=1) / counts[:, None]


def _contrast(scores: torch.Tensor, positives: torch.Tensor, is_there: torch.Tensor) -> torch.Tensor:
    logits = torch.log(scores + _EPSILON) - torch.log1p(_EPSILON - scores.clamp(max=1.0))
    negatives = is_there & ~positives
    rest = logits.masked_fill(~negatives, -torch.inf).logsumexp(dim=1, keepdim=True)
    each = functional.softplus(rest - logits)  # −log of a positive's share against all negatives
    mean = (each * positives).sum(dim=1) / positives.sum(dim=1)
    best = functional.softplus(rest[:, 0] - logits.masked_fill(~positives, -torch.inf).logsumexp(dim=1))
    return (0.5 * (mean + best)).mean()


def _bce_sample(positives: torch.Tensor, negatives: torch.Tensor, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    num_positive = int(positives.sum(dim=1).max())
    found, places = positives.float().topk(num_positive, dim=1)
    own = places.masked_fill(found == 0, -1)
    keys = torch.rand(negatives.shape, device=negatives.device).masked_fill(~negatives, -1.0)
    drawn, other = keys.topk(min(num, negatives.shape[1]), dim=1)
    picked = torch.cat([own, other.masked_fill(drawn < 0, -1)], dim=1)
    wanted = torch.zeros_like(picked, dtype=torch.bool)
    wanted[:, :num_positive] = True
    return picked, wanted


def _bce(scores: torch.Tensor, positives: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
    hit = -(torch.log(scores + _EPSILON) * positives).sum(dim=1) / positives.sum(dim=1).clamp(min=1)
    miss = -(torch.log(1 - scores + _EPSILON) * negatives).sum(dim=1) / negatives.sum(dim=1).clamp(min=1)
    return (0.5 * (hit + miss)).mean()


def answer_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy.

    Args:
        logits: [t, vocab].
        targets: [t] int64.
    """
    return functional.cross_entropy(logits.float(), targets)
