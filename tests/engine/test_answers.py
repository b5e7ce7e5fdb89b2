"""Answers: what is written and what is not, streams and whole answers, stop strings and end tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from mplus_agents import Agent, MPlus
from mplus_agents.engine import Document, Generation, Message
from mplus_agents.engine.text import TextCodec
from mplus_agents.model import MPlusModel, decoding
from tests.engine.engines import (
    check_accounts,
    engine,
    log_of,
    prose,
    reopened,
    small,
    state_of,
    tiny,
    tiny_codec,
    turn_of,
    with_version,
)
from tests.engine.test_prompts import CHATML


@pytest.fixture
def filled(tmp_path: Path) -> Iterator[Agent]:
    with engine(tmp_path / "filled.db", small()) as mplus:
        agent = mplus.agent("a")
        agent.remember([Document(prose(500), "book"), Message("user", "Maya lives in Oslo.")])
        yield agent


def said_before(ids: torch.Tensor, end: int = 0) -> str:
    return tiny_codec().decode(ids[0, : ids.shape[1] - end].tolist())


def prompts_of(model: MPlusModel) -> Any:
    """Watch what the model is given to read."""
    return mock.patch.object(model, "forward_cached", side_effect=model.forward_cached)


def test_reading_writes_nothing(filled: Agent) -> None:
    before = with_version(filled)
    for _ in range(2):
        filled.ask("Where does Maya live?", max_new_tokens=5)
        filled.ask("Where?", max_new_tokens=5, do_sample=True, seed=3, temperature=0.7, top_k=5, top_p=0.9)
        filled.generate([Message("user", "Where?")], max_new_tokens=5)
        list(filled.begin_generation([Message("user", "Where?")], max_new_tokens=5))
        assert with_version(filled) == before
    assert reopened(filled) == before


def test_asking_twice_gives_the_same_answer(filled: Agent) -> None:
    first = filled.ask("Where?", max_new_tokens=20)
    assert first == filled.ask("Where?", max_new_tokens=20)
    options = {"do_sample": True, "temperature": 5.0, "max_new_tokens": 20}
    assert filled.ask("Where?", seed=1, **options) == filled.ask("Where?", seed=1, **options)  # type: ignore[arg-type]
    assert filled.ask("Where?", seed=1, **options) != filled.ask("Where?", seed=2, **options)  # type: ignore[arg-type]


def test_ask_shows_the_window_and_generate_does_not(filled: Agent) -> None:
    with prompts_of(small()) as read:
        filled.ask("Where?", max_new_tokens=1)
        filled.chat("Where?", max_new_tokens=1)
        filled.generate([Message("user", "Where?")], max_new_tokens=1)
    asked, chatted, generated = (said_before(call.args[0]) for call in read.call_args_list)
    assert asked.endswith("User: Maya lives in Oslo.\n\nQuestion: Where?\nAnswer:")
    assert chatted.endswith("User: Maya lives in Oslo.\nUser: Where?\nAssistant:")
    assert generated == "User: Where?\nAssistant:"


def test_chat_remembers_both_turns_once(filled: Agent) -> None:
    before = filled.window
    answer = filled.chat("Where does Maya live?", max_new_tokens=8)
    assert answer.strip()
    assert filled.window == [*before, Message("user", "Where does Maya live?"), Message("assistant", answer)]
    assert [event.role for event in log_of(filled)][-2:] == ["user", "assistant"]
    check_accounts(filled)
    assert with_version(filled) == reopened(filled)


def test_a_turn_of_another_speaker_may_be_answered(filled: Agent) -> None:
    answer = filled.chat(Message("tool", "Oslo"), max_new_tokens=4)
    assert filled.window[-2:] == [Message("tool", "Oslo"), Message("assistant", answer)]
    filled.chat({"role": "user", "content": "And?"}, max_new_tokens=4)  # type: ignore[arg-type]
    assert filled.window[-2] == Message("user", "And?")


def test_an_empty_answer_is_not_remembered(filled: Agent) -> None:
    first = filled.generate([Message("user", "Where?")], max_new_tokens=1)
    with mock.patch.object(MPlusModel, "eos_token_ids", list(range(1024))):
        assert filled.chat("Where?", max_new_tokens=5) == ""
        nothing = filled.generate([Message("user", "Where?")], max_new_tokens=5)
    assert filled.window[-1] == Message("user", "Where?")
    assert (nothing.text, nothing.num_new_tokens, nothing.finish_reason) == ("", 0, "stop")
    assert (first.num_new_tokens, first.finish_reason) == (1, "length")


@pytest.mark.parametrize("num_pieces", [0, 1, 3])
def test_a_stream_closed_early_remembers_nothing(filled: Agent, num_pieces: int) -> None:
    before = with_version(filled)
    stream = filled.stream("Where does Maya live?", max_new_tokens=30)
    for _ in range(num_pieces):
        next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert with_version(filled) == before == reopened(filled)


def test_a_stream_that_is_only_begun_holds_nothing_up(filled: Agent) -> None:
    stream = filled.stream("Where does Maya live?", max_new_tokens=30)
    next(stream)
    filled.remember(turn_of(128))
    filled.ask("Where?", max_new_tokens=1)
    rest = list(stream)
    assert rest
    assert filled.window[-2] == Message("user", "Where does Maya live?")
    check_accounts(filled)


def test_a_stream_is_not_changed_by_what_is_remembered_meanwhile(tmp_path: Path) -> None:
    answers = []
    for has_writer in (False, True):
        with engine(tmp_path / f"{has_writer}.db", small()) as mplus:
            agent = mplus.agent("a")
            agent.remember(prose(500), source_id="book")
            pieces = []
            for number, piece in enumerate(agent.stream("Where?", max_new_tokens=30)):
                pieces.append(piece)
                if has_writer and number % 4 == 0:
                    agent.remember(prose(150, number), source_id=f"{number}")
            answers.append("".join(pieces))
    assert answers[0] == answers[1]


def test_pieces_of_a_stream_are_the_answer_of_chat(tmp_path: Path) -> None:
    states, answers = [], []
    for kind in ("chat", "stream", "generate"):
        with engine(tmp_path / f"{kind}.db", small()) as mplus:
            agent = mplus.agent("a")
            agent.remember(prose(500), source_id="book")
            agent.clear_window()
            if kind == "chat":
                answers.append(agent.chat("Where does Maya live?", max_new_tokens=40))
            elif kind == "stream":
                pieces = list(agent.stream("Where does Maya live?", max_new_tokens=40))
                assert len(pieces) > 1
                assert all(pieces)
                answers.append("".join(pieces))
            else:
                answers.append(agent.generate([Message("user", "Where does Maya live?")], max_new_tokens=40).text)
                continue
            states.append(state_of(agent))
    assert answers[0] == answers[1] == answers[2]
    assert states[0] == states[1]


def test_an_answer_knows_its_counts(filled: Agent) -> None:
    answering = filled.begin_generation([turn_of(50)], max_new_tokens=9)
    text = "".join(answering)
    whole = filled.generate([turn_of(50)], max_new_tokens=9)
    assert isinstance(whole, Generation)
    assert (text, answering.text) == (whole.text, whole.text)
    assert answering.num_new_tokens == whole.num_new_tokens <= 9
    assert whole.num_prompt_tokens == 50 + len(tiny_codec().encode("Assistant:"))
    assert whole.finish_reason == ("length" if whole.num_new_tokens == 9 else "stop")


@pytest.mark.parametrize("as_list", [False, True])
def test_an_answer_ends_before_its_stop_string(filled: Agent, as_list: bool) -> None:
    question = [Message("user", "Where does Maya live?")]
    whole = filled.generate(question, max_new_tokens=60).text
    middle = len(whole) // 2
    stop = whole[middle : middle + 3]
    answer = filled.generate(question, max_new_tokens=60, stop=[stop, "never"] if as_list else stop)
    assert stop not in answer.text
    assert answer.finish_reason == "stop"
    assert answer.text == whole[: whole.index(stop)].rstrip()
    assert answer.num_new_tokens < 60


def test_a_base_model_does_not_go_on_with_the_next_turn(filled: Agent) -> None:
    script = iter(tiny_codec().encode(" Oslo.\nUser: and then?"))
    vocabulary = small().decoder.config.vocab_size

    def scripted(input_ids: torch.Tensor, cache: object, logits_to_keep: int = 0) -> torch.Tensor:
        logits = torch.zeros(1, 1, vocabulary)
        logits[0, 0, next(script)] = 1.0
        return logits

    with mock.patch.object(small(), "forward_cached", scripted):
        assert filled.chat("Where?", max_new_tokens=30) == "Oslo."
    assert filled.window[-1] == Message("assistant", "Oslo.")


def test_half_characters_of_an_answer_are_never_shown(filled: Agent) -> None:
    script = [*tiny_codec().encode("a"), *tiny_codec().encode("🙂"), *tiny_codec().encode("é")]
    todo = iter(script)

    def scripted(input_ids: torch.Tensor, cache: object, logits_to_keep: int = 0) -> torch.Tensor:
        logits = torch.zeros(1, 1, 1024)
        logits[0, 0, next(todo)] = 1.0
        return logits

    with mock.patch.object(small(), "forward_cached", scripted):
        assert list(filled.stream("Where?", max_new_tokens=len(script))) == ["a", "🙂", "é"]


def test_a_stream_that_fails_remembers_nothing(filled: Agent) -> None:
    before = with_version(filled)
    stream = filled.stream("Where does Maya live?", max_new_tokens=30)
    next(stream)
    with (
        mock.patch.object(small(), "forward_cached", side_effect=RuntimeError("out of memory")),
        pytest.raises(RuntimeError, match="out of memory"),
    ):
        list(stream)
    assert with_version(filled) == before


def test_an_agent_without_memory_answers(alice: Agent) -> None:
    assert alice.generate([Message("user", "Where?")], max_new_tokens=3).num_new_tokens <= 3
    assert alice.stats().num_injections == 0
    assert alice.tokens() == []
    assert alice.stats().oldest_age is None


def test_only_the_last_turn_queries(filled: Agent) -> None:
    seen: list[torch.Tensor | None] = []

    def spy(*arguments: object) -> object:
        seen.append(arguments[4])  # type: ignore[arg-type]
        return real(*arguments)  # type: ignore[arg-type]

    real = decoding.decode
    with mock.patch("mplus_agents.engine.answering.decode", spy):
        filled.chat("Where?", max_new_tokens=1)
    (mask,) = seen
    assert mask is not None
    assert int(mask.sum()) == len(tiny_codec().encode("User: Where?\n"))


def test_a_chat_template_is_used_end_to_end(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tiny_codec().tokenizer)
    tokenizer.chat_template = CHATML
    with engine(tmp_path / "a.db", tiny(), TextCodec(tokenizer)) as mplus:
        agent: Agent = mplus.agent("a")
        agent.remember(Message("user", "Maya lives in Oslo."))
        with prompts_of(tiny()) as read:
            agent.ask("Where?", max_new_tokens=1)
        ids = read.call_args_list[0].args[0][0].tolist()
        assert tokenizer.decode(ids) == ("<|user|>\nUser: Maya lives in Oslo.\n\nWhere?<|end|>\n<|assistant|>\n")
        answer = agent.chat("Where?", max_new_tokens=4)
        assert (
            agent.window[-2:] == [Message("user", "Where?"), Message("assistant", answer)][: 1 + bool(answer.strip())]
        )


def test_the_same_agent_is_one_object(mplus: MPlus) -> None:
    assert mplus.agent("a") is mplus.agent("a")
    assert mplus.agent("a") is not mplus.agent("a", namespace="other")
    assert repr(mplus.agent("a")) == "Agent('a', namespace='default', model='random')"
    assert mplus.agent("a").mplus is mplus
