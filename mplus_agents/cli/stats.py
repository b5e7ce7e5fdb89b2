"""`mplus stats`: what an agent's memory holds, in numbers or token by token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from mplus_agents.cli.options import (
    DEFAULT_AGENT,
    DEFAULT_MODEL,
    DEFAULT_NAMESPACE,
    DEFAULT_STORE,
    AgentOption,
    DeviceOption,
    ModelOption,
    NamespaceOption,
    StoreOption,
)
from mplus_agents.cli.output import format_bytes, new_table, print_json, print_table
from mplus_agents.cli.session import Session

if TYPE_CHECKING:
    from mplus_agents.engine import Agent, AgentStats, TokenInfo

_NUM_SHOWN_TOKENS = 20
_TOKENS_HELP = "List every memory token: a table of the first few, or with --json all, one JSON object per line."


def stats(
    *,
    agent: AgentOption = DEFAULT_AGENT,
    namespace: NamespaceOption = DEFAULT_NAMESPACE,
    model: ModelOption = DEFAULT_MODEL,
    store: StoreOption = DEFAULT_STORE,
    device: DeviceOption = None,
    tokens: Annotated[bool, typer.Option("--tokens", help=_TOKENS_HELP)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print an object; with --tokens one per line.")] = False,
) -> None:
    """Show what an agent's memory holds.

    [bold]The memory stays as it is.[/] θ is read whole by every answer; of Θ every
    answer reads what it asks for; what waits in the window is shown word for
    word in every prompt.

      [dim]$[/] mplus stats --agent alice
      [dim]$[/] mplus stats --agent alice --tokens --json | head
    """
    with Session(agent, namespace, model, store, device).open(create=False) as opened:
        measured = opened.stats()
        if tokens and as_json:
            for info in _all_tokens(opened, measured):
                print_json(asdict(info))
        elif tokens:
            print_table(_token_table(opened, measured))
        elif as_json:
            print_json(asdict(measured))
        else:
            print_table(stats_table(measured))


def stats_table(measured: AgentStats) -> Table:
    """Lay an agent's numbers out as a table.

    Args:
        measured: The numbers.
    """
    sizes = sorted(set(measured.long_term_tokens))
    held = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    capacity = f" of {measured.long_term_capacity:,}" if measured.long_term_capacity is not None else ""
    oldest = "–" if measured.oldest_age is None else f"{measured.oldest_age:,} tokens"
    stored = ", ".join(
        f"{name.replace('_', ' ')} {format_bytes(size)}" for name, size in measured.stored_bytes.items() if size
    )
    table = new_table("", "", title=f"{measured.name} (namespace {measured.namespace})")
    table.show_header = False
    rows = {
        "injections": f"{measured.num_injections:,}",
        "short-term memory θ": f"{measured.short_term_tokens:,} of {measured.short_term_capacity:,} tokens per layer",
        "long-term memory Θ": f"{held}{capacity} tokens per layer",
        "staged for Θ": f"{measured.num_staged:,} tokens per layer" if measured.num_staged else "",
        "oldest token's age": oldest,
        "window": f"{measured.num_waiting_messages:,} waiting, {measured.num_waiting_tokens:,} text tokens",
        "log": f"{measured.num_events:,} entries",
        "in the database": f"{format_bytes(sum(measured.stored_bytes.values()))} ({stored})" if stored else "0 B",
        "in use": format_bytes(measured.resident_bytes),
        "rule": measured.memory_rule,
    }
    for name, value in rows.items():
        if value:
            table.add_row(f"[dim]{name}[/]", value)
    return table


def _all_tokens(agent: Agent, measured: AgentStats) -> Iterator[TokenInfo]:
    """Go layer by layer: a large agent has millions of tokens."""
    for layer in range(len(measured.long_term_tokens)):
        yield from agent.tokens(layer)


def _token_table(agent: Agent, measured: AgentStats) -> Table:
    per_layer = measured.short_term_tokens + measured.num_staged
    total = per_layer * len(measured.long_term_tokens) + sum(measured.long_term_tokens)
    shown = list(islice(_all_tokens(agent, measured), _NUM_SHOWN_TOKENS))
    title = f"{len(shown):,} of {total:,} memory tokens" + ("; --json lists all" if total > len(shown) else "")
    table = new_table("#layer", "place", "#injection", "#step", "#slot", "#birth", "#age", title=title)
    for info in shown:
        made = (info.injection_id, info.step, info.slot)
        cells = [str(info.layer), info.place, *("–" if value is None else str(value) for value in made)]
        table.add_row(*cells, str(info.birth), str(info.age))
    return table
