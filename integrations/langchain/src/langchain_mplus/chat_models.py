"""`ChatMPlus`: a chat model that reads an agent's latent memory and never writes it."""

from __future__ import annotations

import warnings
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from langchain_core.caches import BaseCache
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import (
    BaseChatModel,
    LangSmithParams,
    LanguageModelInput,
    ModelProfile,
)
from langchain_core.language_models.chat_model_stream import AsyncChatModelStream, ChatModelStream
from langchain_core.language_models.chat_models import agenerate_from_stream, generate_from_stream
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import RunnableConfig, ensure_config
from pydantic import ConfigDict, Field, SecretStr, model_validator

from langchain_mplus._agents import (
    DEFAULT_MODEL,
    DEFAULT_NAMESPACE,
    DEFAULT_STORE,
    AgentField,
    Place,
    check_agent,
    engine_at,
    place_of,
    store_at,
)
from langchain_mplus._messages import to_turns
from langchain_mplus._profile import profile_of, read_prompt_limit
from mplus_agents import InvalidInputError, __version__

if TYPE_CHECKING:
    from mplus_agents import Agent, MPlus
    from mplus_agents.engine.answering import Answering

_PROVIDER = "mplus"
_HOW_TO_GIVE_AN_AGENT = (
    "a name, given by ChatMPlus(agent=…), ChatMPlus(agent_id='…'), invoke(…, agent_id='…') "
    "or config={'configurable': {'agent_id': '…'}}"
)
_CALL_OPTIONS = ("temperature", "max_tokens", "top_p", "top_k", "seed")
# Flags of LangChain's own that reach the model with the options.
_IGNORED_KWARGS = ("agent_id", "model", "stream")


class ChatMPlus(BaseChatModel):
    """A chat model with one agent's memory.

    It reads the latent memory and sees the messages it is given, nothing else: what waits in the agent's window is
    shown by the memory object (`MPlusMemory`), which also does all the writing. Constructing one loads no weights.

    The agent is `agent`, or the one named `agent_id` in this process's shared engines, which `MPlusMemory(agent_id=…)`
    uses too. A call may name another agent of the same place: by the keyword argument `agent_id`, else by
    `config={"configurable": {"agent_id": …}}`. An agent that is not there is created.

    The standard LangChain arguments `timeout`, `max_retries` and `api_key` are accepted and have no effect: there is no
    network.

    Attributes:
        agent: The agent.
        agent_id: An agent's name; with `agent`, of another agent beside it.
        model: A folder, a hub id, or `mplus-tiny`; also accepted as `model_name`.
        store: The database, as an SQLAlchemy URL.
        device: Where the model is loaded; the first CUDA device if there is one, else the CPU.
        namespace: Where the agents' names are unique.
        temperature: Divides the logits when sampling; the likeliest token is taken if 0 or None.
        top_p: Sample among the likeliest tokens that hold this probability together; needs a temperature.
        top_k: Sample among this many likeliest tokens; needs a temperature.
        seed: Seed of the sampling.
        max_tokens: Most tokens of an answer; as many as fit, at most 128, if None.
        stop: Strings at which every answer ends, beside those of the call.
        streaming: Make `invoke` stream too, for the sake of callbacks; LangChain looks at it.
        timeout: Has no effect.
        max_retries: Has no effect.
        api_key: Has no effect.
        cache: LangChain's cache of answers; off, as the same prompt means something else after the memory has changed.
    """

    model_config = ConfigDict(
        arbitrary_types_allowed=True, extra="forbid", populate_by_name=True, protected_namespaces=()
    )

    agent: AgentField | None = Field(default=None, exclude=True, repr=False)
    agent_id: str | None = None
    model: str = Field(default=DEFAULT_MODEL, alias="model_name")
    store: str = Field(default=DEFAULT_STORE, repr=False)  # may hold a password
    device: str | None = None
    namespace: str = DEFAULT_NAMESPACE
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=1)
    seed: int | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    stop: list[str] | None = None
    streaming: bool | None = None
    timeout: float | None = None
    max_retries: int | None = None
    api_key: SecretStr | None = None
    cache: BaseCache | bool | None = Field(default=False, exclude=True)

    @model_validator(mode="after")
    def _take_agents_place(self) -> Self:
        if self.agent is not None:
            check_agent(self.agent)
            for name, value in place_of(self.agent)._asdict().items():
                if name in self.model_fields_set and getattr(self, name) != value:
                    raise InvalidInputError(name, getattr(self, name), f"{value!r}, where the agent is, or nothing")
                setattr(self, name, value)
        return self

    @model_validator(mode="after")
    def _set_mplus_version(self) -> Self:
        self._add_version("mplus-agents", __version__)
        return self

    @property
    def _llm_type(self) -> str:
        return "mplus-chat"

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        names = ("model", "namespace", *_CALL_OPTIONS)
        return {**{name: getattr(self, name) for name in names}, "always_stop": self.stop, **self._identity({})}

    def open_agent(self) -> Agent:
        """Return the agent; with `agent_id`, the first call loads the model, and an agent that is not there is created.

        Raises:
            CheckpointError: The model cannot be loaded.
            FingerprintMismatchError: The agent was made with another model.
            InvalidInputError: There is no agent, or the name is not allowed.
            StoreError: The database failed.
        """
        return self._open_agent({})

    def invoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:
        """Answer; see `BaseChatModel.invoke`.

        Args:
            input: The prompt.
            config: LangChain's config; `configurable` may hold `agent_id`.
            stop: Strings at which the answer ends.
            **kwargs: `agent_id`, `temperature`, `top_p`, `top_k`, `seed` or `max_tokens`, for this call.
        """
        return super().invoke(input, config, stop=stop, **_with_agent_id(config, kwargs))

    async def ainvoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:
        """Do `invoke` off the event loop.

        Args:
            input: The prompt.
            config: As for `invoke`.
            stop: Strings at which the answer ends.
            **kwargs: As for `invoke`.
        """
        return await super().ainvoke(input, config, stop=stop, **_with_agent_id(config, kwargs))

    def stream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> Iterator[AIMessageChunk]:
        """Answer piece by piece; see `BaseChatModel.stream`.

        Args:
            input: The prompt.
            config: As for `invoke`.
            stop: Strings at which the answer ends.
            **kwargs: As for `invoke`.
        """
        return super().stream(input, config, stop=stop, **_with_agent_id(config, kwargs))

    def astream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[AIMessageChunk]:
        """Do `stream` off the event loop.

        Args:
            input: The prompt.
            config: As for `invoke`.
            stop: Strings at which the answer ends.
            **kwargs: As for `invoke`.
        """
        return super().astream(input, config, stop=stop, **_with_agent_id(config, kwargs))

    def get_token_ids(self, text: str) -> list[int]:
        """Return a text's tokens, by the model's own tokenizer.

        Args:
            text: The text.
        """
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return self._engine().codec.encode(text)

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """Count the tokens of a prompt, as the model gets it and as `usage_metadata` counts it.

        Args:
            messages: The prompt.
            tools: Not counted, with a warning: there is no tool calling yet.

        Raises:
            InvalidInputError: A message cannot be read.
        """
        if tools is not None:
            warnings.warn("ChatMPlus has no tool calling yet; tools are not counted", stacklevel=2)
        if not messages:
            return 0
        from mplus_agents.engine.prompts import chat_prompt

        return len(chat_prompt(self._engine().codec, to_turns(messages)).ids)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return generate_from_stream(self._stream(messages, stop, None, **kwargs))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        # The base class's `_astream` does each step of `_stream` in a thread: a cancelled call ends with its token.
        return await agenerate_from_stream(self._astream(messages, stop, None, **kwargs))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        turns = to_turns(messages)
        options = self._options(stop, kwargs)
        answering = self._open_agent(kwargs).begin_generation(turns, **options)
        for piece in answering:
            chunk = ChatGenerationChunk(message=AIMessageChunk(content=piece))
            if run_manager is not None:
                run_manager.on_llm_new_token(piece, chunk=chunk)
            yield chunk
        yield ChatGenerationChunk(message=self._last_chunk(answering))

    def _last_chunk(self, answering: Answering) -> AIMessageChunk:
        num_in, num_out = answering.num_prompt_tokens, answering.num_new_tokens
        return AIMessageChunk(
            content="",
            usage_metadata=UsageMetadata(input_tokens=num_in, output_tokens=num_out, total_tokens=num_in + num_out),
            response_metadata={
                "model_name": self.model,
                "model_provider": _PROVIDER,
                "finish_reason": answering.finish_reason,
            },
            chunk_position="last",
        )

    def _options(self, stop: list[str] | None, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Bring LangChain's options, the call's before the constructor's, to the engine's."""
        for name in kwargs:
            if name not in (*_CALL_OPTIONS, *_IGNORED_KWARGS):
                raise InvalidInputError("keyword argument", name, ", ".join((*_CALL_OPTIONS, "agent_id", "stop")))
        if kwargs.get("model", self.model) != self.model:
            raise InvalidInputError("model", kwargs["model"], f"{self.model!r}: a memory belongs to one model")
        given = {name: kwargs.get(name, getattr(self, name)) for name in _CALL_OPTIONS}
        options = {name: given[name] for name in ("top_p", "top_k", "seed") if given[name] is not None}
        if given["temperature"]:
            options.update(do_sample=True, temperature=given["temperature"])
        elif surplus := {"top_p", "top_k"} & options.keys():
            raise InvalidInputError("temperature", given["temperature"], f"above 0 with {min(surplus)}, which samples")
        return {**options, "max_new_tokens": given["max_tokens"], "stop": [*(self.stop or ()), *(stop or ())]}

    def _engine(self) -> MPlus:
        return self.agent.mplus if self.agent is not None else engine_at(self._place())

    def _place(self) -> Place:
        return Place(self.model, self.store, self.device, self.namespace)

    def _agent_name(self, kwargs: Mapping[str, Any]) -> str | None:
        """Return the name for a call: its own, else that of the config around it, else the constructor's."""
        name = _with_agent_id(None, kwargs).get("agent_id", self.agent_id)
        if name is not None and not isinstance(name, str):
            raise InvalidInputError("agent_id", name, "an agent's name, as a string")
        return self.agent.name if name is None and self.agent is not None else name

    def _open_agent(self, kwargs: Mapping[str, Any]) -> Agent:
        name = self._agent_name(kwargs)
        if name is None:
            raise InvalidInputError("agent_id", None, _HOW_TO_GIVE_AN_AGENT)
        if self.agent is not None and name == self.agent.name:
            return self.agent
        return self._engine().agent(name, namespace=self.namespace)

    def _identity(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return which memory a call reads, and its version, from the database alone."""
        name = self._agent_name(kwargs)
        if name is None:
            return {"agent_id": None, "memory_version": None}
        store = self.agent.mplus.store if self.agent is not None else store_at(self._place())
        record = store.find_agent(self.namespace, name)
        return {"agent_id": name, "memory_version": record and record.version, "store": store.url}

    def _get_invocation_params(self, stop: list[str] | None = None, **kwargs: Any) -> dict[str, Any]:
        return {**super()._get_invocation_params(stop=stop, **kwargs), **self._identity(kwargs)}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        every_stop = [*(self.stop or ()), *(stop or ())]
        params = super()._get_ls_params(stop=every_stop or None, **kwargs)
        params["ls_provider"] = _PROVIDER
        return params

    def _resolve_model_profile(self) -> ModelProfile | None:
        if self.agent is None:
            return profile_of(self.model, read_prompt_limit(self.model), self.max_tokens)
        mplus = self.agent.mplus
        return profile_of(mplus.name, mplus.model.config.max_prompt_tokens, self.max_tokens)

    def _chat_model_stream_v3(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> ChatModelStream:
        return super()._chat_model_stream_v3(input, config, stop=stop, **_with_agent_id(config, kwargs))

    async def _achat_model_stream_v3(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncChatModelStream:
        return await super()._achat_model_stream_v3(input, config, stop=stop, **_with_agent_id(config, kwargs))


def _with_agent_id(config: RunnableConfig | None, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Add the config's agent to a call's arguments, unless they name one; LangChain itself keeps the config back."""
    name = ensure_config(config).get("configurable", {}).get("agent_id")
    return dict(kwargs) if name is None or "agent_id" in kwargs else {**kwargs, "agent_id": name}
