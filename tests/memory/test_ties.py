"""Equal scores in the search of Θ: sigmoids of large products are exactly 1, so they are common."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mplus_agents.errors import SchemaVersionError
from mplus_agents.memory.index import MemoryIndex
from tests.memory.test_state import _config, _run


def test_newest_of_equals_win_under_paper() -> None:
    config = _config(rule="paper")
    memory = _run(config, 12)
    for block in memory.long_term._blocks.values():
        block.retrieval_keys.fill_(1.0)
    queries = torch.full((1, config.retrieval_dim), 100.0)  # every score is exactly 1
    for layer in range(config.num_layers):
        alive = memory.index.long_term.alive_rows(layer)
        found = memory.retrieve(layer, queries)
        assert len(alive) > config.num_retrieved, "the border must cut through equals"
        assert sorted(found.tolist()) == alive[-config.num_retrieved :].tolist()


def test_a_better_score_beats_newer_equals() -> None:
    config = _config(rule="paper")
    memory = _run(config, 12)
    oldest = int(memory.index.long_term.alive_rows(0)[0])
    for number, block in memory.long_term._blocks.items():
        block.retrieval_keys.fill_(0.1)
        start = memory.index.long_term.block_start(number)
        if start <= oldest < start + block.retrieval_keys.shape[1]:
            block.retrieval_keys[0, oldest - start] = 0.2
    found = memory.retrieve(0, torch.ones((3, config.retrieval_dim)))
    alive = memory.index.long_term.alive_rows(0)
    assert sorted(found.tolist()) == [oldest, *alive[-config.num_retrieved + 1 :].tolist()]


def test_a_snapshot_brings_its_block_size_along() -> None:
    config = _config(rule="paper")
    index = _run(config, 12).index
    index.long_term.block_rows = 7
    assert index.to_arrays()["format"].tolist() == [1]
    copy = MemoryIndex.from_arrays(config, None, index.to_arrays())
    assert copy.long_term.block_rows == 7


def test_a_snapshot_of_an_unknown_format_is_refused() -> None:
    config = _config(rule="paper")
    arrays = {**_run(config, 3).index.to_arrays(), "format": np.array([2])}
    with pytest.raises(SchemaVersionError, match="snapshot format"):
        MemoryIndex.from_arrays(config, None, arrays)
