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

if TYPE_CHECKING:
    from mplus_agents.engine import Receipt

# A model may say anything; what would move the cursor or ring the bell is shown as a replacement character instead.
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


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
    note("error: " + " ".join(str(error).split()))


def print_json(value: object) -> None:
    """Print a JSON value as one line on stdout.

    Args:
        value: The value.
    """
    typer.echo(json.dumps(value, ensure_ascii=False))


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
    if not console.is_terminal:
        console.width = 200
    console.print(table)


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
