"""An answer in the making: prompt read, tokens decoded one by one, text handed out in whole characters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch

from mplus_agents.engine.prompts import Prompt
from mplus_agents.engine.records import Generation
from mplus_agents.engine.text import StreamDecoder, TextCodec
from mplus_agents.errors import InvalidInputError, PromptTooLongError
from mplus_agents.memory import MemoryState
from mplus_agents.model import GenerationOptions, MPlusModel
from mplus_agents.model.decoding import decode

_DEFAULT_NEW_TOKENS = 128


class Answering:
    """Iterates over pieces of an answer; made by `begin`, while the caller holds the agent.

    The memory is read when it is made. Decoding afterwards works on the call's own cache, so the agent is free for
    other calls meanwhile.

    Args:
        steps: The tokens, the first one already decoded.
        decoder: Turns them into text.
        num_prompt_tokens: Tokens of the prompt.
        end_token_ids: Tokens that end the answer.
    """

    def __init__(
        self, steps: Iterator[int], decoder: StreamDecoder, num_prompt_tokens: int, end_token_ids: Sequence[int]
    ) -> None:
        self._steps = steps
        self._decoder = decoder
        self._end_token_ids = set(end_token_ids)
        self._has_ended = False
        self.num_prompt_tokens = num_prompt_tokens
        self.text = ""
        self._white_space = ""

    @classmethod
    def begin(
        cls,
        model: MPlusModel,
        codec: TextCodec,
        memory: MemoryState,
        prompt: Prompt,
        max_new_tokens: int | None,
        options: dict[str, Any],
    ) -> Answering:
        """Check the options, read the prompt and decode the first token.

        Args:
            model: The model.
            codec: The tokenizer.
            memory: The agent's memory.
            prompt: The prompt.
            max_new_tokens: Most tokens of the answer; as many as fit, at most 128, if None.
            options: Fields of `GenerationOptions`, and `stop`.

        Raises:
            InvalidInputError: An option's value is not allowed.
            ConfigError: An option is unknown.
            PromptTooLongError: Prompt and answer do not fit the generation window.
        """
        stop = _check_stop(options.pop("stop", None))
        limit, num_prompt = model.config.max_prompt_tokens, len(prompt.ids)
        if max_new_tokens is None:
            max_new_tokens = max(1, min(_DEFAULT_NEW_TOKENS, limit - num_prompt))
        chosen = GenerationOptions.from_kwargs(max_new_tokens=max_new_tokens, **options)
        if num_prompt + chosen.max_new_tokens > limit:
            raise PromptTooLongError(
                f"prompt ({num_prompt:,} tokens) and max_new_tokens ({chosen.max_new_tokens:,}) exceed the generation "
                f"window of {limit:,} tokens; let the agent remember() long texts and ask about them"
            )
        input_ids = torch.tensor([prompt.ids], device=model.device)
        query_mask = None
        if model.config.retrieval_query == "last_turn":
            query_mask = torch.tensor([prompt.is_query], device=model.device)
        decoded = (int(token) for token in decode(model, input_ids, [memory], chosen, query_mask))
        first = next(decoded)

        def steps() -> Iterator[int]:
            yield first
            yield from decoded

        return cls(steps(), StreamDecoder(codec, (*prompt.stop, *stop)), num_prompt, model.eos_token_ids)

    def __iter__(self) -> Iterator[str]:
        for token_id in self._steps:
            if token_id in self._end_token_ids:
                self._has_ended = True
                break
            if piece := self._take(self._decoder.push(token_id)):
                yield piece
            if self._decoder.is_stopped:
                break
        if piece := self._take(self._decoder.finish()):
            yield piece

    def finish(self) -> Generation:
        """Decode to the end and return the whole answer."""
        for _ in self:
            pass
        return Generation(self.text, self.num_prompt_tokens, self.num_new_tokens, self.finish_reason)

    @property
    def num_new_tokens(self) -> int:
        """Tokens decoded so far, the end token not counted."""
        return self._decoder.num_tokens

    @property
    def finish_reason(self) -> Literal["stop", "length"]:
        """Why the answer ended."""
        return "stop" if self._has_ended or self._decoder.is_stopped else "length"

    def _take(self, piece: str) -> str:
        """Hold back white space until something follows it: an answer has none at its ends."""
        piece = self._white_space + piece
        if not self.text:
            piece = piece.lstrip()
        kept = piece.rstrip()
        self._white_space = piece[len(kept) :]
        self.text += kept
        return kept


def _check_stop(stop: object) -> tuple[str, ...]:
    if stop is None:
        return ()
    strings = [stop] if isinstance(stop, str) else stop
    if not isinstance(strings, (list, tuple)) or not all(isinstance(item, str) and item for item in strings):
        raise InvalidInputError("stop", stop, "a string, or a list of strings that are not empty")
    return tuple(strings)
