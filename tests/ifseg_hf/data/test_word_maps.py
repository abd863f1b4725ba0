"""Word maps against their definition, and their labels against the published implementation's."""

import itertools
import pickle

import numpy as np
import pytest
import torch
from datasets import interleave_datasets
from datasets.distributed import split_dataset_by_node
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_outputs import golden, golden_metadata
from torch.utils.data import DataLoader

from ifseg_hf.data import word_maps
from ifseg_hf.data.word_maps import WordMapDataset, WordMapSampler, word_map_labels, word_map_stream


def enlarge(grid: np.ndarray, size: int) -> np.ndarray:
    """Nearest neighbour by its definition: source index = floor(i * n / size)."""
    height, width = grid.shape
    return np.array([[grid[y * height // size, x * width // size] for x in range(size)] for y in range(size)])


def samples(dataset, count=None) -> list[list]:
    """The first `count` samples as lists, which `==` compares."""
    return [[x["grid_size"].tolist(), x["word_map"].tolist()] for x in itertools.islice(dataset, count)]


def test_published_grids_give_the_published_word_maps_and_labels():
    expected = golden("tiny_word_map")
    grids = [np.array(grid) for grid in golden_metadata("tiny_word_map")["grids"]]
    sizes = np.array([grid.shape for grid in grids])
    cells = np.zeros((len(grids), 32, 32), dtype=np.int64)
    for cell, grid in zip(cells, grids, strict=True):
        cell[: grid.shape[0], : grid.shape[1]] = grid

    word_map = torch.from_numpy(WordMapSampler(5, 0, 32, 32).enlarge(cells.reshape(len(grids), -1), sizes))
    assert torch.equal(word_map, expected["word_map"].long())
    assert torch.equal(word_map_labels(word_map, torch.from_numpy(sizes), 512), expected["labels"].long())


def test_samples_are_small_grids_enlarged():
    """Each word map is a grid of 1 to S cells a side, enlarged."""
    for sample in word_map_stream(7, grid_size=16, max_cells=6, length=200):
        word_map, (height, width) = sample["word_map"], sample["grid_size"]
        assert word_map.shape == (16, 16)
        assert word_map.dtype == sample["grid_size"].dtype == np.int64
        assert 1 <= height <= 6
        assert 1 <= width <= 6
        rows, columns = ([-(-k * 16 // cells) for k in range(cells)] for cells in (height, width))
        assert (enlarge(word_map[np.ix_(rows, columns)], 16) == word_map).all()


def test_sizes_and_words_are_uniform_and_independent():
    word_maps, sizes = WordMapSampler(5, 0, 8, 4)(0, 40_000)
    pairs = np.bincount((sizes[:, 0] - 1) * 4 + sizes[:, 1] - 1, minlength=16) / 40_000
    assert np.abs(pairs - 1 / 16).max() < 0.005
    corners = np.bincount(word_maps[:, 0, 0] * 5 + word_maps[:, -1, -1], weights=(sizes > 1).all(1), minlength=25)
    assert np.abs(corners / corners.sum() - 1 / 25).max() < 0.005
    following = np.bincount(word_maps[:-1, 0, 0] * 5 + word_maps[1:, 0, 0], minlength=25) / 39_999
    assert np.abs(following - 1 / 25).max() < 0.005


def test_hierarchical_words_are_drawn_through_their_categories():
    word_categories = [1, 0, 1, 1, 2, 1]
    word_maps, _ = WordMapSampler(6, 0, 4, 4, word_categories)(0, 20_000)
    share = np.bincount(word_maps[:, 0, 0], minlength=6) / 20_000
    assert share == pytest.approx([1 / 12, 1 / 3, 1 / 12, 1 / 12, 1 / 3, 1 / 12], abs=0.01)
    labels = word_map_labels(torch.from_numpy(word_maps[:2]), torch.tensor([[4, 4], [4, 4]]), 4, word_categories)
    assert torch.equal(labels, torch.tensor(word_categories)[torch.from_numpy(word_maps[:2])])


def test_one_word_per_category_equals_a_flat_vocabulary():
    assert samples(word_map_stream(5, word_categories=range(5)), 3) == samples(word_map_stream(5), 3)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_labels_are_the_small_grid_enlarged_to_pixels(data):
    side = data.draw(st.integers(1, 42), label="patches")
    pixels = data.draw(st.integers(1, 96), label="pixels")
    shape = data.draw(st.tuples(st.integers(1, side), st.integers(1, side)), label="cells")
    grid = np.arange(shape[0] * shape[1]).reshape(shape)  # all cells differ, so that a wrong one shows
    word_map = torch.from_numpy(enlarge(grid, side))[None]
    labels = word_map_labels(word_map, torch.tensor([shape]), pixels)
    assert (labels[0].numpy() == enlarge(grid, pixels)).all()


def test_labels_of_a_batch_are_its_samples_labels():
    batch = next(iter(DataLoader(word_map_stream(9, grid_size=8), batch_size=5)))
    labels = word_map_labels(batch["word_map"], batch["grid_size"], (24, 40))
    assert labels.shape == (5, 24, 40)
    for i in range(5):
        alone = word_map_labels(batch["word_map"][i : i + 1], batch["grid_size"][i : i + 1], (24, 40))
        assert torch.equal(alone[0], labels[i])


def test_a_sample_is_a_function_of_seed_and_index():
    every = samples(word_map_stream(5, grid_size=8, length=150))
    assert every == samples(word_map_stream(5, grid_size=8, length=150, block_size=7))
    assert every == samples(word_map_stream(5, grid_size=8, length=150, block_size=1000))
    assert every[70:] == samples(word_map_stream(5, grid_size=8, start=70, length=80))
    assert every != samples(word_map_stream(5, grid_size=8, length=150, seed=1))
    far = word_map_stream(5, grid_size=8, start=10_000_000, seed=2**40)
    assert samples(far, 2) == samples(word_map_stream(5, grid_size=8, start=9_999_999, seed=2**40), 3)[1:]


@pytest.mark.parametrize("done", [0, 5, 64, 100])
def test_a_state_dict_resumes_at_the_next_sample(done):
    every = samples(word_map_stream(5, grid_size=8, length=150))
    stream = word_map_stream(5, grid_size=8, length=150)
    iterator = iter(stream)
    for _ in range(done):
        next(iterator)
    state = pickle.loads(pickle.dumps(stream.state_dict()))
    resumed = word_map_stream(5, grid_size=8, length=150)
    resumed.load_state_dict(state)
    assert samples(resumed) == every[done:]


@pytest.mark.parametrize("done", [0, 3, 40])
def test_a_late_position_draws_one_range_only(done, monkeypatch):
    drawn = []
    draw = WordMapSampler.__call__
    monkeypatch.setattr(WordMapSampler, "__call__", lambda self, *call: drawn.append(call) or draw(self, *call))
    stream = word_map_stream(5, grid_size=8, start=10_000_000, block_size=16)
    iterator = iter(stream)
    for _ in range(done + 1):
        next(iterator)
    resumed = word_map_stream(5, grid_size=8, start=10_000_000, block_size=16)
    resumed.load_state_dict(stream.state_dict())
    drawn.clear()
    next(iter(resumed))
    assert drawn == [(10_000_000 + done // 16 * 16, 16)]


def test_an_endless_stream_repeats_after_its_blocks(monkeypatch):
    monkeypatch.setattr(word_maps, "_BLOCKS", 3)
    stream = word_map_stream(5, grid_size=8, block_size=4)
    assert samples(stream, 30) == 2 * samples(stream, 12) + samples(stream, 6)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_workers_do_not_change_the_stream(workers):
    stream = word_map_stream(5, grid_size=8, block_size=4)
    batches = itertools.islice(DataLoader(stream, batch_size=4, num_workers=workers), 7)
    seen = [word_map.tolist() for batch in batches for word_map in batch["word_map"]]
    assert seen == [word_map for _, word_map in samples(stream, 28)]


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_processes_take_turns_block_by_block(processes):
    """Together, the b-th batches of all processes are the b-th part of the stream."""
    stream = word_map_stream(5, grid_size=8, block_size=4)
    turns = [
        [samples(stream.shard(processes, rank, contiguous=False), 8) for rank in range(processes)],
        [samples(split_dataset_by_node(stream, rank, processes), 8) for rank in range(processes)],
    ]
    every = samples(stream, 8 * processes)
    for shards in turns:
        assert [x for shard in shards for x in shard[:4]] + [x for shard in shards for x in shard[4:]] == every


def test_shards_of_a_finite_stream_are_its_parts():
    stream = word_map_stream(5, grid_size=8, start=3, length=50, block_size=4)
    every = samples(stream)
    assert stream.num_shards == 13
    assert [x for rank in range(3) for x in samples(stream.shard(3, rank))] == every
    turns = [samples(stream.shard(3, rank, contiguous=False)) for rank in range(3)]
    assert sorted(x for shard in turns for x in shard) == sorted(every)


@pytest.mark.parametrize("length", [40, None])
def test_methods_of_datasets_work_on_a_stream(length):
    stream = word_map_stream(5, grid_size=8, length=length)
    every = samples(stream, 40)
    assert samples(stream.skip(3).take(4)) == every[3:7]
    assert samples(stream.map(lambda x: {"grid_size": x["grid_size"] * 1}), 40) == every
    assert next(iter(stream.with_format("torch")))["word_map"].dtype == torch.int64
    assert next(iter(stream.iter(batch_size=6)))["word_map"][5].tolist() == every[5][1]
    assert samples(pickle.loads(pickle.dumps(stream)), 40) == every
    assert samples(stream.reshard(), 40) == every
    assert stream.column_names == ["word_map", "grid_size"]


def test_a_shuffled_stream_has_the_same_samples():
    stream = word_map_stream(5, grid_size=12, block_size=4, length=40)
    shuffled = samples(stream.shuffle(seed=1))
    assert shuffled != samples(stream)
    assert sorted(shuffled) == sorted(samples(stream))


def test_interleaved_streams_alternate():
    """Until the first of them ends."""
    streams = [word_map_stream(5, seed=seed, grid_size=12, block_size=4, length=40) for seed in (0, 1)]
    both = samples(interleave_datasets(streams))
    assert both[::2] == samples(streams[0])
    assert both[1::2] == samples(streams[1])[:39]


# The map-style dataset ------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset():
    return WordMapDataset(5, length=300, seed=3, grid_size=8)


def test_the_dataset_has_the_samples_of_the_stream(dataset):
    every = samples(word_map_stream(5, seed=3, grid_size=8, length=300))
    assert samples(dataset) == every
    assert len(dataset) == 300
    assert dataset[7]["word_map"].dtype == dataset[7]["grid_size"].dtype == torch.int64
    settings = {"word_categories": [0, 0, 1, 1, 1], "max_cells": 3, "random_cells": False}
    stream = word_map_stream(5, start=20, length=5, **settings)
    assert samples(WordMapDataset(5, 25, **settings).__getitems__(range(20, 25))) == samples(stream)


@pytest.mark.parametrize("indices", [range(3, 200), range(9, -1, -1), [4, 5, 6, 2, 2, 200, 201, 7], []])
def test_a_batch_has_the_samples_of_its_indices(dataset, indices):
    assert samples(dataset.__getitems__(indices)) == [samples([dataset[index]])[0] for index in indices]


def test_consecutive_samples_are_drawn_together(dataset, monkeypatch):
    drawn = []
    draw = dataset.sampler
    monkeypatch.setattr(dataset, "sampler", lambda *call: drawn.append(call) or draw(*call))
    dataset.__getitems__(range(10, 110))
    dataset.__getitems__([1, 2, 8])
    assert drawn == [(10, 64), (74, 36), (1, 2), (8, 1)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("processes", [1, 3])
def test_batches_of_ranges_are_the_stream_in_turns(dataset, workers, processes):
    every = samples(dataset, 48)
    for process in range(processes):
        firsts = range(4 * process, 48, 4 * processes)
        loader = DataLoader(dataset, batch_sampler=[range(first, first + 4) for first in firsts], num_workers=workers)
        for first, batch in zip(firsts, loader, strict=True):
            assert batch["word_map"].tolist() == [word_map for _, word_map in every[first : first + 4]]
            assert batch["grid_size"].tolist() == [size for size, _ in every[first : first + 4]]


@pytest.mark.parametrize("index", [-1, 300])
def test_an_index_outside_the_dataset_is_refused(dataset, index):
    with pytest.raises(IndexError, match=f"Sample {index} of 300"):
        dataset[index]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_words": 0}, "num_words=0"),
        ({"num_words": 5, "max_cells": 33}, "max_cells=33"),
        ({"num_words": 5, "max_cells": 0}, "max_cells=0"),
        ({"num_words": 5, "seed": -1}, "seed=-1"),
        ({"num_words": 5, "start": -1}, "start=-1"),
        ({"num_words": 5, "block_size": 0}, "block_size=0"),
        ({"num_words": 3, "word_categories": [0, 1]}, "2 entries for 3 words"),
        ({"num_words": 3, "word_categories": [0, 2, 2]}, "Category 1 has no word"),
        ({"num_words": 2, "word_categories": [0, -1]}, "-1"),
    ],
)
def test_errors_name_the_wrong_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        word_map_stream(**arguments)


def test_grids_can_have_one_size():
    samples = list(word_map_stream(5, seed=3, grid_size=8, max_cells=4, length=40, random_cells=False))
    assert all((sample["grid_size"] == 4).all() for sample in samples)
    assert any((sample["word_map"][0] != sample["word_map"][4]).any() for sample in samples)
    # Grids of random size have the same words, and show a corner of them.
    for sample, other in zip(samples, word_map_stream(5, seed=3, grid_size=8, max_cells=4, length=40), strict=True):
        assert sample["word_map"][0, 0] == other["word_map"][0, 0]
