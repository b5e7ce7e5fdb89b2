"""Figures like the paper's: exact match over the distance, and the retriever's recall by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mplus_agents.errors import InvalidInputError
from mplus_agents.evaluation.report import Result, RetrieverResult, variants_of

_MISSING = 'matplotlib, which is not installed: pip install "mplus-agents[eval]"'
_COLOURS = {
    "mplus": "tab:blue",
    "theta_only": "tab:orange",
    "random": "tab:red",
    "full_context": "tab:green",
    "window": "tab:gray",
    "no_context": "tab:gray",
}
_NAMES = {
    "mplus": "M+",
    "theta_only": "θ only (MemoryLLM)",
    "random": "random retrieval",
    "full_context": "full context",
    "window": "plain window",
    "no_context": "without the context",
}
_STYLES = ("-", "--", ":", "-.")
_MARKERS = "osD^v<>"


def check_figures() -> None:
    """Check that figures can be drawn, before hours are spent on what they show.

    Raises:
        InvalidInputError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise InvalidInputError("figure", True, f"False, or {_MISSING}") from error


def draw_retention(results: Sequence[tuple[str, Result]], path: Path) -> None:
    """Draw exact match over the distance on a logarithmic axis, several runs in one figure.

    Args:
        results: Label and result of each run.
        path: The file; its suffix says the format.

    Raises:
        InvalidInputError: matplotlib is not installed, or the file cannot be written.
    """
    if not any(result.points for _, result in results):
        raise InvalidInputError("figure", str(path), "results that have points; these have none yet")
    figure, axes = _new_figure()
    unit = "distractor contexts" if results[0][1].kind == "qa" else "chunks of prose"
    distances = sorted({point.distance for _, result in results for point in result.points})
    for place, (label, result) in enumerate(results):
        for variant in variants_of(result):
            points = sorted((p.distance, p.accuracy) for p in result.points if p.variant == variant)
            name = _NAMES.get(variant, variant)
            axes.plot(
                *zip(*points, strict=True),
                label=f"{label}: {name}" if len(results) > 1 else name,
                color=_COLOURS.get(variant),
                linestyle=_STYLES[place % len(_STYLES)],
                marker=_MARKERS[place % len(_MARKERS)],
                markersize=4,
            )
    axes.set_xscale("symlog", base=2, linthresh=1)
    axes.set_xlim(min(distances) - 0.1, max(*distances, 1) * 1.2)
    axes.set_xticks(distances, [f"{distance:,}" for distance in distances], rotation=45)
    axes.minorticks_off()
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel(f"{unit} between fact and question")
    axes.set_ylabel("exact match")
    _save(figure, axes, path)


def draw_retriever(result: RetrieverResult, path: Path) -> None:
    """Draw the share of the fact's tokens among the retrieved over the size of Θ, per layer and at random.

    Args:
        result: The result.
        path: The file; its suffix says the format.

    Raises:
        InvalidInputError: matplotlib is not installed, or the file cannot be written.
    """
    figure, axes = _new_figure()
    for layer in sorted({point.layer for point in result.points}):
        points = sorted((p.size, p.recall) for p in result.points if p.layer == layer)
        axes.plot(*zip(*points, strict=True), label=f"layer {layer}", marker="o", markersize=4)
    points = sorted({(p.size, p.random) for p in result.points})
    axes.plot(*zip(*points, strict=True), label="random", color="tab:gray", linestyle="--", marker="o", markersize=4)
    axes.set_xscale("log")
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("tokens in Θ, per layer")
    axes.set_ylabel("share of the fact's tokens retrieved")
    _save(figure, axes, path)


def _new_figure() -> tuple[Any, Any]:
    check_figures()
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and may open windows

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    return figure, figure.add_subplot()


def _save(figure: Any, axes: Any, path: Path) -> None:
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise InvalidInputError("figure", str(path), f"a picture file that can be written ({error})") from error
