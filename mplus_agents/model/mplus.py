"""The M+ network: an unmodified transformers decoder that writes to and reads from a `MemoryState`.

It holds weights only. Which memory a call works on is an argument, and no call leaves a trace in the module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import nn

from mplus_agents.config import LongTermUse, MemoryRule, MPlusConfig
from mplus_agents.memory import Genesis, MemoryDelta, MemoryState
from mplus_agents.model.adapters import build_write_decoder
from mplus_agents.model.cache import ReadCache, WriteCache
from mplus_agents.model.decoding import GenerationOptions, check_long_term, decode
from mplus_agents.model.families import layer_parts, project_key_value
from mplus_agents.model.hooks import install_read_hooks, install_write_hooks
from mplus_agents.model.parts import Memories, ModelParts, ReadOutput, check_call
from mplus_agents.model.retriever import LayerRetriever


class MPlusModel(nn.Module):
    """M+ (arXiv 2502.00592), or MemoryLLM (arXiv 2402.04624) if there is no Θ.

    Args:
        config: Memory shape, adapters and sizes.
        parts: Weights.
        source: Where the weights came from, for `save_pretrained`; None if they exist only here.
    """

    def __init__(self, config: MPlusConfig, parts: ModelParts, source: str | None = None) -> None:
        super().__init__()
        self.config = config
        self.source = source
        self.base_folder: Path | None = None  # of the decoder that `from_base` started from
        self.adapters = dict(parts.adapters)
        self.fingerprint = dict(parts.fingerprint)
        self.decoder = parts.decoder
        read_decoder = cast(nn.Module, parts.decoder.model)
        self.write_decoder = build_write_decoder(read_decoder, parts.adapters)
        self.retrievers = nn.ModuleList(parts.retrievers)
        self.bos_embedding = nn.Parameter(parts.bos_embedding, requires_grad=False)
        self.new_memory_positional_emb = nn.Parameter(parts.new_memory_positional_emb, requires_grad=False)
        self.genesis: Genesis | None = None
        install_read_hooks(self._read_layers)
        install_write_hooks(cast(nn.ModuleList, self.write_decoder.layers))
        self._rope: tuple[torch.Tensor, torch.Tensor] | None = None
        with torch.no_grad():
            bos = [
                project_key_value(layer, row) for layer, row in zip(self._read_layers, self.bos_embedding, strict=True)
            ]
        self._bos_key_values = [(keys[0], values[0]) for keys, values in bos]
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | PathLike[str],
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        attn_implementation: str = "sdpa",
        memory_rule: MemoryRule | None = None,
        rope_inv_freq: torch.dtype | str | None = None,
    ) -> Self:
        """Load a checkpoint: published M+ layout, published MemoryLLM layout, or our own format.

        Args:
            path_or_hub_id: A folder, or the id of a repository on the Hugging Face hub.
            device: Where to load; the first CUDA device if there is one, else the CPU.
            dtype: What to load as; the checkpoint's own if None.
            attn_implementation: `sdpa`, `eager` or `flash_attention_2`.
            memory_rule: `paper` or `released`; if None, `released` for published checkpoints and what the checkpoint
                says for our own.
            rope_inv_freq: Precision that RoPE's frequencies are rounded to; if None, bfloat16 for published
                checkpoints loaded in bfloat16 (they were trained so), float32 otherwise.

        Returns:
            The model, ready to serve.

        Raises:
            CheckpointError: A tensor is missing, unexpected or misshaped, or the adapters are not the two expected.
            ConfigError: A configuration value is not supported.
            InvalidInputError: An argument is not allowed.
        """
        from mplus_agents.model.loading import LoadOptions, load_model

        options = LoadOptions.resolve(device, dtype, attn_implementation, memory_rule, rope_inv_freq)
        return load_model(cls, path_or_hub_id, options)

    @classmethod
    def from_base(
        cls,
        path_or_hub_id: str | PathLike[str],
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        attn_implementation: str = "sdpa",
        seed: int = 0,
        **memory_options: Any,
    ) -> Self:
        """Turn a transformers decoder into an untrained M+.

        Adapters start at zero effect and the retriever at random, so the model speaks like its base and has yet to
        learn to use its memory.

        Args:
            path_or_hub_id: A folder, or a hub id, of a Llama, Mistral, Qwen2 or Qwen3 model without sliding windows.
            device: Where to load; the first CUDA device if there is one, else the CPU.
            dtype: What to load as; the checkpoint's own if None.
            attn_implementation: `sdpa`, `eager` or `flash_attention_2`.
            seed: Seed of the new weights.
            **memory_options: Fields of `MemoryConfig` (`tokens_per_injection`, `max_short_term`, …) and of
                `MPlusConfig` (`chunk_tokens`, …) that differ from their defaults, and `adapter_rank`.

        Raises:
            ConfigError: The decoder's family, attention or RoPE is not supported, or an option is unknown.
        """
        from mplus_agents.model.base import load_base
        from mplus_agents.model.loading import LoadOptions

        options = LoadOptions.resolve(device, dtype, attn_implementation, None, None)
        return load_base(cls, path_or_hub_id, options, seed, memory_options)

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write the model in our own format: base weights, adapters, retriever and genesis as they were loaded.

        Args:
            folder: Where to write; made if it is not there.

        Raises:
            CheckpointError: The original weights are not at hand any more, as fusing the read adapter is one-way.
        """
        from mplus_agents.model.saving import save_model

        save_model(self, folder)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.bos_embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return self.bos_embedding.dtype

    @property
    def head_shape(self) -> tuple[int, int]:
        """Key/value heads h_kv and head width d_h."""
        return self.config.memory.num_kv_heads, self.config.memory.head_dim

    @property
    def is_fused(self) -> bool:
        """Whether the read adapter changed the base weights, so that the original ones are not in this module."""
        return any(bool(pair.read_up.any()) for pair in self.adapters.values())

    @property
    def uses_flash_attention(self) -> bool:
        """Whether attention takes two-dimensional masks."""
        return "flash" in str(self.decoder.config._attn_implementation)

    @property
    def eos_token_ids(self) -> list[int]:
        """Tokens that end an answer."""
        generation_config = getattr(self.decoder, "generation_config", None)
        ids = getattr(generation_config, "eos_token_id", None)
        if ids is None:
            ids = self.decoder.config.eos_token_id
        if ids is None:
            return []
        return [ids] if isinstance(ids, int) else list(ids)

    def initial_memory(self, seed: int = 0) -> MemoryState:
        """Make a new agent's memory: the checkpoint's own θ and Θ, shared until written to, or empty ones.

        Args:
            seed: The agent's seed, from which all its draws follow.
        """
        return MemoryState(self.config.memory, seed=seed, genesis=self.genesis, device=self.device, dtype=self.dtype)

    @torch.no_grad()
    def write(self, input_ids: torch.Tensor, memory: Memories) -> Any:
        """Compress text into the K new memory tokens per layer (paper 3.1); the memory is not changed.

        Args:
            input_ids: [1, n] int64 with one memory, or [b, n] with a list of b memories.
            memory: What has been remembered so far.

        Returns:
            A `MemoryDelta`, or a list of them for a list of memories.

        Raises:
            InvalidInputError: A shape, a token id or a memory does not fit.
        """
        memories = check_call(self, input_ids, memory)
        input_ids = input_ids.to(self.device)
        deltas: dict[int, MemoryDelta] = {}
        for rows in _group_by(memories, lambda state: state.tail_hidden is not None):
            for row, delta in zip(
                rows, self._write_rows(input_ids[rows], [memories[row] for row in rows]), strict=True
            ):
                deltas[row] = delta
        return deltas[0] if isinstance(memory, MemoryState) else [deltas[row] for row in range(len(memories))]

    def read(
        self,
        input_ids: torch.Tensor,
        memory: Memories,
        query_mask: torch.Tensor | None = None,
        long_term: LongTermUse = "retrieved",
        seed: int = 0,
    ) -> ReadOutput:
        """Run a prompt over [bos | retrieved Θ | θ] (paper 3.2.1); the memory is not changed.

        Args:
            input_ids: [1, n] int64 with one memory, or [b, n] with a list of b memories.
            memory: What has been remembered.
            query_mask: [b, n] bool, the prompt tokens that query Θ; all if None.
            long_term: How Θ is read: the tokens `retrieved` by the prompt, as many at `random`, or none (`off`).
            seed: Seed of a read at random.

        Returns:
            Logits and the retrieved tokens.

        Raises:
            InvalidInputError: A shape, a token id or a memory does not fit, or there is no such way to read Θ.
        """
        check_long_term(long_term)
        memories = check_call(self, input_ids, memory, query_mask)
        cache = ReadCache(self, memories, input_ids.shape[1], query_mask, long_term=long_term, seed=seed)
        logits = self.forward_cached(input_ids.to(self.device), cache)
        retrieved = [
            [state.entry_positions(layer, rows) for layer, rows in enumerate(per_layer)]
            for state, per_layer in zip(memories, cache.retrieved, strict=True)
        ]
        return ReadOutput(logits, retrieved[0] if isinstance(memory, MemoryState) else retrieved)

    def generate(
        self,
        input_ids: torch.Tensor,
        memory: Memories,
        max_new_tokens: int = 16,
        do_sample: bool = False,
        query_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Decode an answer to a prompt.

        Args:
            input_ids: [1, n] int64 with one memory, or [b, n] with a list of b memories.
            memory: What has been remembered; not changed.
            max_new_tokens: Most tokens to decode.
            do_sample: Draw from the distribution; otherwise take the likeliest token.
            query_mask: [b, n] bool, the prompt tokens that query Θ; all if None.
            **options: Other fields of `GenerationOptions`, such as `long_term`.

        Returns:
            [b, m] int64, the new tokens only; rows that end early are filled up with the end token.

        Raises:
            ConfigError: An option is not supported; the message names it.
            InvalidInputError: A value, a shape, a token id or a memory does not fit.
        """
        chosen = GenerationOptions.from_kwargs(max_new_tokens=max_new_tokens, do_sample=do_sample, **options)
        memories = check_call(self, input_ids, memory, query_mask)
        return torch.stack(list(decode(self, input_ids.to(self.device), memories, chosen, query_mask)), dim=1)

    def project(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Turn hidden states into what a memory keeps of them.

        Args:
            hidden: [L, m, d], per layer.

        Returns:
            Keys before RoPE and values, each [L, m, h_kv, d_h], and retrieval keys [L, m, p].
        """
        parts = [self.project_layer(layer, rows) for layer, rows in enumerate(hidden)]
        keys, values, retrieval_keys = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
        return keys, values, retrieval_keys

    def project_layer(self, layer_idx: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Do `project` for one layer.

        Args:
            layer_idx: The layer.
            hidden: [m, d].

        Returns:
            Keys and values, each [m, h_kv, d_h], and retrieval keys [m, p].
        """
        layer = self._read_layers[layer_idx]
        keys, values = project_key_value(layer, hidden)
        if not len(self.retrievers):
            return keys, values, hidden.new_zeros((len(hidden), 0))
        return keys, values, self.retriever(layer_idx).keys(layer_parts(layer)[0](hidden))

    def forward_cached(self, input_ids: torch.Tensor, cache: ReadCache, logits_to_keep: int = 0) -> torch.Tensor:
        """Run the decoder over a call's cache.

        Args:
            input_ids: [b, n] int64, the prompt, or later the last token decoded.
            cache: The call's cache.
            logits_to_keep: Last positions to compute logits for; all if 0.

        Returns:
            [b, n or logits_to_keep, vocab].
        """
        done = cache.get_seq_length() - cache.layout.num_prefix
        starts = torch.from_numpy(cache.layout.row_lengths + done).to(input_ids.device)
        position_ids = starts[:, None] + torch.arange(input_ids.shape[1], device=input_ids.device)
        output = self.decoder(
            input_ids=input_ids,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=logits_to_keep,
        )
        return cast(torch.Tensor, output.logits)

    def rope_table(self, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return RoPE's cosines and sines of the first positions, each [num_positions, d_h]."""
        table = self._rope  # one look: another thread may put a shorter one there
        if table is None or len(table[0]) < num_positions:
            positions = torch.arange(max(num_positions, 1024), device=self.device)[None]
            rotary = cast(nn.Module, cast(nn.Module, self.decoder.model).rotary_emb)
            cos, sin = rotary(self.bos_embedding, positions)
            table = self._rope = (cos[0], sin[0])
        cos, sin = table
        return cos[:num_positions], sin[:num_positions]

    def bos_key_value(self, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return key and value of a layer's bos row for reading, each [h_kv, d_h]."""
        return self._bos_key_values[layer_idx]

    def retriever(self, layer_idx: int) -> LayerRetriever:
        """Return a layer's retriever."""
        return cast(LayerRetriever, self.retrievers[layer_idx])

    def write_layer(self, layer_idx: int) -> nn.Module:
        """Return a decoder layer of the write pass."""
        return cast(nn.ModuleList, self.write_decoder.layers)[layer_idx]

    @property
    def _read_layers(self) -> nn.ModuleList:
        return cast(nn.ModuleList, cast(nn.Module, self.decoder.model).layers)

    def _write_rows(self, input_ids: torch.Tensor, memories: Sequence[MemoryState]) -> list[MemoryDelta]:
        embeddings = cast(nn.Module, self.write_decoder.embed_tokens)(input_ids)
        cache = WriteCache(self, self._write_tail(memories, input_ids.shape[1]), input_ids.shape[1])
        num_memory_rows = cache.num_memory_queries
        fill = embeddings.new_zeros((len(memories), num_memory_rows, embeddings.shape[2]))  # replaced in every layer
        self.write_decoder(inputs_embeds=torch.cat([fill, embeddings], dim=1), past_key_values=cache, use_cache=True)
        hidden = torch.stack(cache.new_hidden, dim=1)  # [b, L, K, d]
        return [MemoryDelta(rows, *self.project(rows)) for rows in hidden]

    def _write_tail(self, memories: Sequence[MemoryState], num_text: int) -> torch.Tensor:
        """[b, L, m, d]: the newest K tokens of θ; without any, bos rows as far as a short text needs query rows."""
        tails = [memory.tail_hidden for memory in memories if memory.tail_hidden is not None]
        if tails:
            return torch.stack(tails)
        num_rows = max(0, self.config.memory.tokens_per_injection - num_text)
        return self.bos_embedding[None].expand(len(memories), -1, num_rows, -1)


def _group_by(memories: Sequence[MemoryState], key: Callable[[MemoryState], object]) -> list[list[int]]:
    """Return the rows of each group, as far as they are not empty."""
    groups: dict[object, list[int]] = {}
    for row, memory in enumerate(memories):
        groups.setdefault(key(memory), []).append(row)
    return list(groups.values())
