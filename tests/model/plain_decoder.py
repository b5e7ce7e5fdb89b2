"""A Llama written out by hand over hidden states, without caches, masks, fused weights or slots.

Memory tokens are kept as hidden states and projected anew in every call; each layer has its own list of them. So it is
slow, and shares nothing with the code it checks but the weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn import functional


def inverse_frequencies(config: dict[str, Any]) -> torch.Tensor:
    """RoPE's frequencies by formula, with the scaling of Llama 3 if the config names it."""
    width = config["head_dim"]
    frequencies: torch.Tensor = config["rope_theta"] ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    scaling = config["rope_scaling"]
    if scaling is None:
        return frequencies
    assert scaling["rope_type"] == "llama3"
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    scaled = []
    for frequency in frequencies.tolist():
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        share = min(1.0, max(0.0, (turns - low) / (high - low)))
        scaled.append(frequency * share + frequency / scaling["factor"] * (1 - share))
    return torch.tensor(scaled, dtype=torch.float64)


class PlainDecoder:
    """The weights of a published checkpoint under one of its adapters, W + s·B·A.

    Args:
        folder: The checkpoint.
        adapter: `default` (write) or `decoder_adapter` (read).
    """

    def __init__(self, folder: Path, adapter: str) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.tensors = load_file(folder / "model.safetensors")
        self.num_layers = self.config["num_hidden_layers"]
        self._adapter = adapter
        self._frequencies = inverse_frequencies(self.config)

    def weight(self, name: str) -> torch.Tensor:
        """Return a linear layer's weight, the adapter added."""
        if f"{name}.weight" in self.tensors:
            return self.tensors[f"{name}.weight"]
        lora = self.config["lora_config"]
        down = self.tensors[f"{name}.lora_A.{self._adapter}.weight"]
        up = self.tensors[f"{name}.lora_B.{self._adapter}.weight"]
        scaling = float(lora["lora_alpha"] / lora["r"])
        return self.tensors[f"{name}.base_layer.weight"] + scaling * up @ down

    def norm(self, hidden: torch.Tensor, name: str) -> torch.Tensor:
        """RMS norm."""
        scale = (hidden.pow(2).mean(dim=-1, keepdim=True) + float(self.config["rms_norm_eps"])).rsqrt()
        return hidden * scale * self.tensors[f"{name}.weight"]

    def rotated(self, heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Turn [m, h, d_h] by RoPE."""
        angles = positions[:, None].double() * self._frequencies[None]
        cos, sin = angles.cos().float()[:, None], angles.sin().float()[:, None]
        first, second = heads.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def layer(
        self, number: int, memory: torch.Tensor, hidden: torch.Tensor, *, places: torch.Tensor, first: int
    ) -> torch.Tensor:
        """Run one layer on `hidden` [n, d] at positions from `first` on, seeing `memory` [m, d] at `places` too."""
        prefix, width = f"model.layers.{number}", self.config["head_dim"]
        rows = self.norm(torch.cat([memory, hidden]), f"{prefix}.input_layernorm")
        positions = torch.cat([places, torch.arange(first, first + len(hidden))])
        num_memory = len(memory)

        def heads(name: str, inputs: torch.Tensor) -> torch.Tensor:
            rows = functional.linear(inputs, self.weight(f"{prefix}.self_attn.{name}"))
            return rows.view(len(inputs), -1, width)

        queries = self.rotated(heads("q_proj", rows[num_memory:]), positions[num_memory:])
        keys, values = self.rotated(heads("k_proj", rows), positions), heads("v_proj", rows)
        group = queries.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", queries, keys) / math.sqrt(width)
        later = torch.ones(len(hidden), len(hidden), dtype=torch.bool).triu(1)
        scores[:, :, num_memory:] = scores[:, :, num_memory:].masked_fill(later, -math.inf)
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).flatten(1)
        hidden = hidden + functional.linear(mixed, self.weight(f"{prefix}.self_attn.o_proj"))
        normed = self.norm(hidden, f"{prefix}.post_attention_layernorm")
        gate = functional.silu(functional.linear(normed, self.weight(f"{prefix}.mlp.gate_proj")))
        inner = gate * functional.linear(normed, self.weight(f"{prefix}.mlp.up_proj"))
        return hidden + functional.linear(inner, self.weight(f"{prefix}.mlp.down_proj"))

    def retrieval_keys(self, number: int, hidden: torch.Tensor, part: str = "key_proj") -> torch.Tensor:
        """f_k (or f_q) of hidden states, after the layer's input norm."""
        normed = self.norm(hidden, f"model.layers.{number}.input_layernorm")
        prefix = f"model.layers.{number}.self_attn.{part}"
        return functional.silu(normed @ self.tensors[f"{prefix}.0.weight"].T) @ self.tensors[f"{prefix}.2.weight"].T

    def read(
        self,
        input_ids: Sequence[int],
        theta: Sequence[torch.Tensor],
        long_term: Sequence[tuple[torch.Tensor, torch.Tensor, int]] | None = None,
        query_mask: Sequence[bool] | None = None,
    ) -> tuple[torch.Tensor, list[list[int]]]:
        """Read a prompt over [bos | retrieved Θ | θ].

        Args:
            input_ids: The prompt.
            theta: Per layer, θ's hidden states, oldest first.
            long_term: Per layer, Θ's hidden states and retrieval keys, oldest first, and how many to retrieve.
            query_mask: Which prompt tokens query; all if None.

        Returns:
            Logits [n, vocab], and per layer the retrieved places.
        """
        hidden = self.tensors["model.embed_tokens.weight"][torch.tensor(input_ids)]
        chosen: list[list[int]] = []
        counts = [min(entry[2], len(entry[0])) for entry in long_term] if long_term else [0] * self.num_layers
        for number in range(self.num_layers):
            num_theta, start = len(theta[number]), 1 + max(counts)
            parts = [self.tensors["bos_embedding"][number]]
            picked: list[int] = []
            if long_term and counts[number]:
                tokens, keys, _ = long_term[number]
                asking = hidden if query_mask is None else hidden[torch.tensor(query_mask)]
                scores = torch.sigmoid(self.retrieval_keys(number, asking, "query_proj") @ keys.T).mean(dim=0)
                picked = sorted(scores.topk(counts[number]).indices.tolist())
                parts.append(tokens[picked])
            chosen.append(picked)
            places = [0, *range(start - len(picked), start + num_theta)]
            memory = torch.cat([*parts, theta[number]])
            hidden = self.layer(number, memory, hidden, places=torch.tensor(places), first=start + num_theta)
        return self.norm(hidden, "model.norm") @ self.weight("lm_head").T, chosen

    def write(self, input_ids: Sequence[int], tail: Sequence[torch.Tensor] | None, num_new: int) -> torch.Tensor:
        """Compress a text into [L, K, d], given per layer the newest K tokens of θ, or none."""
        text = self.tensors["model.embed_tokens.weight"][torch.tensor(input_ids)]
        missing = max(0, num_new - len(text))
        written = []
        for number in range(self.num_layers):
            bos = self.tensors["bos_embedding"][number]
            known = bos.expand(missing, -1) if tail is None else tail[number]
            split = len(known) - missing
            rows = torch.cat([known[split:], text])
            rows = torch.cat([rows[:-num_new], rows[-num_new:] + self.tensors["new_memory_positional_emb"][0]])
            memory = torch.cat([bos, known[:split]])
            rows = self.layer(number, memory, rows, places=torch.arange(1 + split), first=1 + split)
            text = rows[missing:]
            written.append(rows[-num_new:])
        return torch.stack(written)
