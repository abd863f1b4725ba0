"""Processor time of mean IoU on an image of 512 x 683, with 171 categories and a tenth of the pixels ignored."""

import time

import numpy as np
import pytest

from ifseg_hf.evaluation.metrics import MeanIoU, scores


@pytest.mark.benchmark(group="mIoU", timer=time.process_time, min_rounds=20, warmup=True)
@pytest.mark.parametrize("regions", ["noise", "patches"])
def test_pixels_are_counted(benchmark, regions):
    """Random pixels, the worst case for the processor's cache, and patches of 16 x 16."""
    rng = np.random.default_rng(0)
    prediction, reference = rng.integers(0, 171, (2, 512, 683))
    if regions == "patches":
        prediction, reference = (np.kron(rng.integers(0, 171, (32, 43)), np.ones((16, 16), int)) for _ in range(2))
    reference = np.where(rng.random(reference.shape) < 0.1, -100, reference)
    metric = MeanIoU(171)
    benchmark(metric.add, prediction=prediction, reference=reference)
    assert metric.confusion_matrix.sum() % (reference >= 0).sum() == 0


@pytest.mark.benchmark(group="mIoU", timer=time.process_time, min_rounds=20, warmup=True)
def test_scores_are_computed(benchmark):
    matrix = np.random.default_rng(0).integers(0, 100, (171, 171))
    assert 0 < benchmark(scores, matrix, {"seen": range(156), "unseen": range(156, 171)})["mean_iou"] < 1
