"""An agent's memory in numbers, and token by token."""

from __future__ import annotations

from typing import Any, cast

from mplus_agents.engine.records import AgentStats, TokenInfo
from mplus_agents.engine.resident import Resident
from mplus_agents.store import StoreStats


def agent_stats(resident: Resident, stored: StoreStats) -> AgentStats:
    """Count what an agent holds.

    Args:
        resident: The agent.
        stored: What the store says of it.
    """
    memory, config = resident.memory, resident.memory.config
    ages = [int(memory.theta_ages().max())] if memory.theta_size else []
    ages += [int(layer.max()) for layer in map(memory.long_term_ages, range(config.num_layers)) if len(layer)]
    return AgentStats(
        name=resident.record.name,
        namespace=resident.record.namespace,
        memory_rule=config.rule,
        num_injections=memory.num_injections,
        short_term_tokens=memory.theta_size,
        short_term_capacity=config.max_short_term,
        long_term_tokens=tuple(memory.long_term_sizes.tolist()),
        long_term_capacity=config.max_long_term if config.rule == "paper" else None,
        num_staged=memory.num_staged,
        oldest_age=max(ages, default=None),
        num_waiting_messages=len(resident.window),
        num_waiting_tokens=resident.num_waiting_tokens,
        num_events=stored.num_events,
        stored_bytes={
            "keys_and_values": stored.page_bytes,
            "retrieval_keys": stored.retrieval_key_bytes,
            "commits": stored.commit_bytes,
            "snapshots": stored.snapshot_bytes,
            "hidden": stored.hidden_bytes,
            "text": stored.text_bytes,
        },
        resident_bytes=memory.num_bytes(),
    )


def layer_tokens(resident: Resident, layer: int) -> list[TokenInfo]:
    """List the tokens of one layer: θ in its order, then Θ in the order of entry, staged tokens last.

    Args:
        resident: The agent.
        layer: The layer.
    """
    memory = resident.memory
    index, num_new = memory.index, memory.config.tokens_per_injection
    log = index.long_term
    rows = log.alive_rows(layer)
    is_staged = rows >= log.num_merged_rows
    theta = index.theta_births[layer, index.theta_order[layer]]
    listed = [
        ("short_term", theta, index.theta_ages()[layer]),
        (
            "long_term",
            log.births[layer, rows[~is_staged] - log.base_row],
            index.long_term_ages(layer, rows[~is_staged]),
        ),
        ("staged", log.births[layer, rows[is_staged] - log.base_row], index.long_term_ages(layer, rows[is_staged])),
    ]
    infos = []
    for place, births, ages in listed:
        for birth, age in zip(births.tolist(), ages.tolist(), strict=True):
            step, slot = divmod(birth, num_new) if birth >= 0 else (None, None)
            injection_id = None if step is None else resident.injection_ids[step]
            infos.append(TokenInfo(layer, cast(Any, place), injection_id, step, slot, birth, age))
    return infos
