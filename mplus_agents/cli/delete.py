"""`mplus delete`: an agent and everything it remembers, for good."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from mplus_agents.cli.options import (
    DEFAULT_AGENT,
    DEFAULT_NAMESPACE,
    DEFAULT_STORE,
    AgentOption,
    NamespaceOption,
    StoreOption,
)
from mplus_agents.cli.output import note, print_json
from mplus_agents.cli.session import open_store
from mplus_agents.errors import AgentNotFoundError


def delete(
    *,
    agent: AgentOption = DEFAULT_AGENT,
    namespace: NamespaceOption = DEFAULT_NAMESPACE,
    store: StoreOption = DEFAULT_STORE,
    is_sure: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was deleted as JSON.")] = False,
) -> None:
    """Delete an agent.

    [bold red]Its whole memory is gone for good:[/] θ, Θ, the window, the documents
    it read and its log. Other agents stay as they are. No model is loaded.

      [dim]$[/] mplus delete --agent alice
    """
    with open_store(store) as opened:
        record = opened.find_agent(namespace, agent)
        if record is None:
            raise AgentNotFoundError(f"there is no agent {agent!r} in namespace {namespace!r} of {opened.url}")
        if not is_sure:
            what = f"agent {agent!r} (namespace {namespace!r}, {record.next_event_seq:,} log entries) of {opened.url}"
            _confirm(f"Delete {what} for good?")
        opened.delete_agent(record.id)
    if as_json:
        print_json({"deleted": True, "namespace": namespace, "name": agent})
    else:
        typer.echo(f"deleted agent {agent!r}")


def _confirm(question: str) -> None:
    """Ask on stderr, all of it: typer's own prompt leaves a space on stdout, which may be JSON."""
    typer.echo(f"{question} [y/N]: ", nl=False, err=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        note("nothing was deleted")
        raise typer.Exit(1)
