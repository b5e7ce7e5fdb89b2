"""Which agent a LangChain object works on: the one it was given, or one by name in this process's shared engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from mplus_agents import InvalidInputError

if TYPE_CHECKING:
    from mplus_agents import Agent, MPlus, Store

    AgentField: TypeAlias = Agent
else:
    AgentField = Any  # pydantic would import PyTorch for the real type; `check_agent` does the checking

# As in `mplus_agents.engine`, which is not imported before it is used.
DEFAULT_MODEL = "mplus-tiny"
DEFAULT_STORE = "sqlite:///mplus.db"
DEFAULT_NAMESPACE = "default"


class Place(NamedTuple):
    """Where agents are found by name.

    Attributes:
        model: A folder, a hub id, or `mplus-tiny`.
        store: An SQLAlchemy URL.
        device: Where the model is loaded; None for the default.
        namespace: Where the names are unique.
    """

    model: str
    store: str
    device: str | None
    namespace: str


def check_agent(agent: Agent) -> None:
    """Check that a caller's `agent` is one.

    Args:
        agent: What was given.

    Raises:
        InvalidInputError: It is something else.
    """
    from mplus_agents import Agent

    if not isinstance(agent, Agent):
        raise InvalidInputError("agent", agent, "an Agent, as MPlus.agent returns it, or agent_id='…' for one by name")


def place_of(agent: Agent) -> Place:
    """Return where an agent is.

    Args:
        agent: The agent.
    """
    mplus = agent.mplus
    return Place(mplus.name, mplus.store.url, str(mplus.model.device), agent.namespace)


def engine_at(place: Place) -> MPlus:
    """Return this process's engine for a place; the first call loads the model.

    Args:
        place: The place.
    """
    from mplus_agents.engine.registry import shared_engine

    return shared_engine(place.model, place.store, place.device)


def store_at(place: Place) -> Store:
    """Return this process's store for a place; no model is loaded.

    Args:
        place: The place.
    """
    from mplus_agents.engine.registry import shared_store

    return shared_store(place.store)
