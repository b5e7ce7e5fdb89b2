"""A conversation at a terminal survives what goes wrong in one turn; from a pipe it ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import pytest

from mplus_agents.cli.chat import Conversation
from mplus_agents.engine import Agent
from mplus_agents.errors import MPlusError, PromptTooLongError, StoreError


class Stub:
    """Answers `yes`, after raising what it was told to raise."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error

    def stream(self, message: str, max_new_tokens: int | None) -> Iterator[str]:
        yield "y"
        error, self.error = self.error, None
        if error is not None:
            raise error
        yield "es"


def conversation(error: BaseException | None, is_interactive: bool) -> Conversation:
    return Conversation(cast(Agent, Stub(error)), None, as_json=False, is_interactive=is_interactive)


def test_ctrl_c_breaks_off_an_answer_and_the_talk_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    talk = conversation(KeyboardInterrupt(), is_interactive=True)
    talk.take("Hello")
    talk.take("Hello again")
    shown = capsys.readouterr()
    assert shown.out == "y\nyes\n"
    assert shown.err == "mplus: broken off; a turn is remembered when its answer is complete\n"


def test_a_refused_turn_does_not_end_a_talk_at_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    talk = conversation(PromptTooLongError("too long"), is_interactive=True)
    talk.take("Hello")
    talk.take("Hello again")
    assert "mplus: error: too long" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "is_interactive"), [(PromptTooLongError("too long"), False), (StoreError("disk full"), True)]
)
def test_other_errors_end_it(error: MPlusError, is_interactive: bool) -> None:
    with pytest.raises(type(error), match=str(error)):
        conversation(error, is_interactive).take("Hello")


def test_from_a_pipe_a_slash_is_a_slash(capsys: pytest.CaptureFixture[str]) -> None:
    conversation(None, is_interactive=False).take("/usr/bin holds programs")
    assert capsys.readouterr().out == "yes\n"
