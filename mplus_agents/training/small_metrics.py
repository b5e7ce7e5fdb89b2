"""What the small recipe logs: which answers are exact, by kind of question, and the retriever's recall."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mplus_agents.language import USER
from mplus_agents.training.episodes import PromptBatch, Question
from mplus_agents.training.world import Histories


def exact_answers(logits: torch.Tensor, batch: PromptBatch) -> torch.Tensor:
    """Tell which answers greedy decoding would give: every token of theirs is the likeliest one.

    Args:
        logits: [t, vocab], where there are targets.
        batch: The prompts.

    Returns:
        [questions] float, 0 or 1, row by row.
    """
    is_target = batch.targets >= 0
    row = is_target.nonzero(as_tuple=True)[0]
    question = (row * 16 + batch.turns[is_target]).unique(return_inverse=True)[1]
    wrong = (logits.argmax(dim=-1) != batch.targets[is_target]).float()
    exact = (torch.zeros(int(question.max()) + 1, device=wrong.device).index_add_(0, question, wrong) == 0).float()
    return exact.cpu()


def accuracy_by_kind(
    exact: torch.Tensor, questions: Sequence[Question], holder: torch.Tensor, histories: Histories
) -> dict[str, float]:
    """Return the share of exact answers, by kind of question.

    Args:
        exact: [r], as `exact_answers` returns it.
        questions: The questions.
        holder: [r] int64, the chunk that holds each answer; −1 for none.
        histories: The past of every question.
    """
    updated = torch.tensor([len(question.answers) > 1 for question in questions])
    own = torch.tensor([question.key[0] == USER for question in questions])
    replied = torch.tensor([question.reply is not None for question in questions])
    known = (holder >= 0) & ~replied
    age = histories.ages.gather(1, holder.clamp(min=0)[:, None])[:, 0]
    far = known & (age >= 64)
    kinds = {
        "exact": known,
        "far": far,
        "updated": updated & known,
        "own": own & known,
        "unknown": (holder < 0) & ~replied,
        "chat": replied & (holder < 0),
        "window": replied & (holder >= 0),
    }
    return {name: exact[rows].mean().item() for name, rows in kinds.items() if rows.any()}


def retriever_recall(
    retrieved: Sequence[torch.Tensor], theta: torch.Tensor, positives: torch.Tensor, histories: Histories
) -> dict[str, float]:
    """Return the share of the wanted tokens in Θ that were retrieved, per layer.

    Args:
        retrieved: Per layer [r, K0], −1 for none.
        theta: [L, r, N], −1 for none.
        positives: [r, p] bool, the wanted tokens.
        histories: The past of every question.
    """
    metrics = {}
    num_tokens = positives.shape[1]
    for layer, tokens in enumerate(retrieved):
        in_theta = torch.zeros(len(tokens), num_tokens + 1, dtype=torch.bool)
        in_theta.scatter_(1, theta[layer] % (num_tokens + 1), True)
        wanted = positives & ~in_theta[:, :-1] & histories.has_long_term[:, None]
        found = (wanted.gather(1, tokens.clamp(min=0)) & (tokens >= 0)).sum()
        metrics[f"recall_{layer}"] = (found / wanted.sum().clamp(min=1)).item()
    return metrics
