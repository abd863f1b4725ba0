"""Processor time of DenseCRF on an image of 512 x 683."""

import time

import pytest
import torch
from torch.nn.functional import interpolate

from ifseg_hf.processing.dense_crf_ifseg import dense_crf


@pytest.mark.benchmark(group="DenseCRF", timer=time.process_time, min_rounds=3)
@pytest.mark.parametrize("categories", [4, 16])
def test_labels_are_fitted_to_an_image(benchmark, categories):
    """Smooth colours with camera noise, so that few pixels share a lattice point: the slowest case."""
    generator = torch.Generator().manual_seed(0)
    image = interpolate(255 * torch.rand(1, 3, 9, 12, generator=generator), size=(512, 683), mode="bilinear")[0]
    image = (image + 2 * torch.randn(image.shape, generator=generator)).clamp(0, 255).permute(1, 2, 0)
    logits = 2 * torch.randn(1, categories, 16, 22, generator=generator)
    probabilities = interpolate(logits, size=(512, 683), mode="bilinear")[0].softmax(0)
    fitted = benchmark(dense_crf, probabilities, image)
    assert fitted.shape == (categories, 512, 683)
