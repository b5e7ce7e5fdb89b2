"""Results as files, tables and figures: written whole, read with every field checked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from rich.markup import escape
from rich.table import Table

from mplus_agents.errors import InvalidInputError

# In the order of tables and figures.
VARIANTS = ("mplus", "theta_only", "random", "full_context", "window", "no_context")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Point(_Record):
    """What one variant reached at one distance.

    Attributes:
        variant: `mplus`, `theta_only`, `random`, `full_context`, `window` or `no_context`.
        distance: Chunks of prose, or distractor contexts, between fact and question.
        accuracy: Share of answers that are right as a whole.
        episodes: Questions asked.
        contains: Share of answers in which the right value stands.
        unknown: Share of answers that say that the answer is not known.
        superseded: Share of answers that were right before the fact was told again; None if facts are told once.
    """

    variant: str = Field(min_length=1)
    distance: int = Field(ge=0)
    accuracy: float = Field(ge=0, le=1)
    episodes: int = Field(ge=1)
    contains: float = Field(ge=0, le=1)
    unknown: float = Field(ge=0, le=1)
    superseded: float | None = Field(default=None, ge=0, le=1)


class RetrieverPoint(_Record):
    """What the retriever of one layer found among so many tokens.

    Attributes:
        size: Tokens in Θ, per layer.
        layer: The layer.
        recall: Share of the fact's tokens in Θ that are among the K0 retrieved.
        found: Share of questions with at least one of them among the retrieved.
        random: The share that K0 tokens drawn at random hold: K0 / the tokens in Θ, of which there are up to one
            injection's more than `size`.
        questions: Questions asked.
    """

    size: int = Field(ge=1)
    layer: int = Field(ge=0)
    recall: float = Field(ge=0, le=1)
    found: float = Field(ge=0, le=1)
    random: float = Field(ge=0, le=1)
    questions: int = Field(ge=1)


class _Run(_Record):
    seed: int
    versions: dict[str, str]
    weights: dict[str, str]
    model: str
    settings: dict[str, Any]
    is_complete: bool = True
    notes: tuple[str, ...] = ()


class Result(_Run):
    """One run of `retention` or `qa`.

    Attributes:
        kind: What was run.
        seed: Seed of everything random.
        versions: Versions of what computes.
        weights: Digests of weights and tokenizer.
        model: What the model is called.
        settings: How it was run.
        is_complete: Whether all streams are done; the file is written after every one.
        notes: What a reader should know.
        streams: Streams, or contexts, that the points stand on.
        episodes: Questions per point that were asked for.
        left_in_theta: By distance, the share of the fact's tokens that were in θ when it was asked for.
        points: The numbers.
    """

    kind: Literal["retention", "qa"]
    streams: int = Field(ge=0)
    episodes: int = Field(ge=1)
    left_in_theta: dict[int, float] = Field(default_factory=dict)
    points: tuple[Point, ...]


class RetrieverResult(_Run):
    """One run of `retriever`; fields as in `Result`.

    Attributes:
        kind: What was run.
        num_retrieved: K0.
        memories: Memories that were filled.
        points: The numbers.
    """

    kind: Literal["retriever"]
    num_retrieved: int = Field(ge=1)
    memories: int = Field(ge=1)
    points: tuple[RetrieverPoint, ...]


# The table shows distances, weights say which memory it is, and batches change no answer.
_NOT_COMPARED = ("distances", "memory", "batch_size")
_CONTAINED = "in brackets, where it is another: value contained"
_ANY_RESULT: TypeAdapter[Result | RetrieverResult] = TypeAdapter(Result | RetrieverResult)


def save_result(result: Result | RetrieverResult, path: Path) -> None:
    """Write a result as JSON; a file that was there is replaced whole.

    Args:
        result: The result.
        path: The file.

    Raises:
        InvalidInputError: The file cannot be written.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(result.model_dump_json(indent=1, exclude_none=True) + "\n", encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise InvalidInputError("output", str(path), f"a file that can be written ({error.strerror})") from error


def load_result(path: Path) -> Result | RetrieverResult:
    """Read a result.

    Args:
        path: The file.

    Raises:
        InvalidInputError: The file cannot be read, or is no result; the message names the first field at fault.
    """
    try:
        return _ANY_RESULT.validate_json(path.read_bytes())
    except OSError as error:
        raise InvalidInputError("result", str(path), f"a file that can be read ({error.strerror})") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        allowed = f"JSON that `mplus eval` has written ({where}: {first['msg']})"
        raise InvalidInputError("result", str(path), allowed) from error


def load_comparable(paths: Sequence[Path]) -> list[tuple[str, Result]]:
    """Read results that can stand side by side.

    Args:
        paths: At least one file.

    Returns:
        Label and result of each, in order.

    Raises:
        InvalidInputError: A file is no result of `retention` or `qa`, or there are both.
    """
    results = []
    for path in paths:
        result = load_result(path)
        if isinstance(result, RetrieverResult):
            raise InvalidInputError("result", str(path), "a result of `mplus eval retention` or `mplus eval qa`")
        results.append((path, result))
    if len({result.kind for _, result in results}) > 1:
        kinds = ", ".join(f"{path.name}: {result.kind}" for path, result in results)
        raise InvalidInputError("results", kinds, "results of one kind")
    stems = [path.stem for path, _ in results]
    labels = stems if len(set(stems)) == len(stems) else [str(path) for path, _ in results]
    return [(label, result) for label, (_, result) in zip(labels, results, strict=True)]


def variants_of(result: Result) -> list[str]:
    """Return the variants that have points, in the usual order.

    Args:
        result: The result.
    """
    found = dict.fromkeys(point.variant for point in result.points)
    known = [variant for variant in VARIANTS if variant in found]
    return known + [variant for variant in found if variant not in VARIANTS]


def result_table(result: Result) -> Table:
    """Lay a run out by distance: exact match per variant, and the share that holds the value where it differs.

    Args:
        result: The result.
    """
    what = "told twice" if result.settings.get("condition") == "updated" else result.settings.get("condition", "")
    title = f"{result.model}: {result.kind}" + (f" ({what})" if what and what != "plain" else "")
    caption = f"{result.streams:,} streams, {result.episodes:,} episodes per point, seed {result.seed}"
    return _table([("", result)], f"{title}, exact match ({_CONTAINED})", caption)


def comparison_table(results: Sequence[tuple[str, Result]]) -> Table:
    """Lay several runs out side by side.

    Args:
        results: Label and result of each.
    """
    return _table(results, f"exact match ({_CONTAINED})", None)


def differences(results: Sequence[tuple[str, Result]]) -> list[str]:
    """Say what a reader of several runs side by side should know.

    Args:
        results: Label and result of each.
    """
    found = [f"{label} is not complete" for label, result in results if not result.is_complete]
    runs = [_settings_of(result) for _, result in results]
    for name in dict.fromkeys(name for run in runs for name in run):
        values = [run.get(name) for run in runs]
        if any(value != values[0] for value in values):
            listed = ", ".join(f"{value!r:.40} in {label}" for (label, _), value in zip(results, values, strict=True))
            found.append(f"the runs differ in {name}: {listed}")
    return found


def _settings_of(result: Result) -> dict[str, Any]:
    """Everything that decides the numbers."""
    own = {"seed": result.seed, "streams": result.streams, "episodes": result.episodes}
    others = {name: value for name, value in result.settings.items() if name not in _NOT_COMPARED}
    return {**own, **others, "weights": result.weights.get("weights")}


def retriever_table(result: RetrieverResult) -> Table:
    """Lay out what the retriever found, by size and layer.

    Args:
        result: The result.
    """
    layers = sorted({point.layer for point in result.points})
    title = f"{result.model}: share of the fact's tokens among the {result.num_retrieved} retrieved, by layer"
    table = _new_table(title)
    for name in ("tokens in Θ", *(f"layer {layer}" for layer in layers), "mean", "random", "questions"):
        table.add_column(name, justify="right")
    for size in sorted({point.size for point in result.points}):
        row = {point.layer: point for point in result.points if point.size == size}
        recalls = [row[layer].recall for layer in layers]
        first = row[layers[0]]
        cells = [f"{value:.3f}" for value in (*recalls, sum(recalls) / len(recalls), first.random)]
        table.add_row(f"{size:,}", *cells, f"{first.questions:,}")
    return table


def _table(results: Sequence[tuple[str, Result]], title: str, caption: str | None) -> Table:
    table = _new_table(title, caption)
    unit = "distractors" if results[0][1].kind == "qa" else "chunks"
    table.add_column(unit, justify="right")
    columns = [(label, result, variant) for label, result in results for variant in variants_of(result)]
    for label, _, variant in columns:
        table.add_column(escape(f"{label}\n{variant}" if label else variant), justify="right")
    points = [{(point.variant, point.distance): point for point in result.points} for _, result in results]
    by_result = {id(result): cells for (_, result), cells in zip(results, points, strict=True)}
    for distance in sorted({point.distance for _, result in results for point in result.points}):
        cells = [by_result[id(result)].get((variant, distance)) for _, result, variant in columns]
        table.add_row(f"{distance:,}", *map(_cell, cells))
    return table


def _cell(point: Point | None) -> str:
    if point is None:
        return "–"
    notes = [f"{point.contains:.3f}"] if abs(point.contains - point.accuracy) > 5e-4 else []
    notes += [f"old {point.superseded:.3f}"] if point.superseded else []
    return f"{point.accuracy:.3f}" + (f" ({', '.join(notes)})" if notes else "")


def _new_table(title: str, caption: str | None = None) -> Table:
    return Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        header_style="dim",
    )
