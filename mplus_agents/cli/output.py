"""What the commands print: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table

from mplus_agents.errors import InvalidInputError

if TYPE_CHECKING:
    from mplus_agents.engine import Receipt

# Options by the name of the argument that the engine or the store complains about.
_OPTIONS = {
    "name": "--agent",
    "namespace": "--namespace",
    "device": "--device",
    "commit": "COMMIT",
    "tag": "NAME",
    "target": "--store",
    "max_new_tokens": "--max-new-tokens",
    "source_id": "--source-id",
    "question": "QUESTION",
    "episodes": "--episodes",
    "streams": "--streams",
    "distances": "--distances",
    "template": "--template",
    "window_tokens": "--window-tokens",
    "num_retrieved": "--num-retrieved",
    "prose": "--prose",
    "sizes": "--sizes",
    "steps": "--steps",
    "file": "--file",
    "distractors": "--distractors",
    "output": "--output",
    "figure": "--figure",
    "model": "--model",
}

# A model may say anything and a file be called anything; what would move the cursor or ring the bell is shown as a
# replacement character instead, and so is half a surrogate pair, which no terminal takes.
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160), *range(0xD800, 0xE000)) if code not in (9, 10)}


def note(text: str) -> None:
    """Say something beside the result, on stderr.

    Args:
        text: One line.
    """
    typer.echo(f"mplus: {text}", err=True)


def print_error(error: Exception) -> None:
    """Print an expected error as one line on stderr.

    Args:
        error: The error.
    """
    text = str(error)
    if isinstance(error, InvalidInputError) and error.argument in _OPTIONS:
        text = text.replace(error.argument, _OPTIONS[error.argument], 1)
    note("error: " + " ".join(text.split()))


def print_json(value: object) -> None:
    """Print a JSON value as one line on stdout.

    Args:
        value: The value.
    """
    typer.echo(json.dumps(value))  # pure ASCII, whatever the locale


def printable(text: str) -> str:
    """Return a model's text without characters that control a terminal.

    Args:
        text: The text.
    """
    return text.translate(_CONTROLS)


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show on stderr that something takes a moment, if a person is looking.

    Args:
        what: What is being done.
    """
    if not sys.stderr.isatty():
        yield
        return
    with Console(stderr=True).status(f"{what} …"):
        yield


def print_table(table: Table) -> None:
    """Print a table on stdout; off a terminal it is as wide as it needs to be.

    Args:
        table: The table.
    """
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(table)
        return
    console.width = 200
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        typer.echo(line.rstrip())


def new_table(*columns: str, title: str | None = None) -> Table:
    """Make a plain table; columns whose name begins with `#` are numbers.

    Args:
        *columns: Their names.
        title: Line above the table.
    """
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    for name in columns:
        table.add_column(name.removeprefix("#"), justify="right" if name.startswith("#") else "left")
    return table


def describe_receipt(receipt: Receipt) -> str:
    """Put a receipt into words.

    Args:
        receipt: What `remember` or `flush` returned.
    """
    parts = []
    if receipt.num_injections:
        written = f"{receipt.num_injections:,} injection{'s' * (receipt.num_injections != 1)}"
        parts.append(f"{receipt.num_text_tokens:,} tokens in {written}, {format_bytes(receipt.num_bytes)} stored")
    if receipt.note:
        parts.append(receipt.note)
    elif receipt.num_waiting_tokens:
        parts.append(f"{receipt.num_waiting_tokens:,} tokens wait in the window")
    return "; ".join(parts)


def format_bytes(num_bytes: int) -> str:
    """Write a number of bytes for people.

    Args:
        num_bytes: The number.
    """
    size, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1_000:
            break
        size, unit = size / 1_000, larger
    return f"{num_bytes} B" if unit == "B" else f"{size:,.1f} {unit}"
