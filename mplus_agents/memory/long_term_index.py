"""The bookkeeping of Θ: a log of rows in the order of entry, with integers only.

A dropped token takes the next row and keeps it until it leaves; nothing moves. All layers have the same rows, as every
injection drops the same number from each; which rows are still alive differs by layer. Rows in front that are dead in
every layer are trimmed a block at a time.
"""

from __future__ import annotations

import numpy as np

from mplus_agents.memory.types import BoolArray, FloatArray, IntArray

_NO_ROW = -1


class LongTermIndex:
    """Rows of Θ: birth, liveness and, for the rule `released`, entry age and recall count.

    Args:
        num_layers: Layers L.
        block_rows: Rows per block; trimming happens in whole blocks.
        first_block_rows: Rows of the block in front, 0 if there is none (the checkpoint's own Θ is one such block).
    """

    def __init__(self, num_layers: int, block_rows: int, first_block_rows: int = 0) -> None:
        self.block_rows = block_rows
        self.first_block_rows = first_block_rows
        self.base_row = 0
        self.num_rows = 0
        self.num_merged_rows = 0
        self.births: IntArray = np.zeros((num_layers, block_rows), dtype=np.int64)
        self.alive: BoolArray = np.zeros((num_layers, block_rows), dtype=np.bool_)
        self.entered: IntArray = np.zeros(block_rows, dtype=np.int64)
        self.entry_ages: IntArray = np.zeros((num_layers, block_rows), dtype=np.int64)
        self.recall_counts: FloatArray = np.zeros((num_layers, block_rows), dtype=np.float32)
        self.sizes: IntArray = np.zeros(num_layers, dtype=np.int64)
        # For eviction by birth: the row of every token, by birth, and per layer a birth below which nothing is alive.
        self._row_of: IntArray = np.full((num_layers, block_rows), _NO_ROW, dtype=np.int64)
        self._first_birth: int | None = None
        self._oldest: IntArray = np.zeros(num_layers, dtype=np.int64)

    @property
    def num_layers(self) -> int:
        """Layers L."""
        return int(self.births.shape[0])

    @property
    def window(self) -> slice:
        """The columns in use of the arrays; column c holds row `base_row + c`."""
        return slice(0, self.num_rows - self.base_row)

    def append(
        self,
        births: IntArray,
        *,
        alive: BoolArray | None = None,
        entered: int = 0,
        entry_ages: IntArray | None = None,
        recall_count: float | FloatArray = 0.0,
    ) -> int:
        """Add rows at the end.

        Args:
            births: [L, r] int64.
            alive: [L, r]; all if not given.
            entered: Injections done when the rows enter.
            entry_ages: [L, r] int64, ages at entry (rule `released`).
            recall_count: Recall count at entry, one for all or [L, r].

        Returns:
            The first new row.
        """
        num_new = births.shape[1]
        first_row = self.num_rows
        self._reserve(first_row - self.base_row + num_new)
        columns = slice(first_row - self.base_row, first_row - self.base_row + num_new)
        self.births[:, columns] = births
        self.alive[:, columns] = True if alive is None else alive
        self.entered[columns] = entered
        self.entry_ages[:, columns] = 0 if entry_ages is None else entry_ages
        self.recall_counts[:, columns] = recall_count
        self.num_rows += num_new
        self.sizes += self.alive[:, columns].sum(axis=1)
        if num_new:
            self._remember_rows(columns)
        return first_row

    def evict_oldest(self, layer: int, num_tokens: int) -> IntArray:
        """Let the tokens with the smallest births leave one layer.

        Costs time in the number of tokens and in how long tokens stay in θ, not in the size of Θ.

        Args:
            layer: The layer.
            num_tokens: How many leave, at most `sizes[layer]`.

        Returns:
            Their rows, ascending by birth.
        """
        if num_tokens <= 0:
            return np.empty(0, dtype=np.int64)
        assert self._first_birth is not None
        start = int(self._oldest[layer]) - self._first_birth
        width = 4 * num_tokens
        while True:
            candidates = self._row_of[layer, start : start + width]
            found = np.flatnonzero(candidates != _NO_ROW)[:num_tokens]
            if len(found) == num_tokens:
                break
            width *= 2
        rows = candidates[found]
        self.kill(layer, rows)
        self._oldest[layer] = int(found[-1]) + start + self._first_birth + 1
        return rows

    def kill(self, layer: int, rows: IntArray) -> None:
        """Mark rows of one layer as dead.

        Args:
            layer: The layer.
            rows: [r] int64, alive rows.
        """
        if not len(rows):
            return
        columns = rows - self.base_row
        self.alive[layer, columns] = False
        self.sizes[layer] -= len(rows)
        assert self._first_birth is not None
        self._row_of[layer, self.births[layer, columns] - self._first_birth] = _NO_ROW

    def trim(self) -> None:
        """Forget the blocks in front whose rows are dead in every layer."""
        while True:
            block_end = self._block_end(self.base_row)
            columns = block_end - self.base_row
            if block_end > self.num_rows or columns == 0 or self.alive[:, :columns].any():
                return
            for name in ("births", "alive", "entry_ages", "recall_counts", "entered"):
                array = getattr(self, name)
                setattr(self, name, array[..., columns:].copy())
            self.base_row = block_end

    def alive_rows(self, layer: int) -> IntArray:
        """Return the alive rows of one layer in the order of entry, [size] int64."""
        return np.flatnonzero(self.alive[layer, self.window]) + self.base_row

    def block_of(self, row: int) -> int:
        """Return the block of a row; block 0 is the one in front of `first_block_rows` rows, if there is one."""
        if row < self.first_block_rows:
            return 0
        offset = 1 if self.first_block_rows else 0
        return offset + (row - self.first_block_rows) // self.block_rows

    def blocks_of(self, rows: IntArray) -> IntArray:
        """Return the block of each row, [r] int64.

        Args:
            rows: [r] int64.
        """
        offset = 1 if self.first_block_rows else 0
        later = offset + (rows - self.first_block_rows) // self.block_rows
        return np.where(rows < self.first_block_rows, 0, later)

    def block_start(self, block: int) -> int:
        """Return the first row of a block."""
        if not self.first_block_rows:
            return block * self.block_rows
        return 0 if block == 0 else self.first_block_rows + (block - 1) * self.block_rows

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the state as named arrays, to be stored."""
        columns = self.window
        return {
            "rows": np.array([self.base_row, self.num_rows, self.num_merged_rows, self.block_rows], dtype=np.int64),
            "births": self.births[:, columns].copy(),
            "alive": self.alive[:, columns].astype(np.uint8),
            "entered": self.entered[columns].copy(),
            "entry_ages": self.entry_ages[:, columns].copy(),
            "recall_counts": self.recall_counts[:, columns].view(np.int32).copy(),
        }

    def load_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        """Take the state from what `to_arrays` returned; the index must be new.

        Args:
            arrays: Named arrays.
        """
        base_row, num_rows, num_merged, self.block_rows = (int(value) for value in arrays["rows"])
        self.base_row = self.num_rows = base_row
        if num_rows > base_row:
            self.append(
                arrays["births"],
                alive=arrays["alive"].astype(np.bool_),
                entry_ages=arrays["entry_ages"],
                recall_count=arrays["recall_counts"].view(np.float32),
            )
            self.entered[self.window] = arrays["entered"]
        self.num_merged_rows = num_merged

    def _block_end(self, row: int) -> int:
        return self.block_start(self.block_of(row) + 1)

    def _reserve(self, num_columns: int) -> None:
        capacity = self.births.shape[1]
        if num_columns <= capacity:
            return
        extra = max(num_columns, 2 * capacity) - capacity
        for name in ("births", "alive", "entry_ages", "recall_counts", "entered"):
            array = getattr(self, name)
            setattr(self, name, np.concatenate([array, np.zeros_like(array, shape=(*array.shape[:-1], extra))], -1))

    def _remember_rows(self, columns: slice) -> None:
        births, alive = self.births[:, columns], self.alive[:, columns]
        if not alive.any():
            return
        lowest, highest = int(births[alive].min()), int(births[alive].max())
        self._cover_births(lowest, highest)
        assert self._first_birth is not None
        layers, cells = np.nonzero(alive)
        rows = cells + (columns.start + self.base_row)
        self._row_of[layers, births[layers, cells] - self._first_birth] = rows
        # A token that stayed long in θ may be older than all that is left in Θ.
        self._oldest = np.minimum(self._oldest, np.where(alive, births, np.iinfo(np.int64).max).min(axis=1))

    def _cover_births(self, lowest: int, highest: int) -> None:
        """Make the birth table span [lowest, highest], dropping the part in front that nothing can need any more."""
        if self._first_birth is None:
            self._first_birth = lowest
            self._oldest[:] = lowest
        old_first, capacity = self._first_birth, self._row_of.shape[1]
        if lowest >= old_first and highest < old_first + capacity:
            return
        # A batch older than all before must not cut off what came before, and what is gone takes no place.
        in_use = np.flatnonzero((self._row_of != _NO_ROW).any(axis=0))
        start, end = (int(in_use[0]), int(in_use[-1]) + 1) if len(in_use) else (0, 0)
        first = min(lowest, old_first + start) if end else lowest
        num_births = max(highest + 1, old_first + end) - first if end else highest + 1 - first
        table = np.full((self.num_layers, max(2 * num_births, self.block_rows)), _NO_ROW, dtype=np.int64)
        if end:
            table[:, old_first + start - first : old_first + end - first] = self._row_of[:, start:end]
        self._oldest = np.maximum(self._oldest, first)
        self._row_of, self._first_birth = table, first
