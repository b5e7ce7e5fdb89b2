"""Reading a memory: questions, conversations that the caller holds, and looks at the tokens. Nothing is written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

import torch

from mplus_agents.config import LongTermUse
from mplus_agents.engine.answering import Answering, answer_all
from mplus_agents.engine.inputs import check_number, parse_conversation
from mplus_agents.engine.inspection import agent_stats, layer_tokens
from mplus_agents.engine.prompts import Prompt, chat_prompt, question_prompt
from mplus_agents.engine.records import AgentStats, Generation, Message, TokenInfo
from mplus_agents.engine.resident import Resident
from mplus_agents.engine.text import check_text

if TYPE_CHECKING:
    from mplus_agents.engine.mplus import MPlus


class MemoryReader(ABC):
    """What an agent and a view of its past have in common.

    Args:
        mplus: The engine.
        namespace: Where the agent's name is unique.
        name: The agent's name.
    """

    def __init__(self, mplus: MPlus, namespace: str, name: str) -> None:
        self._mplus = mplus
        self.namespace = namespace
        self.name = name

    @property
    def mplus(self) -> MPlus:
        """The engine this memory is read with."""
        return self._mplus

    @abstractmethod
    def _open(self) -> AbstractContextManager[Resident]:
        """Lock the memory and bring it up to date."""

    def ask(self, question: str, *, max_new_tokens: int | None = None, **options: Any) -> str:
        """Answer one question from memory; nothing is written.

        Args:
            question: The question.
            max_new_tokens: Most tokens of the answer; as many as fit, at most 128, if None.
            **options: Fields of `GenerationOptions` (`do_sample`, `temperature`, `long_term`, …), and `stop`, a list of
                strings.

        Returns:
            The answer.

        Raises:
            InvalidInputError: The question or an option's value is not allowed.
            ConfigError: An option is unknown.
            PromptTooLongError: Question, window and answer do not fit the generation window.
        """
        question = check_text("question", question)
        with self._open() as resident:
            prompt = question_prompt(self._mplus.codec, resident.window_text, question)
            answering = self._begin(resident, prompt, max_new_tokens, options)
        return answering.finish().text

    def ask_all(
        self, questions: Sequence[str], *, max_new_tokens: int | None = None, batch_size: int = 16, **options: Any
    ) -> list[str]:
        """Answer many questions, each for itself, those of equal length together; without sampling as `ask` does.

        Args:
            questions: The questions.
            max_new_tokens: Most tokens of an answer; as many as fit, at most 128, if None.
            batch_size: Most questions that are read together; each takes room for the whole θ.
            **options: As for `ask`.

        Returns:
            The answers.

        Raises:
            InvalidInputError: A question or an option's value is not allowed.
            ConfigError: An option is unknown.
            PromptTooLongError: A question, window and answer do not fit the generation window.
        """
        checked = [check_text(f"questions[{place}]", question) for place, question in enumerate(questions)]
        with self._open() as resident:
            prompts = [question_prompt(self._mplus.codec, resident.window_text, question) for question in checked]
            return [item.text for item in self._answer_all(resident, prompts, max_new_tokens, options, batch_size)]

    def generate(self, messages: Sequence[Message], *, max_new_tokens: int | None = None, **options: Any) -> Generation:
        """Answer a conversation that the caller holds; the window is not shown and nothing is written.

        This is what a framework's language model calls: its memory object supplies the window and writes.

        Args:
            messages: The turns; the last one is answered.
            max_new_tokens: Most tokens of the answer; as many as fit, at most 128, if None.
            **options: As for `ask`.

        Returns:
            The answer with its token counts.

        Raises:
            InvalidInputError: A message or an option's value is not allowed.
            ConfigError: An option is unknown.
            PromptTooLongError: The turns and the answer do not fit the generation window.
        """
        return self.begin_generation(messages, max_new_tokens=max_new_tokens, **options).finish()

    def generate_all(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int | None = None,
        batch_size: int = 16,
        **options: Any,
    ) -> list[Generation]:
        """Do `generate` for many conversations, those of equal length together.

        Args:
            conversations: The turns of each; the last one is answered.
            max_new_tokens: Most tokens of an answer; as many as fit, at most 128, if None.
            batch_size: Most conversations that are read together; each takes room for the whole θ.
            **options: As for `ask`.

        Returns:
            The answers with their token counts.

        Raises:
            InvalidInputError: A message or an option's value is not allowed.
            ConfigError: An option is unknown.
            PromptTooLongError: The turns and the answer do not fit the generation window.
        """
        prompts = [chat_prompt(self._mplus.codec, parse_conversation(messages)) for messages in conversations]
        with self._open() as resident:
            return self._answer_all(resident, prompts, max_new_tokens, options, batch_size)

    def begin_generation(
        self, messages: Sequence[Message], *, max_new_tokens: int | None = None, **options: Any
    ) -> Answering:
        """Do `generate` piece by piece.

        Args:
            messages: The turns; the last one is answered.
            max_new_tokens: Most tokens of the answer; as many as fit, at most 128, if None.
            **options: As for `ask`.

        Returns:
            An iterator over pieces of the answer, which knows the token counts at the end.

        Raises:
            InvalidInputError: A message or an option's value is not allowed.
            ConfigError: An option is unknown.
            PromptTooLongError: The turns and the answer do not fit the generation window.
        """
        turns = parse_conversation(messages)
        with self._open() as resident:
            prompt = chat_prompt(self._mplus.codec, turns)
            return self._begin(resident, prompt, max_new_tokens, options)

    def logits(self, text: str, *, long_term: LongTermUse = "retrieved", seed: int = 0) -> torch.Tensor:
        """Return the logits of a text read with this memory, [n, vocab]; for comparing memories.

        Args:
            text: The text.
            long_term: How Θ is read: the tokens `retrieved` by the text, as many at `random`, or none (`off`).
            seed: Seed of a read at random.

        Raises:
            InvalidInputError: The text is not allowed, or there is no such way to read Θ.
        """
        ids = torch.tensor([self._mplus.codec.encode(check_text("text", text))], device=self._mplus.model.device)
        with self._open() as resident, torch.no_grad():
            return self._mplus.model.read(ids, resident.memory, long_term=long_term, seed=seed).logits[0]

    @property
    def window(self) -> list[Message]:
        """The turns that wait verbatim, oldest first; pieces of documents come as system turns."""
        with self._open() as resident:
            return [Message(cast(Any, item.role or "system"), item.content) for item in resident.window]

    @property
    def window_text(self) -> str:
        """The window as a prompt shows it; empty if nothing waits."""
        with self._open() as resident:
            return resident.window_text

    def stats(self) -> AgentStats:
        """Return the memory in numbers.

        Raises:
            StoreError: The database failed.
        """
        with self._open() as resident:
            record = resident.record
            return agent_stats(resident, self._mplus.store.stats(record.id, record.head_commit_id))

    def tokens(self, layer: int | None = None) -> list[TokenInfo]:
        """List every token of θ and Θ: where it is, which injection made it, and how old it is.

        Args:
            layer: Only this layer; all if None.

        Returns:
            Per layer θ in its order, then Θ in the order of entry, staged tokens last.

        Raises:
            InvalidInputError: There is no such layer.
        """
        num_layers = self._mplus.model.config.memory.num_layers
        if layer is not None:
            check_number("layer", layer, num_layers)
        layers = range(num_layers) if layer is None else [layer]
        with self._open() as resident:
            return [info for number in layers for info in layer_tokens(resident, number)]

    def _begin(
        self, resident: Resident, prompt: Prompt, max_new_tokens: int | None, options: dict[str, Any]
    ) -> Answering:
        return Answering.begin(self._mplus.model, self._mplus.codec, resident.memory, prompt, max_new_tokens, options)

    def _answer_all(
        self,
        resident: Resident,
        prompts: Sequence[Prompt],
        max_new_tokens: int | None,
        options: dict[str, Any],
        batch_size: int,
    ) -> list[Generation]:
        model, codec = self._mplus.model, self._mplus.codec
        return answer_all(model, codec, resident.memory, prompts, max_new_tokens, options, batch_size)
