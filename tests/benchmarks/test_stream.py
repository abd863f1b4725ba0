"""Word maps of 32 x 32 patches per second of processor time, in batches as in training; `make bench` prints them.

The labels are measured separately, because training makes them on the model's device.
"""

import itertools
import time

import pytest
import torch
from torch.utils.data import DataLoader

from ifseg_hf.data.word_maps import word_map_labels, word_map_stream

SAMPLES = 4096


@pytest.fixture
def report(benchmark, capsys):
    """Prints and returns samples per second after a benchmark; returns None where benchmarks are disabled."""

    def report(what: str, samples: int) -> float | None:
        if benchmark.stats is None:
            return None
        rate = samples / benchmark.stats.stats.min
        with capsys.disabled():
            print(f"\n{what}: {rate:,.0f} samples/s on one core")
        return rate

    return report


@pytest.mark.benchmark(group="word maps", timer=time.process_time, min_rounds=5, warmup=True)
@pytest.mark.parametrize("start", [0, 10_000_000])
@pytest.mark.parametrize("vocabulary", ["171 words", "27 categories of 171 words"])
def test_word_maps_are_drawn_at_20000_per_second(benchmark, report, vocabulary, start):
    word_categories = [i % 27 for i in range(171)] if "categories" in vocabulary else None

    def read():
        stream = word_map_stream(171, start=start, word_categories=word_categories, block_size=16)
        batches = itertools.islice(DataLoader(stream, batch_size=16), SAMPLES // 16)
        return sum(len(batch["word_map"]) for batch in batches)

    torch.set_num_threads(1)
    assert benchmark(read) == SAMPLES
    rate = report(f"{vocabulary}, from sample {start:,}", SAMPLES)
    assert rate is None or rate >= 20_000


@pytest.mark.benchmark(group="labels", timer=time.process_time, min_rounds=5, warmup=True)
def test_labels_are_made(benchmark, report):
    """On the CPU, where labels are slowest."""
    batch = next(iter(DataLoader(word_map_stream(171), batch_size=16)))
    torch.set_num_threads(1)
    labels = benchmark(word_map_labels, batch["word_map"], batch["grid_size"], 512)
    assert labels.shape == (16, 512, 512)
    report("labels of 512 x 512", 16)
