"""The tensors of Θ: blocks of rows that are filled once and never moved, and the search among their retrieval keys."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mplus_agents.memory.index import MemoryIndex
from mplus_agents.memory.types import IntArray

# Rows of query-by-key scores held at once, so that a long prompt over a large Θ stays within tens of MB.
_MAX_SCORES = 1 << 24
_DEAD = -1.0  # below every mean of sigmoids


@dataclass(slots=True)
class LongTermBlock:
    """Consecutive rows of Θ.

    Attributes:
        keys: [L, r, h_kv, d_h], before RoPE.
        values: [L, r, h_kv, d_h].
        retrieval_keys: [L, r, p].
        alive: [L, r] bool; rows not filled yet count as dead.
        placement: [L, r] int64, ascending in the order in which rows are placed for reading.
    """

    keys: torch.Tensor
    values: torch.Tensor
    retrieval_keys: torch.Tensor
    alive: torch.Tensor
    placement: torch.Tensor


class LongTermMemory:
    """The blocks of Θ by number, parallel to the rows of a `LongTermIndex`.

    Args:
        index: The bookkeeping that says which rows exist.
        device: Where the tensors live.
        dtype: Their dtype.
    """

    def __init__(self, index: MemoryIndex, device: torch.device, dtype: torch.dtype) -> None:
        self._index = index
        self._device = device
        self._dtype = dtype
        self._blocks: dict[int, LongTermBlock] = {}

    def attach_genesis(self, keys: torch.Tensor, values: torch.Tensor, retrieval_keys: torch.Tensor) -> None:
        """Use a checkpoint's own Θ as the block in front; its tensors are shared, not copied.

        Args:
            keys: [L, S, h_kv, d_h].
            values: [L, S, h_kv, d_h].
            retrieval_keys: [L, S, p].
        """
        log = self._index.long_term
        if not log.first_block_rows or log.base_row > 0:
            return
        rows = slice(0, log.first_block_rows)
        alive = torch.from_numpy(log.alive[:, rows].copy()).to(self._device)
        placement = torch.from_numpy(self._index.placement_keys(rows)).to(self._device)
        self._blocks[0] = LongTermBlock(keys, values, retrieval_keys, alive, placement)

    def append(self, keys: torch.Tensor, values: torch.Tensor, retrieval_keys: torch.Tensor, first_row: int) -> None:
        """Fill the rows from `first_row` on, which the index has already taken in.

        Args:
            keys: [L, r, h_kv, d_h].
            values: [L, r, h_kv, d_h].
            retrieval_keys: [L, r, p].
            first_row: The first row.
        """
        log = self._index.long_term
        done, num_new = max(0, log.base_row - first_row), keys.shape[1]  # rows may be trimmed as they enter
        while done < num_new:
            row = first_row + done
            number = log.block_of(row)
            offset = row - log.block_start(number)
            count = min(num_new - done, log.block_start(number + 1) - row)
            block = self._block(number)
            for target, source in (
                (block.keys, keys),
                (block.values, values),
                (block.retrieval_keys, retrieval_keys),
            ):
                target[:, offset : offset + count] = source[:, done : done + count]
            block.placement[:, offset : offset + count] = torch.from_numpy(
                self._index.placement_keys(slice(row, row + count))
            ).to(self._device)
            done += count
        self.refresh_alive(first_row, first_row + num_new)

    def refresh_alive(self, first_row: int, end_row: int) -> None:
        """Copy the index's liveness of some rows to the device.

        Args:
            first_row: The first row.
            end_row: One past the last row.
        """
        log = self._index.long_term
        row = max(first_row, log.base_row)
        while row < end_row:
            number = log.block_of(row)
            start = log.block_start(number)
            end = min(end_row, log.block_start(number + 1))
            alive = log.alive[:, row - log.base_row : end - log.base_row]
            self._blocks[number].alive[:, row - start : end - start] = torch.from_numpy(alive.copy()).to(self._device)
            row = end

    def forget(self, layer: int, rows: IntArray) -> None:
        """Mark rows of one layer as dead on the device.

        Args:
            layer: The layer.
            rows: [r] int64, ascending.
        """
        log = self._index.long_term
        position = 0
        while position < len(rows):
            number = log.block_of(int(rows[position]))
            end = int(rows.searchsorted(log.block_start(number + 1)))
            if number in self._blocks:
                offsets = torch.from_numpy(rows[position:end] - log.block_start(number)).to(self._device)
                self._blocks[number].alive[layer, offsets] = False
            position = end

    def allocate(self) -> None:
        """Make the blocks for all rows that the index knows, to be filled by `scatter`."""
        log = self._index.long_term
        row = max(log.base_row, log.first_block_rows)
        while row < log.num_rows:
            number = log.block_of(row)
            end = min(log.num_rows, log.block_start(number + 1))
            block = self._block(number)
            placement = torch.from_numpy(self._index.placement_keys(slice(row, end)))
            block.placement[:, : end - row] = placement.to(self._device)
            row = end
        self.refresh_alive(max(log.base_row, log.first_block_rows), log.num_rows)

    def scatter(
        self, layers: IntArray, rows: IntArray, tokens: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    ) -> None:
        """Fill single rows of single layers.

        Args:
            layers: [m] int64.
            rows: [m] int64, rows of Θ.
            tokens: Keys [m, h_kv, d_h], values [m, h_kv, d_h] and retrieval keys [m, p].
        """
        log = self._index.long_term
        numbers = log.blocks_of(rows)
        for number in np.unique(numbers):
            picked = numbers == number
            block = self._blocks[int(number)]
            where = torch.from_numpy(picked.nonzero()[0]).to(self._device)
            target_layers = torch.from_numpy(layers[picked]).to(self._device)
            offsets = torch.from_numpy(rows[picked] - log.block_start(int(number))).to(self._device)
            for target, source in zip((block.keys, block.values, block.retrieval_keys), tokens, strict=True):
                target[target_layers, offsets] = source[where]

    def drop_trimmed(self) -> None:
        """Free the blocks that the index has trimmed."""
        log = self._index.long_term
        for number in [number for number in self._blocks if log.block_start(number) < log.base_row]:
            del self._blocks[number]

    def search(self, layer: int, queries: torch.Tensor, num_retrieved: int) -> IntArray:
        """Find the rows of one layer that the queries ask for, oldest first.

        The score of a row is the mean over the queries of sigmoid(query · key), in float32 (paper 3.2.2; the sigmoid is
        the published code's).

        Args:
            layer: The layer.
            queries: [n, p].
            num_retrieved: K0; fewer are returned if Θ holds fewer.

        Returns:
            [at most K0] int64, rows of Θ.
        """
        log = self._index.long_term
        num_found = min(num_retrieved, int(log.sizes[layer]))
        if num_found == 0:
            return log.alive_rows(layer)[:0]
        scores = []
        placements = []
        for number in sorted(self._blocks):
            block, start = self._blocks[number], log.block_start(number)
            used = min(log.num_rows, log.block_start(number + 1)) - start
            block_scores = mean_sigmoid_scores(queries, block.retrieval_keys[layer, :used])
            scores.append(block_scores.masked_fill(~block.alive[layer, :used], _DEAD))
            placements.append(block.placement[layer, :used])
        pick = _pick_as_published if self._index.config.rule == "released" else _pick_newest_of_equals
        rows = pick(torch.cat(scores), num_found)
        rows = rows[torch.cat(placements)[rows].argsort()]
        return rows.cpu().numpy() + log.base_row

    def oldest_first(self, layer: int, rows: IntArray) -> IntArray:
        """Return rows of one layer in the order in which they are placed for reading.

        Args:
            layer: The layer.
            rows: [r] int64, ascending.
        """
        log = self._index.long_term
        placements = np.empty(len(rows), dtype=np.int64)
        for number in np.unique(log.blocks_of(rows)):
            inside = log.blocks_of(rows) == number
            block = self._blocks[int(number)]
            offsets = torch.from_numpy(rows[inside] - log.block_start(int(number))).to(block.placement.device)
            placements[inside] = block.placement[layer, offsets].cpu().numpy()
        return rows[placements.argsort()]

    def gather(self, layer: int, rows: IntArray, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Copy rows of one layer, in the order given.

        Args:
            layer: The layer.
            rows: [r] int64.
            keys: [r, h_kv, d_h], filled in.
            values: [r, h_kv, d_h], filled in.
        """
        log = self._index.long_term
        for number, block in self._blocks.items():
            start = log.block_start(number)
            inside = ((rows >= start) & (rows < log.block_start(number + 1))).nonzero()[0]
            if not len(inside):
                continue
            source = torch.from_numpy(rows[inside] - start).to(block.keys.device)
            target = torch.from_numpy(inside).to(keys.device)
            keys.index_copy_(0, target, block.keys[layer].index_select(0, source).to(keys.device))
            values.index_copy_(0, target, block.values[layer].index_select(0, source).to(values.device))

    def num_bytes(self) -> int:
        """Return the bytes that the blocks hold, the shared block of a checkpoint's own Θ included."""
        tensors = [t for b in self._blocks.values() for t in (b.keys, b.values, b.retrieval_keys, b.alive, b.placement)]
        return sum(tensor.nbytes for tensor in tensors)

    def _block(self, number: int) -> LongTermBlock:
        if number not in self._blocks:
            config, rows = self._index.config, self._index.long_term.block_rows
            head_shape = (config.num_layers, rows, config.num_kv_heads, config.head_dim)
            options = {"device": self._device, "dtype": self._dtype}
            self._blocks[number] = LongTermBlock(
                keys=torch.empty(head_shape, **options),  # type: ignore[call-overload]
                values=torch.empty(head_shape, **options),  # type: ignore[call-overload]
                retrieval_keys=torch.zeros((config.num_layers, rows, config.retrieval_dim), **options),  # type: ignore[call-overload]
                alive=torch.zeros((config.num_layers, rows), dtype=torch.bool, device=self._device),
                placement=torch.zeros((config.num_layers, rows), dtype=torch.int64, device=self._device),
            )
        return self._blocks[number]


def _pick_newest_of_equals(scores: torch.Tensor, num_found: int) -> torch.Tensor:
    """Return the places of the best scores; of equal ones at the border the newest, on every device.

    Sigmoids of a short question reach 1.0 exactly, so equal scores are common.
    """
    border = scores.topk(num_found).values[-1]
    above = (scores > border).nonzero()[:, 0]
    equal = (scores == border).nonzero()[:, 0]
    return torch.cat([above, equal[len(equal) - (num_found - len(above)) :]])


def _pick_as_published(scores: torch.Tensor, num_found: int) -> torch.Tensor:
    """Return the places of the best scores; equal ones fall as `topk` over the alive rows alone lets them."""
    alive = (scores != _DEAD).nonzero()[:, 0]
    return alive[scores[alive].topk(num_found).indices]


def mean_sigmoid_scores(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return the mean over the queries of sigmoid(query · key).

    Args:
        queries: [n, p].
        keys: [m, p].

    Returns:
        [m] float32.
    """
    rows = max(1, _MAX_SCORES // max(1, queries.shape[0]))
    parts = [torch.sigmoid((queries @ part.T).float()).mean(dim=0) for part in keys.split(rows)]
    return torch.cat(parts)
