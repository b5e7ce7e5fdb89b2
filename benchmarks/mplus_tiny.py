"""Measures all that docs/evaluation.md says of `mplus-tiny`, and keeps the numbers in docs/results.

    python benchmarks/mplus_tiny.py [--only retention,bare] [--folder docs/results] [--again]

What is complete and of the packaged weights is not measured again, so a run that was broken off goes on. All of it
takes two to three hours on two CPU cores; nothing else should run there. `benchmarks/result_tables.py` then writes the
tables. The baselines are in the results: θ alone, Θ read at random, all text in the prompt.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from langchain_classic.chains.conversation.prompt import PROMPT
from result_tables import is_of_packaged_model, read_result

_ROOT = Path(__file__).parent.parent
_EVAL = ("-m", "mplus_agents.cli.main", "eval")
_FEW = ("--streams", "25", "--distances", "0,64,512")
_TEMPLATE = "{template}"  # stands for the path of ConversationChain's default prompt
_RETENTION: dict[str, tuple[str, ...]] = {
    "retention": ("--figure",),
    "bare": _FEW,
    "chain": (*_FEW, "--template", _TEMPLATE),
    "chain-window": (*_FEW, "--template", _TEMPLATE, "--window-tokens", "60"),
    "value-first": (*_FEW, "--condition", "value_first"),
    "unknown": (*_FEW, "--condition", "unknown"),
    "own": ("--streams", "40", "--distances", "0,64,512", "--condition", "own"),
    "updated": (*_FEW, "--condition", "updated"),
    "k128": (*_FEW, "--num-retrieved", "128"),
    "fresh": ("--streams", "200", "--distances", "0,2,8"),
}
_OTHERS: dict[str, tuple[str, ...]] = {
    "retriever": (*_EVAL, "retriever", "--seed", "0"),
    "corrections": (str(_ROOT / "benchmarks" / "corrections.py"), "--questions", "50", "--distances", "0,8"),
}


def main() -> None:
    """Measure what is missing, in the order of the list."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default=",".join((*_RETENTION, *_OTHERS)), help="names, parted by commas")
    parser.add_argument("--folder", type=Path, default=_ROOT / "docs" / "results")
    parser.add_argument("--again", action="store_true", help="measure also what is there")
    options = parser.parse_args()
    names = options.only.split(",")
    unknown = [name for name in names if name not in {**_RETENTION, **_OTHERS}]
    if unknown:
        parser.error(f"--only names {unknown}; allowed are {', '.join((*_RETENTION, *_OTHERS))}")
    with tempfile.TemporaryDirectory() as folder:
        template = Path(folder) / "prompt.txt"
        template.write_text(PROMPT.template.replace("{input}", "{question}"), encoding="utf-8")
        for name in names:
            output = options.folder / f"mplus-tiny-{name}.json"
            if not options.again and is_current(output):
                print(f"{name}: is there", flush=True)
                continue
            started = time.monotonic()
            measure(name, output, template)
            print(f"{name}: {(time.monotonic() - started) / 60:.0f} minutes", flush=True)


def is_current(path: Path) -> bool:
    """Tell whether a result is complete and of the packaged model.

    Args:
        path: Where it would be.
    """
    if not path.is_file():
        return False
    result = read_result(path)
    return bool(result.get("is_complete", True)) and is_of_packaged_model(result)


def measure(name: str, output: Path, template: Path) -> None:
    """Run one measurement in a process of its own.

    Args:
        name: What it is called.
        output: Where its numbers go.
        template: ConversationChain's default prompt.
    """
    if name in _RETENTION:
        command = [*_EVAL, "retention", "--seed", "0", "--episodes", "200", "--workers", "2"]
        command += [argument if argument != _TEMPLATE else str(template) for argument in _RETENTION[name]]
    else:
        command = list(_OTHERS[name])
    environment = {**os.environ, "OMP_NUM_THREADS": "1" if name in _RETENTION else "2"}
    subprocess.run([sys.executable, *command, "--output", str(output)], check=True, env=environment)


if __name__ == "__main__":
    main()
