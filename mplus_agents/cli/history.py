"""`mplus log`, `tag` and `fork`: an agent's past. No model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from mplus_agents.cli.graph import draw_graph
from mplus_agents.cli.options import (
    DEFAULT_AGENT,
    DEFAULT_NAMESPACE,
    DEFAULT_STORE,
    AgentOption,
    JsonLinesOption,
    NamespaceOption,
    StoreOption,
)
from mplus_agents.cli.output import new_table, note, print_json, print_table, printable
from mplus_agents.cli.session import as_commit, find_agent, open_store
from mplus_agents.errors import InvalidInputError

if TYPE_CHECKING:
    from mplus_agents.store import CommitInfo

_ALL_HELP = "All agents of the namespace, with what they share."


def log(
    *,
    agent: AgentOption = DEFAULT_AGENT,
    namespace: NamespaceOption = DEFAULT_NAMESPACE,
    store: StoreOption = DEFAULT_STORE,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, metavar="N", help="Show at most so many commits.")] = 20,
    all_agents: Annotated[bool, typer.Option("--all", help=_ALL_HELP)] = False,
    as_json: JsonLinesOption = False,
) -> None:
    """Show what made an agent's memory: a commit for each injection, newest first.

    [bold]No memory is touched,[/] and no model is loaded. A commit's id, or a tag,
    can be given to [bold]mplus ask --at[/].

      [dim]$[/] mplus log --agent alice
      [dim]$[/] mplus log --all
    """
    with open_store(store) as opened:
        records = opened.list_agents(namespace) if all_agents else [find_agent(opened, namespace, agent)]
        commits: dict[int, CommitInfo] = {}
        heads: dict[int, list[str]] = {}
        tags: dict[int, list[str]] = {}
        for record in records:
            heads.setdefault(record.head_commit_id or 0, []).append(record.name)
            for commit in opened.history.log(record, limit=limit):
                commits[commit.commit_id] = commit
                prefix = f"{record.name}:" if all_agents else ""
                tags.setdefault(commit.commit_id, []).extend(f"{prefix}{name}" for name in commit.tags)
    shown = [commits[commit_id] for commit_id in sorted(commits, reverse=True)[:limit]]
    if as_json:
        for commit in shown:
            created_at = commit.created_at.isoformat(timespec="seconds")
            named = {"tags": tags[commit.commit_id], "heads": heads.get(commit.commit_id, [])}
            print_json({**asdict(commit), **named, "created_at": created_at})
    elif shown:
        _print_log(shown, {commit_id: heads.get(commit_id, []) + tags[commit_id] for commit_id in tags})
    else:
        note("nothing was injected yet")


def tag(
    name: Annotated[str, typer.Argument(help="The tag.")],
    *,
    commit: Annotated[str | None, typer.Option(metavar="COMMIT", help="A commit's id, or a tag; the newest.")] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Take the tag away.")] = False,
    agent: AgentOption = DEFAULT_AGENT,
    namespace: NamespaceOption = DEFAULT_NAMESPACE,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Give a commit a name, such as before-the-move.

    [bold]No memory is touched,[/] and no model is loaded. A tag that is there
    already is moved.

      [dim]$[/] mplus tag before-the-move --agent alice
    """
    from mplus_agents.engine.inputs import check_name

    with open_store(store) as opened:
        record = find_agent(opened, namespace, agent)
        if remove:
            opened.history.remove_tag(record, name)
            note(f"{name} is no tag of agent {agent!r} any more")
            return
        commit_id = record.head_commit_id if commit is None else opened.history.resolve(record, as_commit(commit))
        if commit_id is None:
            allowed = "a commit; there is none before the first injection, and what waits in the window is in none"
            raise InvalidInputError("commit", commit, allowed)
        opened.history.set_tag(record, check_name("tag", name), commit_id)
        note(f"{name} is commit {commit_id} of agent {agent!r}")


def fork(
    name: Annotated[str, typer.Argument(help="The new agent's name.")],
    *,
    agent: AgentOption = DEFAULT_AGENT,
    namespace: NamespaceOption = DEFAULT_NAMESPACE,
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Make an agent that begins with the memory of another one.

    [bold]Nothing of the memory is copied:[/] both share what was written before,
    and neither sees what is written to the other later.

      [dim]$[/] mplus fork alice-tries-something --agent alice
    """
    from mplus_agents.engine.inputs import check_name

    with open_store(store) as opened:
        record = find_agent(opened, namespace, agent)
        opened.history.fork(record, namespace, check_name("new name", name))
    note(f"agent {name!r} begins with what {agent!r} remembers")


def _print_log(shown: Sequence[CommitInfo], names: dict[int, list[str]]) -> None:
    table = new_table("", "#commit", "#step", "made", "#tokens", "what")
    by_id = {commit.commit_id: commit for commit in shown}
    for drawn, commit_id in draw_graph([(commit.commit_id, commit.parent_id) for commit in shown]):
        if commit_id is None:
            table.add_row(drawn)
            continue
        commit = by_id[commit_id]
        label = f"[bold]({escape(printable(', '.join(names[commit_id])))})[/] " if names[commit_id] else ""
        sources = f"[dim]{escape(printable(', '.join(commit.source_ids)))}[/] " if commit.source_ids else ""
        made = commit.created_at.strftime("%Y-%m-%d %H:%M")
        cells = (str(commit_id), str(commit.step), made, str(commit.num_text_tokens))
        table.add_row(drawn, *cells, f"{label}{sources}{escape(printable(commit.text))}")
    print_table(table)
