"""Texts from folders and from Hugging Face datasets, sharded by rank, with a position that can be stored.

The published training code gave every rank the same stream (an IterableDataset with a fixed seed and no sharding by
rank), so eight GPUs read each document eight times. Here a document belongs to one rank alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mplus_agents.errors import ConfigError, InvalidInputError

_WHOLE_FILES = (".txt", ".md")
_SUFFIXES = (*_WHOLE_FILES, ".jsonl")


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of a source one process reads.

    Attributes:
        rank: Number of the process.
        world_size: Number of processes.
        skip: Documents left out at the start of the source, whatever the number of processes.
        take: Documents used after those; None for all.
        seed: Seed of the order, the same in all processes.
    """

    rank: int = 0
    world_size: int = 1
    skip: int = 0
    take: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"rank is {self.rank} of {self.world_size}; allowed: 0 to world_size - 1")
        if self.skip < 0 or (self.take is not None and self.take < 1):
            raise ConfigError(f"skip and take are {self.skip} and {self.take}; allowed: 0 or more, and 1 or more")

    @property
    def description(self) -> str:
        """The shard in words, for messages."""
        part = "all documents" if self.take is None else f"{self.take} documents"
        return f"rank {self.rank} of {self.world_size}, {part} after the first {self.skip}"


class TextSource(Protocol):
    """An endless stream of texts; after the last one it starts over in another order."""

    epoch: int

    def __next__(self) -> str:
        """Return the next text."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the position, as plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position."""
        ...


class FolderSource:
    """Texts of a folder: every .txt and .md file is one, and so is every line of a .jsonl file.

    Documents are counted in the order of the sorted file names, which decides what `skip` and `take` mean; they are
    read in a random order of each epoch.

    Args:
        folder: The folder; searched with its subfolders.
        text_key: Where a JSON line has its text.
        shard: The part to read.

    Raises:
        ConfigError: There is no such folder, or it has no document for this rank.
        InvalidInputError: A file cannot be read or is empty.
    """

    def __init__(self, folder: str | Path, text_key: str = "text", shard: Shard | None = None) -> None:
        self.shard = shard or Shard()
        self.epoch = 0
        self._folder = Path(folder)
        self._text_key = text_key
        self._place = 0
        if not self._folder.is_dir():
            raise ConfigError(f"{str(folder)!r} is no folder")
        found = (path for path in self._folder.rglob("*") if path.suffix in _SUFFIXES and path.is_file())
        self._files = sorted(found)
        lines = [_line_starts(path) for path in self._files]
        sizes = [len(starts) for starts in lines]
        self._file_of = np.repeat(np.arange(len(lines)), sizes)
        self._start_of = np.concatenate(lines) if lines else np.empty(0, dtype=np.int64)
        self._order = self._draw_order()
        if not len(self._file_of):
            raise ConfigError(f"{str(folder)!r} has no documents ({', '.join(_SUFFIXES)} files with text in them)")
        if not len(self._order):
            raise ConfigError(
                f"{str(folder)!r} has {len(self._file_of)} documents ({', '.join(_SUFFIXES)}), "
                f"and none for {self.shard.description}"
            )

    def __next__(self) -> str:
        if self._place == len(self._order):
            self.epoch += 1
            self._place = 0
            self._order = self._draw_order()
        document = int(self._order[self._place])
        text = self._read(document)
        self._place += 1
        return text

    def state_dict(self) -> dict[str, Any]:
        """Return the position, as plain values."""
        return {"epoch": self.epoch, "place": self._place, "num_documents": len(self._file_of)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position.

        Args:
            state: What `state_dict` returned.

        Raises:
            ConfigError: The folder has another number of documents now.
        """
        if state["num_documents"] != len(self._file_of):
            raise ConfigError(
                f"{str(self._folder)!r} had {state['num_documents']} documents when training stopped, and has "
                f"{len(self._file_of)} now; going on from the same place is not possible"
            )
        self.epoch, self._place = state["epoch"], state["place"]
        self._order = self._draw_order()

    def _draw_order(self) -> npt.NDArray[np.int64]:
        shard, num_documents = self.shard, len(self._file_of)
        end = num_documents if shard.take is None else min(num_documents, shard.skip + shard.take)
        # Whose a document is stays the same in all epochs, as ranks may be in different ones.
        shared = np.random.default_rng(shard.seed).permutation(max(0, end - shard.skip)) + shard.skip
        own = np.random.default_rng([shard.seed, self.epoch, shard.rank])
        return own.permutation(shared[shard.rank :: shard.world_size])

    def _read(self, document: int) -> str:
        path = self._files[self._file_of[document]]
        if path.suffix in _WHOLE_FILES:
            return _decode(_read_bytes(path), str(path))
        start = int(self._start_of[document])
        with path.open("rb") as file:
            file.seek(start)
            line = file.readline()
        try:
            return _parse_line(line, self._text_key, str(path))
        except InvalidInputError as error:
            number = _read_bytes(path)[:start].count(b"\n") + 1
            raise InvalidInputError(f"{path}, line {number}", error.value, error.allowed) from error


class HubSource:
    """Texts of a Hugging Face dataset, streamed; what is read is not kept on disk.

    Args:
        name: The dataset, as `datasets.load_dataset` takes it.
        text_key: Column of the text.
        shard: The part to read. With `skip` or `take` every process reads the whole stream and keeps its share, so
            that the same documents are meant for any number of processes; without, files are shared out if possible.
        shuffle_block: So many consecutive documents are put in a random order; 1 for none. A shuffle buffer of the
            library would lose its content when training is resumed.
        options: Further arguments of `load_dataset`, such as `split`, `name` (the subset) and `revision`.

    Raises:
        ConfigError: `datasets` is not installed, or the dataset cannot be opened.
    """

    def __init__(
        self,
        name: str,
        text_key: str = "text",
        shard: Shard | None = None,
        shuffle_block: int = 1,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.shard = shard or Shard()
        self.epoch = 0
        self._name = name
        self._text_key = text_key
        self._options = {"split": "train", **(options or {})}
        self._block_size = shuffle_block
        self._block: list[str] = []
        self._place = 0
        self._rewind(None)

    def __next__(self) -> str:
        while self._place == len(self._block):
            self._fill_block()
        text = self._block[self._place]
        self._place += 1
        return text

    def state_dict(self) -> dict[str, Any]:
        """Return the position, as plain values."""
        return {"epoch": self.epoch, "block": self._block_start, "place": self._place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position; the block of documents that it lies in is read again.

        Args:
            state: What `state_dict` returned.
        """
        self.epoch = state["epoch"]
        self._rewind(state["block"])
        if state["place"]:
            self._fill_block()
            self._place = state["place"]

    def _rewind(self, start: dict[str, Any] | None) -> None:
        """Go to the start of a block; of the whole stream if None."""
        dataset = _open_stream(self._name, self._options)
        self._counts_itself = self.shard.skip > 0 or self.shard.take is not None
        if not self._counts_itself and self.shard.world_size > 1:
            from datasets.distributed import split_dataset_by_node  # type: ignore[import-untyped]

            dataset = split_dataset_by_node(dataset, self.shard.rank, self.shard.world_size)
        self._num_read = self._num_kept = 0
        if start is not None:
            dataset.load_state_dict(start["stream"])
            self._num_read, self._num_kept = start["num_read"], start["num_kept"]
        self._dataset = dataset
        self._rows: Iterator[dict[str, Any]] = iter(dataset)
        self._block, self._place = [], 0
        self._block_start: dict[str, Any] = start or self._stream_state()
        self._is_at_start = True  # until a row is read, the stream does not tell the position it was sent to

    def _stream_state(self) -> dict[str, Any]:
        return {"stream": self._dataset.state_dict(), "num_read": self._num_read, "num_kept": self._num_kept}

    def _fill_block(self) -> None:
        if not self._is_at_start:
            self._block_start = self._stream_state()
        self._is_at_start = False
        first = self._num_kept
        self._block, self._place = [], 0
        while len(self._block) < self._block_size:
            text = self._next_own()
            if text is None:
                break
            self._block.append(text)
        Random(f"{self.shard.seed}/{self.epoch}/{first}").shuffle(self._block)
        if self._block:
            return
        if not self._num_kept:
            raise ConfigError(f"dataset {self._name!r} has no documents for {self.shard.description}")
        self.epoch += 1
        self._rewind(None)

    def _next_own(self) -> str | None:
        """Return the next text of this process; None at the end of the stream."""
        shard = self.shard
        end = None if shard.take is None else shard.skip + shard.take
        while end is None or self._num_read < end:
            try:
                row = next(self._rows, None)
            except (OSError, ValueError) as error:
                raise InvalidInputError(f"dataset {self._name!r}", str(error), "a readable stream") from error
            if row is None:
                return None
            number = self._num_read
            self._num_read += 1
            is_own = number >= shard.skip and (number - shard.skip) % shard.world_size == shard.rank
            if is_own or not self._counts_itself:
                self._num_kept += 1
                return self._text_of(row, number)
        return None

    def _text_of(self, row: dict[str, Any], number: int) -> str:
        text: object = row.get(self._text_key)
        if not isinstance(text, str):
            where = f"dataset {self._name!r}, document {number}"
            raise InvalidInputError(where, row if text is None else text, f"a text under {self._text_key!r}")
        return text


def _open_stream(name: str, options: dict[str, Any]) -> Any:
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError("Hugging Face datasets need: pip install 'mplus-agents[train]'") from error
    try:
        return datasets.load_dataset(name, streaming=True, **options)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"dataset {name!r} cannot be opened: {str(error).splitlines()[0]}") from error


def _line_starts(path: Path) -> npt.NDArray[np.int64]:
    """Return where the documents of a file start, in bytes."""
    if path.suffix in _WHOLE_FILES:
        if not path.stat().st_size:
            raise InvalidInputError(str(path), "an empty file", "a text")
        return np.zeros(1, dtype=np.int64)
    starts, start = [], 0
    try:
        with path.open("rb") as file:
            for line in file:
                if line.strip():
                    starts.append(start)
                start += len(line)
    except OSError as error:
        raise InvalidInputError(str(path), str(error), "a readable file") from error
    if not starts:
        raise InvalidInputError(str(path), "no lines", "one JSON object per line")
    return np.array(starts, dtype=np.int64)


def _parse_line(line: bytes, text_key: str, name: str) -> str:
    allowed = f"a JSON object with a text under {text_key!r}"
    try:
        values = json.loads(line)
    except ValueError as error:  # bytes that are no UTF-8 as well
        raise InvalidInputError(name, line[:80], allowed) from error
    text = values.get(text_key) if isinstance(values, dict) else None
    if not isinstance(text, str):
        raise InvalidInputError(name, values, allowed)
    return text


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInputError(str(path), str(error), "a readable file") from error


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInputError(name, str(error), "UTF-8 text") from error


def split_by_weight(weights: Sequence[float], draw: float) -> int:
    """Return which part of the whole a number between 0 and 1 falls into.

    Args:
        weights: Sizes of the parts.
        draw: The number.
    """
    left = draw * sum(weights)
    for place, weight in enumerate(weights):
        left -= weight
        if left < 0:
            return place
    return max(place for place, weight in enumerate(weights) if weight > 0)
