"""Digests that tell one model's weights from another's.

They are taken over the tensors as the checkpoint stores them, before any cast or fusing, so that they do not depend on
the device or the dtype a model is served in. They protect against mistakes, not against an attacker.
"""

from __future__ import annotations

import hashlib

import torch
from transformers import PretrainedConfig

_WORDS_PER_STEP = 1 << 20
_ARCHITECTURE_KEYS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "hidden_act",
    "rms_norm_eps",
)
PARTS = ("weights", "adapters", "retriever", "genesis")


def tensor_checksum(tensor: torch.Tensor) -> int:
    """Return a 64-bit checksum of a tensor's bytes that every device computes alike.

    The bytes are taken as 64-bit words w_i and summed as w_i · (2i + 1) modulo 2**64: integer arithmetic, so that the
    order of summation does not matter, and every single changed word shows.

    Args:
        tensor: Any dtype and shape.
    """
    data = tensor.detach().contiguous().flatten().view(torch.uint8)
    whole = len(data) // 8 * 8
    words = data[:whole]
    # A view as int64 needs an aligned start; slices of memory-mapped files do not promise one.
    words = (words.clone() if words.storage_offset() % 8 or words.data_ptr() % 8 else words).view(torch.int64)
    total = 0
    for start in range(0, len(words), _WORDS_PER_STEP):
        part = words[start : start + _WORDS_PER_STEP]
        factors = torch.arange(start, start + len(part), device=part.device, dtype=torch.int64) * 2 + 1
        total += int((part * factors).sum())
    for offset, byte in enumerate(data[whole:].tolist()):
        total += byte * (2 * (len(words) + offset) + 1)
    return total % (1 << 64)


def part_of(name: str) -> str:
    """Return the part of the model that a tensor of a checkpoint belongs to.

    Args:
        name: The tensor's name in the file.
    """
    if ".lora_" in name:
        return "adapters"
    if any(key in name for key in (".query_proj.", ".key_proj.", ".encoder_query_proj.")):
        return "retriever"
    if name == "memory" or name.startswith("ltm"):
        return "genesis"
    return "weights"


class Fingerprint:
    """Collects tensors, in any order, into one digest per part."""

    def __init__(self) -> None:
        self._lines: dict[str, list[str]] = {part: [] for part in PARTS}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take in a tensor as its checkpoint stores it.

        Args:
            name: The tensor's name in the file.
            tensor: The tensor.
        """
        line = f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor_checksum(tensor):016x}"
        self._lines[part_of(name)].append(line)

    def digests(self) -> dict[str, str]:
        """Return one digest per part; `none` for a part without tensors."""
        return {part: _digest(lines) if lines else "none" for part, lines in self._lines.items()}


def architecture(config: PretrainedConfig) -> dict[str, str]:
    """Describe a decoder's shape, value by value.

    Args:
        config: The decoder's configuration.
    """
    values = {key: getattr(config, key, None) for key in _ARCHITECTURE_KEYS}
    rope = {f"rope.{key}": value for key, value in sorted(dict(config.rope_parameters or {}).items())}
    return {f"decoder.{key}": str(value) for key, value in {**values, **rope}.items()}


def _digest(lines: list[str]) -> str:
    return hashlib.blake2b("\n".join(sorted(lines)).encode(), digest_size=16).hexdigest()
