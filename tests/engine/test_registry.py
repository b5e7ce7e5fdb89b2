from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url

from mplus_agents import InvalidInputError, StoreError
from mplus_agents.engine.registry import close_shared_engines, shared_engine, shared_store
from mplus_agents.model import MPlusModel


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """A new database for shared engines, which are closed afterwards."""
    yield f"sqlite:///{tmp_path / 'shared.db'}"
    close_shared_engines()


def test_one_engine_per_model_store_and_device(url: str, tmp_path: Path) -> None:
    engine = shared_engine("mplus-tiny", url, "cpu")
    other = shared_engine("mplus-tiny", f"sqlite:///{tmp_path / 'other.db'}", "cpu")
    assert shared_engine("mplus-tiny", url, "cpu") is engine
    assert other is not engine
    assert other.model is engine.model
    assert engine.store is shared_store(url)
    assert engine.agent("alice") is shared_engine("mplus-tiny", url, "cpu").agent("alice")


def test_spellings_of_one_file_are_one_store(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(make_url(url).database or "")
    (tmp_path / "folder").mkdir()
    spellings = [f"sqlite:///{path.name}", f"sqlite:///folder/../{path.name}", f"sqlite+pysqlite:///./{path.name}"]
    assert {id(shared_store(spelling)) for spelling in spellings[:2]} == {id(shared_store(url))}
    assert shared_store(spellings[2]).list_agents() == []


def test_threads_load_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    load = MPlusModel.from_pretrained

    def note_load(*args: Any) -> MPlusModel:
        loads.append(args)
        return load(*args)

    monkeypatch.setattr(MPlusModel, "from_pretrained", note_load)
    with ThreadPoolExecutor(8) as pool:
        agents = list(pool.map(lambda _: shared_engine("mplus-tiny", url, "cpu").agent("alice"), range(16)))
    assert len(loads) == 1
    assert len({id(agent) for agent in agents}) == 1


def test_store_alone_loads_no_model(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MPlusModel, "from_pretrained", None)
    assert shared_store(url).list_agents() == []


def test_closed_engines_are_made_anew(url: str) -> None:
    engine = shared_engine("mplus-tiny", url, "cpu")
    engine.agent("alice").remember("Maya lives in Oslo.")
    close_shared_engines()
    with pytest.raises(StoreError, match="closed"):
        engine.agents()
    assert shared_engine("mplus-tiny", url, "cpu").agent("alice").window_text == "Maya lives in Oslo."


@pytest.mark.parametrize(
    ("model", "store", "device", "match"),
    [
        (1, "sqlite://", "cpu", "model is 1"),
        ("mplus-tiny", "nonsense", "cpu", "target is 'nonsense'"),
        ("mplus-tiny", None, "cpu", "store is None"),
        ("mplus-tiny", "sqlite://", "nonsense", "device is 'nonsense'"),
    ],
)
def test_arguments_are_checked(url: str, model: str, store: str, device: str, match: str) -> None:
    with pytest.raises(InvalidInputError, match=match):
        shared_engine(model, store, device)
