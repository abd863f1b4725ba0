from functools import lru_cache
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoints import reference_model
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_outputs import fixture, golden, golden_metadata, relative_error
from torch.nn.functional import interpolate, normalize

import ifseg_hf.processing.post_processing_ifseg as post_processing
from ifseg_hf.processing import (
    IFSegImageProcessor,
    nearest_patches,
    patch_scores,
    resized_argmax,
    segmentation_maps,
    smooth_probabilities,
)


def smooth_by_loops(probabilities: np.ndarray, features: np.ndarray, neighbors: int, iterations: int) -> np.ndarray:
    features = features / np.linalg.norm(features, axis=1, keepdims=True)
    similarity = features @ features.T
    nearest = [sorted(range(len(row)), key=lambda j, row=row: -row[j])[:neighbors] for row in similarity]
    for _ in range(iterations):
        probabilities = np.stack([np.mean([probabilities[j] for j in row], axis=0) for row in nearest])
    return probabilities


def outputs_of(*sizes, categories: int = 5, channels: int = 16, padded: bool = True) -> SimpleNamespace:
    """Random outputs for images of these grid sizes."""
    torch.manual_seed(0)
    height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
    mask = torch.zeros(len(sizes), height, width, dtype=torch.bool)
    for row, size in zip(mask, sizes, strict=True):
        row[: size[0], : size[1]] = True
    return SimpleNamespace(
        logits=3 * torch.randn(len(sizes), categories, height, width),
        image_features=torch.randn(len(sizes), channels, height, width),
        patch_mask=mask if padded else None,
    )


@lru_cache(maxsize=1)
def model_of(size: str):
    return reference_model(size)


def smooth_with_ties(probabilities, features, neighbors: int, iterations: int, tie: float = 1e-6):
    """Smoothed probabilities, once for each way to decide between a k-th and a next neighbour that are equally near."""
    features = normalize(features.double(), dim=1)
    similarity, indices = (features @ features.T).topk(neighbors + 1)
    tied = (similarity[:, -2] - similarity[:, -1] < tie).nonzero()[:, 0].tolist()
    assert len(tied) <= 6
    for swaps in product([False, True], repeat=len(tied)):
        nearest = indices[:, :neighbors].clone()
        for patch, swap in zip(tied, swaps, strict=True):
            nearest[patch, -1] = indices[patch, neighbors if swap else neighbors - 1]
        smoothed = probabilities
        for _ in range(iterations):
            smoothed = smoothed[nearest].mean(1)
        yield smoothed


@pytest.mark.parametrize(
    "name",
    [
        "tiny_512x512",
        "tiny_512x683",
        "tiny_384x640",
        "tiny_512x512_171",
        pytest.param("base_512x512", marks=pytest.mark.slow),
    ],
)
def test_golden(name, published_processor):
    expected, metadata = golden(name), golden_metadata(name)
    words = published_processor(categories=metadata["categories"], return_tensors="pt")
    assert torch.equal(words.input_ids, expected["input_ids"])
    with torch.no_grad():
        outputs = model_of(metadata["size"])(fixture.pixel_values(*map(int, metadata["pixels"].split("x"))), **words)
    probabilities = outputs.logits[0].flatten(1).T.softmax(1)
    features = outputs.image_features[0].flatten(1).T
    for neighbors, iterations in ((3, 25), (5, 10)):
        (scores,) = patch_scores(outputs, neighbors, iterations)
        scores = scores.flatten(1).T
        ways = list(smooth_with_ties(probabilities, features, neighbors, iterations))
        # Rounding in the trunk decides ties; any decision is right, and one of them is the reference's.
        assert min(relative_error(scores, way) for way in ways) < 5e-6
        reference = expected[f"knn_k{neighbors}_i{iterations}"][0]
        assert min(relative_error(way, reference) for way in ways) < 5e-6

    size = [tuple(map(int, metadata["target_size"].split("x")))]
    for key, iterations in (("segmentation_knn", 25), ("segmentation", 0)):
        (labels,) = published_processor.post_process_semantic_segmentation(
            outputs, size, smoothing_iterations=iterations
        )
        assert labels.dtype == torch.int64
        assert (labels != expected[key][0]).float().mean() < 1e-4


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 6), st.integers(0, 1000))
def test_smoothing_against_loops(patches, neighbors, iterations, seed):
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.rand(patches, 4, generator=generator).softmax(1)
    features = torch.randn(patches, 12, generator=generator)
    smoothed = smooth_probabilities(probabilities, features, neighbors, iterations)
    expected = smooth_by_loops(probabilities.double().numpy(), features.double().numpy(), neighbors, iterations)
    np.testing.assert_allclose(smoothed, expected, atol=1e-6)
    np.testing.assert_allclose(smoothed.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize("block", [1, 100, 999])
def test_blocks_change_nothing(monkeypatch, block):
    outputs = outputs_of((7, 9), (5, 5), categories=11)
    features = outputs.image_features[0].flatten(1).T
    whole = nearest_patches(features, 4).sort().values
    maps = segmentation_maps(outputs, [(50, 61), (33, 20)])
    monkeypatch.setattr(post_processing, "_BLOCK", block)
    assert torch.equal(nearest_patches(features, 4).sort().values, whole)
    for actual, expected in zip(segmentation_maps(outputs, [(50, 61), (33, 20)]), maps, strict=True):
        assert torch.equal(actual, expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), *[st.integers(1, 9)] * 2, *[st.integers(1, 40)] * 2)
def test_argmax_in_blocks_is_the_argmax(categories, height, width, new_height, new_width):
    torch.manual_seed(0)
    scores = torch.randn(categories, height, width, dtype=torch.float64)
    scores[0] = torch.finfo(scores.dtype).min  # an absent category's logits
    expected = interpolate(scores[None], size=(new_height, new_width), mode="bilinear")[0].argmax(0)
    for block in (2**24, 2 * new_width * categories, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(post_processing, "_BLOCK", block)
            assert torch.equal(resized_argmax(scores, (new_height, new_width)), expected)


@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, -torch.inf])
def test_an_absent_category_wins_nowhere(lowest):
    scores = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
    scores[1] = lowest
    labels = resized_argmax(scores, (77, 91))
    expected = resized_argmax(scores[[0, 2]], (77, 91)) * 2
    assert torch.equal(labels, expected)


def test_of_equal_scores_the_first_category_wins():
    scores = torch.rand(1, 7, 9, generator=torch.Generator().manual_seed(0)).expand(40, 7, 9)
    assert not resized_argmax(scores, (100, 131)).any()


def test_only_categories_that_can_win_are_resized():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(500, 16, 20, generator=generator) + 9 * (torch.arange(500) % 100 == 0)[:, None, None]
    candidates = post_processing._candidates(scores)
    assert 1 < len(candidates) < 50
    expected = interpolate(scores[None], size=(160, 200), mode="bilinear")[0].argmax(0)
    assert torch.equal(resized_argmax(scores, (160, 200)), expected)
    assert set(expected.unique().tolist()) <= set(candidates.tolist())


def test_scores_that_are_not_numbers_have_a_label():
    assert resized_argmax(torch.full((3, 2, 2), torch.nan), (4, 4)).unique().tolist() == [0]


def test_a_patch_is_its_own_neighbour():
    blank = torch.ones(50, 8)
    assert torch.equal(nearest_patches(blank, 1)[:, 0], torch.arange(50))
    assert (nearest_patches(torch.zeros(50, 8), 3) == torch.arange(50)[:, None]).any(1).all()
    assert nearest_patches(torch.randn(2, 8), 5).shape == (2, 2)


def test_padding_takes_no_part():
    outputs = outputs_of((4, 6), (7, 3))
    sizes = [(40, 60), (70, 30)]
    maps = segmentation_maps(outputs, sizes)
    assert [map.shape for map in maps] == [torch.Size(size) for size in sizes]
    for index, (height, width) in enumerate([(4, 6), (7, 3)]):
        alone = SimpleNamespace(
            logits=outputs.logits[index : index + 1, :, :height, :width],
            image_features=outputs.image_features[index : index + 1, :, :height, :width],
        )
        assert torch.equal(segmentation_maps(alone, [sizes[index]])[0], maps[index])
    assert [map.shape for map in segmentation_maps(outputs)] == [(4, 6), (7, 3)]


def test_no_smoothing_resizes_the_logits():
    outputs = outputs_of((6, 8), padded=False)
    expected = interpolate(outputs.logits, size=(50, 70), mode="bilinear").argmax(1)
    processor = IFSegImageProcessor()
    for sizes in ([(50, 70)], torch.tensor([[50, 70]])):
        (labels,) = processor.post_process_semantic_segmentation(outputs, sizes, smoothing_iterations=0)
        assert torch.equal(labels, expected[0])
    outputs.image_features = None
    assert torch.equal(segmentation_maps(outputs, iterations=0)[0], outputs.logits[0].argmax(0))


def test_empty_categories_never_win():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        outputs = outputs_of((6, 8))
        outputs.logits[:, 3:] = torch.finfo(dtype).min
        outputs.logits = outputs.logits.to(dtype)
        (scores,) = patch_scores(outputs)
        assert scores.dtype == torch.float32
        assert (scores[3:] == 0).all()
        for iterations in (0, 25):
            assert segmentation_maps(outputs, [(96, 128)], iterations=iterations)[0].max() <= 2


def test_half_precision_autocast_changes_nothing():
    outputs = outputs_of((6, 8))
    (expected,) = patch_scores(outputs)
    with torch.autocast("cpu", torch.bfloat16):
        (scores,) = patch_scores(outputs)
    assert torch.equal(scores, expected)


def test_errors():
    outputs = outputs_of((4, 4), (4, 4))
    with pytest.raises(ValueError, match="1 target_sizes for 2 images"):
        segmentation_maps(outputs, [(8, 8)])
    for wrong in ((8, 8), [(8, 8), (8, 8, 3)], [(8, 8), (0, 8)], [(8, 8), "88"], [(8, 8), (8, None)]):
        with pytest.raises(ValueError, match=r"give one \(height, width\) in pixels per image"):
            segmentation_maps(outputs, wrong)
    with pytest.raises(ValueError, match="smoothing_iterations=-1"):
        segmentation_maps(outputs, iterations=-1)
    with pytest.raises(ValueError, match="smoothing_neighbors=0"):
        segmentation_maps(outputs, neighbors=0)
    outputs.image_features = None
    with pytest.raises(ValueError, match="smoothing_iterations=0"):
        segmentation_maps(outputs)
