"""Engines that the parts of one process share: the same model, store and device are the same `MPlus` everywhere.

Per process only. Nothing here is shared with other processes but the database itself, and an `MPlus` that a caller
made with `from_pretrained` is not in here.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import sqlalchemy as sa
import torch
from sqlalchemy.exc import ArgumentError

from mplus_agents.engine.mplus import DEFAULT_MODEL, DEFAULT_STORE, MPlus
from mplus_agents.engine.text import TextCodec
from mplus_agents.errors import InvalidInputError
from mplus_agents.model import MPlusModel
from mplus_agents.store import Store


class EngineRegistry:
    """Makes engines on first use and keeps them; a model's weights are loaded once, whatever the number of stores.

    Loading a model holds up whoever else needs a model, but nobody who needs only a store.
    """

    def __init__(self) -> None:
        self._model_lock = threading.Lock()
        self._store_lock = threading.Lock()
        self._models: dict[tuple[str, str], tuple[MPlusModel, TextCodec]] = {}
        self._stores: dict[str, Store] = {}
        self._engines: dict[tuple[str, str, str], MPlus] = {}

    def engine(self, model: str, store: str, device: str | None) -> MPlus:
        """Return the engine, made and loaded if this is its first use.

        Args:
            model: A folder, a hub id, or `mplus-tiny`.
            store: An SQLAlchemy URL.
            device: Where to load; the first CUDA device if there is one, else the CPU.
        """
        with self._model_lock:
            opened = self.store(store)
            model_key = (_normal_model(model), _normal_device(device))
            if model_key not in self._models:
                loaded = MPlusModel.from_pretrained(model, device)
                assert loaded.source is not None
                self._models[model_key] = (loaded, TextCodec.from_pretrained(loaded.source))
            key = (*model_key, _normal_url(store))
            if key not in self._engines:
                self._engines[key] = MPlus(*self._models[model_key], opened, model)
            return self._engines[key]

    def store(self, store: str) -> Store:
        """Return the store, opened if this is its first use; no model is loaded.

        Args:
            store: An SQLAlchemy URL.
        """
        url = _normal_url(store)
        with self._store_lock:
            if url not in self._stores:
                self._stores[url] = Store(url)
            return self._stores[url]

    def close(self) -> None:
        """Close the stores and forget engines and models; the next use starts anew."""
        with self._model_lock, self._store_lock:
            for store in self._stores.values():
                store.close()
            self._models, self._stores, self._engines = {}, {}, {}


# The one object of the process that everything below speaks of.
_REGISTRY = EngineRegistry()


def shared_engine(model: str = DEFAULT_MODEL, store: str = DEFAULT_STORE, device: str | None = None) -> MPlus:
    """Return this process's engine for a model, a store and a device; it is loaded when it is first asked for.

    So two objects that name the same agent, such as a chat model and a memory, work on one `Agent`. Two spellings of
    one SQLite file are one store; a database in memory is one per spelling of its URL.

    Args:
        model: A folder, a hub id, or `mplus-tiny`, the small model that the package brings along.
        store: An SQLAlchemy URL; by default `mplus.db` in the working directory.
        device: Where to load; the first CUDA device if there is one, else the CPU.

    Raises:
        CheckpointError: The model or its tokenizer cannot be loaded.
        ConfigError: A configuration value is not supported.
        InvalidInputError: An argument is not allowed.
        SchemaVersionError: The database was made by a newer version.
        StoreError: The database cannot be opened.
    """
    return _REGISTRY.engine(model, store, device)


def shared_store(store: str = DEFAULT_STORE) -> Store:
    """Return the store of this process's engines on a database, without loading a model.

    Args:
        store: An SQLAlchemy URL.

    Raises:
        InvalidInputError: The URL cannot be used.
        SchemaVersionError: The database was made by a newer version.
        StoreError: The database cannot be opened.
    """
    return _REGISTRY.store(store)


def close_shared_engines() -> None:
    """Close every shared engine and forget it, weights and all; agents handed out before cannot be used any more."""
    _REGISTRY.close()


def _normal_model(model: str) -> str:
    if not isinstance(model, str):
        raise InvalidInputError("model", model, "a folder, a hub id, or 'mplus-tiny', as a string")
    return os.path.realpath(model) if Path(model).is_dir() else model


def _normal_device(device: str | None) -> str:
    try:
        resolved = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise InvalidInputError("device", device, "a torch device, such as 'cpu' or 'cuda'") from error
    if resolved.type == "cuda" and resolved.index is None and torch.cuda.is_available():
        resolved = torch.device("cuda", torch.cuda.current_device())
    return str(resolved)


def _normal_url(store: str) -> str:
    """Return the URL with the path of an SQLite file made absolute; what is no URL is left for `Store` to refuse."""
    if not isinstance(store, str):
        raise InvalidInputError("store", store, "an SQLAlchemy URL, such as 'sqlite:///mplus.db'")
    try:
        url = sa.make_url(store)
    except ArgumentError:
        return store
    path = url.database
    if url.get_backend_name() != "sqlite" or not path or path == ":memory:" or path.startswith("file:"):
        return store
    return url.set(database=os.path.realpath(path)).render_as_string(hide_password=False)
