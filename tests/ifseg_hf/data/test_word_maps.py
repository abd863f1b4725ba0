"""The stream of word maps against its definition, and the labels against the published implementation's."""

import itertools
import pickle

import numpy as np
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_outputs import golden, golden_metadata
from torch.utils.data import DataLoader

from ifseg_hf.data.word_maps import WordMapSampler, word_map_labels, word_map_stream


def enlarge(grid: np.ndarray, size: int) -> np.ndarray:
    """Nearest neighbour as it is defined: source index = floor(i * n / size)."""
    height, width = grid.shape
    return np.array([[grid[y * height // size, x * width // size] for x in range(size)] for y in range(size)])


def samples(stream, count=None) -> list[list]:
    """The first `count` samples, as lists that `==` compares."""
    return [[x["grid_size"].tolist(), x["word_map"].tolist()] for x in itertools.islice(stream, count)]


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


def test_samples_are_what_the_method_says():
    """Every map is a small grid of 1 to S cells a side, enlarged, and S changes nothing but the grids' sizes."""
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


def test_one_word_a_category_is_a_flat_vocabulary():
    assert samples(word_map_stream(5, word_categories=range(5)), 3) == samples(word_map_stream(5), 3)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_labels_are_the_small_grid_enlarged_to_pixels(data):
    side = data.draw(st.integers(1, 42), label="patches")
    pixels = data.draw(st.integers(1, 96), label="pixels")
    shape = data.draw(st.tuples(st.integers(1, side), st.integers(1, side)), label="cells")
    grid = np.arange(shape[0] * shape[1]).reshape(shape)  # every cell differs, so that a wrong one shows
    word_map = torch.from_numpy(enlarge(grid, side))[None]
    labels = word_map_labels(word_map, torch.tensor([shape]), pixels)
    assert (labels[0].numpy() == enlarge(grid, pixels)).all()


def test_labels_of_a_batch_are_those_of_its_samples():
    batch = next(iter(DataLoader(word_map_stream(9, grid_size=8), batch_size=5)))
    labels = word_map_labels(batch["word_map"], batch["grid_size"], (24, 40))
    assert labels.shape == (5, 24, 40)
    for i in range(5):
        alone = word_map_labels(batch["word_map"][i : i + 1], batch["grid_size"][i : i + 1], (24, 40))
        assert torch.equal(alone[0], labels[i])


def test_a_sample_is_a_function_of_seed_and_index():
    every = samples(word_map_stream(5, grid_size=8, length=150))
    assert every == samples(word_map_stream(5, grid_size=8, length=150, block_size=7))
    assert every[70:] == samples(word_map_stream(5, grid_size=8, start=70, length=80))
    assert every != samples(word_map_stream(5, grid_size=8, length=150, seed=1))
    far = word_map_stream(5, grid_size=8, start=10_000_000, seed=2**40)
    assert samples(far, 2) == samples(word_map_stream(5, grid_size=8, start=9_999_999, seed=2**40), 3)[1:]


@pytest.mark.parametrize("done", [0, 5, 64, 100])
def test_state_dict_goes_on_where_it_was_taken(done):
    every = samples(word_map_stream(5, grid_size=8, length=150))
    stream = word_map_stream(5, grid_size=8, length=150)
    iterator = iter(stream)
    for _ in range(done):
        next(iterator)
    state = pickle.loads(pickle.dumps(stream.state_dict()))
    resumed = word_map_stream(5, grid_size=8, length=150)
    resumed.load_state_dict(state)
    assert samples(resumed) == every[done:]


def test_a_late_state_is_reached_without_walking_there():
    stream = word_map_stream(5, grid_size=8)
    state = stream.state_dict()
    state["examples_iterable"]["position"] = 10**12
    stream.load_state_dict(state)
    assert samples(stream, 1) == samples(word_map_stream(5, grid_size=8, start=10**12), 1)


@pytest.mark.parametrize("position", [0, 10_000_000])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_late_start_draws_no_more_than_an_early_one(position, resumed, monkeypatch):
    """One call of the generator, at the sample itself, whatever the position."""
    drawn = []
    draw = WordMapSampler.__call__
    monkeypatch.setattr(WordMapSampler, "__call__", lambda self, *call: drawn.append(call) or draw(self, *call))
    stream = word_map_stream(5, grid_size=8, start=0 if resumed else position)
    if resumed:
        state = stream.state_dict()
        state["examples_iterable"]["position"] = position
        stream.load_state_dict(state)
    next(iter(stream))
    assert drawn == [(position, 64)]


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_workers_change_nothing(workers):
    stream = word_map_stream(5, grid_size=8, block_size=4)
    batches = itertools.islice(DataLoader(stream, batch_size=4, num_workers=workers), 7)
    seen = [word_map.tolist() for batch in batches for word_map in batch["word_map"]]
    assert seen == [word_map for _, word_map in samples(stream, 28)]


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_processes_take_turns(processes):
    """Together, the b-th batches of all processes are the b-th stretch of the stream."""
    stream = word_map_stream(5, grid_size=8, block_size=4)
    turns = [
        [samples(stream.shard(processes, rank), 8) for rank in range(processes)],
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


def test_the_methods_of_datasets_work_on_it():
    stream = word_map_stream(5, grid_size=8, length=20)
    every = samples(stream)
    assert samples(stream.skip(3).take(4)) == every[3:7]
    assert samples(stream.map(lambda x: {"grid_size": x["grid_size"] * 1}), 20) == every
    assert next(iter(stream.with_format("torch")))["word_map"].dtype == torch.int64
    assert next(iter(stream.iter(batch_size=6)))["word_map"][5].tolist() == every[5][1]
    assert samples(pickle.loads(pickle.dumps(stream))) == every
    assert stream.column_names == ["word_map", "grid_size"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_words": 0}, "num_words=0"),
        ({"num_words": 5, "max_cells": 33}, "max_cells=33"),
        ({"num_words": 5, "max_cells": 0}, "max_cells=0"),
        ({"num_words": 5, "seed": -1}, "seed=-1"),
        ({"num_words": 5, "start": -1}, "start=-1"),
        ({"num_words": 3, "word_categories": [0, 1]}, "2 entries for 3 words"),
        ({"num_words": 3, "word_categories": [0, 2, 2]}, "Category 1 has no word"),
        ({"num_words": 2, "word_categories": [0, -1]}, "-1"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        word_map_stream(**arguments)


def test_grids_of_one_size():
    samples = list(word_map_stream(5, seed=3, grid_size=8, max_cells=4, length=40, random_cells=False))
    assert all((sample["grid_size"] == 4).all() for sample in samples)
    assert any((sample["word_map"][0] != sample["word_map"][4]).any() for sample in samples)
    # the words are those of the grids of random size, which show a corner of them
    for sample, other in zip(samples, word_map_stream(5, seed=3, grid_size=8, max_cells=4, length=40), strict=True):
        assert sample["word_map"][0, 0] == other["word_map"][0, 0]
