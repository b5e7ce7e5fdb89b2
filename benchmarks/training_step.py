"""Times steps of training on a CPU with and without `keep_freed_memory`, which `mplus train` calls, in one run.

    python benchmarks/training_step.py [--steps 8] [--rounds 3] [--output FILE.json]

Both go on from the packaged weights with the last stage of the recipe `tiny`, forward and backward, each in processes
of its own, by turns. The baseline is a process that allocates as the C library does by default. The most resident
memory of a process is printed as well.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from mplus_agents.cli.host_memory import keep_freed_memory

_STAGE = "8-conversation"
_WARM_UP = 2  # steps


def main() -> None:
    """Time, and print medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a process")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each kind")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", choices=("default", "kept"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        if options.child == "kept" and not keep_freed_memory():
            raise SystemExit("the C library is not glibc, or the environment says how to allocate")
        measured_steps = time_steps(options.steps)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
        print(json.dumps({"seconds": measured_steps, "bytes": peak}))
        return
    seconds: dict[str, list[float]] = {"default": [], "kept": []}
    held: dict[str, list[int]] = {"default": [], "kept": []}
    for _ in range(options.rounds):
        for kind, measured in seconds.items():
            command = [sys.executable, __file__, "--steps", str(options.steps), "--child", kind]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            result = json.loads(done.stdout.splitlines()[-1])
            measured += result["seconds"]
            held[kind].append(result["bytes"])
    medians = {kind: statistics.median(measured) for kind, measured in seconds.items()}
    print(f"median seconds per step: default {medians['default']:.2f}, memory kept {medians['kept']:.2f}")
    print(f"ratio: {medians['kept'] / medians['default']:.2f}")
    peaks = {kind: statistics.median(measured) / 1e9 for kind, measured in held.items()}
    print(f"held at most, median of processes: default {peaks['default']:.1f} GB, memory kept {peaks['kept']:.1f} GB")
    if options.output is not None:
        values = {"versions": _versions(), "medians": medians, "seconds": seconds, "peak_bytes": held}
        options.output.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _versions() -> dict[str, str]:
    import torch  # not before a child has chosen how to allocate

    from mplus_agents.evaluation.engines import versions

    return versions(torch.device("cpu"))


def time_steps(num_steps: int) -> list[float]:
    """Train without changing weights; return the seconds of each step."""
    import torch

    from mplus_agents.model.checkpoint import CheckpointFiles
    from mplus_agents.training.assemble import build_recipe
    from mplus_agents.training.build import build_network
    from mplus_agents.training.precision import MasterWeights
    from mplus_agents.training.stage_files import load_stage, ready_recipes

    file = next(path for path in ready_recipes()["tiny"] if path.stem == _STAGE)
    stage = load_stage(file, [f"model.start.path={CheckpointFiles.open('mplus-tiny').folder}"])
    network, codec = build_network(stage, None)
    recipe = build_recipe(stage, network, codec, 0, 1)
    MasterWeights(network)  # computes in bfloat16, as the stage does
    network.train()
    torch.manual_seed(0)
    measured = []
    for step in range(1, num_steps + _WARM_UP + 1):
        started = time.perf_counter()
        loss, _ = recipe.loss(step)
        loss.backward()
        network.zero_grad()
        recipe.after_step()
        measured.append(time.perf_counter() - started)
    return measured[_WARM_UP:]


if __name__ == "__main__":
    main()
