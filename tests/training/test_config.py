"""Stage files: every mistake is said in one sentence, and the ready recipes hold the paper's numbers."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest

from mplus_agents.config import MPlusConfig
from mplus_agents.errors import ConfigError
from mplus_agents.training import small_stage
from mplus_agents.training.config import DocumentSettings, OptimizerSection, SmallSettings, memory_config
from mplus_agents.training.document_stage import PAPER_STAGES, DocumentStage
from mplus_agents.training.stage_files import find_stages, load_stage, parse_stage, ready_recipes
from tests.training.stages import TINY_MODEL, stage_values

READY = [path for paths in ready_recipes().values() for path in paths]
SMALL = {"type": "small", "kind": "write"}
DOCUMENT = {"type": "document", "options": {"paper_stage": 1}}
FOLDER = {"sources": [{"location": "texts"}]}
NEW = TINY_MODEL["new"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stepss": 3}, "f.yaml: unknown key 'stepss'; did you mean 'steps'? known keys: name, model, recipe, data,"),
        ({"recipe": {**SMALL, "num_chunk": 3}}, "unknown key 'recipe.num_chunk'; did you mean 'num_chunks'? known"),
        ({"optimizer": {"lr": 1, "warmup": 2}}, "unknown key 'optimizer.warmup'; "),
        ({"optimizer": {}}, "the key 'optimizer.lr' is missing"),
        ({"optimizer": {"lr": -1}}, "optimizer.lr is -1; allowed: greater than 0"),
        ({"optimizer": {"lr": True}}, "optimizer.lr is True; allowed: a number"),
        ({"optimizer": {"lr": "fast"}}, "optimizer.lr is 'fast'; allowed: a number"),
        ({"optimizer": 3}, "optimizer is 3; allowed: keys and values"),
        ({"optimizer": {"lr": 1, "schedule": "linear", "decay_from": 1}}, "decay_from (1.0) has to be less than"),
        ({"steps": "5"}, "steps is '5'; allowed: a whole number"),
        ({"steps": 0}, "steps is 0; allowed: greater than 0"),
        ({"precision": "fp8"}, "precision is 'fp8'; allowed: 'float32', 'bf16_master' or 'bf16_autocast'"),
        ({"gradient_checkpointing": 1}, "gradient_checkpointing is 1; allowed: true or false"),
        ({"recipe": {"type": "smal"}}, "recipe.type is 'smal'; allowed: small, document"),
        ({"recipe": {**SMALL, "kind": "wirte"}}, "recipe.kind is 'wirte'; allowed: 'repeat',"),
        ({"model": {}}, "model: exactly one of new, base and start"),
        ({"model": {"base": {"path": "x"}, "start": {}}}, "model: exactly one of new, base and start"),
        ({"model": {"new": {"hiden_size": 3}}}, "unknown key 'model.new.hiden_size'; did you mean 'hidden_size'?"),
        ({"model": {"base": {"path": "x", "memory": {"max_short": 3}}}}, "did you mean 'max_short_term'?"),
        ({"recipe": DOCUMENT}, "data.sources is empty; allowed: at least one folder or dataset"),
        ({"recipe": {"type": "document", "options": {"plain": 1}}, "data": FOLDER}, "recipe.options: document recipe"),
        ({"recipe": DOCUMENT, "data": {"sources": [{"place": "x"}]}}, "data.sources: source: unknown key 'place'"),
        ({"name": "../x"}, "name is '../x'; allowed: a name for a folder"),
        ({"name": ""}, "name is ''; allowed: a name for a folder"),
        ({"seed": 2**70}, "seed is 1180591620717411303424; allowed: "),
        ({"optimizer": {"lr": 1, "betas": [0.9, 1]}}, "optimizer.betas.1 is 1; allowed: less than 1"),
        ({"data": {"prose": []}}, "data.prose is []; allowed: "),
        ({"model": {"new": {**NEW, "head_dim": 15}}}, "head_dim (15) is odd"),
        ({"model": {"new": {**NEW, "hidden_size": 33}}}, "hidden_size (33) is no multiple of num_heads (2)"),
        ({"model": {"new": {**NEW, "tokenizer": {"prose": ["foo"]}}}}, "tokenizer.prose.0 is 'foo'; allowed: 'kjv'"),
        ({"recipe": {**DOCUMENT, "options": {"max_chunks": [[0, 1], ["b", 2]]}}, "data": FOLDER}, "max_chunks is"),
        ({"recipe": {**DOCUMENT, "options": {"retriever_weight": float("inf")}}, "data": FOLDER}, "a number from 0"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_stage(stage_values(**changes), "f.yaml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("f.yaml: ")
    assert "\n" not in str(caught.value)


def test_yaml_and_toml_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "1-a.yaml").write_text(
        "model: {start: {path: x}}\nrecipe: {type: small, kind: write}\n"
        "optimizer: {lr: 1e-4, clip: null}\nsteps: 1_000\n",
        encoding="utf-8",
    )
    (tmp_path / "2-b.toml").write_text(
        'name = "1-a"\nsteps = 1000\n[model.start]\npath = "x"\n[recipe]\ntype = "small"\nkind = "write"\n'
        "[optimizer]\nlr = 1e-4\n",
        encoding="utf-8",
    )
    files = find_stages([str(tmp_path)])
    yaml, toml = (load_stage(path) for path in files)
    assert (yaml.name, yaml.optimizer.lr, yaml.optimizer.clip, yaml.steps) == ("1-a", 1e-4, None, 1000)
    assert toml.model_dump() == load_stage(files[0], ["optimizer.clip=1.0"]).model_dump()


def test_changes_from_the_command_line(tmp_path: Path) -> None:
    path = find_stages(["tiny"])[0]
    changed = load_stage(path, ["optimizer.lr=1e-5", "stop_when=null", "model.new.memory.chunk_tokens=48"])
    assert changed.optimizer.lr == 1e-5
    assert changed.stop_when is None
    assert changed.model.new is not None
    assert changed.model.new.memory.chunk_tokens == 48
    assert changed.model.new.memory.max_short_term == load_stage(path).model.new.memory.max_short_term  # type: ignore[union-attr]
    for change, message in (("x", "allowed: key=value"), ("steps.x=1", "holds a value"), ("stepz=1", "did you mean")):
        with pytest.raises(ConfigError, match=message):
            load_stage(path, [change])


def test_files_that_are_none(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    twice = "a: {b: [{c: 1, c: 2}]}"
    for text, message in (("a: [", "is not YAML"), ("- 1", "holds no keys"), (twice, "'c' is given twice")):
        broken.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=message):
            load_stage(broken)
    with pytest.raises(ConfigError, match=r"'huge' is neither a ready recipe \(llama-3.1-8b, llama-3.2-1b, tiny\)"):
        find_stages(["huge"])


@pytest.mark.parametrize("path", READY, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_ready_recipes_are_valid(path: Path) -> None:
    stage = load_stage(path)
    assert stage.name == path.stem
    assert (stage.model.start is None) == path.name.startswith("1-")
    if stage.model.new is not None:
        assert isinstance(memory_config(stage.model.new), MPlusConfig)


def test_ready_recipes_hold_the_papers_numbers() -> None:
    first, second, third = (load_stage(path) for path in ready_recipes()["llama-3.1-8b"])
    assert first.model.base is not None
    assert first.model.base.path == "meta-llama/Llama-3.1-8B"
    memory = first.model.base.memory
    assert (memory.tokens_per_injection, memory.max_short_term, memory.chunk_tokens) == (256, 12_800, 512)
    assert memory.max_prompt_tokens == 2048
    assert (first.model.base.adapter_rank, first.model.base.adapter_alpha) == (16, 32)
    assert first.steps == 1_200_000
    assert first.optimizer.lr == pytest.approx(8 * 4.6e-5)
    assert first.optimizer.factor(0, first.steps) == 1
    assert first.optimizer.factor(50_000, first.steps) == pytest.approx(0.55, abs=1e-4)
    assert first.optimizer.factor(500_000, first.steps) == pytest.approx(0.1)
    assert [each.optimizer.lr for each in (second, third)] == pytest.approx([8 * 4.6e-6] * 2)
    assert [each.optimizer.retriever_lr for each in (second, third)] == [1e-4] * 2
    assert second.steps * 8 == 1_000_000
    assert len(second.data.sources) == 5
    assert third.model.start is not None
    assert third.model.start.memory.max_short_term == 10_240
    for number, each in enumerate((first, second, third), 1):
        assert isinstance(each.recipe, DocumentSettings)
        options = {key: value for key, value in each.recipe.options.items() if key != "long_term_device"}
        assert DocumentStage.from_dict(options) == PAPER_STAGES[number]


def test_rate_is_the_prototypes() -> None:
    section = OptimizerSection(lr=1.0, warm_up_steps=100, schedule="linear", decay_from=0.4)
    for step in (0, 50, 99, 100, 1199, 1200, 1201, 2500, 2999):
        expected = min(1, (step + 1) / 100)
        if step >= 0.4 * 3000:
            expected *= 1 - 0.95 * (step - 0.4 * 3000) / ((1 - 0.4) * 3000)
        assert section.factor(step, 3000) == pytest.approx(expected, rel=1e-12)
    assert OptimizerSection(lr=1.0, warm_up_steps=0).factor(7, 10) == 1


def test_small_settings_are_those_of_the_recipe() -> None:
    of_loop = {"steps"}
    fields = {
        field.name: field.default for field in dataclasses.fields(small_stage.SmallStage) if field.name not in of_loop
    }
    own = set(SmallSettings.model_fields) - {"type"}
    assert own == set(fields)
    kinds = SmallSettings.model_fields["kind"].annotation
    assert set(typing.get_args(kinds)) == set(typing.get_args(small_stage.StepKind))
    for name in own - {"kind"}:
        assert SmallSettings.model_fields[name].default == fields[name]
