"""What goes into a model and what comes out of a read, and the checks between callers and the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from mplus_agents.errors import InvalidInputError
from mplus_agents.memory import MemoryState
from mplus_agents.model.adapters import LoraPair
from mplus_agents.model.retriever import LayerRetriever

if TYPE_CHECKING:
    from mplus_agents.model.mplus import MPlusModel

Memories = MemoryState | Sequence[MemoryState]


@dataclass(frozen=True, slots=True)
class ModelParts:
    """What a loader hands over to build a model from.

    Attributes:
        decoder: The transformers causal language model, the read adapter fused.
        adapters: Adapters by the name of their linear layer in the decoder without its head; empty without adapters.
        retrievers: One per layer; empty for MemoryLLM.
        bos_embedding: [L, 1, d], every layer's own beginning-of-sequence row.
        new_memory_positional_emb: [1, 1, d], added to the rows that become memory.
        fingerprint: Digests that identify the weights, by part.
    """

    decoder: PreTrainedModel
    adapters: Mapping[str, LoraPair]
    retrievers: Sequence[LayerRetriever]
    bos_embedding: torch.Tensor
    new_memory_positional_emb: torch.Tensor
    fingerprint: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ReadOutput:
    """What a read returns.

    Attributes:
        logits: [b, n, vocab].
        retrieved: Per layer, [at most K0] int64: the places in Θ's order of entry, staged tokens last, of the tokens
            read, in the order in which they were placed (oldest first). For a list of memories, one such list each.
    """

    logits: torch.Tensor
    retrieved: list[Any]


def check_call(
    model: MPlusModel, input_ids: torch.Tensor, memory: Memories, query_mask: torch.Tensor | None = None
) -> list[MemoryState]:
    """Check what a caller gives `write`, `read` or `generate`.

    Args:
        model: The model.
        input_ids: [b, n] int64.
        memory: One memory, or one per row.
        query_mask: [b, n] bool.

    Returns:
        The memories, one per row.

    Raises:
        InvalidInputError: A shape, a token id or a memory does not fit.
    """
    memories = [memory] if isinstance(memory, MemoryState) else list(memory)
    if input_ids.ndim != 2 or not input_ids.numel() or input_ids.dtype != torch.int64:
        given = f"{list(input_ids.shape)} {input_ids.dtype}"
        raise InvalidInputError("input_ids", given, "[b, n] int64 with at least one token per row")
    if len(memories) != len(input_ids):
        raise InvalidInputError("memory", f"{len(memories)} memories", f"one per row of input_ids ({len(input_ids)})")
    vocab_size = model.decoder.config.vocab_size
    if int(input_ids.min()) < 0 or int(input_ids.max()) >= vocab_size:
        wrong = int(input_ids.min()) if int(input_ids.min()) < 0 else int(input_ids.max())
        raise InvalidInputError("input_ids", f"token {wrong}", f"token ids from 0 to {vocab_size - 1}")
    if any(state.config != model.config.memory for state in memories):
        raise InvalidInputError("memory", "made for another shape or rule", "a memory of this model")
    is_mask = query_mask is None or (query_mask.dtype == torch.bool and query_mask.shape == input_ids.shape)
    if query_mask is not None and not (is_mask and query_mask.any(dim=1).all()):
        raise InvalidInputError(
            "query_mask",
            f"{list(query_mask.shape)} {query_mask.dtype}",
            "[b, n] bool with at least one True per row",
        )
    return memories
