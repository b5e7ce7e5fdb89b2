"""`mplus read`: documents into the memory, each at most once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
from mplus_agents.cli.output import describe_receipt, note, print_json, printable
from mplus_agents.cli.session import Session
from mplus_agents.errors import InvalidInputError

if TYPE_CHECKING:
    from mplus_agents.engine import Receipt

_SOURCE_ID_HELP = (
    "A stable name for a single file, so that the agent goes on with it when it has grown. Without one a file is known "
    "by its content, and its name and path are not stored."
)


def read(
    files: Annotated[list[str], typer.Argument(metavar="FILE", help="Text files in UTF-8; - is standard input.")],
    *,
    source_id: Annotated[str | None, typer.Option(metavar="ID", help=_SOURCE_ID_HELP)] = None,
    agent: AgentOption = DEFAULT_AGENT,
    namespace: NamespaceOption = DEFAULT_NAMESPACE,
    model: ModelOption = DEFAULT_MODEL,
    store: StoreOption = DEFAULT_STORE,
    device: DeviceOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print an array with one receipt per file.")] = False,
) -> None:
    """Read text files into the memory.

    [bold]Writes:[/] every chunk of text becomes a few memory tokens per layer in θ;
    older tokens move on to Θ. A last piece that is too short for a chunk waits
    word for word in the window, which every prompt shows. The agent is created
    if there is none. What was read before is not read twice; what was
    interrupted goes on where it stopped.

      [dim]$[/] mplus read notes.txt manual.txt --agent alice
      [dim]$[/] git log | mplus read - --agent alice
    """
    if source_id is not None and len(files) > 1:
        raise typer.BadParameter("it names a single file; give one FILE", param_hint="--source-id")
    if files.count("-") > 1:
        raise typer.BadParameter("standard input can be read once", param_hint="FILE")
    texts = [(name, _read_text(name)) for name in files]
    receipts: list[dict[str, Any]] = []
    session = Session(agent, namespace, model, store, device)
    with _safe_to_interrupt(), session.open(create=True) as opened:
        from mplus_agents.engine import Document

        for name, text in texts:
            receipt = opened.remember(Document(text, source_id))
            receipts.append({"file": name, **_as_dict(receipt)})
            if not as_json:
                typer.echo(f"{printable(name)}: {describe_receipt(receipt)}")
    if as_json:
        print_json(receipts)


def _read_text(name: str) -> str:
    """Read a whole file, so that nothing is written to the memory if one of several cannot be read."""
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise InvalidInputError("FILE", name, f"a text file that can be read ({error.strerror})") from error
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        allowed = f"a text file in UTF-8 (the bytes from offset {error.start} on are not)"
        raise InvalidInputError("FILE", name, allowed) from error
    if not text.strip():
        raise InvalidInputError("FILE", name, "a text file that is not empty")
    return text


def _as_dict(receipt: Receipt) -> dict[str, Any]:
    return {"num_injections": receipt.num_injections, **asdict(receipt)}


@contextmanager
def _safe_to_interrupt() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as interrupt:
        note("interrupted; what was acknowledged is safe. The same command goes on where this one stopped.")
        raise typer.Exit(130) from interrupt
