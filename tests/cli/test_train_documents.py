"""`mplus train` with the paper's three stages on a folder of documents: adapters learn, the decoder stays."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mplus_agents.language.prose import packaged_prose
from tests.cli.conftest import Run
from tests.training.test_build import base_folder

_PRECISIONS = ("float32", "bf16_autocast", "bf16_master")
_MEMORY = {"tokens_per_injection": 8, "max_short_term": 32, "num_retrieved": 8, "max_long_term": 64}
_OPTIONS = {"max_chunks": [[0, 4]], "revisit_share": 0.3, "repeat_share": 0.5}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Three stages, each in another precision, the last one with checkpointing."""
    base, texts, folder = base_folder(tmp_path / "base"), tmp_path / "texts", tmp_path / "documents"
    texts.mkdir()
    folder.mkdir()
    novel = packaged_prose("novel")
    for number in range(6):
        (texts / f"{number}.txt").write_text(novel[number * 900 : (number + 1) * 900], encoding="utf-8")
    for place, precision in enumerate(_PRECISIONS, start=1):
        model: dict[str, Any] = {"start": {"path": "previous"}}
        if place == 1:
            model = {"base": {"path": str(base), "adapter_rank": 4, "memory": _MEMORY}}
        options = {"paper_stage": place, "max_short_term": None, "long_min_chunk_tokens": 16, **_OPTIONS}
        values = {
            "model": model,
            "recipe": {"type": "document", "options": options},
            "data": {"sources": [{"location": str(texts)}]},
            "optimizer": {"lr": 1e-2},
            "precision": precision,
            "gradient_checkpointing": place == 3,
            "steps": 12,
            "log_every": 1,
        }
        (folder / f"{place}.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return folder


def weights_of(model: str) -> dict[str, torch.Tensor]:
    return load_file(Path(model) / "model.safetensors")


def test_three_stages_on_documents_train_the_adapters_alone(mplus: Run, recipe: Path) -> None:
    result = mplus("train", str(recipe), "--json")
    assert result.exit_code == 0, result.output
    stages = json.loads(result.stdout)
    assert [(stage["stage"], stage["num_steps"]) for stage in stages] == [("1", 12), ("2", 12), ("3", 12)]
    first, last = (weights_of(stages[place]["model"]) for place in (0, 2))
    changed = {name for name in first.keys() & last.keys() if not torch.equal(first[name], last[name].to(first[name]))}
    for adapter in (".default", ".decoder_adapter"):
        assert any(adapter in name for name in changed), adapter
    assert not {name for name in changed if "base_layer" in name or "embed_tokens" in name or "layernorm" in name}
    seen: set[str] = set()
    for stage in stages:
        with (Path(stage["model"]).parent / "log.csv").open(newline="", encoding="utf-8") as file:
            seen |= {name for row in csv.DictReader(file) for name, value in row.items() if value}
    assert {"two_chunk", "multi_chunk", "revisit", "completion", "repetition", "retriever"} <= seen
    model = stages[2]["model"]
    assert mplus("read", "-", "--model", model, stdin="The ferry left for Bergen. " * 9).exit_code == 0
    assert mplus("ask", "Where?", "--model", model, "--max-new-tokens", "3").exit_code == 0
