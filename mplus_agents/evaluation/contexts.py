"""Text in the prompt: the baseline of a plain model, which sees the end of what does not fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mplus_agents.engine.prompts import Prompt
from mplus_agents.engine.text import TextCodec


def end_prompt(codec: TextCodec, tokens: Sequence[int], limit: int, make: Callable[[str], Prompt]) -> Prompt:
    """Return the longest prompt whose context is the end of a text.

    Args:
        codec: The tokenizer.
        tokens: The text.
        limit: Most tokens of the prompt.
        make: Makes a prompt of a context.
    """
    num_tokens = limit - len(make("").ids)
    while num_tokens > 0:
        prompt = make(codec.decode(list(tokens[-num_tokens:])))
        if len(prompt.ids) <= limit:
            return prompt
        num_tokens -= len(prompt.ids) - limit
    return make("")
