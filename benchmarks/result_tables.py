"""Writes the tables of `mplus-tiny` into the pages that show them, from the numbers in docs/results.

    python benchmarks/result_tables.py [--check]

A page holds `<!-- table: NAME -->` in front of such a table and `<!-- end of table -->` behind it. Numbers that were
measured with other weights than the packaged ones, or with another θ, are marked †.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mplus_agents.evaluation.engines import load

_ROOT = Path(__file__).parent.parent
_RESULTS = _ROOT / "docs" / "results"
_PAGES = ("README.md", "docs/evaluation.md", "mplus_agents/assets/mplus-tiny/README.md")
_BLOCK = re.compile(r"(<!-- table: ([a-z-]+) -->\n).*?(\n<!-- end of table -->)", re.DOTALL)
_VARIANTS = (
    ("**with Θ**", "mplus"),
    ("θ alone (MemoryLLM)", "theta_only"),
    ("Θ read at random", "random"),
    ("all text in the prompt, while it fits", "full_context"),
    ("the end of the text in the prompt", "window"),
)
_BRIEF_VARIANTS = (("with the long-term memory Θ", "mplus"), ("the same weights, Θ off", "theta_only"))
_BRIEF_DISTANCES = (0, 2, 8, 64, 512, 4096)
_CONDITIONS = (
    ("the bare question", "bare", "accuracy"),
    ("in ConversationChain's default prompt, `--template prompt.txt`", "chain", "accuracy"),
    ("the same with turns about others in it, `--window-tokens 60`", "chain-window", "accuracy"),
    ("told with the value first, `--condition value_first`", "value-first", "accuracy"),
    ('never told, "not known", `--condition unknown`, named people only', "unknown", "accuracy"),
    ("another K0 than the model has, `--num-retrieved 128`", "k128", "accuracy"),
    ("in the first person, told as turns, `--condition own --streams 40`", "own", "accuracy"),
    ("told twice, the later value, `--condition updated`", "updated", "accuracy"),
    ("told twice, the earlier value, the same run", "updated", "superseded"),
)
_MOMENTS = {
    "before": "before the correction",
    "in the window": "while it waits in the window",
    "injected": "once it is injected",
}


def main() -> None:
    """Write every table, or tell which pages hold other numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is not up to date")
    options = parser.parse_args()
    stale = []
    for name in _PAGES:
        path = _ROOT / name
        old = path.read_text(encoding="utf-8")
        new = with_tables(old)
        if new != old:
            stale.append(name)
            if not options.check:
                path.write_text(new, encoding="utf-8")
    for name in stale:
        print(f"{name}: {'not up to date' if options.check else 'written'}")
    sys.exit(1 if options.check and stale else 0)


def with_tables(page: str) -> str:
    """Return a page with its tables made anew.

    Args:
        page: Markdown with marked places.

    Raises:
        KeyError: A place names a table that does not exist.
    """
    return _BLOCK.sub(lambda place: place[1] + TABLES[place[2]]() + place[3], page)


def read_result(path: Path) -> dict[str, Any]:
    """Return a saved result.

    Args:
        path: Where it is.
    """
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def is_of_packaged_model(result: dict[str, Any]) -> bool:
    """Tell whether a result was measured with the packaged weights and their N.

    Args:
        result: A saved result.
    """
    packaged = load("mplus-tiny").weights
    return all(result["weights"][key] == packaged[key] for key in ("weights", "memory.max_short_term"))


def _read(name: str) -> dict[str, Any]:
    return read_result(_RESULTS / f"mplus-tiny-{name}.json")


def _retention() -> str:
    points = _by_variant(_read("retention"))
    distances = sorted({distance for _, distance in points})
    return _retention_table("chunks of prose between", _VARIANTS, distances)


def _retention_brief() -> str:
    return _retention_table("chunks between", _BRIEF_VARIANTS, list(_BRIEF_DISTANCES))


def _retention_table(head: str, variants: tuple[tuple[str, str], ...], distances: list[int]) -> str:
    points = _by_variant(_read("retention"))
    rows = [[head, *(f"{distance:,}" for distance in distances)]]
    for label, variant in variants:
        cells = [_number(points.get((variant, distance), {}).get("accuracy")) for distance in distances]
        rows.append([label, *(f"**{cell}**" if label.startswith("**") else cell for cell in cells)])
    return _markdown(rows)


def _conditions() -> str:
    rows = [["", "K0", "0", "64", "512"]]
    for label, name, field in _CONDITIONS:
        result = _read(name)
        points = _by_variant(result)
        settings = result["settings"]
        label = f"{label} ([numbers](results/mplus-tiny-{name}.json))" + ("" if is_of_packaged_model(result) else " †")
        asked = settings["num_retrieved"] or settings["memory"]["num_retrieved"]
        rows.append([label, f"{asked}", *(_number(points["mplus", distance][field]) for distance in (0, 64, 512))])
    return _markdown(rows)


def _corrections() -> str:
    rows = [["chunks between fact and correction", "asked", "earlier value", "later value", "neither"]]
    for point in _read("corrections")["points"]:
        shares = [point["earlier"], point["later"], 1 - point["earlier"] - point["later"]]
        rows.append([f"{point['distance']}", _MOMENTS[point["asked"]], *(_number(share, 2) for share in shares)])
    return _markdown(rows)


def _retriever() -> str:
    points = _read("retriever")["points"]
    layers = sorted({point["layer"] for point in points})
    rows = [["tokens in Θ, per layer", "at random", f"layer {layers[0]}", *(f"{layer}" for layer in layers[1:])]]
    for size in sorted({point["size"] for point in points}):
        of_size = {point["layer"]: point for point in points if point["size"] == size}
        chance = of_size[layers[0]]["random"]
        recalls = [_number(of_size[layer]["recall"]) for layer in layers]
        rows.append([f"{size:,}", _number(chance, 3 if chance >= 0.001 else 4), *recalls])
    return _markdown(rows)


def _by_variant(result: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    return {(point["variant"], point["distance"]): point for point in result["points"]}


def _number(share: float | None, digits: int = 3) -> str:
    if share is None:
        return "–"
    text = f"{share:.{digits}f}"
    return "0" if float(text) == 0 else text.removeprefix("0") if float(text) < 1 else "1.00"


def _markdown(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0].replace("|  |", "| |"), "|---" * len(rows[0]) + "|", *lines[1:]])


TABLES: dict[str, Callable[[], str]] = {
    "retention": _retention,
    "retention-brief": _retention_brief,
    "conditions": _conditions,
    "corrections": _corrections,
    "retriever": _retriever,
}


if __name__ == "__main__":
    main()
