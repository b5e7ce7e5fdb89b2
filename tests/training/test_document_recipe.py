from __future__ import annotations

import io
import math
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any, cast

import pytest
import torch

from mplus_agents.engine.text import TextCodec
from mplus_agents.errors import ConfigError
from mplus_agents.training.chunking import ChunkRule, split_document
from mplus_agents.training.document_recipe import DocumentRecipe, build_document_recipe
from mplus_agents.training.document_stage import PAPER_STAGES, DocumentStage, TaskKind
from mplus_agents.training.documents import Document
from mplus_agents.training.network import TrainableMPlus
from mplus_agents.training.pool_reading import PoolMemory, SlotRetrieverLoss
from tests.training.networks import NUM_LAYERS, NUM_NEW, NUM_RETRIEVED, VOCAB_SIZE, gradients, tiny_network, trained

INSTRUCTION = [7, 8]


class Numbers:
    """An endless stream of documents of random tokens."""

    def __init__(self, seed: int = 0, shortest: int = 20, longest: int = 60) -> None:
        self._seed, self._range = seed, (shortest, longest)
        self.count = 0

    def __next__(self) -> Document:
        rng = Random(f"{self._seed}/{self.count}")
        self.count += 1
        return Document([rng.randrange(9, VOCAB_SIZE) for _ in range(rng.randint(*self._range))], "numbers", False)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def tiny_stage(paper_stage: int = 3, **changes: Any) -> DocumentStage:
    return DocumentStage.from_dict({"paper_stage": paper_stage, "max_short_term": 16, **changes})


def always(kind: str, **changes: Any) -> DocumentStage:
    shares = {"plain_share": float(kind == "plain"), "multi_share": float(kind == "multi_chunk"), "revisit_share": 0.0}
    return tiny_stage(**{**shares, **changes})


def new_recipe(network: TrainableMPlus, stage: DocumentStage, **options: Any) -> DocumentRecipe:
    return DocumentRecipe(network, Numbers(), stage, INSTRUCTION, **options)


def run(recipe: DocumentRecipe, optimizer: torch.optim.Optimizer | None, steps: range) -> list[dict[str, float]]:
    seen = []
    for step in steps:
        loss, metrics = recipe.loss(step)
        if optimizer is not None:
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        recipe.after_step()
        seen.append({**metrics, "loss": loss.item()})
    return seen


def kind_of(metrics: dict[str, float]) -> str:
    return next(kind for kind in ("plain", "revisit", "two_chunk", "multi_chunk") if kind in metrics)


# -- what the paper says ------------------------------------------------------------------------------------------


def test_the_numbers_of_the_three_stages() -> None:
    one, two, three = (PAPER_STAGES[number] for number in (1, 2, 3))
    assert [stage.max_short_term for stage in (one, two, three)] == [12_800, 12_800, 10_240]
    assert [stage.plain_share for stage in (one, two, three)] == [0.1, 0.05, 0.05]
    assert [stage.multi_share for stage in (one, two, three)] == [0.8, 0.9, 0.8]
    assert [stage.replace_share for stage in (one, two, three)] == [1.0, 1.0, 0.2]
    assert {stage.revisit_share for stage in (one, two, three)} == {0.2}
    assert {stage.repeat_share for stage in (one, two, three)} == {0.1}
    assert [stage.retriever_weight for stage in (one, two, three)] == [0.0, 1.0, 1.0]
    assert [stage.has_long_term for stage in (one, two, three)] == [False, False, True]
    assert [one.most_chunks(step) for step in (0, 99_999, 100_000, 199_999, 200_000)] == [50, 50, 100, 100, 200]
    assert [three.most_chunks(step) for step in (0, 19_999, 20_000)] == [100, 100, 200]


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("can_revisit", [True, False])
def test_sub_tasks_come_as_often_as_they_should(number: int, can_revisit: bool) -> None:
    stage, rng, num_draws = PAPER_STAGES[number], Random(number), 20_000
    counts = Counter(stage.draw_task(rng, can_revisit) for _ in range(num_draws))
    plain = {1: 0.1, 2: 0.05, 3: 0.05}[number]
    revisit = (1 - plain) * 0.2 * can_revisit
    multi = {1: 0.8, 2: 0.9, 3: 0.8}[number]
    rest = 1 - plain - revisit
    wanted: dict[TaskKind, float] = {
        "plain": plain,
        "revisit": revisit,
        "two_chunk": rest * (1 - multi),
        "multi_chunk": rest * multi,
    }
    assert set(counts) == {kind for kind, share in wanted.items() if share}
    expected = {kind: num_draws * share for kind, share in wanted.items() if share}
    chi_square = sum((counts[kind] - number) ** 2 / number for kind, number in expected.items())
    assert chi_square < 16.3  # 3 degrees of freedom: p = 0.001


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"plain_shar": 0.1}, "unknown key 'plain_shar'"),
        ({"paper_stage": 4}, "paper_stage is 4"),
        ({"plain_share": 1.5}, "plain_share is 1.5"),
        ({"max_chunks": [[5, 10]]}, "max_chunks is"),
        ({"max_chunks": 3}, "max_chunks is 3"),
        ({"two_chunk_read_adapter": "both"}, "two_chunk_read_adapter is 'both'"),
        ({"retriever_weight": -1}, "retriever_weight is -1"),
        ({"refresh_keys_every": True}, "refresh_keys_every is True"),
    ],
)
def test_wrong_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DocumentStage.from_dict(values)


# -- which weights learn what -------------------------------------------------------------------------------------


def learning_parts(network: TrainableMPlus) -> set[str]:
    names = {name for name, gradient in gradients(network).items() if gradient.any()}
    marks = {"write": ".default", "read": ".decoder_adapter", "bos": "bos_embedding", "retriever": "retrievers"}
    found = {part for part, mark in marks.items() if any(mark in name for name in names)}
    return found | ({"positional"} if "new_memory_positional_emb" in names else set())


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("two_chunk", {}, {"write", "read", "bos", "positional"}),
        ("two_chunk", {"two_chunk_read_adapter": "write"}, {"write", "bos", "positional"}),
        ("multi_chunk", {}, {"read", "bos", "retriever"}),
        ("multi_chunk", {"retriever_weight": 0.0}, {"read", "bos"}),
        ("plain", {}, {"read", "bos"}),
    ],
)
def test_a_sub_task_trains_its_own_weights(kind: str, changes: dict[str, Any], expected: set[str]) -> None:
    network = tiny_network()
    recipe = new_recipe(network, always(kind, **changes))
    loss, metrics = recipe.loss(0)
    torch.autograd.backward(loss)
    assert kind_of(metrics) == kind
    assert learning_parts(network) == expected


@pytest.mark.parametrize("objective", ["bce", "contrastive"])
def test_hidden_states_get_no_gradient_from_the_retrievers_loss(objective: Any) -> None:
    network = tiny_network(adapters=False)
    recipe = new_recipe(network, always("multi_chunk"))
    run(recipe, None, range(4))
    retriever_loss = SlotRetrieverLoss(recipe.pool.theta_owners == 3, objective)
    network.read(torch.randint(3, 60, (1, 9)), PoolMemory(network, recipe.pool, NUM_RETRIEVED, retriever_loss))
    torch.autograd.backward(retriever_loss.total())
    found = {name for name, gradient in gradients(network).items() if gradient.any()}
    assert found == {name for name in trained(network) if name.startswith("retrievers")}


def test_the_retrievers_loss_is_the_published_formula() -> None:
    torch.manual_seed(0)
    queries = [torch.randn(3, 5) for _ in range(2)]
    keys = [torch.randn(4, 5) for _ in range(2)]
    positives = torch.tensor([[True, False, False, True], [False, True, False, False]])
    loss = SlotRetrieverLoss(positives)
    hits, misses = [], []
    for layer in range(2):
        loss.add(layer, queries[layer], keys[layer])
        loss.add(layer, queries[layer], keys[layer] + 1)  # a checkpoint's second run does not count
        for slot in range(4):
            score = 0.0
            for query in queries[layer]:
                product = sum(float(a) * float(b) for a, b in zip(query, keys[layer][slot], strict=True))
                score += 1 / (1 + math.exp(-product)) / 3
            if positives[layer, slot]:
                hits.append(-math.log(score + 1e-5))
            else:
                misses.append(-math.log(1 - score + 1e-5))
    expected = (sum(hits) / len(hits) + sum(misses) / len(misses)) / 2
    assert loss.total().item() == pytest.approx(expected, rel=1e-5)
    nothing = SlotRetrieverLoss(torch.zeros(1, 4, dtype=torch.bool))
    nothing.add(0, queries[0], keys[0])
    scores = torch.sigmoid(queries[0] @ keys[0].T).mean(dim=0)
    assert nothing.total().item() == pytest.approx(-0.5 * torch.log(1 - scores + 1e-5).mean().item(), rel=1e-5)


# -- steps --------------------------------------------------------------------------------------------------------


def test_a_multi_chunk_step_is_writes_then_a_read_and_its_loss_that_of_the_target() -> None:
    network = tiny_network()
    recipe = new_recipe(network, always("multi_chunk", repeat_share=0.0, max_chunks=[[0, 2]], retriever_weight=0.0))
    loss, metrics = recipe.loss(0)
    document = next(Numbers())
    passage = split_document(document.ids, ChunkRule(2, 12, 24), Random("0/0/step/0"))
    assert passage is not None
    ids = torch.tensor([passage.target.ids])
    with torch.no_grad():
        tail, rows = None, [network.bos_embedding[layer] for layer in range(NUM_LAYERS)]
        for chunk in passage.contexts[-2:]:
            tail = network.write(torch.tensor([chunk]), tail)
            rows = [torch.cat([old, new[0]]) for old, new in zip(rows, tail, strict=True)]
        assert metrics["chunks"] == len(passage.contexts[-2:])
        assert all(torch.equal(recipe.pool.theta[layer], rows[layer][1:]) for layer in range(NUM_LAYERS))
        logits = network.logits(network.read(ids, PoolMemory(network, recipe.pool)))[0]
        expected = -torch.stack([logits[i].log_softmax(-1)[ids[0, i + 1]] for i in range(ids.shape[1] - 1)]).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert recipe.pool.theta_owners.unique().tolist() == [0]


def test_the_memory_takes_in_what_was_written_with_gradient_after_the_step() -> None:
    network = tiny_network()
    recipe = new_recipe(network, always("two_chunk"))
    recipe.loss(0)
    assert recipe.pool.theta_size == 0
    with pytest.raises(AssertionError, match="after_step"):
        recipe.state_dict()
    recipe.after_step()
    assert recipe.pool.theta_size == NUM_NEW
    recipe.after_step()
    assert recipe.pool.theta_size == NUM_NEW


def test_a_plain_step_leaves_the_memory_as_it_is() -> None:
    recipe = new_recipe(tiny_network(), always("plain"))
    metrics = run(recipe, None, range(3))
    assert all(kind_of(row) == "plain" for row in metrics)
    assert recipe.pool.num_injections == 0
    assert recipe.state_dict()["cached"] is None


@pytest.mark.parametrize("replace_share", [0.0, 1.0])
def test_a_target_is_come_back_to_over_its_own_tokens(replace_share: float) -> None:
    stage = tiny_stage(plain_share=0.0, revisit_share=0.6, replace_share=replace_share)
    recipe = new_recipe(tiny_network(), stage)
    injected = distance = 0
    owner, was_revisit, num_revisits = None, False, 0
    for step in range(40):
        can_revisit = owner is not None and distance > 0 and not was_revisit
        assert recipe.can_revisit == can_revisit
        metrics = run(recipe, None, range(step, step + 1))[0]
        if kind_of(metrics) == "revisit":
            assert can_revisit
            assert metrics["distance"] == distance
            was_revisit, num_revisits = True, num_revisits + 1
            assert recipe.pool.num_injections == injected
            continue
        num_chunks = int(metrics["chunks"])
        injected += num_chunks
        if owner is None or (was_revisit and replace_share):
            owner, distance = recipe.pool.num_documents - 1, 0
        else:
            distance += num_chunks
        was_revisit = False
        assert recipe.pool.num_injections == injected
        cached = recipe.state_dict()["cached"]
        assert cached[2:] == [owner, distance]
    assert num_revisits > 3
    assert (owner == 0) == (replace_share == 0.0)


def test_recall_is_the_share_of_the_documents_tokens_in_long_term_memory_that_was_read() -> None:
    network = tiny_network()
    recipe = new_recipe(network, always("multi_chunk"))
    run(recipe, None, range(8))
    pool = recipe.pool
    assert pool.long_term_size > NUM_RETRIEVED
    memory = PoolMemory(network, pool, NUM_RETRIEVED)
    network.read(torch.randint(3, 60, (1, 6)), memory)
    for owner in range(pool.num_documents):
        recalls = memory.recalls(owner)
        for layer in range(NUM_LAYERS):
            owners = pool.long_owners[layer].tolist()
            read = [owners[row] for row in memory.retrieved[layer].tolist()]
            if owner in owners:
                assert recalls[f"recall_{layer}"] == read.count(owner) / owners.count(owner)
            else:
                assert f"recall_{layer}" not in recalls


def test_all_ranks_draw_the_same_sub_tasks_and_different_documents_cuts() -> None:
    network = tiny_network()
    rows = [run(new_recipe(network, tiny_stage(), rank=rank), None, range(12)) for rank in (0, 1)]
    assert [kind_of(row) for row in rows[0]] == [kind_of(row) for row in rows[1]]
    assert [row["loss"] for row in rows[0]] != [row["loss"] for row in rows[1]]


# -- going on -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"random_query_prefix": True, "refresh_keys_every": 3}], ids=["paper", "code"])
def test_a_training_goes_on_bit_for_bit(changes: dict[str, Any]) -> None:
    stage = tiny_stage(revisit_share=0.4, **changes)

    def start() -> tuple[TrainableMPlus, torch.optim.Optimizer, DocumentRecipe]:
        network = tiny_network()
        return network, torch.optim.AdamW(trained(network).values(), lr=1e-3), new_recipe(network, stage)

    network, optimizer, recipe = start()
    run(recipe, optimizer, range(9))
    file = io.BytesIO()
    weights = {name: weight.detach() for name, weight in trained(network).items()}
    torch.save({"weights": weights, "optimizer": optimizer.state_dict(), "recipe": recipe.state_dict()}, file)
    expected = run(recipe, optimizer, range(9, 16))

    file.seek(0)
    state = torch.load(file, weights_only=True)
    again, again_optimizer, again_recipe = start()
    with torch.no_grad():
        for name, weight in trained(again).items():
            weight.copy_(state["weights"][name])
    again_optimizer.load_state_dict(state["optimizer"])
    again_recipe.load_state_dict(state["recipe"])
    assert run(again_recipe, again_optimizer, range(9, 16)) == expected
    assert {kind_of(row) for row in expected} >= {"revisit", "multi_chunk"}
    for name, weight in trained(network).items():
        assert torch.equal(weight, trained(again)[name]), name
    carried, carried_again = recipe.state_dict(), again_recipe.state_dict()
    for name, tensor in carried.pop("pool").items():
        assert torch.equal(tensor, carried_again["pool"][name]), name
    carried_again.pop("pool")
    assert carried == carried_again


@pytest.mark.parametrize("number", [1, 2])
def test_a_memory_is_carried_into_the_third_stage(number: int) -> None:
    network = tiny_network()
    before = new_recipe(network, tiny_stage(number, max_short_term=24))
    run(before, None, range(8))
    assert (before.pool.theta_size, before.pool.long_term_size) == (24, 0)
    recipe = new_recipe(network, tiny_stage(3))
    recipe.pool.load_state_dict(before.state_dict()["pool"])
    run(recipe, None, range(2))
    assert recipe.pool.theta_size == 16
    assert recipe.pool.long_term_size >= 12
    assert recipe.pool.num_documents > before.pool.num_documents


def test_training_makes_the_network_better_at_documents_it_sees_again() -> None:
    network = tiny_network()
    recipe = DocumentRecipe(network, Numbers(longest=24), always("two_chunk", repeat_share=0.0), INSTRUCTION)
    optimizer = torch.optim.AdamW(trained(network).values(), lr=1e-2)
    losses = []
    for _ in range(15):
        recipe.load_state_dict({**new_recipe(network, recipe.stage).state_dict()})
        losses += [row["loss"] for row in run(recipe, optimizer, range(1))]
    assert losses[-1] < 0.7 * losses[0]


class Letters:
    """As much of a tokenizer as the recipe needs."""

    def encode(self, text: str) -> list[int]:
        return [3 + ord(letter) % 50 for letter in text]


def build(network: TrainableMPlus, folder: Path, **options: Any) -> DocumentRecipe:
    given = {"paper_stage": 3, "max_short_term": 16, **options}
    return build_document_recipe(network, cast(TextCodec, Letters()), given, [{"location": str(folder)}])


@pytest.mark.parametrize("objective", ["bce", "contrastive"])
def test_a_recipe_is_built_from_plain_values_and_runs_with_checkpointing(objective: str, tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text("All work and no play. " * (2 + number))
    network = tiny_network()
    options = {"retriever_objective": objective, "revisit_share": 0.5, "max_chunks": [[0, 3]]}
    torch.manual_seed(0)  # of `contrastive`, which draws negatives
    expected = run(build(network, tmp_path, **options), None, range(8))
    assert {kind_of(row) for row in expected} >= {"revisit", "multi_chunk"}
    network.checkpointing = True
    torch.manual_seed(0)
    assert run(build(network, tmp_path, **options), None, range(8)) == expected
    torch.manual_seed(0)
    rounded = build(network, tmp_path, **options, memory_dtype="bfloat16", long_term_device="cpu")
    losses = [row["loss"] for row in run(rounded, None, range(8))]
    assert rounded.pool.theta[0].dtype == torch.bfloat16
    assert losses == pytest.approx([row["loss"] for row in expected], rel=0.05)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    network = tiny_network()
    (tmp_path / "a.txt").write_text("text")
    for options, message in (
        ({"memory_dtype": "int8"}, "memory_dtype is 'int8'"),
        ({"long_term_device": "moon"}, "long_term_device is 'moon'"),
        ({"max_short_term": 3}, "max_short_term is 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(network, tmp_path, **options)
    with pytest.raises(ConfigError, match="too short"):
        DocumentRecipe(network, Numbers(shortest=1, longest=3), tiny_stage(), INSTRUCTION).loss(0)
