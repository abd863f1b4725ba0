"""DenseCRF against exact filtering with kernels between all pairs of pixels, and its place in post-processing."""

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate
from transformers.utils import ModelOutput

from ifseg_hf.processing import IFSegImageProcessor
from ifseg_hf.processing.dense_crf_ifseg import DenseCRFSettings, PermutohedralLattice, _PositionFilter, dense_crf
from ifseg_hf.processing.post_processing_ifseg import resize_scores

SIDE = 48


def picture(side: int = SIDE) -> torch.Tensor:
    """An image (side, side, 3) of smooth colours with edges and a little noise, float32 from 0 to 255."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    disc = ((y - side / 2) ** 2 + (x - side / 3) ** 2 < (side / 4) ** 2).float()
    colours = torch.stack([60 + 60 * disc + x / side * 9, 90 + y / side * 12, 120 - 50 * disc], dim=-1)
    return (colours + 2 * torch.randn(side, side, 3, generator=generator)).clamp(0, 255)


def patch_probabilities(categories: int = 4, patches: int = 4, seed: int = 0) -> torch.Tensor:
    """Probabilities (categories, patches, patches) as a model predicts them."""
    logits = 2 * torch.randn(categories, patches, patches, generator=torch.Generator().manual_seed(seed))
    return logits.softmax(0)


def kernel(features: torch.Tensor) -> torch.Tensor:
    """The Gaussian kernel between all pairs of points, normalised symmetrically."""
    weights = (-0.5 * torch.cdist(features.double(), features.double()) ** 2).exp()
    scale = weights.sum(1).rsqrt()
    return scale[:, None] * weights * scale


def features_of(image: torch.Tensor, settings: DenseCRFSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled positions (pixels, 2), and positions and colours (pixels, 5)."""
    height, width = image.shape[:2]
    places = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), -1).reshape(-1, 2)
    colours = image.reshape(-1, 3) / settings.bilateral_srgb
    return places / settings.gaussian_sxy, torch.cat([places / settings.bilateral_sxy, colours], dim=1)


def exact_crf(probabilities: torch.Tensor, image: torch.Tensor, settings: DenseCRFSettings) -> torch.Tensor:
    """Mean-field inference with whole kernel matrices, in float64."""
    near, alike = (kernel(features) for features in features_of(image, settings))
    unary = -probabilities.double().flatten(1).T.clamp(min=1e-5).log()
    current = (-unary).softmax(1)
    for _ in range(settings.iterations):
        messages = settings.gaussian_weight * near @ current + settings.bilateral_weight * alike @ current
        current = (messages - unary).softmax(1)
    return current.T.reshape(probabilities.shape)


def test_the_position_filter_is_the_sum_over_pixels():
    height, width, sigma = 9, 14, 1.5
    values = torch.randn(height * width, 3, generator=torch.Generator().manual_seed(0))
    places = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), -1).reshape(-1, 2)
    weights = (-0.5 * torch.cdist(places.double(), places.double()) ** 2 / sigma**2).exp()
    found = _PositionFilter(height, width, sigma, "cpu")(values)
    torch.testing.assert_close(found, (weights @ values.double()).float(), rtol=0, atol=5e-5)


@pytest.mark.parametrize("colour", [3.0, 10.0])
def test_the_lattice_is_close_to_exact_filtering(colour):
    settings = DenseCRFSettings(bilateral_srgb=colour)
    _, features = features_of(picture(), settings)
    values = torch.rand(SIDE**2, 5, generator=torch.Generator().manual_seed(0))
    weights = (-0.5 * torch.cdist(features, features) ** 2).exp()
    expected = weights @ values / weights.sum(1, keepdim=True)
    lattice = PermutohedralLattice(features.float())
    found = lattice(values) / lattice(torch.ones(SIDE**2, 1))
    assert (found - expected).abs().mean() < 0.25 * (expected - expected.mean(0)).abs().mean()
    assert np.corrcoef(found.flatten(), expected.flatten())[0, 1] > 0.96


def test_lattice_weights_are_barycentric_and_keep_sums():
    features = 5 * torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    lattice = PermutohedralLattice(features)
    assert lattice.weights.min() > -1e-5
    torch.testing.assert_close(lattice.weights.sum(1), torch.ones(200))
    far = PermutohedralLattice(torch.tensor([[0.0, 0, 0], [50, 0, 0], [0, 70, 9]]))
    found = far(torch.eye(3))
    assert torch.equal(found, found.diagonal().diag())  # points far apart do not mix
    with pytest.raises(ValueError, match="choose larger standard deviations"):
        PermutohedralLattice(1e6 * features)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_inference_is_close_to_exact_inference(seed):
    settings = DenseCRFSettings()
    image = picture()
    probabilities = interpolate(patch_probabilities(seed=seed)[None], size=(SIDE, SIDE), mode="bilinear")[0]
    expected = exact_crf(probabilities, image, settings)
    found = dense_crf(probabilities, image, settings)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(0), torch.ones(SIDE, SIDE))
    changed = (expected.argmax(0) != probabilities.argmax(0)).float().mean()
    wrong = (found.argmax(0) != expected.argmax(0)).float().mean()
    assert changed > 0.02
    assert wrong < 0.03
    assert (found - expected).abs().mean() < 0.02


def test_labels_move_to_the_edges_of_colours():
    image = torch.full((40, 60, 3), 40.0)
    image[:, 25:] = 200
    logits = torch.zeros(2, 40, 60)
    logits[0, :, :32] = 1  # seven pixels beyond the edge
    logits[1, :, 32:] = 1
    labels = dense_crf(logits.softmax(0), image).argmax(0)
    assert (labels[:, :25] == 0).all()
    assert (labels[:, 25:] == 1).all()
    unchanged = dense_crf(logits.softmax(0), image, DenseCRFSettings(iterations=0))
    torch.testing.assert_close(unchanged, logits.softmax(0))
    with pytest.raises(ValueError, match=r"shape \(40, 59, 3\), and the probabilities are for 40 x 60 pixels"):
        dense_crf(logits.softmax(0), image[:, 1:])


def outputs_of(probabilities: torch.Tensor) -> ModelOutput:
    return ModelOutput(logits=probabilities.log()[None])


def test_post_processing_fits_maps_to_images():
    processor = IFSegImageProcessor(smoothing_iterations=0)
    image = picture().round().to(torch.uint8)
    probabilities = patch_probabilities()
    rare = torch.full((1, 4, 4), 0.01)  # takes no part
    outputs = outputs_of(torch.cat([probabilities * 0.99, rare]))
    expected = dense_crf(resize_scores(0.99 * probabilities, (SIDE, SIDE)), image.float())
    (labels,) = processor.post_process_semantic_segmentation(outputs, crf=True, images=image.numpy())
    assert torch.equal(labels, expected.argmax(0))
    (both,) = processor.post_process_semantic_segmentation(
        outputs, [(SIDE, SIDE)], crf=True, images=[image.numpy()], return_segmentation_scores=True
    )
    assert torch.equal(both["segmentation"], labels)
    torch.testing.assert_close(both["segmentation_scores"][:4], expected)
    assert not both["segmentation_scores"][4].any()
    (without,) = processor.post_process_semantic_segmentation(outputs, [(SIDE, SIDE)])
    assert (without != labels).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "crf=True needs the images: 0 for 1 label maps"),
        ({"images": [np.zeros((9, 9, 3), np.uint8)] * 2}, "crf=True needs the images: 2 for 1 label maps"),
        ({"images": np.zeros((9, 9, 3), np.uint8), "target_sizes": [(9, 8)]}, "probabilities are for 9 x 8 pixels"),
    ],
)
def test_images_that_do_not_fit_are_refused(arguments, message):
    processor = IFSegImageProcessor(smoothing_iterations=0)
    with pytest.raises(ValueError, match=message):
        processor.post_process_semantic_segmentation(outputs_of(patch_probabilities()), crf=True, **arguments)
