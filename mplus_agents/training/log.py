"""What a training leaves behind to look at: a CSV file, a picture of its curves, and TensorBoard's files if asked."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mplus_agents.errors import ConfigError
from mplus_agents.training.checkpoints import write_atomically

_FIXED = ("step", "seconds", "lr")


class Means:
    """Means of what steps reported since they were last taken; a number need not be reported at every step."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    def add(self, values: Mapping[str, float]) -> None:
        """Add a step's numbers."""
        for name, value in values.items():
            pair = self._sums.setdefault(name, [0.0, 0.0])
            pair[0] += value
            pair[1] += 1

    def get(self, name: str) -> float | None:
        """Return one mean; None if nothing was reported."""
        total, count = self._sums.get(name, (0.0, 0.0))
        return total / count if count else None

    def take(self) -> dict[str, float]:
        """Return all means and begin anew."""
        means = {name: total / count for name, (total, count) in self._sums.items()}
        self._sums = {}
        return means

    def state_dict(self) -> dict[str, list[float]]:
        """Return the sums so far."""
        return {name: list(pair) for name, pair in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """Take over sums."""
        self._sums = {name: list(pair) for name, pair in state.items()}


class TrainingLog:
    """`log.csv` and `curves.png` of one stage.

    Args:
        folder: The stage's output folder.
        uses_tensorboard: Whether to write TensorBoard's files as well.

    Raises:
        ConfigError: TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, uses_tensorboard: bool = False) -> None:
        self._path = folder / "log.csv"
        self._picture = folder / "curves.png"
        self._writer: Any = _summary_writer(folder / "tensorboard") if uses_tensorboard else None

    def rows(self) -> list[dict[str, str]]:
        """Return the rows written so far."""
        if not self._path.is_file():
            return []
        with self._path.open(newline="", encoding="utf-8", errors="replace") as file:
            return list(csv.DictReader(file))

    def cut(self, last_step: int) -> None:
        """Drop the rows of steps that will be done again.

        Args:
            last_step: Steps that stay done.
        """
        rows = self.rows()
        # A killed process may leave half a row, whose step is cut off or not a number.
        kept = [row for row in rows if (row.get("step") or "").isdecimal() and None not in row.values()]
        kept = [row for row in kept if int(row["step"]) <= last_step]
        if rows != kept:
            self._rewrite(kept)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write a row.

        Args:
            step: Steps done.
            values: Names and numbers.
        """
        row = {"step": str(step), **{name: f"{value:.6g}" for name, value in values.items()}}
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        columns = self._columns()
        if set(row) <= set(columns):
            with self._path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, columns, restval="").writerow(row)
        else:
            self._rewrite([*self.rows(), row])

    def draw(self) -> None:
        """Draw the curves; without matplotlib, leave it."""
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            return
        rows = self.rows()
        names = [name for name in self._columns() if name not in ("step", "seconds")]
        if not rows or not names:
            return
        num_columns = min(4, len(names))
        num_rows = -(-len(names) // num_columns)
        figure = Figure(figsize=(3.4 * num_columns, 2.4 * num_rows), layout="constrained")
        FigureCanvasAgg(figure)
        for place, name in enumerate(names):
            axes = figure.add_subplot(num_rows, num_columns, place + 1)
            points = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
            axes.plot([step for step, _ in points], [value for _, value in points], linewidth=1.2)
            axes.set_title(name, fontsize=9)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.3)
        write_atomically(self._picture, lambda path: figure.savefig(path, dpi=110))

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self._writer is not None:
            self._writer.close()

    def _columns(self) -> list[str]:
        if not self._path.is_file():
            return []
        with self._path.open(newline="", encoding="utf-8", errors="replace") as file:
            return next(csv.reader(file), [])

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        names = {name: None for row in rows for name in row}
        columns = [*(name for name in _FIXED if name in names), *(name for name in names if name not in _FIXED)]

        def write_rows(path: Path) -> None:
            """Write the head and all rows to a new file."""
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, columns, restval="")
                writer.writeheader()
                writer.writerows(rows)

        write_atomically(self._path, write_rows)


def _summary_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("tensorboard is true, but TensorBoard is not installed: pip install tensorboard") from error
    return SummaryWriter(str(folder))
