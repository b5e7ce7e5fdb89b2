"""One agent: a name, a memory that outlives the process, and the calls that write to it and read from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from mplus_agents.config import LongTermUse
from mplus_agents.engine.answering import Answering, answer_all
from mplus_agents.engine.inputs import check_number, parse_conversation, parse_memories, parse_message
from mplus_agents.engine.inspection import agent_stats, layer_tokens
from mplus_agents.engine.progress import ProgressBar
from mplus_agents.engine.prompts import Prompt, chat_prompt, question_prompt
from mplus_agents.engine.records import AgentStats, Document, Generation, Message, Receipt, TokenInfo
from mplus_agents.engine.resident import Resident
from mplus_agents.engine.state import AgentState
from mplus_agents.engine.text import check_text
from mplus_agents.engine.writer import Writer

if TYPE_CHECKING:
    from mplus_agents.engine.mplus import MPlus


class Agent:
    """An agent's memory and voice; made by `MPlus.agent`, safe to use from many threads.

    Args:
        mplus: The engine.
        namespace: Where the name is unique.
        name: The agent's name.
        agent_id: Its row in the store.
    """

    def __init__(self, mplus: MPlus, namespace: str, name: str, agent_id: int) -> None:
        self._mplus = mplus
        self.namespace = namespace
        self.name = name
        self._agent_id = agent_id
        self._state = AgentState(mplus.model, mplus.codec, mplus.store, namespace, name, agent_id)

    def __repr__(self) -> str:
        return f"Agent({self.name!r}, namespace={self.namespace!r}, model={self._mplus.name!r})"

    def has_id(self, agent_id: int) -> bool:
        """Tell whether this is the agent of a row in the store; a name may be deleted and created again.

        Args:
            agent_id: The row.
        """
        return self._agent_id == agent_id

    @property
    def mplus(self) -> MPlus:
        """The engine this agent lives in."""
        return self._mplus

    def remember(self, memories: object, *, source_id: str | None = None, progress: bool | None = None) -> Receipt:
        """Take turns or documents into the memory.

        Short texts wait verbatim in the window, which every prompt shows, until about a chunk is there. A document that
        was read before is not read twice, and one that was interrupted goes on where it stopped.

        Turns given together as a list are stored all or nothing, as far as they make at most 16 injections.

        Args:
            memories: A text (str or UTF-8 bytes), a `Document`, a `Message` or `{"role", "content"}`, an open file, a
                path (`pathlib.Path`), or an iterable of these.
            source_id: A stable name of a single document; its hash if None.
            progress: Show a progress bar; if None, for long texts on a terminal.

        Returns:
            What was made durable, or why nothing was injected.

        Raises:
            InvalidInputError: Something cannot be remembered. Nothing was stored, but for what came before it in an
                iterator, or before a document that has changed.
            ConflictError: Another process wrote to the agent at the same time; call again.
            StoreError: The database failed; the message says so, and everything acknowledged before is still there.
        """
        items = parse_memories(memories, source_id)
        with self._state.open_to_write() as resident, ProgressBar(progress) as bar:
            writer = self._writer(resident, bar)
            for item in _until_error(items, writer):
                if isinstance(item, Document):
                    bar.expect(len(item.text))
                    writer.add_document(item)
                else:
                    writer.add_message(item)
            writer.commit()
            return writer.receipt()

    def flush(self) -> Receipt:
        """Inject what waits in the window now, unless it is under the model's minimum.

        Returns:
            What was injected, or why nothing was.

        Raises:
            ConflictError: Another process wrote to the agent at the same time; call again.
            StoreError: The database failed.
        """
        with self._state.open_to_write() as resident:
            writer = self._writer(resident)
            writer.flush()
            writer.commit()
            return writer.receipt()

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
        with self._state.open() as resident:
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
        with self._state.open() as resident:
            prompts = [question_prompt(self._mplus.codec, resident.window_text, question) for question in checked]
            return [item.text for item in self._answer_all(resident, prompts, max_new_tokens, options, batch_size)]

    def chat(self, message: str | Message, *, max_new_tokens: int | None = None, **options: Any) -> str:
        """Answer a turn of a conversation, then remember the turn and the answer.

        Args:
            message: What the user says.
            max_new_tokens: Most tokens of the answer; as many as fit, at most 128, if None.
            **options: As for `ask`.

        Returns:
            The answer.

        Raises:
            InvalidInputError: The message or an option's value is not allowed.
            ConfigError: An option is unknown.
            PromptTooLongError: Message, window and answer do not fit the generation window; nothing was remembered.
            StoreError: The answer was given but could not be remembered.
        """
        return "".join(self.stream(message, max_new_tokens=max_new_tokens, **options))

    def stream(self, message: str | Message, *, max_new_tokens: int | None = None, **options: Any) -> Iterator[str]:
        """Do `chat` piece by piece; the turn is remembered when the answer is complete, not if it is broken off.

        Args:
            message: What the user says.
            max_new_tokens: Most tokens of the answer; as many as fit, at most 128, if None.
            **options: As for `ask`.

        Returns:
            Pieces of the answer.

        Raises:
            InvalidInputError: The message or an option's value is not allowed.
            ConfigError: An option is unknown.
            PromptTooLongError: Message, window and answer do not fit the generation window.
        """
        turn = parse_message("message", message)
        with self._state.open() as resident:
            prompt = chat_prompt(self._mplus.codec, [turn], lead=resident.window_text)
            answering = self._begin(resident, prompt, max_new_tokens, options)
        return self._stream_and_remember(turn, answering)

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
        with self._state.open() as resident:
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
        with self._state.open() as resident:
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
        with self._state.open() as resident, torch.no_grad():
            return self._mplus.model.read(ids, resident.memory, long_term=long_term, seed=seed).logits[0]

    @property
    def window(self) -> list[Message]:
        """The turns that wait verbatim, oldest first; pieces of documents come as system turns."""
        with self._state.open() as resident:
            return [Message(cast(Any, item.role or "system"), item.content) for item in resident.window]

    @property
    def window_text(self) -> str:
        """The window as a prompt shows it; empty if nothing waits."""
        with self._state.open() as resident:
            return resident.window_text

    def clear_window(self) -> int:
        """Forget what waits in the window without injecting it; a document whose end waits there is not read again.

        Returns:
            How many turns were dropped.

        Raises:
            ConflictError: Another process wrote to the agent at the same time; call again.
            StoreError: The database failed.
        """
        with self._state.open_to_write() as resident:
            seqs = [item.seq for item in resident.window if item.seq is not None]
            if seqs:
                with self._mplus.store.write(resident.record) as tx:
                    tx.remove_from_window(seqs)
                resident.record, resident.window = tx.agent, []
            return len(seqs)

    def stats(self) -> AgentStats:
        """Return the memory in numbers.

        Raises:
            StoreError: The database failed.
        """
        with self._state.open() as resident:
            return agent_stats(resident, self._mplus.store.stats(self._agent_id))

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
        with self._state.open() as resident:
            return [info for number in layers for info in layer_tokens(resident, number)]

    def delete(self) -> None:
        """Delete the agent with its memory, window, documents and log; it cannot be used afterwards.

        Raises:
            AgentNotFoundError: It was deleted already.
            StoreError: The database failed.
        """
        with self._state.closed():
            self._mplus.store.delete_agent(self._agent_id)
            self._mplus.forget(self)

    def _writer(self, resident: Resident, bar: ProgressBar | None = None) -> Writer:
        advance = bar.advance if bar is not None else None
        return Writer(self._mplus.model, self._mplus.codec, self._mplus.store, resident, advance)

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

    def _stream_and_remember(self, turn: Message, answering: Answering) -> Iterator[str]:
        pieces = []
        for piece in answering:
            pieces.append(piece)
            yield piece
        answer = "".join(pieces)
        turns = [turn, Message("assistant", answer)] if answer.strip() else [turn]
        self.remember(turns, progress=False)


def _until_error(items: Iterator[Message | Document], writer: Writer) -> Iterator[Message | Document]:
    """Go through items; if the next one cannot be had, what came before it is stored first."""
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except BaseException:
            writer.commit()
            raise
        yield item
