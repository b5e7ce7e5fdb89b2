"""The paper's recipe on documents (3.2.4, App. D): the sub-tasks of its three stages over one carried memory.

Where the paper and the published training code differ, this follows the paper; docs/training-differences.md lists the
differences and the options that bring the code's ways back.

All that is drawn depends on the seed and a counter alone. Sub-tasks and the choice of a source are drawn alike in all
processes, so that they do like work at the same time; everything else is drawn for each rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Protocol

import torch

from mplus_agents.engine.text import TextCodec
from mplus_agents.errors import ConfigError
from mplus_agents.model.adapters import READ_ADAPTER, WRITE_ADAPTER
from mplus_agents.training.chunking import (
    ChunkRule,
    Passage,
    Target,
    keep_last,
    repeat_first,
    split_document,
    whole_text,
)
from mplus_agents.training.document_stage import DocumentStage
from mplus_agents.training.documents import Document, DocumentMixture, SourceConfig
from mplus_agents.training.network import Memory, TrainableMPlus
from mplus_agents.training.pool import MemoryPool, PoolShape
from mplus_agents.training.pool_reading import FreshMemory, PoolMemory, SlotRetrieverLoss, key_maker, masked_loss

INSTRUCTION = "Repeat: "
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MOST_SHORT_DOCUMENTS = 10_000  # one after the other; then something is wrong with the data


class DocumentStream(Protocol):
    """Where documents come from."""

    def __next__(self) -> Document:
        """Return the next document."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position."""
        ...


@dataclass(frozen=True, slots=True)
class _Cached:
    """An earlier target to come back to.

    Attributes:
        target: What was read.
        owner: The document whose tokens it needs.
        distance: Chunks injected since.
    """

    target: Target
    owner: int
    distance: int = 0


class DocumentRecipe:
    """Computes the losses of one stage.

    Args:
        network: The network; its config says K, K0, M, and how long chunks and targets are.
        documents: Where documents come from.
        stage: The stage.
        instruction: Tokens of the instruction to repeat a text.
        seed: Seed of all draws.
        rank: Number of this process.
        memory_dtype: Of the carried hidden states; the network's own if None.
        long_term_device: Where the hidden states of Θ are; where the network is if None.

    Raises:
        ConfigError: The stage does not fit the network.
    """

    def __init__(
        self,
        network: TrainableMPlus,
        documents: DocumentStream,
        stage: DocumentStage,
        instruction: Sequence[int],
        seed: int = 0,
        rank: int = 0,
        memory_dtype: torch.dtype | None = None,
        long_term_device: torch.device | str | None = None,
    ) -> None:
        self.network = network
        self.stage = stage
        self._documents = documents
        self._instruction = list(instruction)
        self._seed, self._rank = seed, rank
        config, memory = network.config, network.config.memory
        if (stage.has_long_term or stage.retriever_weight) and not memory.has_long_term:
            raise ConfigError("the stage has a retriever and the network has none")
        rule = ChunkRule(max(2, config.min_chunk_tokens), config.chunk_tokens, config.max_prompt_tokens)
        self._rules = {False: rule, True: replace(rule, min_tokens=min(stage.long_min_chunk_tokens, rule.max_tokens))}
        shape = PoolShape(
            num_layers=memory.num_layers,
            hidden_size=memory.hidden_size,
            num_new=memory.tokens_per_injection,
            max_short_term=stage.max_short_term or memory.max_short_term,
            retrieval_dim=memory.retrieval_dim,
            max_long_term=memory.max_long_term if stage.has_long_term else 0,
        )
        dtype = memory_dtype or network.bos_embedding.dtype
        self.pool = MemoryPool(shape, seed, rank, network.bos_embedding.device, dtype, long_term_device)
        self._make_keys = key_maker(network) if stage.has_long_term else None
        self._pending: list[tuple[list[torch.Tensor], int]] = []
        self._num_losses = 0
        self._cached: _Cached | None = None
        self._was_revisit = False

    @property
    def can_revisit(self) -> bool:
        """Whether there is a target to come back to: not twice in a row, and not before more was injected."""
        return self._cached is not None and self._cached.distance > 0 and not self._was_revisit

    def loss(self, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the loss of a step, and numbers to log.

        Args:
            step: Its number within the stage.
        """
        stage = self.stage
        if self._make_keys and stage.refresh_keys_every and step and step % stage.refresh_keys_every == 0:
            self.pool.refresh_keys(self._make_keys)
        shared = Random(f"{self._seed}/task/{self._num_losses}")
        own = Random(f"{self._seed}/{self._rank}/step/{self._num_losses}")
        self._num_losses += 1
        kind = stage.draw_task(shared, self.can_revisit)
        replaces = shared.random() < stage.replace_share
        if kind == "plain":
            target = whole_text(*self._next_passage(own))
            loss = self._read(target, self._memory(target, own))
            return loss, {"plain": loss.item()}
        if kind == "revisit":
            return self._revisit(own)
        most_chunks = stage.most_chunks(step) if kind == "multi_chunk" else 1
        passage, is_repetition = self._draw_task_passage(own, most_chunks)
        owner = self.pool.new_owner()
        if kind == "two_chunk":
            loss, metrics = self._two_chunk(passage, owner)
        else:
            loss, metrics = self._multi_chunk(passage, owner, own)
        self._remember_target(passage, owner, replaces)
        form = "repetition" if is_repetition else "completion"
        return loss, {**metrics, form: metrics[kind], "chunks": float(len(passage.contexts))}

    def after_step(self) -> None:
        """Put what was written with gradient into the memory, now without."""
        for new, owner in self._pending:
            self.pool.append(new, self._make_keys, owner)
        self._pending = []

    def state_dict(self) -> dict[str, Any]:
        """Return memory, cached target and data position; call it after `after_step`.

        Tensors of Θ are not copied: write them out before the next step.
        """
        assert not self._pending, "call after_step first"
        cached = self._cached
        values = None
        if cached is not None:
            values = [cached.target.ids, cached.target.num_masked, cached.owner, cached.distance]
        return {
            "pool": self.pool.state_dict(),
            "documents": self._documents.state_dict(),
            "num_losses": self._num_losses,
            "was_revisit": self._was_revisit,
            "cached": values,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. To carry only the memory into the next stage, load `state["pool"]` into `pool`.

        Args:
            state: What `state_dict` returned.

        Raises:
            CheckpointError: The memory has another shape.
            ConfigError: The data is not the same.
        """
        self.pool.load_state_dict(state["pool"])
        self._documents.load_state_dict(state["documents"])
        self._num_losses, self._was_revisit = state["num_losses"], state["was_revisit"]
        self._cached = None
        self._pending = []
        if state["cached"] is not None:
            ids, num_masked, owner, distance = state["cached"]
            self._cached = _Cached(Target(list(ids), num_masked), owner, distance)

    def _next_passage(self, rng: Random) -> tuple[Passage, ChunkRule]:
        for _ in range(_MOST_SHORT_DOCUMENTS):
            document = next(self._documents)
            rule = self._rules[document.is_long]
            passage = split_document(document.ids, rule, rng)
            if passage is not None:
                return passage, rule
        raise ConfigError(f"{_MOST_SHORT_DOCUMENTS} documents in a row were too short to be cut in two")

    def _draw_task_passage(self, rng: Random, most_chunks: int) -> tuple[Passage, bool]:
        """Return a passage, and whether its target repeats the first chunk instead of going on."""
        passage, rule = self._next_passage(rng)
        if rng.random() < self.stage.repeat_share:
            return repeat_first(passage, most_chunks, self._instruction, rule), True
        return keep_last(passage, most_chunks), False

    def _two_chunk(self, passage: Passage, owner: int) -> tuple[torch.Tensor, dict[str, float]]:
        """Write with gradient, read the new tokens alone; the only task that trains writing."""
        new = self.network.write(self._ids(passage.contexts[0])[None], self.pool.tail)
        adapter = READ_ADAPTER if self.stage.two_chunk_read_adapter == "read" else WRITE_ADAPTER
        loss = self._read(passage.target, FreshMemory(self.network, new), adapter)
        self._pending.append(([rows.detach()[0] for rows in new], owner))
        return loss, {"two_chunk": loss.item()}

    def _multi_chunk(self, passage: Passage, owner: int, rng: Random) -> tuple[torch.Tensor, dict[str, float]]:
        with torch.no_grad():
            for chunk in passage.contexts:
                new = self.network.write(self._ids(chunk)[None], self.pool.tail)
                self.pool.append([rows[0] for rows in new], self._make_keys, owner)
        loss, metrics = self._read_pool(passage.target, owner, rng)
        return loss, {"multi_chunk": metrics.pop("read"), **metrics}

    def _revisit(self, rng: Random) -> tuple[torch.Tensor, dict[str, float]]:
        cached = self._cached
        assert cached is not None
        self._was_revisit = True
        loss, metrics = self._read_pool(cached.target, cached.owner, rng)
        return loss, {"revisit": metrics.pop("read"), "distance": float(cached.distance), **metrics}

    def _read_pool(self, target: Target, owner: int, rng: Random) -> tuple[torch.Tensor, dict[str, float]]:
        """Read over the whole memory, the retriever being trained to find one document's tokens in θ."""
        stage, retriever_loss = self.stage, None
        if stage.retriever_weight and self.pool.theta_size:
            retriever_loss = SlotRetrieverLoss(self.pool.theta_owners == owner, stage.retriever_objective)
        memory = self._memory(target, rng, retriever_loss)
        loss = self._read(target, memory)
        metrics = {"read": loss.item(), **memory.recalls(owner)}
        if retriever_loss is not None:
            found = retriever_loss.total()
            metrics["retriever"] = found.item()
            loss = loss + stage.retriever_weight * found
        return loss, metrics

    def _memory(self, target: Target, rng: Random, loss: SlotRetrieverLoss | None = None) -> PoolMemory:
        num_retrieved = self.network.config.memory.num_retrieved if self.stage.has_long_term else 0
        prefixes: list[int | None] = [None, None]
        if self.stage.random_query_prefix:
            prefixes = [rng.randint(1, len(target.ids) - 1) for _ in prefixes]
        return PoolMemory(self.network, self.pool, num_retrieved, loss, *prefixes)

    def _read(self, target: Target, memory: Memory, adapter: str = READ_ADAPTER) -> torch.Tensor:
        ids = self._ids(target.ids)
        hidden = self.network.read(ids[None, :-1], memory, adapter)
        return masked_loss(self.network, hidden[0], ids, target.num_masked)

    def _ids(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor(ids, device=self.pool.device)

    def _remember_target(self, passage: Passage, owner: int, replaces: bool) -> None:
        cached = self._cached
        if cached is None or (self._was_revisit and replaces):
            self._cached = _Cached(passage.target, owner)
        else:
            self._cached = replace(cached, distance=cached.distance + len(passage.contexts))
        self._was_revisit = False


def build_document_recipe(
    network: TrainableMPlus,
    codec: TextCodec,
    options: Mapping[str, Any],
    sources: Sequence[Mapping[str, Any]],
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> DocumentRecipe:
    """Make the recipe from what a stage file says.

    Args:
        network: The network, where it will be trained.
        codec: The tokenizer.
        options: Fields of `DocumentStage`, and `paper_stage`, `memory_dtype` and `long_term_device`.
        sources: Fields of `SourceConfig`, one mapping per source.
        seed: Seed of all draws.
        rank: Number of this process.
        world_size: Number of processes.

    Raises:
        ConfigError: A key is unknown, a value is not allowed, or the data cannot be opened.
    """
    given = dict(options)
    dtype, device = given.pop("memory_dtype", None), given.pop("long_term_device", None)
    if dtype is not None and not (isinstance(dtype, str) and dtype in _DTYPES):
        raise ConfigError(f"memory_dtype is {dtype!r}; allowed: {', '.join(_DTYPES)}")
    try:
        long_term_device = None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"long_term_device is {device!r}; allowed: a torch device, such as 'cpu'") from error
    stage = DocumentStage.from_dict(given)
    configs = [SourceConfig.from_dict(values) for values in sources]
    documents = DocumentMixture(configs, codec.encode, seed, rank, world_size)
    memory_dtype = None if dtype is None else _DTYPES[dtype]
    instruction = codec.encode(INSTRUCTION)
    return DocumentRecipe(network, documents, stage, instruction, seed, rank, memory_dtype, long_term_device)
