"""Documents to chunks and target: the rules of the published data pipeline, as functions of tokens and a generator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from mplus_agents.errors import ConfigError

# After the instruction "repeat", so many tokens count for nothing: no one can know where the repetition starts.
_UNKNOWN_START = 5


@dataclass(frozen=True, slots=True)
class ChunkRule:
    """How a document is cut.

    Attributes:
        min_tokens: Least tokens of a chunk (published: 16; 384 for long documents).
        max_tokens: Most tokens of a chunk (paper 4.4: 512).
        window: Most tokens of a target (paper 3.2.4: 2,048).
    """

    min_tokens: int = 16
    max_tokens: int = 512
    window: int = 2_048

    def __post_init__(self) -> None:
        if not 2 <= self.min_tokens <= self.max_tokens <= self.window:
            raise ConfigError(
                f"min_tokens, max_tokens and window are {self.min_tokens}, {self.max_tokens} and {self.window}; "
                "allowed: ascending, from 2"
            )


@dataclass(frozen=True, slots=True)
class Target:
    """What a read is trained on.

    Attributes:
        ids: Its tokens.
        num_masked: Tokens at its start that the loss leaves out.
    """

    ids: list[int]
    num_masked: int = 0


@dataclass(frozen=True, slots=True)
class Passage:
    """A document, cut.

    Attributes:
        contexts: Chunks to inject, in order; at least one.
        target: What follows them.
    """

    contexts: list[list[int]]
    target: Target


def split_lengths(num_tokens: int, rule: ChunkRule, rng: Random) -> list[int]:
    """Draw the lengths of consecutive chunks, each uniform between the rule's bounds.

    A last chunk that comes out too short is topped up with tokens from the chunks before it. No token is repeated, as
    the last chunk may be a target, which must not stand in its own context. Where it is too little for a chunk of its
    own, it goes into the chunks before it; where no cut keeps every chunk within the bounds, the first one is short.

    Args:
        num_tokens: Tokens of the document.
        rule: The bounds.
        rng: Where the lengths come from.

    Returns:
        Lengths that add up to `num_tokens`.
    """
    lengths = []
    left = num_tokens
    while left > 0:
        length = min(rng.randint(rule.min_tokens, rule.max_tokens), left)
        lengths.append(length)
        left -= length
    return _top_up(lengths, rule)


def _top_up(lengths: list[int], rule: ChunkRule) -> list[int]:
    *earlier, last = lengths
    if not earlier or last >= rule.min_tokens:
        return lengths
    missing = rule.min_tokens - last
    spare = sum(length - rule.min_tokens for length in earlier)
    room = sum(rule.max_tokens - length for length in earlier)
    if spare < missing and room >= last:  # not enough for a chunk of its own
        for place in reversed(range(len(earlier))):
            moved = min(last, rule.max_tokens - earlier[place])
            earlier[place] += moved
            last -= moved
        return earlier
    for place in reversed(range(len(earlier))):
        moved = min(missing, earlier[place] - rule.min_tokens)
        earlier[place] -= moved
        missing -= moved
    earlier[0] -= missing
    return [*earlier, rule.min_tokens]


def cut(tokens: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Cut tokens into consecutive pieces.

    Args:
        tokens: What to cut.
        lengths: Lengths that add up to the number of tokens.
    """
    pieces, start = [], 0
    for length in lengths:
        pieces.append(list(tokens[start : start + length]))
        start += length
    return pieces


def split_document(tokens: Sequence[int], rule: ChunkRule, rng: Random) -> Passage | None:
    """Cut a document into contexts and a target, as published.

    Args:
        tokens: The document, without special tokens.
        rule: The bounds.
        rng: Where the cuts come from.

    Returns:
        The passage; None if the document is too short to have both.
    """
    num_tokens = len(tokens)
    if num_tokens < 2 * rule.min_tokens:
        return None
    if num_tokens < rule.window:
        pieces = cut(tokens, split_lengths(num_tokens, rule, rng))
        return Passage(pieces[:-1], Target(pieces[-1])) if len(pieces) > 1 else None
    if num_tokens < rule.window + rule.min_tokens:
        first = rule.min_tokens
        return Passage([list(tokens[:first])], Target(list(tokens[first:])))
    num_target = rng.randint(rule.min_tokens, rule.window)
    num_context = num_tokens - num_target
    contexts = cut(tokens[:num_context], split_lengths(num_context, rule, rng))
    return Passage(contexts, Target(list(tokens[num_context:])))


def keep_last(passage: Passage, num_chunks: int) -> Passage:
    """Keep the chunks right before the target.

    Args:
        passage: A passage to complete.
        num_chunks: Most chunks to keep.
    """
    return Passage(passage.contexts[-num_chunks:], passage.target)


def repeat_first(passage: Passage, num_chunks: int, instruction: Sequence[int], rule: ChunkRule) -> Passage:
    """Keep the first chunks, and ask for them word by word in place of what follows.

    Args:
        passage: A passage.
        num_chunks: Most chunks to keep.
        instruction: Tokens of "Repeat: ".
        rule: Says how long a target may be.
    """
    contexts = passage.contexts[:num_chunks]
    text = [token for chunk in contexts for token in chunk]
    ids = [*instruction, *text][: rule.window]
    return Passage(contexts, Target(ids, min(len(instruction) + _UNKNOWN_START, len(ids) - 1)))


def whole_text(passage: Passage, rule: ChunkRule) -> Target:
    """Return the start of the document as one text, to be learnt without its contexts being injected.

    Args:
        passage: A passage.
        rule: Says how long a target may be.
    """
    text = [token for chunk in passage.contexts for token in chunk]
    return Target([*text, *passage.target.ids][: rule.window])
