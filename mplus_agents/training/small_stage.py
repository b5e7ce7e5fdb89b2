"""The stages of the small recipe, in numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mplus_agents.training.objectives import RetrieverObjective

StepKind = Literal["repeat", "recall", "context", "write", "theta", "long_term"]


@dataclass(frozen=True, slots=True)
class SmallStage:
    """One stage of the small recipe.

    Attributes:
        kind: What a step is made of. `repeat`: copy repeated random tokens. `recall`: say facts again in another
            order. `context`: answer from text in the prompt. `write`: answer from θ without losses. `theta`: θ with
            random dropping. `long_term`: Θ as well.
        steps: How many.
        num_chunks: Chunks per step.
        num_questions: Questions per step.
        queue_steps: Earlier steps whose tokens stay in the world.
        context_every: Every so many steps reads from the prompt, so that this is not unlearned; 0: none.
        long_prompt_every: Every so many steps has much text in front of its questions; 0: none.
        most_context_chunks: Most chunks in a prompt of those steps.
        chat_share: Share of turns that need no memory: facts told, which are acknowledged, and questions whose answer
            waits in the window. `theta` and `long_term` only.
        retriever_weight: Weight of the retriever's loss.
        common_from: Share of common names and values at the first step; they are single tokens mostly.
        common_to: The same at the last step.
        hard_from: Share, at the first step, of chunks that are hard to keep (what they tell at their end, values before
            their persons, many numbers, their last fact asked for) and of steps that read more than K0 tokens of Θ.
        hard_to: The same at the last step.
        easy_steps: `recall`: steps with values next to their names, before sentences come in over as many more.
        objective: The retriever's objective.
        detach_hidden: Whether the retriever's loss stops at the hidden states.
    """

    kind: StepKind
    steps: int
    num_chunks: int = 96
    num_questions: int = 160
    queue_steps: int = 0
    context_every: int = 0
    long_prompt_every: int = 0
    most_context_chunks: int = 8
    chat_share: float = 0.0
    retriever_weight: float = 0.3
    common_from: float = 0.25
    common_to: float = 0.25
    hard_from: float = 1.0
    hard_to: float = 1.0
    easy_steps: int = 100
    objective: RetrieverObjective = "contrastive"
    detach_hidden: bool = True
