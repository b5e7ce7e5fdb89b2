"""From options to a store, an engine and an agent; heavy imports happen here, when a command runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mplus_agents.cli.output import note, working
from mplus_agents.errors import AgentNotFoundError, StoreError

if TYPE_CHECKING:
    from mplus_agents.engine import Agent, MPlus
    from mplus_agents.store import AgentRecord, Store

_TINY_MODEL = "mplus-tiny"
_SMALL_MODEL_PARAMETERS = 50_000_000
_TINY_NOTE = (
    "mplus-tiny speaks a simple English: facts about people, such as home, job, dog and favourite food. "
    "For more, choose another model with --model."
)


@dataclass(frozen=True, slots=True)
class Session:
    """What the options of a command say.

    Attributes:
        agent: The agent's name.
        namespace: Its namespace.
        model: The model.
        store: URL of the database.
        device: Where to load the model; the first GPU, else the CPU, if None.
    """

    agent: str
    namespace: str
    model: str
    store: str
    device: str | None

    @contextmanager
    def open(self, *, create: bool) -> Iterator[Agent]:
        """Load the model and open the agent; the store is closed at the end.

        Args:
            create: Create the agent, and the database, if there is none.

        Yields:
            The agent.

        Raises:
            AgentNotFoundError: There is no such agent, and `create` is False.
            MPlusError: Model, store or agent cannot be opened.
        """
        if not create:
            require_database(self.store)
        with working(f"loading {self.model}"):
            from mplus_agents.engine import MPlus

            mplus = MPlus.from_pretrained(self.model, store=self.store, device=self.device)
            _keep_to_one_thread(mplus)
        with mplus:
            try:
                agent = mplus.agent(self.agent, namespace=self.namespace, create=False)
            except AgentNotFoundError:
                if not create:
                    raise
                agent = mplus.agent(self.agent, namespace=self.namespace)
                note(f"agent {self.agent!r} is new in {mplus.store.url}")
            yield agent

    def note_language(self) -> None:
        """Say on stderr what the built-in model can talk about, if it is the one in use."""
        if self.model == _TINY_MODEL:
            note(_TINY_NOTE)


def _keep_to_one_thread(mplus: MPlus) -> None:
    """Run a small model on one thread: more gain little, and on a busy machine wait for each other most of the time."""
    import torch

    is_small = sum(parameter.numel() for parameter in mplus.model.parameters()) < _SMALL_MODEL_PARAMETERS
    if is_small and mplus.model.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def as_commit(given: str) -> int | str:
    """Take what names a commit: digits are its id, anything else is a tag.

    Args:
        given: What was given.
    """
    return int(given) if given.isdecimal() and given.isascii() and len(given) < 19 else given


def find_agent(store: Store, namespace: str, name: str) -> AgentRecord:
    """Look an agent up without a model.

    Args:
        store: The store.
        namespace: Its namespace.
        name: Its name.

    Raises:
        AgentNotFoundError: There is no such agent.
        InvalidInputError: A name is not allowed.
    """
    record = store.find_agent(namespace, name)
    if record is None:
        raise AgentNotFoundError(f"there is no agent {name!r} in namespace {namespace!r} of {store.url}")
    return record


@contextmanager
def open_store(url: str) -> Iterator[Store]:
    """Open a database that exists; no model is loaded.

    Args:
        url: The database.

    Yields:
        The store.

    Raises:
        StoreError: There is no such database, or it cannot be opened.
    """
    require_database(url)
    with working("opening the database"):
        from mplus_agents.store import Store
    with Store(url) as store:
        yield store


def require_database(url: str) -> None:
    """Refuse an SQLite file that does not exist, so that looking into a mistyped one does not create it.

    Args:
        url: The database; what is no SQLite URL is left for the store to judge.

    Raises:
        StoreError: The file does not exist.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        parsed = make_url(url)
    except ArgumentError:
        return
    file = parsed.database or ""
    is_file = parsed.get_backend_name() == "sqlite" and file not in ("", ":memory:") and not file.startswith("file:")
    if is_file and not Path(file).exists():
        raise StoreError(f"there is no database {file!r}; `mplus read` and `mplus chat` create one")
