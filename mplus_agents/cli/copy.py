"""`mplus copy`: an agent into another database."""

from __future__ import annotations

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
from mplus_agents.cli.output import note, print_json, working
from mplus_agents.cli.session import find_agent, open_store
from mplus_agents.errors import InvalidInputError


def copy(
    to: Annotated[str, typer.Argument(metavar="URL", help="The other database; made if there is none.")],
    *,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="What the copy is called; as the agent.")] = None,
    agent: AgentOption = DEFAULT_AGENT,
    namespace: NamespaceOption = DEFAULT_NAMESPACE,
    store: StoreOption = DEFAULT_STORE,
    as_json: Annotated[bool, typer.Option("--json", help="Print {agent, store, num_commits, num_events}.")] = False,
) -> None:
    """Copy an agent whole into another database: a backup, an export, a move.

    [bold]The memory stays as it is;[/] the copy has all of it, with window, log,
    documents and tags. SQLite and PostgreSQL go either way, and every stored
    piece is checked. A new SQLite file is one agent in one file.

      [dim]$[/] mplus copy sqlite:///alice.db --agent alice
      [dim]$[/] mplus copy postgresql://me@host/memories --agent alice --name alice-2
    """
    from mplus_agents.engine.inputs import check_name
    from mplus_agents.store import Store, copy_agent

    new_name = check_name("new name", agent if name is None else name)
    with open_store(store) as source:
        record = find_agent(source, namespace, agent)  # before a database is made for it
        try:
            target = Store(to)
        except InvalidInputError as error:
            raise InvalidInputError("URL", error.value, error.allowed) from error
        with target, working(f"copying {agent}"):
            copied = copy_agent(source, record, target, name=new_name)
            stats, url = target.stats(copied.id), target.url
    if as_json:
        counts = {"num_commits": stats.num_commits, "num_events": stats.num_events}
        print_json({"agent": new_name, "store": url, **counts})
    else:
        note(f"{stats.num_commits:,} injections and {stats.num_events:,} log entries are agent {new_name!r} of {url}")
