"""The engine: one model and one store that serve many agents."""

from __future__ import annotations

import hashlib
import os
import threading
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch

from mplus_agents.config import MemoryRule
from mplus_agents.engine.agent import Agent
from mplus_agents.engine.inputs import check_name, check_number
from mplus_agents.engine.prompts import POLICY_VERSION
from mplus_agents.engine.text import TextCodec
from mplus_agents.errors import AgentNotFoundError, ConflictError, FingerprintMismatchError
from mplus_agents.model import MPlusModel
from mplus_agents.store import AgentRecord, Store

if TYPE_CHECKING:
    import sqlalchemy

DEFAULT_MODEL = "mplus-tiny"
DEFAULT_STORE = "sqlite:///mplus.db"
DEFAULT_NAMESPACE = "default"


class MPlus:
    """A model, its tokenizer and a store; `agent` gives the agents that live in them.

    Args:
        model: The model.
        codec: Its tokenizer.
        store: Where memories are kept.
        name: What the model is called.
    """

    def __init__(self, model: MPlusModel, codec: TextCodec, store: Store, name: str) -> None:
        self.model = model
        self.codec = codec
        self.store = store
        self.name = name
        self._owns_store = False
        self._fingerprint = {**model.fingerprint, "tokenizer": codec.fingerprint()}
        self._agents: dict[tuple[str, str], Agent] = {}
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        model: str | PathLike[str] = DEFAULT_MODEL,
        *,
        store: str | sqlalchemy.Engine | Store = DEFAULT_STORE,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        attn_implementation: str = "sdpa",
        memory_rule: MemoryRule | None = None,
        rope_inv_freq: torch.dtype | str | None = None,
    ) -> Self:
        """Load a model and open a store.

        Args:
            model: A folder, a hub id, or `mplus-tiny`, the small model that the package brings along.
            store: An SQLAlchemy URL, an Engine, or a `Store`; by default `mplus.db` in the working directory.
            device: Where to load; the first CUDA device if there is one, else the CPU.
            dtype: What to load as; the checkpoint's own if None.
            attn_implementation: `sdpa`, `eager` or `flash_attention_2`.
            memory_rule: `paper` or `released`; the checkpoint's default if None.
            rope_inv_freq: Precision of RoPE's frequencies; see `MPlusModel.from_pretrained`.

        Raises:
            CheckpointError: The model or its tokenizer cannot be loaded.
            ConfigError: A configuration value is not supported.
            InvalidInputError: An argument is not allowed.
            SchemaVersionError: The database was made by a newer version.
            StoreError: The database cannot be opened.
        """
        loaded = MPlusModel.from_pretrained(model, device, dtype, attn_implementation, memory_rule, rope_inv_freq)
        assert loaded.source is not None
        codec = TextCodec.from_pretrained(loaded.source)
        is_own = isinstance(store, Store)
        mplus = cls(loaded, codec, store if isinstance(store, Store) else Store(store), os.fspath(model))
        mplus._owns_store = not is_own
        return mplus

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"MPlus({self.name!r}, store={self.store.url!r}, device={str(self.model.device)!r})"

    def close(self) -> None:
        """Close the store, if it was opened here; what was acknowledged is durable already."""
        if self._owns_store:
            self.store.close()

    def agent(
        self, name: str, *, namespace: str = DEFAULT_NAMESPACE, seed: int | None = None, create: bool = True
    ) -> Agent:
        """Open an agent, or create it.

        The same name always gives the same object, so that threads share one lock and one copy of the memory.

        Args:
            name: 1 to 200 printable characters without `/`.
            namespace: Where the name is unique; likewise.
            seed: Seed of a new agent's random draws; derived from the names if None. One that exists keeps its own.
            create: Create the agent if there is none.

        Raises:
            InvalidInputError: A name or the seed is not allowed.
            AgentNotFoundError: There is no such agent, and `create` is False.
            FingerprintMismatchError: The agent was made with another model; the message names what differs.
            StoreError: The database failed.
        """
        key = (check_name("namespace", namespace), check_name("name", name))
        if seed is not None:
            check_number("seed", seed, 2**63)
        with self._lock:
            record = self.store.find_agent(*key)
            known = self._agents.get(key)
            if known is not None and record is not None and known.has_id(record.id):
                return known
            if record is None and not create:
                raise AgentNotFoundError(f"there is no agent {name!r} in namespace {namespace!r} of {self.store.url}")
            if record is None:
                record = self._create(key, _seed_of(key) if seed is None else seed)
            self._check_fingerprint(record)
            agent = Agent(self, namespace, name, record.id)
            self._agents[key] = agent
            return agent

    def agents(self, namespace: str | None = None) -> list[AgentRecord]:
        """List the agents of the store.

        Args:
            namespace: Only this namespace; all if None.

        Raises:
            InvalidInputError: The namespace is not allowed.
            StoreError: The database failed.
        """
        return self.store.list_agents(None if namespace is None else check_name("namespace", namespace))

    def forget(self, agent: Agent) -> None:
        """Stop handing out an agent that was deleted.

        Args:
            agent: The agent.
        """
        with self._lock:
            self._agents.pop((agent.namespace, agent.name), None)

    def _create(self, key: tuple[str, str], seed: int) -> AgentRecord:
        settings: dict[str, str | int] = {"policy_version": POLICY_VERSION, "codec": "raw", "model": self.name}
        try:
            return self.store.create_agent(*key, fingerprint=self._fingerprint, seed=seed, settings=settings)
        except ConflictError:  # another process created it just now
            record = self.store.find_agent(*key)
            if record is None:
                raise
            return record

    def _check_fingerprint(self, record: AgentRecord) -> None:
        names = {**record.fingerprint, **self._fingerprint}
        fields = {
            name: (record.fingerprint.get(name, "nothing"), self._fingerprint.get(name, "nothing"))
            for name in names
            if record.fingerprint.get(name) != self._fingerprint.get(name)
        }
        if fields:
            raise FingerprintMismatchError(record.name, fields, str(record.settings.get("model", "another model")))


def _seed_of(key: tuple[str, str]) -> int:
    digest = hashlib.blake2b("/".join(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
