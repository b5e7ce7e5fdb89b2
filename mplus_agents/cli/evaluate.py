"""`mplus eval`: what a model remembers, by experiment; results as tables, JSON files and figures."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mplus_agents.cli.options import DEFAULT_MODEL, DeviceOption
from mplus_agents.cli.output import note, print_json, print_table, working
from mplus_agents.errors import InvalidInputError

if TYPE_CHECKING:
    from mplus_agents.evaluation.report import Result, RetrieverResult

# The experiments' own defaults; importing them from there would load PyTorch for every `--help`. A test compares them.
DEFAULT_DISTANCES = "0,1,2,4,8,16,32,64,128,256,512,2048,4096"
DEFAULT_EPISODES = 200
DEFAULT_SIZES = "1000,10000,100000"
DEFAULT_STEPS = "0,1,2,5,10,20"

evaluate = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")

ModelsOption = Annotated[
    list[str],
    typer.Option(
        "--model", "-m", metavar="MODEL", help="A folder, a Hugging Face id, or mplus-tiny; give it again for more."
    ),
]
SeedOption = Annotated[int, typer.Option(min=0, metavar="S", help="Seed of everything random.")]
OutputOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Save the numbers as JSON, after every stream; several models get a file each."),
]
FigureOption = Annotated[bool, typer.Option("--figure", help="Draw the numbers as a PNG beside the JSON file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON; of several models an array.")]
NumRetrievedOption = Annotated[
    int | None, typer.Option(min=1, metavar="K0", help="Tokens read from Θ per layer, if not as the model was made.")
]
ProseOption = Annotated[
    str | None, typer.Option(metavar="FILE", help="Take the prose from a text file, not from the packaged novel.")
]
DistancesOption = Annotated[str, typer.Option(metavar="D,D,…", help="Chunks of prose between fact and question.")]
StreamsOption = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Streams that carry the facts; at least 50 (or one per question) if not given."
    ),
]
ConditionOption = Annotated[
    Literal["plain", "own", "updated", "unknown", "value_first"],
    typer.Option(
        help="Facts about people; in the first person; told again with another value; never told; or with the "
        "value in front."
    ),
]
TemplateOption = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT|FILE",
        help="Ask through this prompt; {question} stands for the question, {history} for the window.",
    ),
]


@evaluate.callback()
def _root() -> None:
    """Measure what a model remembers.

    Every experiment makes agents of its own in temporary databases, which are
    deleted afterwards. [bold]No agent of yours is touched.[/]

      [dim]$[/] mplus eval retention --seed 0 --output retention.json --figure
      [dim]$[/] mplus eval compare old.json new.json --figure both.png
    """


@evaluate.command()
def retention(
    *,
    model: ModelsOption = [DEFAULT_MODEL],  # noqa: B006 - typer copies it
    seed: SeedOption = 0,
    episodes: Annotated[
        int, typer.Option(min=1, metavar="N", help="Questions per distance and variant.")
    ] = DEFAULT_EPISODES,
    distances: DistancesOption = DEFAULT_DISTANCES,
    streams: StreamsOption = None,
    condition: ConditionOption = "plain",
    gap: Annotated[int, typer.Option(min=1, metavar="N", help="Chunks between the two tellings of 'updated'.")] = 1,
    num_retrieved: NumRetrievedOption = None,
    template: TemplateOption = None,
    window_tokens: Annotated[
        int, typer.Option(min=0, metavar="N", help="Let so many tokens of other turns wait in the window.")
    ] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer, in tokens.")] = 32,
    prose: ProseOption = None,
    workers: Annotated[int, typer.Option(min=1, metavar="N", help="Processes that streams are split over.")] = 1,
    device: DeviceOption = None,
    output: OutputOption = None,
    figure: FigureOption = False,
    as_json: JsonOption = False,
) -> None:
    """Tell facts, read prose, ask: exact match by distance.

    Made-up facts are remembered, then so many chunks of prose, then questions
    are asked: with Θ, with θ alone, with tokens of Θ drawn at random, and with
    the text in the prompt of an empty memory. The window is empty.

      [dim]$[/] mplus eval retention --seed 0 --episodes 200 --distances 0,64,512 --output run.json
    """
    with working("loading"):
        from mplus_agents.evaluation.retention import run_retention
        from mplus_agents.evaluation.settings import RetentionSettings
    out = _Output(output, figure, as_json, model)
    shared: dict[str, Any] = {
        "seed": seed,
        "episodes": episodes,
        "distances": _numbers("distances", distances),
        "streams": streams,
        "condition": condition,
        "gap": gap,
        "num_retrieved": num_retrieved,
        "template": _read_template(template),
        "window_tokens": window_tokens,
        "max_new_tokens": max_new_tokens,
        "prose": prose,
        "device": device,
    }
    for name in model:
        settings = RetentionSettings(model=name, **shared)
        with _progress(f"{name}: chunks of prose", settings.num_streams * settings.num_prose_chunks) as advance:
            result = run_retention(settings, workers=workers, on_result=out.saver(name), on_progress=advance)
        out.take(name, result)
    out.finish()


@evaluate.command()
def retriever(
    *,
    model: ModelsOption = [DEFAULT_MODEL],  # noqa: B006 - typer copies it
    seed: SeedOption = 0,
    questions: Annotated[int, typer.Option(min=1, metavar="N", help="Questions per size.")] = DEFAULT_EPISODES,
    sizes: Annotated[str, typer.Option(metavar="M,M,…", help="Tokens in Θ, per layer.")] = DEFAULT_SIZES,
    num_retrieved: NumRetrievedOption = None,
    prose: ProseOption = None,
    device: DeviceOption = None,
    output: OutputOption = None,
    figure: FigureOption = False,
    as_json: JsonOption = False,
) -> None:
    """Count the fact's tokens among those retrieved from Θ.

    Θ is filled with prose and facts; then every question retrieves K0 tokens
    per layer of its memory, and the share of the fact's tokens among them is
    compared with a draw at random.

      [dim]$[/] mplus eval retriever --sizes 1000,10000,100000 --output recall.json
    """
    with working("loading"):
        from mplus_agents.evaluation.retriever import RetrieverSettings, run_retriever
    out = _Output(output, figure, as_json, model)
    for name in model:
        settings = RetrieverSettings(name, seed, questions, _numbers("sizes", sizes), num_retrieved, prose, device)
        with _progress(f"{name}: injections") as advance:
            result = run_retriever(settings, on_progress=advance)
        out.saver(name)(result)
        out.take(name, result)
    out.finish()


@evaluate.command()
def qa(
    *,
    dataset: Annotated[Literal["squad", "naturalqa"], typer.Option(help="Format of the questions.")],
    file: Annotated[str, typer.Option(metavar="F", help="Questions: SQuAD's JSON, or simplified NQ's JSON Lines.")],
    distractors: Annotated[
        str, typer.Option(metavar="G", help="SQuAD's JSON; its contexts of 300 to 500 tokens come in between.")
    ],
    steps: Annotated[
        str, typer.Option(metavar="N,N,…", help="Distractors between context and question.")
    ] = DEFAULT_STEPS,
    model: ModelsOption = [DEFAULT_MODEL],  # noqa: B006 - typer copies it
    seed: SeedOption = 0,
    episodes: Annotated[
        int, typer.Option(min=1, metavar="N", help="Questions, the first ones with short answers.")
    ] = 100,
    num_retrieved: NumRetrievedOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer, in tokens.")] = 16,
    device: DeviceOption = None,
    output: OutputOption = None,
    figure: FigureOption = False,
    as_json: JsonOption = False,
) -> None:
    """Ask about real contexts, as the paper does.

    An agent's memory reads the context of a question, then other contexts, and
    is asked after so many of them. Answers of more than 3 (SQuAD) or 4 (Natural
    Questions) tokens are left out.

      [dim]$[/] mplus eval qa --dataset squad --file dev-v1.1.json --distractors train-v1.1.json --steps 0,5,10
    """
    with working("loading"):
        from mplus_agents.evaluation.qa import QASettings, run_qa
    out = _Output(output, figure, as_json, model)
    for name in model:
        settings = QASettings(
            dataset,
            file,
            distractors,
            name,
            seed,
            episodes,
            _numbers("steps", steps),
            num_retrieved,
            max_new_tokens,
            device,
        )
        with _progress(f"{name}: questions") as advance:
            result = run_qa(settings, on_result=out.saver(name), on_progress=advance)
        out.take(name, result)
    out.finish()


@evaluate.command()
def compare(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Results of retention, or of qa.")],
    *,
    figure: Annotated[Path | None, typer.Option(metavar="PNG", help="Draw all runs in one figure.")] = None,
) -> None:
    """Put saved results side by side; no memory and no model is loaded.

    [dim]$[/] mplus eval compare old.json new.json --figure both.png
    """
    from mplus_agents.evaluation.report import comparison_table, differences, load_comparable

    results = load_comparable(files)
    print_table(comparison_table(results))
    for text in differences(results):
        note(text)
    if figure is not None:
        from mplus_agents.evaluation.figures import draw_retention

        draw_retention(results, figure)
        note(f"figure: {figure}")


class _Output:
    """Where results go.

    Args:
        path: File for the numbers.
        has_figure: Whether to draw them.
        as_json: Whether to print JSON in place of a table.
        models: Models to come.
    """

    def __init__(self, path: Path | None, has_figure: bool, as_json: bool, models: Sequence[str]) -> None:
        if has_figure and path is None:
            raise InvalidInputError("figure", True, "True together with --output FILE, beside which it is drawn")
        if len(set(models)) < len(models):
            raise InvalidInputError("model", list(models), "every model once")
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise InvalidInputError("output", str(path), "a file in a folder that exists")
        if path is not None and has_figure and path.suffix == ".png":
            raise InvalidInputError("output", str(path), "a file for the numbers; the figure is drawn beside it as PNG")
        if has_figure:
            from mplus_agents.evaluation.figures import check_figures

            check_figures()
        self._path, self._has_figure, self._as_json, self._models = path, has_figure, as_json, models
        self._results: list[Result | RetrieverResult] = []

    def saver(self, model: str) -> Callable[[Result | RetrieverResult], None]:
        """Return what saves a model's numbers so far."""
        from mplus_agents.evaluation.report import save_result

        path = self._path_of(model)
        return lambda result: save_result(result, path) if path is not None else None

    def take(self, model: str, result: Result | RetrieverResult) -> None:
        """Show a model's numbers."""
        from mplus_agents.evaluation.report import RetrieverResult, result_table, retriever_table

        self._results.append(result)
        if not self._as_json:
            print_table(retriever_table(result) if isinstance(result, RetrieverResult) else result_table(result))
            for text in result.notes:
                note(text)
        path = self._path_of(model)
        if path is not None and self._has_figure:
            from mplus_agents.evaluation.figures import draw_retention, draw_retriever

            picture = path.with_name(f"{path.name.removesuffix('.json')}.png")
            if isinstance(result, RetrieverResult):
                draw_retriever(result, picture)
            else:
                draw_retention([(result.model, result)], picture)

    def finish(self) -> None:
        """Print JSON, or the models side by side."""
        from mplus_agents.evaluation.report import Result, comparison_table

        if self._as_json:
            values = [result.model_dump(mode="json", exclude_none=True) for result in self._results]
            print_json(values[0] if len(values) == 1 else values)
            return
        comparable = [(result.model, result) for result in self._results if isinstance(result, Result)]
        if len(comparable) > 1:
            print_table(comparison_table(comparable))

    def _path_of(self, model: str) -> Path | None:
        if self._path is None or len(self._models) == 1:
            return self._path
        slug = f"{self._models.index(model)}-{re.sub('[^A-Za-z0-9._-]+', '-', Path(model).name)}"
        return self._path.with_name(f"{self._path.stem}.{slug}{self._path.suffix}")


@contextmanager
def _progress(what: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Show a bar on stderr, if a person is looking; the total may come with the first step."""
    from tqdm import tqdm

    with tqdm(total=total, desc=what, disable=not sys.stderr.isatty(), leave=False) as bar:

        def advance(done: int, in_all: int | None = None) -> None:
            """Move the bar on by so many, and set the total if it has become known."""
            if in_all is not None and bar.total != in_all:
                bar.total = in_all
            bar.update(done)

        yield advance


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InvalidInputError(name, text, "whole numbers with commas between") from error


def _read_template(text: str | None) -> str | None:
    """Return a template given as such, or the content of the file that is named."""
    if text is None or "{question}" in text:
        return text
    try:
        return Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        allowed = f"a text with {{question}} in it, or a file of such a text, which cannot be read here ({error})"
        raise InvalidInputError("template", text, allowed) from error
