"""An answer in the making: prompt read, tokens decoded one by one, text handed out in whole characters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
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
        chosen = _check_options(model, len(prompt.ids), max_new_tokens, options)
        decoded = (int(token) for token in _decode(model, memory, [prompt], chosen))
        first = next(decoded)

        def steps() -> Iterator[int]:
            yield first
            yield from decoded

        return cls(steps(), StreamDecoder(codec, (*prompt.stop, *stop)), len(prompt.ids), model.eos_token_ids)

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


def answer_all(
    model: MPlusModel,
    codec: TextCodec,
    memory: MemoryState,
    prompts: Sequence[Prompt],
    max_new_tokens: int | None,
    options: dict[str, Any],
    batch_size: int,
) -> list[Generation]:
    """Answer many prompts from one memory, those of equal length together.

    Without sampling the answers are those of `Answering.begin`. What is random is drawn anew for every prompt.

    Args:
        model: The model.
        codec: The tokenizer.
        memory: The agent's memory.
        prompts: The prompts.
        max_new_tokens: Most tokens of an answer; as many as fit, at most 128, if None.
        options: Fields of `GenerationOptions`, and `stop`.
        batch_size: Most prompts that are decoded together; each takes room for the whole θ.

    Raises:
        InvalidInputError: An option's value is not allowed.
        ConfigError: An option is unknown.
        PromptTooLongError: A prompt and its answer do not fit the generation window.
    """
    if type(batch_size) is not int or batch_size < 1:
        raise InvalidInputError("batch_size", batch_size, "a whole number from 1")
    stop = _check_stop(options.pop("stop", None))
    lengths = sorted({len(prompt.ids) for prompt in prompts})
    chosen = {length: _check_options(model, length, max_new_tokens, options) for length in lengths}
    answers: dict[int, Generation] = {}
    for length in lengths:
        places = [place for place, prompt in enumerate(prompts) if len(prompt.ids) == length]
        for start in range(0, len(places), batch_size):
            batch = places[start : start + batch_size]
            seed = chosen[length].seed  # every batch gets its own, so that no two prompts share a draw
            seeded = replace(chosen[length], seed=None if seed is None else (seed + batch[0]) % 2**63)
            steps = list(_decode(model, memory, [prompts[place] for place in batch], seeded))
            for place, ids in zip(batch, torch.stack(steps, dim=1).tolist(), strict=True):
                decoder = StreamDecoder(codec, (*prompts[place].stop, *stop))
                answers[place] = Answering(iter(ids), decoder, length, model.eos_token_ids).finish()
    return [answers[place] for place in range(len(prompts))]


def _check_options(
    model: MPlusModel, num_prompt: int, max_new_tokens: int | None, options: dict[str, Any]
) -> GenerationOptions:
    limit = model.config.max_prompt_tokens
    if max_new_tokens is None:
        max_new_tokens = max(1, min(_DEFAULT_NEW_TOKENS, limit - num_prompt))
    chosen = GenerationOptions.from_kwargs(max_new_tokens=max_new_tokens, **options)
    if num_prompt + chosen.max_new_tokens > limit:
        raise PromptTooLongError(
            f"prompt ({num_prompt:,} tokens) and max_new_tokens ({chosen.max_new_tokens:,}) exceed the generation "
            f"window of {limit:,} tokens; let the agent remember() long texts and ask about them"
        )
    return chosen


def _decode(
    model: MPlusModel, memory: MemoryState, prompts: Sequence[Prompt], options: GenerationOptions
) -> Iterator[torch.Tensor]:
    """Decode answers to prompts of equal length, [b] tokens at a time."""
    input_ids = torch.tensor([prompt.ids for prompt in prompts], device=model.device)
    query_mask = None
    if model.config.retrieval_query == "last_turn":
        query_mask = torch.tensor([prompt.is_query for prompt in prompts], device=model.device)
    return decode(model, input_ids, [memory] * len(prompts), options, query_mask)


def _check_stop(stop: object) -> tuple[str, ...]:
    if stop is None:
        return ()
    strings = [stop] if isinstance(stop, str) else stop
    if not isinstance(strings, (list, tuple)) or not all(isinstance(item, str) and item for item in strings):
        raise InvalidInputError("stop", stop, "a string, or a list of strings that are not empty")
    return tuple(strings)
