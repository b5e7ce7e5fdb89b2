"""`MPlusMemory`: writes a chain's turns to an agent, and shows the prompt those that still wait verbatim."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage
from pydantic import ConfigDict, Field, model_validator

from langchain_mplus._agents import (
    DEFAULT_MODEL,
    DEFAULT_NAMESPACE,
    DEFAULT_STORE,
    AgentField,
    Place,
    check_agent,
    engine_at,
    place_of,
)
from langchain_mplus._messages import text_of
from mplus_agents import InvalidInputError

try:
    from langchain_classic.base_memory import BaseMemory
except ModuleNotFoundError:  # LangChain before 1.0
    from langchain_core.memory import BaseMemory  # type: ignore[import-not-found, no-redef]

if TYPE_CHECKING:
    from mplus_agents import Agent, Message


class MPlusMemory(BaseMemory):
    """An agent's memory for `ConversationChain` and other chains.

    A turn is first shown to the prompt word for word; when enough turns wait, they are injected into the latent memory,
    which `ChatMPlus` reads, and are not shown again. So the history stays short however long the conversation gets.
    With another chat model the chain sees the waiting turns only.

    Give `agent`, or `agent_id` for one by name in this process's shared engines, which `ChatMPlus(agent_id=…)` uses
    too. The agent outlives the process. `clear` drops what waits; `memory.open_agent().delete()` deletes all there is.

    Attributes:
        agent: The agent.
        agent_id: The agent's name, if `agent` is not given.
        model: A folder, a hub id, or `mplus-tiny`; with `agent_id` only.
        store: The database, as an SQLAlchemy URL; with `agent_id` only.
        device: Where the model is loaded; with `agent_id` only.
        namespace: Where the name is unique; with `agent_id` only.
        memory_key: Name of the one variable that the prompt gets.
        input_key: Which of the chain's inputs is the human's turn; if None, the only one, or the one named `input`.
        output_key: Which of the chain's outputs is the AI's turn; if None, the only one, or the one named `output`.
        return_messages: Give the variable as messages, for a `MessagesPlaceholder`, instead of as a text.
        human_prefix: Who the human is called in that text.
        ai_prefix: Who the AI is called in that text.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", protected_namespaces=())

    agent: AgentField | None = Field(default=None, exclude=True, repr=False)
    agent_id: str | None = None
    model: str = DEFAULT_MODEL
    store: str = Field(default=DEFAULT_STORE, repr=False)  # may hold a password
    device: str | None = None
    namespace: str = DEFAULT_NAMESPACE
    memory_key: str = "history"
    input_key: str | None = None
    output_key: str | None = None
    return_messages: bool = False
    human_prefix: str = "Human"
    ai_prefix: str = "AI"

    @model_validator(mode="after")
    def _check_agent(self) -> Self:
        if (self.agent is None) == (self.agent_id is None):
            given = "neither" if self.agent is None else "both"
            raise InvalidInputError("agent, agent_id", given, "exactly one: agent=… or agent_id='…'")
        if self.agent is not None:
            check_agent(self.agent)
            surplus = sorted({"model", "store", "device", "namespace"} & self.model_fields_set)
            if surplus:
                raise InvalidInputError(surplus[0], getattr(self, surplus[0]), "nothing: agent=… has its own")
            self.model, self.store, self.device, self.namespace = place_of(self.agent)
        return self

    @property
    def memory_variables(self) -> list[str]:
        """The one variable of the prompt."""
        return [self.memory_key]

    def open_agent(self) -> Agent:
        """Return the agent; with `agent_id`, the first call loads the model, and an agent that is not there is created.

        Raises:
            CheckpointError: The model cannot be loaded.
            FingerprintMismatchError: The agent was made with another model.
            InvalidInputError: The name is not allowed.
            StoreError: The database failed.
        """
        if self.agent is not None:
            return self.agent
        assert self.agent_id is not None
        place = Place(self.model, self.store, self.device, self.namespace)
        return engine_at(place).agent(self.agent_id, namespace=self.namespace)

    def load_memory_variables(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the turns that are not injected yet, and never one that is; nothing is written.

        Args:
            inputs: Not looked at.

        Raises:
            StoreError: The database failed.
        """
        window = self.open_agent().window
        if self.return_messages:
            return {self.memory_key: [_to_message(turn) for turn in window]}
        return {self.memory_key: "\n".join(self._write(turn) for turn in window)}

    def save_context(self, inputs: dict[str, Any], outputs: dict[str, str]) -> None:
        """Remember the human's turn and the AI's answer; one that is blank is left out.

        Args:
            inputs: The chain's inputs; memory variables among them are not stored.
            outputs: The chain's outputs.

        Raises:
            InvalidInputError: It is not clear which input or output to store, or it is not text; nothing was stored.
            ConflictError: Another process wrote to the agent at the same time; call again.
            StoreError: The database failed.
        """
        from mplus_agents import Message

        own = {*self.memory_variables, "stop"}
        given = {key: value for key, value in inputs.items() if key not in own}
        said = _pick("input_key", self.input_key, given if self.input_key is None else inputs, "input")
        answered = _pick("output_key", self.output_key, outputs, "output")
        turns = [Message("user", said), Message("assistant", answered)]
        spoken = [turn for turn in turns if turn.content.strip()]
        if spoken:
            self.open_agent().remember(spoken, progress=False)

    def clear(self) -> None:
        """Drop the turns that wait; what was injected stays in the memory.

        To delete the agent with all that it remembers: `memory.open_agent().delete()`.

        Raises:
            ConflictError: Another process wrote to the agent at the same time; call again.
            StoreError: The database failed.
        """
        self.open_agent().clear_window()

    async def aload_memory_variables(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Do `load_memory_variables` off the event loop.

        Args:
            inputs: Not looked at.
        """
        return await asyncio.to_thread(self.load_memory_variables, inputs)

    async def asave_context(self, inputs: dict[str, Any], outputs: dict[str, str]) -> None:
        """Do `save_context` off the event loop.

        Args:
            inputs: The chain's inputs.
            outputs: The chain's outputs.
        """
        await asyncio.to_thread(self.save_context, inputs, outputs)

    async def aclear(self) -> None:
        """Do `clear` off the event loop."""
        await asyncio.to_thread(self.clear)

    def _write(self, turn: Message) -> str:
        prefixes = {"user": self.human_prefix, "assistant": self.ai_prefix, "tool": "Tool"}
        # Pieces of documents come as system turns.
        return turn.content if turn.role == "system" else f"{prefixes[turn.role]}: {turn.content}"


def _to_message(turn: Message) -> BaseMessage:
    if turn.role == "tool":  # a ToolMessage would need the id of a call
        return ChatMessage(role="tool", content=turn.content)
    kinds: dict[str, type[BaseMessage]] = {"user": HumanMessage, "assistant": AIMessage, "system": SystemMessage}
    return kinds[turn.role](content=turn.content)


def _pick(argument: str, key: str | None, values: Mapping[str, Any], preferred: str) -> str:
    if key is None:
        key = next(iter(values)) if len(values) == 1 else preferred
    if key not in values:
        raise InvalidInputError(argument, key, f"one of the keys that the chain gives ({', '.join(values) or 'none'})")
    return text_of(key, values[key])
