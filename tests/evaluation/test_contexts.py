"""The end of a text in a prompt: as much as fits, and not a token less."""

from __future__ import annotations

import pytest

from mplus_agents.engine.prompts import Prompt, question_prompt
from mplus_agents.engine.text import TextCodec
from mplus_agents.evaluation.contexts import end_prompt
from mplus_agents.language.prose import packaged_prose
from tests.engine.engines import TINY

_QUESTION = "Where does Maya live?"


@pytest.mark.parametrize("limit", [60, 200, 1000])
def test_the_longest_end_that_fits_is_taken(limit: int) -> None:
    codec = TextCodec.from_pretrained(TINY)
    tokens = codec.encode(packaged_prose("novel")[:20_000])

    def make(context: str) -> Prompt:
        return question_prompt(codec, context, _QUESTION)

    prompt = end_prompt(codec, tokens, limit, make)
    assert len(prompt.ids) <= limit
    text = codec.decode(prompt.ids)
    assert _QUESTION in text
    lengths = [len(make(codec.decode(tokens[-count:])).ids) for count in range(limit - 40, limit)]
    assert len(prompt.ids) >= max(length for length in lengths if length <= limit) - 1  # cut words may join otherwise


def test_a_text_that_fits_is_there_as_a_whole_and_one_that_cannot_is_left_out() -> None:
    codec = TextCodec.from_pretrained(TINY)
    text = "Maya lives in Oslo."

    def make(context: str) -> Prompt:
        return question_prompt(codec, context, _QUESTION)

    assert end_prompt(codec, codec.encode(text), 100, make) == make(text)
    assert end_prompt(codec, codec.encode(text), len(make("").ids), make) == make("")
