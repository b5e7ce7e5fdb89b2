"""`mplus chat`: a conversation that is remembered, at a terminal or line by line from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from mplus_agents.cli.options import (
    DEFAULT_AGENT,
    DEFAULT_MODEL,
    DEFAULT_NAMESPACE,
    DEFAULT_STORE,
    AgentOption,
    DeviceOption,
    MaxNewTokensOption,
    ModelOption,
    NamespaceOption,
    StoreOption,
)
from mplus_agents.cli.output import describe_receipt, note, print_error, print_json, print_table, printable
from mplus_agents.cli.session import Session
from mplus_agents.cli.stats import stats_table
from mplus_agents.errors import InvalidInputError, PromptTooLongError

if TYPE_CHECKING:
    from mplus_agents.engine import Agent

_COMMANDS = "/stats shows the memory, /flush writes what waits in the window into it, /quit ends"


def chat(
    *,
    agent: AgentOption = DEFAULT_AGENT,
    namespace: NamespaceOption = DEFAULT_NAMESPACE,
    model: ModelOption = DEFAULT_MODEL,
    store: StoreOption = DEFAULT_STORE,
    device: DeviceOption = None,
    max_new_tokens: MaxNewTokensOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per line and turn.")] = False,
) -> None:
    """Talk with an agent, which is created if there is none.

    [bold]Writes:[/] your turns and the answers wait word for word in the window,
    which every prompt shows, and go into the memory when a chunk is full. A
    turn is remembered when its answer is complete.

      [dim]$[/] mplus chat --agent alice
      [dim]$[/] echo "Maya lives in Oslo." | mplus chat --agent alice

    While talking: [bold]/stats[/] shows the memory, [bold]/flush[/] writes what waits in
    the window into it, [bold]/quit[/] or the end of the input ends. Ctrl-C breaks
    off an answer.
    """
    session = Session(agent, namespace, model, store, device)
    is_interactive = sys.stdin.isatty() and not as_json
    with session.open(create=True) as opened:
        if not as_json:
            session.note_language()
        if is_interactive:
            note(_COMMANDS)
        talk = Conversation(opened, max_new_tokens, as_json, is_interactive)
        for line in _typed_lines() if is_interactive else _piped_lines():
            if line == "/quit":
                break
            talk.take(line)


class Conversation:
    """Answers line by line.

    Args:
        agent: Who answers.
        max_new_tokens: Longest answer.
        as_json: Print JSON.
        is_interactive: Whether a person types; then a refused turn does not end the conversation.
    """

    def __init__(self, agent: Agent, max_new_tokens: int | None, as_json: bool, is_interactive: bool) -> None:
        self._agent = agent
        self._max_new_tokens = max_new_tokens
        self._as_json = as_json
        self._is_interactive = is_interactive

    def take(self, line: str) -> None:
        """Answer a turn, or obey a command.

        Args:
            line: What was typed, stripped.
        """
        if line == "/stats":
            self._show_stats()
        elif line == "/flush":
            self._flush()
        elif self._is_interactive and line.startswith("/"):
            note(f"unknown command {line.split()[0]!r}: {_COMMANDS}")
        else:
            self._answer(line)

    def _show_stats(self) -> None:
        measured = self._agent.stats()
        if self._as_json:
            print_json({"stats": asdict(measured)})
        else:
            print_table(stats_table(measured))

    def _flush(self) -> None:
        receipt = self._agent.flush()
        if self._as_json:
            print_json({"flush": asdict(receipt)})
        else:
            typer.echo(describe_receipt(receipt))

    def _answer(self, message: str) -> None:
        if not self._is_interactive:
            self._stream(message)
            return
        try:
            self._stream(message)
        except (InvalidInputError, PromptTooLongError) as error:
            print_error(error)
        except KeyboardInterrupt:
            typer.echo()
            note("broken off; a turn is remembered when its answer is complete")

    def _stream(self, message: str) -> None:
        pieces = []
        for piece in self._agent.stream(message, max_new_tokens=self._max_new_tokens):
            pieces.append(piece)
            if not self._as_json:
                typer.echo(printable(piece), nl=False)
        if self._as_json:
            print_json({"message": message, "answer": "".join(pieces)})
        else:
            typer.echo()


def _piped_lines() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            stripped = line.decode().strip()
        except UnicodeDecodeError as error:
            raise InvalidInputError(f"line {number}", line, "UTF-8") from error
        if stripped:
            yield stripped


def _typed_lines() -> Iterator[str]:
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 (input() gets line editing and history from it)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            typer.echo()
            return
        except KeyboardInterrupt as interrupt:
            typer.echo()
            raise typer.Exit(130) from interrupt
        except UnicodeDecodeError:
            note("that was not UTF-8")
            continue
        if line:
            yield line
