"""Word maps, the artificial images of image-free training (section 2.1 of the paper), and their labels.

A word map is a small grid of random size, filled with random words and enlarged to the patch grid by nearest
neighbour. It is a pure function of (seed, index): a run sees the same samples with any number of processes and loader
workers, and a resumed run starts at the sample it needs.

[`WordMapDataset`] is a map-style dataset, and [`word_map_stream`] a `datasets.IterableDataset` of the same samples.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from datasets import Array2D, Features, IterableDataset, List, Value
from torch.utils.data import Dataset, default_collate

_DRAWN_TOGETHER = 64  # word maps drawn by one call of NumPy: more do not fit into the processor's cache
# Blocks before an endless stream repeats its samples. `datasets` keeps a list of all blocks, and divides them evenly
# among processes if it can: 10080 is divisible by all numbers up to 10, by 12, 14, 15, 16, 18, 20, 24, 28, 30 and 32.
_BLOCKS = 10080


class WordMapSampler:
    """Draws word maps by seed and index.

    Each sample has its own range of the counter of one Philox generator, so it is drawn without the samples before it.

    Args:
        num_words (`int`): words to draw from, 0 to `num_words - 1`.
        seed (`int`): from 0; samples of different seeds are independent.
        grid_size (`int`): side of the word map; 32 for OFA's 512 x 512 images (`model.config.grid_size`).
        max_cells (`int`, *optional*): S, the largest height and width of the small grid. Default: `grid_size`.
        word_categories (`Sequence[int]`, *optional*): the category of each word in a hierarchical vocabulary. A cell
            then draws a category first and one of its words second, both uniformly.
        random_cells (`bool`): draw the size of every small grid; otherwise all have `max_cells` x `max_cells` cells,
            which the paper finds worse (Table 12).

    Raises:
        `ValueError`: an argument is out of range, or a category has no word.
    """

    def __init__(
        self,
        num_words: int,
        seed: int = 0,
        grid_size: int = 32,
        max_cells: int | None = None,
        word_categories: Sequence[int] | None = None,
        random_cells: bool = True,
    ):
        max_cells = grid_size if max_cells is None else max_cells
        _check_minimum(num_words=(num_words, 1), seed=(seed, 0), grid_size=(grid_size, 1), max_cells=(max_cells, 1))
        if max_cells > grid_size:
            raise ValueError(
                f"max_cells={max_cells}: a word map of {grid_size} x {grid_size} patches has room for {grid_size}."
            )
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
        """Draws the samples `first` to `first + count - 1`.

        Returns:
            Word maps, int64 (count, g, g), and height and width of each small grid, int64 (count, 2).
        """
        raw = np.random.Philox(key=self.seed, counter=first * self.counters).random_raw(count * self.counters * 4)
        raw = raw.reshape(count, -1)
        sizes = 1 + _below(self.max_cells, raw[:, :2] >> 32)
        if not self.random_cells:
            sizes = np.full_like(sizes, self.max_cells)
        return self.enlarge(self._words(raw[:, 2 : 2 + self.max_cells**2]), sizes), sizes

    def _words(self, raw: np.ndarray) -> np.ndarray:
        """Words from uniform 64-bit numbers, of the same shape."""
        if self.by_category is None:
            return _below(self.num_words, raw >> 32)
        words, first, count = self.by_category
        category = _below(len(count), raw >> 32)
        return words[first[category] + _below(count[category], raw & 0xFFFFFFFF)]

    def enlarge(self, cells: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Enlarges small grids to word maps (count, g, g).

        Args:
            cells: (count, S * S), a grid of S x S words per sample, row by row.
            sizes: (count, 2), height and width of the part at the upper left of each grid that is enlarged.
        """
        rows, columns = self.nearest[sizes[:, 0]], self.nearest[sizes[:, 1]]
        index = (np.arange(len(cells)) * cells.shape[1])[:, None, None] + rows[:, :, None] * self.max_cells
        return cells.take(index + columns[:, None, :])


class WordMapDataset(Dataset):
    """A map-style dataset of random word maps.

    A sample is `{"word_map": int64 (g, g), "grid_size": int64 (2,)}`, torch tensors: the word of each patch, and the
    height and width of the small grid, from which [`word_map_labels`] makes the labels. Consecutive samples of a batch
    are drawn together, which is much faster than one by one; a `batch_sampler` of ranges gives such batches:

        DataLoader(dataset, batch_sampler=[range(first, first + 16) for first in range(0, 32000, 16)])

    Args:
        num_words, seed, grid_size, max_cells, word_categories, random_cells: see [`WordMapSampler`].
        length (`int`): number of samples. A sample does not depend on it.
    """

    def __init__(
        self,
        num_words: int,
        length: int,
        seed: int = 0,
        grid_size: int = 32,
        max_cells: int | None = None,
        word_categories: Sequence[int] | None = None,
        random_cells: bool = True,
    ):
        _check_minimum(length=(length, 0))
        self.length = length
        self.sampler = WordMapSampler(num_words, seed, grid_size, max_cells, word_categories, random_cells)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """The samples of a batch, in the order of `indices`; torch's `DataLoader` calls this method."""
        for index in indices:
            if not 0 <= index < self.length:
                raise IndexError(f"Sample {index} of {self.length}: indices run from 0 to {self.length - 1}.")
        samples = []
        for first, count in _runs(indices):
            word_maps, sizes = (torch.from_numpy(values) for values in self.sampler(first, count))
            samples += [
                {"word_map": word_map, "grid_size": size} for word_map, size in zip(word_maps, sizes, strict=True)
            ]
        return samples


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
    """A `datasets.IterableDataset` of random word maps, the samples of [`WordMapDataset`] in their order.

    A sample is `{"word_map": int64 (grid_size, grid_size), "grid_size": int64 (2,)}`, NumPy arrays.

    The stream has a shard for each block of `block_size` consecutive samples. Loader workers, and the processes of
    `split_dataset_by_node`, take turns block by block. With `block_size` = the loader's batch size, batch b is the
    same for any number of workers. `shuffle` shuffles the blocks, and samples within its buffer.

    Args:
        num_words, seed, grid_size, max_cells, word_categories, random_cells: see [`WordMapSampler`].
        start (`int`): index of the first sample. Skipped samples are not drawn.
        length (`int`, *optional*): number of samples. Default: an endless stream, which repeats its samples after
            10080 blocks; `WordMapDataset` has no such limit.
        block_size (`int`): samples in a block.

    Raises:
        `ValueError`: an argument is out of range, or a category has no word.
    """
    sampler = WordMapSampler(num_words, seed, grid_size, max_cells, word_categories, random_cells)
    _check_minimum(start=(start, 0), block_size=(block_size, 1), length=(0 if length is None else length, 0))
    stop = start + (_BLOCKS * block_size if length is None else length)
    features = Features(word_map=Array2D((grid_size, grid_size), "int64"), grid_size=List(Value("int64"), length=2))
    # The generator yields ranges of indices and `map` draws their samples: `datasets` would copy every array of a
    # generator with `features` to Python lists and back.
    blocks = {"firsts": list(range(start, stop, block_size)), "block_size": block_size, "stop": stop}
    stream = IterableDataset.from_generator(_ranges_of_blocks, gen_kwargs=blocks).map(
        _draw_range,
        batched=True,
        batch_size=1,
        remove_columns=["first", "count"],
        features=features,
        fn_kwargs={"sampler": sampler},
    )
    return stream.repeat(None) if length is None else stream


def _ranges_of_blocks(firsts: list[int], block_size: int, stop: int) -> Iterator[dict[str, int]]:
    """First index and number of the samples that are drawn together, block by block.

    Args:
        firsts: index of the first sample of each block.
        block_size: samples in a block; the last one ends before sample `stop`.
    """
    for block in firsts:
        end = min(block + block_size, stop)
        for first in range(block, end, _DRAWN_TOGETHER):
            yield {"first": first, "count": min(_DRAWN_TOGETHER, end - first)}


def _draw_range(ranges: dict[str, list[int]], sampler: WordMapSampler) -> dict[str, list[np.ndarray]]:
    """The samples of a batch of one range, as columns."""
    word_maps, sizes = sampler(ranges["first"][0], ranges["count"][0])
    return {"word_map": list(word_maps), "grid_size": list(sizes)}


def word_map_labels(
    word_map: torch.Tensor,
    grid_size: torch.Tensor,
    size: int | tuple[int, int],
    word_categories: torch.Tensor | Sequence[int] | None = None,
) -> torch.Tensor:
    """The category of each pixel: the small grids enlarged to `size` by nearest neighbour.

    Args:
        word_map: integer (batch, g, g), on any device; the labels are on the same device.
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
    """Data collator for transformers' `Trainer`: batches of `word_map` and `labels` from word-map samples.

    The labels are made from `grid_size`, which the model does not take, so Trainer must not remove that column:
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
                "The samples have no grid_size, from which the labels are made: pass "
                "TrainingArguments(remove_unused_columns=False)."
            )
        batch = default_collate(samples)
        labels = word_map_labels(batch["word_map"], batch["grid_size"], self.size, self.word_categories)
        return {"word_map": batch["word_map"], "labels": labels}


def _first_patches(cells: torch.Tensor, patches: int, pixels: int) -> torch.Tensor:
    """The first patch of the cell of each pixel, (batch, pixels), for rows or columns of `cells` (batch,) cells.

    Pixel p lies in cell k = floor(p * cells / pixels), whose first patch is ceil(k * patches / cells).
    """
    cells = cells[:, None]
    k = torch.arange(pixels, device=cells.device) * cells // pixels
    return (k * patches + cells - 1) // cells


def _check_minimum(**arguments: tuple[int, int]) -> None:
    """Raises `ValueError` for the first argument, given as (value, minimum), that is too small."""
    for name, (value, minimum) in arguments.items():
        if value < minimum:
            raise ValueError(f"{name}={value}: must be at least {minimum}.")


def _runs(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of the longest runs of consecutive indices, each of at most `_DRAWN_TOGETHER`."""
    begin = 0
    for end in range(1, len(indices) + 1):
        if end == len(indices) or indices[end] != indices[end - 1] + 1 or end - begin == _DRAWN_TOGETHER:
            yield indices[begin], end - begin
            begin = end


def _below(limit: int | np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Integers below `limit` from uniform 32-bit numbers, uniform up to a relative error of limit / 2^32."""
    return (bits.view(np.int64) * limit) >> 32


def _words_by_category(num_words: int, word_categories: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The words sorted by category, and for each category the position of its first word and their number."""
    categories = np.asarray(word_categories, dtype=np.int64)
    if categories.shape != (num_words,):
        raise ValueError(f"word_categories has {categories.size} entries for {num_words} words: give one for each.")
    if categories.min() < 0:
        raise ValueError(f"word_categories holds {categories.min()}: categories are counted from 0.")
    count = np.bincount(categories)
    if not count.all():
        raise ValueError(f"Category {int(count.argmin())} has no word in word_categories.")
    return np.argsort(categories, kind="stable"), np.cumsum(count) - count, count


__all__ = ["WordMapCollator", "WordMapDataset", "WordMapSampler", "word_map_labels", "word_map_stream"]
