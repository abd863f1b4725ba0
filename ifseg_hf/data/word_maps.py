"""Artificial images made of words (the paper, section 2.1): the endless stream that training reads, and its labels.

A sample is a small grid of random size filled with random words, enlarged to the patch grid by nearest neighbour. It is
a pure function of (seed, index), so a run sees the same samples for any number of processes and loader workers, and a
resumed run starts at the sample it needs.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Array2D, DatasetInfo, Features, IterableDataset, List, Value
from datasets.iterable_dataset import _BaseExamplesIterable
from torch.utils.data import default_collate

# Blocks of a stream without end. Divisible by every number of processes and workers up to 36, so that `datasets` splits
# it by whole blocks whatever their number.
_ENDLESS = math.lcm(*range(1, 37))
_AT_ONCE = 64  # samples drawn by one call of numpy: more no longer fit into a cache


def word_map_stream(
    num_words: int,
    seed: int = 0,
    grid_size: int = 32,
    max_cells: int | None = None,
    start: int = 0,
    length: int | None = None,
    word_categories: Sequence[int] | None = None,
    block_size: int = 64,
    random_cells: bool = True,
) -> IterableDataset:
    """A `datasets.IterableDataset` of random word maps.

    A sample is `{"word_map": int64 (grid_size, grid_size), "grid_size": int64 (2,)}`, as numpy arrays: the word of each
    patch, and the height and width of the small grid behind it, from which [`word_map_labels`] makes the labels.

    Split over processes or loader workers, the stream is dealt out in turns of `block_size` consecutive samples. With
    `block_size` = the loader's batch size, batch b is the same for any number of workers, and P processes see in
    their b-th batches what one process sees in batches P*b to P*b + P - 1.

    Args:
        num_words (`int`): words to draw from, 0 to `num_words - 1`.
        seed (`int`): from 0; samples of different seeds are independent.
        grid_size (`int`): side of the word map; 32 for OFA's 512 x 512 images (`model.config.grid_size`).
        max_cells (`int`, *optional*): S, the largest height and width of the small grid. Default: `grid_size`.
        start (`int`): index of the first sample. Starting late costs nothing.
        length (`int`, *optional*): number of samples. Default: no end.
        word_categories (`Sequence[int]`, *optional*): the category of each word in a hierarchical vocabulary. A cell
            then draws a category first and one of its words second, both uniformly.
        block_size (`int`): samples dealt out together.
        random_cells (`bool`): draw the size of every small grid; otherwise all have `max_cells` x `max_cells` cells,
            which the paper finds worse (Table 12).

    Raises:
        `ValueError`: naming the argument that is out of range, or the category that has no word.
    """
    max_cells = grid_size if max_cells is None else max_cells
    for name, value, least in [
        ("num_words", num_words, 1),
        ("seed", seed, 0),
        ("grid_size", grid_size, 1),
        ("max_cells", max_cells, 1),
        ("start", start, 0),
        ("length", 0 if length is None else length, 0),
        ("block_size", block_size, 1),
    ]:
        if value < least:
            raise ValueError(f"{name}={value}: must be at least {least}.")
    if max_cells > grid_size:
        raise ValueError(f"max_cells={max_cells}: a word map of {grid_size} x {grid_size} has no room for more cells.")
    draw = WordMapSampler(num_words, seed, grid_size, max_cells, word_categories, random_cells)
    stop = start + (block_size * _ENDLESS if length is None else length)
    examples = _WordMapExamples(draw, range(start, stop, block_size), block_size, stop, endless=length is None)
    return IterableDataset(examples, info=DatasetInfo(features=examples.features))


def word_map_labels(
    word_map: torch.Tensor,
    grid_size: torch.Tensor,
    size: int | tuple[int, int],
    word_categories: torch.Tensor | Sequence[int] | None = None,
) -> torch.Tensor:
    """The category of each pixel: what enlarging the small grids straight to `size` by nearest neighbour gives.

    Args:
        word_map: integer (batch, g, g), on any device; the labels are made there.
        grid_size: integer (batch, 2), height and width of each small grid, from 1 to g.
        size: side, or height and width, of the labels.
        word_categories: integer (words,), the category of each word in a hierarchical vocabulary.

    Returns:
        (batch, height, width), dtype of `word_map` (int64 with `word_categories`).
    """
    height, width = (size, size) if isinstance(size, int) else size
    if word_categories is not None:
        word_map = torch.as_tensor(word_categories, device=word_map.device)[word_map]
    rows = _first_patches(grid_size[:, 0], word_map.shape[1], height)
    columns = _first_patches(grid_size[:, 1], word_map.shape[2], width)
    word_map = word_map.gather(1, rows[:, :, None].expand(-1, -1, word_map.shape[2]))
    return word_map.gather(2, columns[:, None, :].expand(-1, height, -1))


class WordMapCollator:
    """Batches for transformers' `Trainer`: `word_map` and `labels`, from samples of [`word_map_stream`].

    It needs both columns of the stream, so Trainer must not drop the one that the model does not take:
    `TrainingArguments(remove_unused_columns=False, ...)`.

    Args:
        size, word_categories: as for [`word_map_labels`]; `model.config.image_size`, `model.config.word_categories`.
    """

    def __init__(self, size: int, word_categories: Sequence[int] | None = None):
        self.size = size
        self.word_categories = word_categories

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        """`{"word_map": (batch, g, g), "labels": (batch, size, size)}`, int64."""
        if "grid_size" not in samples[0]:
            raise ValueError(
                "The samples have lost their grid_size, which the labels are made of: pass "
                "TrainingArguments(remove_unused_columns=False)."
            )
        batch = default_collate(samples)
        labels = word_map_labels(batch["word_map"], batch["grid_size"], self.size, self.word_categories)
        return {"word_map": batch["word_map"], "labels": labels}


def _first_patches(cells: torch.Tensor, patches: int, pixels: int) -> torch.Tensor:
    """Pixel p lies in cell k = floor(p * n / pixels), whose first patch is ceil(k * patches / n): (batch, pixels)."""
    cells = cells[:, None]
    k = torch.arange(pixels, device=cells.device) * cells // pixels
    return (k * patches + cells - 1) // cells


class WordMapSampler:
    """Draws word maps; see [`word_map_stream`] for the arguments.

    Every sample owns a stretch of the counter of one Philox generator, so any of them is drawn without the others.
    """

    def __init__(
        self,
        num_words: int,
        seed: int,
        grid_size: int,
        max_cells: int,
        word_categories: Sequence[int] | None = None,
        random_cells: bool = True,
    ):
        self.num_words = num_words
        self.seed = seed
        self.grid_size = grid_size
        self.max_cells = max_cells
        self.random_cells = random_cells
        # Philox makes four 64-bit numbers from one value of its counter. A sample takes one number for the height, one
        # for the width and one for each cell of the largest grid.
        self.counters = math.ceil((2 + max_cells**2) / 4)
        # nearest[n]: the cell of each patch when n cells are enlarged.
        self.nearest = np.arange(grid_size) * np.arange(max_cells + 1)[:, None] // grid_size
        self.by_category = None
        if word_categories is not None:
            self.by_category = _words_by_category(num_words, word_categories)

    def __call__(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """`count` samples from `first` on: word maps int64 (count, g, g), sizes of the small grids int64 (count, 2)."""
        raw = np.random.Philox(key=self.seed, counter=first * self.counters).random_raw(count * self.counters * 4)
        raw = raw.reshape(count, -1)
        sizes = 1 + _below(self.max_cells, raw[:, :2] >> 32)
        if not self.random_cells:
            sizes = np.full_like(sizes, self.max_cells)
        return self.enlarge(self._words(raw[:, 2 : 2 + self.max_cells**2]), sizes), sizes

    def _words(self, raw: np.ndarray) -> np.ndarray:
        if self.by_category is None:
            return _below(self.num_words, raw >> 32)
        words, first, count = self.by_category
        category = _below(len(count), raw >> 32)
        return words[first[category] + _below(count[category], raw & 0xFFFFFFFF)]

    def enlarge(self, cells: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Word maps (count, g, g) of small grids of `sizes` (count, 2) in the corners of `cells` (count, S * S)."""
        rows, columns = self.nearest[sizes[:, 0]], self.nearest[sizes[:, 1]]
        index = (np.arange(len(cells)) * cells.shape[1])[:, None, None] + rows[:, :, None] * self.max_cells
        return cells.take(index + columns[:, None, :])


def _below(limit: int | np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Uniform integers below `limit` from uniform 32-bit numbers; none is likelier by more than limit / 2^32."""
    return (bits.view(np.int64) * limit) >> 32


def _words_by_category(num_words: int, word_categories: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The words sorted by category, then where each category's begin and how many they are."""
    categories = np.asarray(word_categories, dtype=np.int64)
    if categories.shape != (num_words,):
        raise ValueError(f"word_categories has {categories.size} entries for {num_words} words: give one for each.")
    if categories.min() < 0:
        raise ValueError(f"word_categories holds {categories.min()}: categories are counted from 0.")
    count = np.bincount(categories)
    if not count.all():
        raise ValueError(f"Category {int(count.argmin())} has no word in word_categories.")
    return np.argsort(categories, kind="stable"), np.cumsum(count) - count, count


class _WordMapExamples(_BaseExamplesIterable):
    """What `datasets` iterates over: some blocks of the stream, and how far it got in them.

    `IterableDataset.from_generator` would do the same, but skips forward to a saved position sample by sample.
    """

    is_typed = True

    def __init__(self, draw: WordMapSampler, blocks: range, block_size: int, stop: int, endless: bool):
        super().__init__()
        self.draw = draw
        self.blocks = blocks  # index of the first sample of each block
        self.block_size = block_size
        self.stop = stop
        self.endless = endless

    @property
    def features(self) -> Features:
        side = self.draw.grid_size
        return Features({"word_map": Array2D((side, side), "int64"), "grid_size": List(Value("int64"), length=2)})

    def _init_state_dict(self) -> dict:
        self._state_dict: dict[str, Any] = {"position": 0, "type": type(self).__name__}
        return self._state_dict

    def __iter__(self) -> Iterator[tuple[int, dict]]:
        position = self._state_dict["position"] if self._state_dict else 0
        for indices in self._runs(position):
            word_maps, sizes = self.draw(indices.start, len(indices))
            for index, word_map, size in zip(indices, word_maps, sizes, strict=True):
                if self._state_dict:
                    self._state_dict["position"] += 1
                yield index, {"word_map": word_map, "grid_size": size}

    def _runs(self, position: int) -> Iterator[range]:
        """Consecutive indices, from this shard's sample `position` on."""
        block, done = divmod(position, self.block_size)
        for first in self.blocks[block:]:
            indices = range(first, min(first + self.block_size, self.stop))[done:]
            for begin in range(0, len(indices), _AT_ONCE):
                yield indices[begin : begin + _AT_ONCE]
            done = 0

    def shuffle_data_sources(self, generator: np.random.Generator) -> "_WordMapExamples":
        return self  # the samples are random as they are, and their order is part of the stream

    def shard_data_sources(self, num_shards: int, index: int, contiguous: bool = True) -> "_WordMapExamples":
        shard = self.split_shard_indices_by_worker(num_shards, index, contiguous)
        blocks = self.blocks[shard.start : shard.stop : shard.step]
        return _WordMapExamples(self.draw, blocks, self.block_size, self.stop, self.endless)

    def split_shard_indices_by_worker(self, num_shards: int, index: int, contiguous: bool = True) -> range:
        """As in the base class, but without a list of every block, and in turns where there is no end to cut at."""
        if self.endless or not contiguous:
            return range(index, len(self.blocks), num_shards)
        each, more = divmod(len(self.blocks), num_shards)
        begin = each * index + min(index, more)
        return range(begin, begin + each + (index < more))

    @property
    def num_shards(self) -> int:
        return len(self.blocks)
