"""The step loop that decodes an answer over a filled cache, with transformers' own logits processors.

`generate` of transformers is not used: it would crop and re-feed a prompt that partly lives in the memory's slots.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mplus_agents.config import LONG_TERM_USES, LongTermUse, reject_unknown_keys
from mplus_agents.errors import InvalidInputError
from mplus_agents.model.cache import ReadCache

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mplus_agents.memory import MemoryState
    from mplus_agents.model.mplus import MPlusModel


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """How an answer is decoded.

    Attributes:
        max_new_tokens: Most tokens to decode.
        do_sample: Draw from the distribution; otherwise take the likeliest token.
        temperature: Divides the logits when sampling, above 0.
        top_k: Sample among this many likeliest tokens; all if None.
        top_p: Sample among the likeliest tokens that hold this probability together, above 0, at most 1.
        repetition_penalty: Divides the logits of tokens that the prompt or the answer already holds; 1 does nothing.
        seed: Seed of the sampling and of reading Θ at random; if None, a fresh one from the operating system for the
            sampling, and 0 for the reading.
        long_term: How Θ is read: the tokens `retrieved` by the prompt, as many at `random`, or none (`off`); what Θ and
            the retriever add shows in the difference.
    """

    max_new_tokens: int = 16
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    long_term: LongTermUse = "retrieved"

    def __post_init__(self) -> None:
        if type(self.max_new_tokens) is not int or self.max_new_tokens < 1:
            raise InvalidInputError("max_new_tokens", self.max_new_tokens, "a whole number from 1")
        if type(self.do_sample) is not bool:
            raise InvalidInputError("do_sample", self.do_sample, "true or false")
        if not (_is_number(self.temperature) and self.temperature > 0):
            raise InvalidInputError("temperature", self.temperature, "a number above 0 (do_sample=False for greedy)")
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise InvalidInputError("top_k", self.top_k, "a whole number from 1, or None")
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise InvalidInputError("top_p", self.top_p, "a number above 0, at most 1")
        if not (_is_number(self.repetition_penalty) and self.repetition_penalty > 0):
            raise InvalidInputError("repetition_penalty", self.repetition_penalty, "a number above 0")
        if self.seed is not None and (type(self.seed) is not int or not 0 <= self.seed < 2**63):
            raise InvalidInputError("seed", self.seed, "a whole number from 0 to 2**63 - 1, or None")
        check_long_term(self.long_term)

    @classmethod
    def from_kwargs(cls, **options: Any) -> Self:
        """Build options from keyword arguments.

        Args:
            **options: Field names and values.

        Raises:
            ConfigError: An option is not supported; the message names it.
            InvalidInputError: A value is not allowed.
        """
        reject_unknown_keys(options, {field.name for field in fields(cls)}, "generation options")
        return cls(**options)

    def processors(self) -> LogitsProcessorList:
        """Return transformers' processors for these options."""
        chosen = LogitsProcessorList()
        if self.repetition_penalty != 1.0:
            chosen.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.do_sample:
            if self.temperature != 1.0:
                chosen.append(TemperatureLogitsWarper(self.temperature))
            if self.top_k is not None:
                chosen.append(TopKLogitsWarper(self.top_k))
            if self.top_p < 1.0:
                chosen.append(TopPLogitsWarper(self.top_p))
        return chosen


def check_long_term(long_term: object) -> None:
    """Check how Θ shall be read.

    Args:
        long_term: What was given.

    Raises:
        InvalidInputError: It is none of the known ways.
    """
    if long_term not in LONG_TERM_USES:
        raise InvalidInputError("long_term", long_term, ", ".join(LONG_TERM_USES))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@torch.no_grad()
def decode(
    model: MPlusModel,
    input_ids: torch.Tensor,
    memories: Sequence[MemoryState],
    options: GenerationOptions,
    query_mask: torch.Tensor | None = None,
) -> Iterator[torch.Tensor]:
    """Decode step by step; the memories are read once, with the prompt.

    Args:
        model: The model.
        input_ids: [b, n] int64, the prompts.
        memories: One memory per row.
        options: How to decode.
        query_mask: [b, n] bool, the prompt tokens that query Θ; all if None.

    Yields:
        [b] int64, the next token of every row; rows that have ended yield the end token. Stops when all have ended.
    """
    cache = ReadCache(
        model,
        memories,
        input_ids.shape[1],
        query_mask,
        options.max_new_tokens,
        options.long_term,
        options.seed or 0,
    )
    processors = options.processors()
    generator = torch.Generator(device=input_ids.device)
    generator.seed() if options.seed is None else generator.manual_seed(options.seed)
    ends = torch.tensor(model.eos_token_ids, device=input_ids.device)
    ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    sequence, step_ids = input_ids, input_ids
    for _ in range(options.max_new_tokens):
        logits = model.forward_cached(step_ids, cache, logits_to_keep=1)[:, -1].float()
        scores = processors(cast(torch.LongTensor, sequence), cast(torch.FloatTensor, logits))
        if options.do_sample:
            chosen = torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]
        else:
            chosen = scores.argmax(-1)
        if len(ends):
            chosen = torch.where(ended, ends[0], chosen)
            ended = ended | torch.isin(chosen, ends)
        yield chosen
        if ended.all():
            return
        step_ids = chosen[:, None]
        sequence = torch.cat([sequence, step_ids], dim=1)
