"""Documents for the paper's recipe: mixtures of sources, by weight and by length in tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from random import Random
from typing import Any, Literal, Self, get_args

from mplus_agents.config import reject_unknown_keys
from mplus_agents.errors import ConfigError
from mplus_agents.training.document_sources import FolderSource, HubSource, Shard, TextSource, split_by_weight

SourceKind = Literal["folder", "hub"]
Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class SourceConfig:
    """One source of documents.

    Attributes:
        location: A folder of .txt, .md and .jsonl files, or the name of a Hugging Face dataset.
        kind: `folder` or `hub`.
        name: What metrics call it; the location if empty.
        weight: How often it is drawn from, relative to the others.
        min_tokens: Shorter documents are passed over.
        max_tokens: Documents of so many tokens or more are passed over; None for no limit.
        is_long: Whether its documents are cut by the rule for long ones.
        skip: Documents left out at the start of the source, counted before any are passed over; stage 3 leaves out
            those that stage 2 was trained on.
        take: Documents used after those; None for all.
        text_key: Key or column of the text.
        subset: `hub`: the dataset's configuration.
        split: `hub`: the split.
        revision: `hub`: the revision.
        data_files: `hub`: files of the dataset.
        shuffle_block: `hub`: so many consecutive documents are put in a random order.
    """

    location: str
    kind: SourceKind = "folder"
    name: str = ""
    weight: float = 1.0
    min_tokens: int = 0
    max_tokens: int | None = None
    is_long: bool = False
    skip: int = 0
    take: int | None = None
    text_key: str = "text"
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    data_files: str | None = None
    shuffle_block: int = 1

    def __post_init__(self) -> None:
        self._check("kind", self.kind in get_args(SourceKind), " or ".join(get_args(SourceKind)))
        for name in ("location", "text_key"):
            value = getattr(self, name)
            self._check(name, isinstance(value, str) and bool(value), "a text that is not empty")
        is_number = type(self.weight) in (int, float)
        self._check("weight", is_number and 0 < self.weight < float("inf"), "a positive number")
        for name, least in (("min_tokens", 0), ("skip", 0), ("shuffle_block", 1)):
            value = getattr(self, name)
            self._check(name, type(value) is int and value >= least, f"a whole number from {least}")
        for name in ("max_tokens", "take"):
            value = getattr(self, name)
            self._check(name, value is None or (type(value) is int and value >= 1), "a positive whole number, or None")
        self._check("is_long", type(self.is_long) is bool, "true or false")
        self._check("max_tokens", self.max_tokens is None or self.max_tokens > self.min_tokens, "more than min_tokens")
        if self.kind == "folder":
            for name in ("subset", "revision", "data_files"):
                self._check(name, getattr(self, name) is None, "nothing, as the source is a folder")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a config from plain values.

        Args:
            values: Field names and values.

        Raises:
            ConfigError: A key is unknown or missing, or a value is not allowed.
        """
        reject_unknown_keys(values, {field.name for field in fields(cls)}, "source")
        if "location" not in values:
            raise ConfigError("source: the key 'location' is missing")
        return cls(**values)

    @property
    def label(self) -> str:
        """What messages and metrics call the source."""
        return self.name or self.location

    def _check(self, name: str, condition: bool, allowed: str) -> None:
        if not condition:
            raise ConfigError(f"source {self.location!r}: {name} is {getattr(self, name)!r}; allowed: {allowed}")


@dataclass(frozen=True, slots=True)
class Document:
    """A document in tokens.

    Attributes:
        ids: Its tokens, without special ones.
        source: Which source it is from.
        is_long: Whether it is cut by the rule for long documents.
    """

    ids: list[int]
    source: str
    is_long: bool


class _TokenSource:
    """The documents of one source that have the wanted length."""

    def __init__(self, config: SourceConfig, texts: TextSource, tokenize: Tokenize) -> None:
        self.config = config
        self.texts = texts
        self.num_passed_over = 0
        self._tokenize = tokenize

    def __next__(self) -> Document:
        config, first_epoch = self.config, self.texts.epoch
        while True:
            text = next(self.texts)
            if self.texts.epoch > first_epoch + 1:
                limit = "" if config.max_tokens is None else f" and less than {config.max_tokens}"
                raise ConfigError(f"{config.label!r} has no document of at least {config.min_tokens} tokens{limit}")
            # No token is shorter than a byte: most documents that are too short need not be tokenized.
            if len(text.encode("utf-8", "replace")) + 1 >= config.min_tokens:
                ids = self._tokenize(text)
                if ids and config.min_tokens <= len(ids) < (config.max_tokens or len(ids) + 1):
                    return Document(ids, config.label, config.is_long)
            self.num_passed_over += 1

    def state_dict(self) -> dict[str, Any]:
        return {"texts": self.texts.state_dict(), "num_passed_over": self.num_passed_over}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.texts.load_state_dict(state["texts"])
        self.num_passed_over = state["num_passed_over"]


class DocumentMixture:
    """An endless stream of documents from several sources.

    Which source comes next is drawn from the seed alone, so that all ranks work on documents of like length at the
    same time.

    Args:
        configs: The sources.
        tokenize: Turns a text into tokens, without special ones.
        seed: Seed of all draws.
        rank: Number of this process.
        world_size: Number of processes.

    Raises:
        ConfigError: There is no source, or one cannot be opened.
    """

    def __init__(
        self, configs: Sequence[SourceConfig], tokenize: Tokenize, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        if not configs:
            raise ConfigError("no source of documents is given")
        self._seed = seed
        self._sources = [
            _TokenSource(config, _open_texts(config, Shard(rank, world_size, config.skip, config.take, seed)), tokenize)
            for config in configs
        ]
        self._num_draws = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Document:
        draw = Random(f"{self._seed}/mixture/{self._num_draws}").random()
        document = next(self._sources[split_by_weight([source.config.weight for source in self._sources], draw)])
        self._num_draws += 1
        return document

    @property
    def num_passed_over(self) -> dict[str, int]:
        """Documents of the wrong length so far, by source."""
        return {source.config.label: source.num_passed_over for source in self._sources}

    def state_dict(self) -> dict[str, Any]:
        """Return the position in every source, as plain values."""
        return {"num_draws": self._num_draws, "sources": [source.state_dict() for source in self._sources]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position.

        Args:
            state: What `state_dict` returned.

        Raises:
            ConfigError: There are other sources now.
        """
        if len(state["sources"]) != len(self._sources):
            raise ConfigError(f"the data had {len(state['sources'])} sources, and has {len(self._sources)} now")
        self._num_draws = state["num_draws"]
        for source, position in zip(self._sources, state["sources"], strict=True):
            source.load_state_dict(position)


def _open_texts(config: SourceConfig, shard: Shard) -> TextSource:
    if config.kind == "folder":
        return FolderSource(config.location, config.text_key, shard)
    named = {"name": config.subset, "revision": config.revision, "data_files": config.data_files}
    options = {key: value for key, value in named.items() if value is not None}
    return HubSource(config.location, config.text_key, shard, config.shuffle_block, {"split": config.split, **options})
