"""Word maps drawn per second on one core, 32 x 32 patches, in batches as training reads them.

`make bench` prints the rates. Time is the processor's, so that other jobs on the machine do not count. Labels are not
part of it: they are made from the small grids on the model's device.
"""

import itertools
import time

import pytest
import torch
from torch.utils.data import DataLoader

from ifseg_hf.data.word_maps import WordMapDataset, word_map_labels, word_map_stream

SAMPLES = 4096


@pytest.fixture
def report(benchmark, capsys):
    """Prints samples a second once the benchmark has run, and returns them; None where benchmarks are switched off."""

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
@pytest.mark.parametrize("kind", ["dataset", "stream"])
def test_word_maps(benchmark, report, kind, vocabulary, start):
    word_categories = [i % 27 for i in range(171)] if "categories" in vocabulary else None
    if kind == "dataset":
        dataset = WordMapDataset(171, length=start + SAMPLES, word_categories=word_categories)
        ranges = [range(first, first + 16) for first in range(start, start + SAMPLES, 16)]
        loader = DataLoader(dataset, batch_sampler=ranges)
    else:
        stream = word_map_stream(171, start=start, word_categories=word_categories, block_size=16)
        loader = DataLoader(stream, batch_size=16)

    def read():
        return sum(len(batch["word_map"]) for batch in itertools.islice(loader, SAMPLES // 16))

    torch.set_num_threads(1)
    assert benchmark(read) == SAMPLES
    rate = report(f"{kind}, {vocabulary}, from sample {start:,}", SAMPLES)
    assert rate is None or rate >= {"dataset": 20_000, "stream": 10_000}[kind]


@pytest.mark.benchmark(group="labels", timer=time.process_time, min_rounds=5, warmup=True)
def test_labels(benchmark, report):
    """On the CPU, where they cost most."""
    batch = next(iter(DataLoader(word_map_stream(171), batch_size=16)))
    torch.set_num_threads(1)
    labels = benchmark(word_map_labels, batch["word_map"], batch["grid_size"], 512)
    assert labels.shape == (16, 512, 512)
    report("labels of 512 x 512", 16)
