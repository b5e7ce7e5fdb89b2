"""`mplus agents`: who lives in a database."""

from __future__ import annotations

from typing import Annotated

import typer

from mplus_agents.cli.options import DEFAULT_STORE, StoreOption
from mplus_agents.cli.output import new_table, note, print_json, print_table
from mplus_agents.cli.session import open_store


def agents(
    *,
    namespace: Annotated[str | None, typer.Option(metavar="NAME", help="Only this namespace.")] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: Annotated[bool, typer.Option("--json", help="Print an array of objects.")] = False,
) -> None:
    """List the agents of a database.

    [bold]No memory is touched,[/] and no model is loaded.

      [dim]$[/] mplus agents --store sqlite:///team.db
    """
    with open_store(store) as opened:
        records = opened.list_agents(namespace)
        url = opened.url
    rows = [
        {
            "namespace": record.namespace,
            "name": record.name,
            "created_at": record.created_at.isoformat(timespec="seconds"),
            "num_writes": record.version,
            "num_events": record.next_event_seq,
        }
        for record in records
    ]
    if as_json:
        print_json(rows)
    elif rows:
        table = new_table("namespace", "name", "created", "#writes", "#log entries")
        for row in rows:
            table.add_row(*map(str, row.values()))
        print_table(table)
    else:
        note(f"there are no agents in {url}")
