"""Small commits whose every number follows from the step, so that a test can tell what must be stored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mplus_agents.store import AgentRecord, CommitResult, InjectionTensors, Store, StoredInjection, WriteTransaction


@dataclass(frozen=True)
class Sizes:
    num_layers: int = 2
    num_slots: int = 5
    num_kv_heads: int = 2
    head_dim: int = 3
    retrieval_dim: int = 4
    hidden_dim: int = 6
    dtype: torch.dtype = torch.float32


def tensors_of(step: int, sizes: Sizes = Sizes()) -> InjectionTensors:
    generator = torch.Generator().manual_seed(step)
    per_token = (sizes.num_layers, sizes.num_slots)
    heads = (*per_token, sizes.num_kv_heads, sizes.head_dim)
    keys = torch.randn(heads, generator=generator).to(sizes.dtype)
    values = torch.randn(heads, generator=generator).to(sizes.dtype)
    retrieval_keys = torch.randn((*per_token, sizes.retrieval_dim), generator=generator).to(sizes.dtype)
    return InjectionTensors(keys, values, retrieval_keys)


def hidden_of(step: int, sizes: Sizes = Sizes()) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10_000 + step)
    return torch.randn((sizes.num_layers, sizes.num_slots, sizes.hidden_dim), generator=generator).to(sizes.dtype)


def dropped_of(step: int, sizes: Sizes = Sizes()) -> torch.Tensor:
    """Nothing at step 0, then two slots per layer."""
    return (step + torch.arange(sizes.num_layers * min(step, 1) * 2)).reshape(sizes.num_layers, -1)


def evicted_of(step: int, sizes: Sizes = Sizes()) -> torch.Tensor:
    return 2**40 + step + torch.arange(sizes.num_layers).reshape(sizes.num_layers, 1)


def snapshot_of(step: int) -> dict[str, np.ndarray]:
    return {"theta": np.arange(step, step + 6).reshape(2, 3), "layers": np.array([step, 7], dtype=np.int32)}


def commit(
    tx: WriteTransaction,
    step: int,
    *,
    sizes: Sizes = Sizes(),
    event_seqs: tuple[int, ...] = (),
    has_snapshot: bool = False,
) -> CommitResult:
    return tx.add_commit(
        step=step,
        tensors=tensors_of(step, sizes),
        dropped=dropped_of(step, sizes),
        evicted=evicted_of(step, sizes),
        tail_hidden=hidden_of(step, sizes),
        event_seqs=event_seqs,
        num_text_tokens=100 + step,
        snapshot=snapshot_of(step) if has_snapshot else None,
    )


def create(store: Store, name: str = "alice") -> AgentRecord:
    return store.create_agent("default", name, fingerprint={"weights": "abc"}, seed=7, settings={"rule": "paper"})


def grow(
    store: Store,
    agent: AgentRecord,
    steps: range,
    *,
    sizes: Sizes = Sizes(),
    snapshots: frozenset[int] = frozenset(),
) -> AgentRecord:
    """Add one commit per transaction."""
    for step in steps:
        with store.write(agent) as tx:
            commit(tx, step, sizes=sizes, has_snapshot=step in snapshots)
        agent = tx.agent
    return agent


def give_up(store: Store, agent: AgentRecord) -> None:
    """Write something of every kind, and raise KeyboardInterrupt before the end."""
    with store.write(agent) as tx:
        tx.add_to_window([tx.add_event("message", text="lost").seq])
        tx.set_source("lost", next_offset=1, prefix_digest="00", is_done=False)
        commit(tx, 0)
        raise KeyboardInterrupt


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_stored(stored: StoredInjection, step: int, sizes: Sizes = Sizes()) -> None:
    given = tensors_of(step, sizes)
    assert bits(stored.keys) == bits(given.keys)
    assert bits(stored.values) == bits(given.values)
    assert bits(stored.retrieval_keys) == bits(given.retrieval_keys)
