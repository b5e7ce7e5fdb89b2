"""The network under training against the one that serves, on the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mplus_agents.memory.draws import draw_dropped
from mplus_agents.training.network import TrainableMPlus
from mplus_agents.training.pool import MemoryPool, PoolShape
from mplus_agents.training.pool_reading import FreshMemory, PoolMemory, SlotRetrieverLoss, key_maker
from tests.training.networks import (
    NUM_LAYERS,
    NUM_NEW,
    NUM_RETRIEVED,
    NUM_SHORT,
    gradients,
    serve,
    tiny_network,
    tokens,
)

_CLOSE = 1e-5
with_and_without_adapters = pytest.mark.parametrize("adapters", [True, False])


def new_pool(max_long_term: int = 40) -> MemoryPool:
    return MemoryPool(PoolShape(NUM_LAYERS, 32, NUM_NEW, NUM_SHORT, 8, max_long_term))


def fill(network: TrainableMPlus, pool: MemoryPool, lengths: list[int], owners: list[int] | None = None) -> None:
    with torch.no_grad():
        for step, length in enumerate(lengths):
            new = network.write(tokens(length, step), pool.tail)
            owner = -1 if owners is None else owners[step]
            pool.append([rows[0] for rows in new], key_maker(network), owner)


@with_and_without_adapters
# Full chunks, chunks shorter than K, and enough of them that Θ is read and evicts.
@pytest.mark.parametrize("lengths", [[], [9], [2], [1, 9, 3], [7] * 5, [7, 2] * 8], ids=len)
def test_writing_and_reading_are_those_of_the_serving_model(adapters: bool, lengths: list[int], tmp_path: Path) -> None:
    network = tiny_network(adapters, max_long_term=20)
    model = serve(network, tmp_path)
    memory, pool = model.initial_memory(), new_pool(max_long_term=20)
    with torch.no_grad():
        for step, length in enumerate(lengths):
            ids = tokens(length, step)
            delta = model.write(ids, memory)
            new = network.write(ids, pool.tail)
            torch.testing.assert_close(torch.cat(new), delta.hidden, rtol=_CLOSE, atol=_CLOSE)
            dropped = torch.from_numpy(
                draw_dropped(
                    7,
                    step,
                    num_layers=NUM_LAYERS,
                    theta_size=memory.theta_size,
                    num_dropped=max(0, memory.theta_size + NUM_NEW - NUM_SHORT),
                )
            )
            memory.apply(delta, dropped)
            pool.append(list(delta.hidden), key_maker(network), dropped=dropped)  # or roundings would add up
        prompt = tokens(11, 99)
        reading = PoolMemory(network, pool, NUM_RETRIEVED)
        logits = network.logits(network.read(prompt, reading))
        expected = model.read(prompt, memory)
    torch.testing.assert_close(logits, expected.logits, rtol=_CLOSE, atol=_CLOSE)
    assert pool.theta_births.tolist() == [
        [int(memory.index.theta_births[layer, slot]) for slot in memory.index.theta_order[layer]]
        for layer in range(NUM_LAYERS)
    ]
    if pool.long_term_size:
        log = memory.index.long_term
        for layer in range(NUM_LAYERS):
            rows = log.alive_rows(layer)
            entered = log.births[layer, rows - log.base_row]
            assert sorted(pool.long_births[layer].tolist()) == sorted(entered.tolist())
            served = entered[expected.retrieved[layer].numpy()].tolist()
            assert pool.long_births[layer, reading.retrieved[layer]].tolist() == served


def test_long_term_memory_is_read_only_where_asked_for() -> None:
    network = tiny_network()
    pool = new_pool()
    fill(network, pool, [6] * 7)
    prompt = tokens(5, 50)
    without, with_it = PoolMemory(network, pool, 0), PoolMemory(network, pool, NUM_RETRIEVED)
    assert (without.num_slots, with_it.num_slots) == (1 + NUM_SHORT, 1 + NUM_RETRIEVED + NUM_SHORT)
    with torch.no_grad():
        difference = network.read(prompt, without) - network.read(prompt, with_it)
    assert difference.abs().max() > 1e-3


def run_once(network: TrainableMPlus, pool: MemoryPool, scale: float = 1.0) -> tuple[float, dict[str, torch.Tensor]]:
    """A write with gradient, a read of it, a read of the pool, and the retriever's loss."""
    network.zero_grad()
    ids = tokens(10, 77)
    new = [scale * rows for rows in network.write(tokens(6, 76), pool.tail)]
    fresh = network.logits(network.read(ids, FreshMemory(network, new)))
    retriever_loss = SlotRetrieverLoss(pool.theta_owners == 1)
    read = network.logits(network.read(ids, PoolMemory(network, pool, NUM_RETRIEVED, retriever_loss)))
    log_likely = fresh.log_softmax(-1)[0, :, 5].mean() + read.log_softmax(-1)[0, :, 5].mean()
    loss = retriever_loss.total() - log_likely
    torch.autograd.backward(loss)
    return loss.item(), {name: grad.clone() for name, grad in gradients(network).items()}


@with_and_without_adapters
def test_gradient_checkpointing_changes_nothing(adapters: bool) -> None:
    network = tiny_network(adapters)
    pool = new_pool()
    fill(network, pool, [6] * 7, owners=[0, 0, 0, 0, 1, 1, 0])
    loss, expected = run_once(network, pool)
    network.checkpointing = True
    again, found = run_once(network, pool)
    assert again == pytest.approx(loss, rel=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
    parts = {name.rpartition(".")[0] for name, gradient in expected.items() if gradient.any()}
    if adapters:
        assert any(".default" in part for part in parts)
        assert any(".decoder_adapter" in part for part in parts)
    assert any("query_proj" in part for part in parts)
    assert any("key_proj" in part for part in parts)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("zeroed", ["fresh", "theta", "long_term"])
@with_and_without_adapters
def test_zeroed_memory_changes_the_loss(adapters: bool, zeroed: str, checkpointing: bool) -> None:
    network = tiny_network(adapters)
    network.checkpointing = checkpointing
    pool = new_pool()
    fill(network, pool, [6] * 7, owners=[0, 0, 0, 0, 1, 1, 0])
    loss, _ = run_once(network, pool)
    if zeroed == "theta":
        for rows in pool.theta:
            rows.zero_()
    elif zeroed == "long_term":
        pool._long_hidden.zero_()
    changed, _ = run_once(network, pool, scale=0.0 if zeroed == "fresh" else 1.0)
    assert abs(changed - loss) > 1e-3


def test_both_adapters_stay_trained_after_either_was_used() -> None:
    network = tiny_network()
    before = {name for name, weight in network.named_parameters() if weight.requires_grad}
    pool = new_pool()
    fill(network, pool, [6])
    network.read(tokens(4, 1), PoolMemory(network, pool))
    network.read(tokens(4, 1), PoolMemory(network, pool), adapter="default")
    assert {name for name, weight in network.named_parameters() if weight.requires_grad} == before


def test_which_adapter_reads_can_be_chosen() -> None:
    network = tiny_network()
    pool = new_pool()
    fill(network, pool, [6, 6])
    ids = tokens(5, 3)
    with torch.no_grad():
        read = network.read(ids, PoolMemory(network, pool))
        written = network.read(ids, PoolMemory(network, pool), adapter="default")
        for name, weight in network.named_parameters():
            if ".decoder_adapter" in name:
                weight.copy_(network.get_parameter(name.replace("decoder_adapter", "default")))
        torch.testing.assert_close(network.read(ids, PoolMemory(network, pool)), written)
    assert (read - written).abs().max() > 1e-3
