"""Options that several commands have, each defined once."""

from __future__ import annotations

from typing import Annotated

import typer

# The engine's own defaults; importing them from there would load PyTorch for every `--help`. A test compares them.
DEFAULT_AGENT = "default"
DEFAULT_NAMESPACE = "default"
DEFAULT_MODEL = "mplus-tiny"
DEFAULT_STORE = "sqlite:///mplus.db"

AgentOption = Annotated[
    str, typer.Option("--agent", "-a", envvar="MPLUS_AGENT", metavar="NAME", help="Whose memory to use.")
]
NamespaceOption = Annotated[
    str, typer.Option(metavar="NAME", help="Where the agent's name is unique, such as a project or a customer.")
]
ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        envvar="MPLUS_MODEL",
        metavar="MODEL",
        help="A folder, a Hugging Face id, or mplus-tiny. An agent stays with the model that it was made with.",
    ),
]
StoreOption = Annotated[
    str,
    typer.Option("--store", "-s", envvar="MPLUS_STORE", metavar="URL", help="The database, as an SQLAlchemy URL."),
]
JsonLinesOption = Annotated[bool, typer.Option("--json", help="Print one object per line.")]
DeviceOption = Annotated[
    str | None,
    typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1 …; the first GPU if there is one, else the CPU."),
]
MaxNewTokensOption = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Longest answer, in tokens; as many as fit, at most 128, if not given."),
]
