"""`mplus ask`: one question, one answer, nothing written."""

from __future__ import annotations

from typing import Annotated

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
from mplus_agents.cli.output import print_json, printable, working
from mplus_agents.cli.session import Session, as_commit


def ask(
    question: Annotated[str, typer.Argument(help="The question; quote it.")],
    *,
    agent: AgentOption = DEFAULT_AGENT,
    namespace: NamespaceOption = DEFAULT_NAMESPACE,
    model: ModelOption = DEFAULT_MODEL,
    store: StoreOption = DEFAULT_STORE,
    device: DeviceOption = None,
    at: Annotated[str | None, typer.Option(metavar="COMMIT", help="Ask the memory as it was: a tag, or an id.")] = None,
    max_new_tokens: MaxNewTokensOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print {question, answer} as JSON.")] = False,
) -> None:
    """Answer one question from memory.

    [bold]The memory stays as it is:[/] neither the question nor the answer is
    remembered. The agent must exist.

      [dim]$[/] mplus ask "Where does Maya live?" --agent alice
      [dim]$[/] mplus ask "Where does Maya live?" --agent alice --at before-the-move
    """
    session = Session(agent, namespace, model, store, device)
    with session.open(create=False) as opened:
        if not as_json:
            session.note_language()
        with working("answering"):
            memory = opened if at is None else opened.at(as_commit(at))
            answer = memory.ask(question, max_new_tokens=max_new_tokens)
    if as_json:
        print_json({"question": question, "answer": answer})
    else:
        typer.echo(printable(answer))
