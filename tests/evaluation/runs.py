"""Small runs of the experiments, and what an agent's log says about them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mplus_agents import Agent
from mplus_agents.evaluation.settings import RetentionSettings
from tests.engine.engines import TINY, prose


def prose_file(folder: Path, num_words: int = 3_000) -> str:
    path = folder / "prose.txt"
    path.write_text(prose(num_words), encoding="utf-8")
    return str(path)


def small_settings(folder: Path, **changes: Any) -> RetentionSettings:
    """Two streams of a few chunks each."""
    values: dict[str, Any] = {
        "seed": 7,
        "episodes": 4,
        "streams": 2,
        "distances": (0, 1, 6),
        "max_new_tokens": 4,
        "prose": prose_file(folder),
        "device": "cpu",
        "model": str(TINY),
    }
    return RetentionSettings(**{**values, **changes})


@dataclass(frozen=True)
class Injected:
    """One injection, by the store's own tables."""

    text: str
    is_prose: bool


def injections_of(agent: Agent) -> list[Injected]:
    """Read from the log what every injection of an agent's life took in, in order."""
    store = agent.mplus.store
    record = store.find_agent(agent.namespace, agent.name)
    assert record is not None
    events = {event.seq: event for event in store.events(record.id)}
    infos = store.injection_infos(store.chain(record.head_commit_id).injection_ids.values())
    taken = []
    for info in infos.values():
        parts = [events[seq] for seq in info.event_seqs]
        kinds = {(part.source_id or "").startswith("prose ") for part in parts}
        assert len(kinds) == 1  # never facts and prose together
        taken.append(Injected("".join(part.text or "" for part in parts), kinds.pop()))
    return taken
