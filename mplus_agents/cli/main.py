"""The way in: collects the commands, and turns expected errors into one line and an exit code."""

from __future__ import annotations

import io
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mplus_agents import __version__
from mplus_agents.cli.agents import agents
from mplus_agents.cli.ask import ask
from mplus_agents.cli.chat import chat
from mplus_agents.cli.copy import copy
from mplus_agents.cli.delete import delete
from mplus_agents.cli.evaluate import evaluate
from mplus_agents.cli.history import fork, log, tag
from mplus_agents.cli.output import print_error
from mplus_agents.cli.read import read
from mplus_agents.cli.stats import stats
from mplus_agents.cli.train import train
from mplus_agents.errors import MPlusError

_COMMANDS = (chat, read, ask, agents, stats, log, tag, fork, copy, delete, train)


class _OneLineErrors(TyperGroup):
    """Every error raised on purpose becomes one line on stderr and exit code 1; others keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except MPlusError as error:
            print_error(error)
            raise typer.Exit(1) from error


app = typer.Typer(
    name="mplus",
    cls=_OneLineErrors,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"mplus {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Agents with a memory of their own that outlives the process.

    An agent's memory is not text but the model's own key and value tokens:
    θ, which every answer reads whole, and Θ, of which every answer reads what
    it asks for. It is kept in a database; any later command goes on with it.

      [dim]$[/] mplus read notes.txt                 read a document into the memory
      [dim]$[/] mplus ask "Where does Maya live?"    ask; the memory stays as it is
      [dim]$[/] mplus chat                           talk; every turn is remembered
      [dim]$[/] mplus stats                          see what the memory holds

    [bold]--agent[/] says whose memory, [bold]--store[/] in which database,
    [bold]--model[/] with which model.
    """


for _command in _COMMANDS:
    app.command()(_command)
app.add_typer(evaluate, name="eval")


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no Θ gets a question mark, not a traceback
    app(prog_name="mplus")


if __name__ == "__main__":
    main()
