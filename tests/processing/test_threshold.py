"""`threshold`: pixels whose category has a lower probability belong to no category."""

import numpy as np
import pytest
import torch
from checkpoints import small_model
from hypothesis import given
from hypothesis import strategies as st

from ifseg_hf.processing import IFSegSegmenter, resize_scores, resized_argmax
from ifseg_hf.processing.post_processing_ifseg import patch_labels


@given(
    seed=st.integers(0, 2**31),
    categories=st.integers(1, 6),
    patches=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    smoothed=st.booleans(),
    threshold=st.floats(0, 1),
)
def test_exactly_the_pixels_below_lose_their_category(seed, categories, patches, size, smoothed, threshold):
    scores = torch.randn(categories, *patches, generator=torch.Generator().manual_seed(seed)) * 3
    probabilities = scores.softmax(0)
    scores = probabilities if smoothed else scores
    every, some = patch_labels(scores, size, smoothed), patch_labels(scores, size, smoothed, threshold)
    assert torch.equal(every, resized_argmax(scores, size))
    chosen = resize_scores(probabilities, size).gather(0, every[None])[0]
    close = (chosen - threshold).abs() < 1e-5
    assert torch.equal(some[~close], every.where(chosen >= threshold, -1)[~close])
    assert ((some == every) | (some == -1)).all()


def test_whole_images_crops_smoothing_and_crf_compare_the_same_probability(segmenter, images):
    for inference in ("whole", "slide"):
        segmenter.inference = inference
        outputs = segmenter(segmenter.preprocess(images))  # padded
        sizes = [image.shape[:2] for image in images]
        for iterations in (0, 2):
            for crf in (False, True):
                how = {"smoothing_iterations": iterations, "crf": crf, "images": images if crf else None}
                post = segmenter.image_processor.post_process_semantic_segmentation
                found = post(outputs, sizes, return_segmentation_scores=True, **how)
                logits = iterations == 0 and not crf
                for index, single in enumerate(found):
                    labels, scores = single["segmentation"], single["segmentation_scores"]
                    if logits:
                        (patches,) = list(segmenter.patch_scores(outputs, None, 0))[index : index + 1]
                        scores = resize_scores(patches.softmax(0), sizes[index])
                    best = scores.gather(0, labels[None])[0]
                    threshold = best.median().item() + 1e-4
                    kept = post(outputs, sizes, threshold=threshold, **how)[index]
                    clear = (best - threshold).abs() > 1e-5  # of rounding
                    assert torch.equal(kept[clear], labels.where(best >= threshold, -1)[clear])
                    assert (kept == -1).any()


def test_an_image_gets_the_same_in_a_padded_batch(segmenter, images):
    alone = [segmenter.segment([image], threshold=0.4)[0] for image in images]
    for one, other in zip(segmenter.segment(images, threshold=0.4), alone, strict=True):
        assert (one == other).float().mean() > 0.999  # a probability may be rounded across the threshold


def test_the_pipeline_returns_no_mask_of_pixels_below(segmenter, images):
    pipe = segmenter.processor.pipeline(segmenter.model)
    everywhere = {found["label"]: found for found in pipe(images[0], untuned=True)}
    (labels,) = segmenter.segment([images[0]])
    (scores,) = segmenter.patch_scores(segmenter(segmenter.preprocess([images[0]])))
    threshold = resize_scores(scores, labels.shape).amax(0).median().item()
    kept = pipe(images[0], threshold=threshold)
    assert kept
    assert all(found["score"] >= threshold - 1e-5 for found in kept)
    covered = sum((np.asarray(found["mask"]) > 0).sum() for found in kept)
    assert 0 < covered < labels.numel()
    for found in kept:
        assert (np.asarray(found["mask"]) <= np.asarray(everywhere[found["label"]]["mask"])).all()
    assert pipe(images[0], threshold=1.0) == []


def test_a_single_category_is_certain(small_processor, images):
    segmenter = IFSegSegmenter(small_model(vocab_size=len(small_processor.tokenizer)), small_processor)
    segmenter.set_words(["cat"])
    for iterations in (0, 3):
        (labels,) = segmenter.segment([images[0]], iterations=iterations, threshold=1.0)
        assert (labels == 0).all()


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan"), True, "0.5"])
def test_a_threshold_is_a_probability(segmenter, images, threshold):
    with pytest.raises(ValueError, match="give a probability, from 0 to 1"):
        segmenter.segment(images, threshold=threshold)
    with pytest.raises(ValueError, match="give a probability, from 0 to 1"):
        segmenter.processor.pipeline(segmenter.model)(images[0], threshold=threshold)
