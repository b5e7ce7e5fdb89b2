"""Several processes train one model: their gradients are averaged."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training.stages import ToyNetwork, ToyRecipe, stage, toy_trainer, toy_weights

REPOSITORY = Path(__file__).parents[2]


class TwoDraws(ToyRecipe):
    """One process that draws what two would: the first loss of a step is the one's, the second the other's."""

    def __init__(self, network: ToyNetwork) -> None:
        super().__init__(network)
        self.parts = [ToyRecipe(network, 1), ToyRecipe(network, 2)]

    def loss(self, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        return self.parts[self.num_after % 2].loss(step)


def network_without_dropout() -> ToyNetwork:
    network = ToyNetwork()
    network.body[1] = torch.nn.Identity()  # each process would draw its own
    return network


def train_in_process(output: Path) -> None:
    """Run in each of two processes."""
    from mplus_agents.training.loop import make_accelerator

    config = stage()
    rank = make_accelerator(config).process_index
    trainer = toy_trainer(output, config, ToyRecipe(network_without_dropout(), 1 + rank))
    trainer.run()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one_with_two_batches(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import sys; from pathlib import Path; from tests.training.test_processes import train_in_process as t; "
    command = [sys.executable, "-c", f"{code} t(Path(sys.argv[1]))", str(tmp_path / "two")]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    shared |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    processes = []
    for rank in range(2):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
        environment = {**os.environ, **shared, **own}
        processes.append(subprocess.Popen(command, env=environment, cwd=REPOSITORY))
    assert [process.wait() for process in processes] == [0, 0]

    config = stage(gradient_accumulation=2)
    toy_trainer(tmp_path / "one", config, TwoDraws(network_without_dropout())).run()
    one, two = toy_weights(tmp_path / "one"), toy_weights(tmp_path / "two")
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-5, atol=1e-6)
    found = sorted(path.name for path in (tmp_path / "two" / "checkpoints" / "step-00000008").iterdir())
    assert found == ["process-0.pt", "process-1.pt", "state.json", "weights.pt"]
