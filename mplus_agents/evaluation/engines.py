"""A model loaded once, and engines over it whose databases are gone afterwards."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import transformers

from mplus_agents import __version__
from mplus_agents.engine import MPlus
from mplus_agents.engine.text import TextCodec
from mplus_agents.errors import InvalidInputError
from mplus_agents.model import MPlusModel
from mplus_agents.store import Store

_SMALL_MODEL_PARAMETERS = 50_000_000


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model with its tokenizer.

    Attributes:
        model: The model.
        codec: Its tokenizer.
        name: What it is called.
    """

    model: MPlusModel
    codec: TextCodec
    name: str

    @property
    def weights(self) -> dict[str, str]:
        """Digests that identify weights and tokenizer, by part."""
        return {**self.model.fingerprint, "tokenizer": self.codec.fingerprint()}

    @contextmanager
    def open(self) -> Iterator[MPlus]:
        """Open an engine on a new database file, which is deleted at the end.

        Yields:
            The engine.
        """
        with (
            tempfile.TemporaryDirectory(prefix="mplus-eval-") as folder,
            Store(f"sqlite:///{os.path.join(folder, 'stream.db')}") as store,
        ):
            yield MPlus(self.model, self.codec, store, self.name)


@lru_cache(maxsize=1)
def load(name: str, device: str | None = None, num_retrieved: int | None = None) -> LoadedModel:
    """Load a model; the last one loaded is kept. A small model on the CPU puts PyTorch on one thread: more gain little.

    Args:
        name: A folder, a hub id, or `mplus-tiny`.
        device: Where to load; the first CUDA device if there is one, else the CPU.
        num_retrieved: K0, tokens read from Θ per layer; as the model was made if None.

    Raises:
        CheckpointError: The model or its tokenizer cannot be loaded.
        InvalidInputError: `num_retrieved` is not allowed.
    """
    with MPlus.from_pretrained(name, store="sqlite://", device=device) as opened:
        model, codec = opened.model, opened.codec
    if num_retrieved is not None:
        memory = model.config.memory
        if not memory.has_long_term or not 1 <= num_retrieved <= memory.max_long_term:
            allowed = f"a whole number from 1 to {memory.max_long_term}" if memory.has_long_term else "None without Θ"
            raise InvalidInputError("num_retrieved", num_retrieved, allowed)
        model.config = replace(model.config, memory=replace(memory, num_retrieved=num_retrieved))
    is_small = sum(parameter.numel() for parameter in model.parameters()) < _SMALL_MODEL_PARAMETERS
    if is_small and model.device.type == "cpu":
        torch.set_num_threads(1)
    return LoadedModel(model, codec, name)


def versions(device: torch.device) -> dict[str, str]:
    """Return the versions that decide the numbers, to be saved with them.

    Args:
        device: What computes; on a CPU the number of threads counts too.
    """
    is_cpu = device.type == "cpu"
    name = f"{torch.get_num_threads()} CPU threads" if is_cpu else str(torch.cuda.get_device_name(device))
    return {
        "mplus_agents": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
        "device": name,
    }
