from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mplus_agents.errors import ConfigError
from mplus_agents.training.chunking import (
    ChunkRule,
    Passage,
    Target,
    cut,
    keep_last,
    repeat_first,
    split_document,
    split_lengths,
    whole_text,
)

PUBLISHED = ChunkRule()
LONG = ChunkRule(min_tokens=384)
rules = st.tuples(st.integers(2, 12), st.integers(0, 20), st.integers(0, 40)).map(
    lambda sizes: ChunkRule(sizes[0], sizes[0] + sizes[1], sizes[0] + sizes[1] + sizes[2])
)


@given(st.integers(1, 300), rules, st.integers(0, 10_000))
def test_lengths_add_up_and_keep_to_the_bounds_where_any_cut_can(num_tokens: int, rule: ChunkRule, seed: int) -> None:
    lengths = split_lengths(num_tokens, rule, Random(seed))
    assert sum(lengths) == num_tokens
    assert all(1 <= length <= rule.max_tokens for length in lengths)
    is_possible = any(k * rule.min_tokens <= num_tokens <= k * rule.max_tokens for k in range(1, num_tokens + 1))
    assert (min(lengths) >= rule.min_tokens) == is_possible
    assert all(length >= rule.min_tokens for length in lengths[1:])


def test_lengths_are_uniform_between_the_bounds() -> None:
    rng = Random(0)
    drawn = [length for _ in range(300) for length in split_lengths(50_000, PUBLISHED, rng)[:-2]]
    num_bins, width = 7, 71
    counts = [sum(16 + i * width <= length < 16 + (i + 1) * width for length in drawn) for i in range(num_bins)]
    assert sum(counts) == len(drawn)
    wanted = len(drawn) / num_bins
    assert sum((count - wanted) ** 2 / wanted for count in counts) < 22.5  # chi-square, 6 degrees of freedom: p = 0.001


def test_a_short_last_chunk_takes_tokens_from_the_one_before() -> None:
    rule = ChunkRule(10, 20, 100)
    # of all draws: those whose first chunks leave less than 10 of 50
    for seed in range(50):
        lengths = split_lengths(50, rule, Random(seed))
        rng = Random(seed)
        drawn: list[int] = []
        while sum(drawn) < 50:
            drawn.append(rng.randint(10, 20))
        drawn[-1] -= sum(drawn) - 50
        if drawn[-1] >= 10:
            assert lengths == drawn
        elif drawn[-2] + drawn[-1] >= 20:
            assert lengths == [*drawn[:-2], drawn[-2] + drawn[-1] - 10, 10]


def test_no_token_of_a_document_is_lost_or_repeated() -> None:
    for num_tokens in (600, 1_500, 2_047, 2_048, 2_063, 2_064, 9_000):
        tokens = list(range(num_tokens))
        passage = split_document(tokens, PUBLISHED, Random(num_tokens))
        assert passage is not None
        pieces = [*passage.contexts, passage.target.ids]
        assert [token for piece in pieces for token in piece] == tokens
        assert passage.target.num_masked == 0


def test_which_part_is_the_target() -> None:
    lengths = split_lengths(1_000, PUBLISHED, Random(3))
    short = split_document(list(range(1_000)), PUBLISHED, Random(3))
    assert short is not None
    assert [*map(len, short.contexts), len(short.target.ids)] == lengths  # the last chunk
    middle = split_document(list(range(2_050)), PUBLISHED, Random(3))
    assert middle == Passage([list(range(16))], Target(list(range(16, 2_050))))
    sizes = set()
    for seed in range(200):
        long = split_document(list(range(6_000)), LONG, Random(seed))
        assert long is not None
        sizes.add(len(long.target.ids))
        assert 384 <= len(long.target.ids) <= 2_048
        assert all(384 <= len(chunk) <= 512 for chunk in long.contexts)
    assert min(sizes) < 500
    assert max(sizes) > 1_900


@pytest.mark.parametrize("num_tokens", [0, 1, 15, 16, 31])
def test_a_document_too_short_for_context_and_target_is_none(num_tokens: int) -> None:
    assert split_document(list(range(num_tokens)), PUBLISHED, Random(0)) is None


def test_completion_keeps_the_last_chunks_and_repetition_the_first() -> None:
    passage = Passage([[1, 2], [3, 4, 5], [6, 7, 8, 9, 10, 11]], Target([12, 13]))
    rule = ChunkRule(2, 6, 12)
    assert keep_last(passage, 2) == Passage([[3, 4, 5], [6, 7, 8, 9, 10, 11]], Target([12, 13]))
    assert keep_last(passage, 9) == passage
    repeated = repeat_first(passage, 2, [90, 91], rule)
    assert repeated == Passage([[1, 2], [3, 4, 5]], Target([90, 91, 1, 2, 3, 4, 5], num_masked=6))
    assert repeat_first(passage, 9, [90, 91], rule).target == Target([90, 91, *range(1, 11)], num_masked=7)
    assert whole_text(passage, rule).ids == list(range(1, 13))
    assert whole_text(passage, ChunkRule(2, 4, 5)) == Target([1, 2, 3, 4, 5])


def test_cut() -> None:
    assert cut([1, 2, 3, 4], [1, 3]) == [[1], [2, 3, 4]]


@pytest.mark.parametrize("sizes", [(1, 5, 9), (6, 5, 9), (2, 10, 9)])
def test_rules_that_cannot_be_kept_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="min_tokens, max_tokens and window"):
        ChunkRule(*sizes)
