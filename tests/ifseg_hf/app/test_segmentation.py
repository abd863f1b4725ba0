"""Outputs that are kept, and models that visitors share."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image

from ifseg_hf.app.segmentation import Models, PostProcessing, segment_image

SETTINGS = [PostProcessing(4, 3), PostProcessing(1, 0), PostProcessing(6, 10, 0.6), PostProcessing(1, 0, 0.9)]


@pytest.fixture
def models():
    return Models()


@pytest.fixture
def image(image_file):
    return Image.open(image_file).convert("RGB")


def segment(models, folder, image, words):
    return segment_image(models, folder, image, "field.png", words, None, False)


@pytest.mark.parametrize("how", SETTINGS)
def test_masks_are_those_of_the_processor(models, small_nano, image, how):
    words = ["sky", "grass", "wall"]
    kept = segment(models, small_nano, image, words)
    segmenter, _ = models.get(small_nano)
    segmenter.set_words(words)
    (expected,) = segmenter.segment([np.asarray(image)], how.neighbors, how.iterations, threshold=how.threshold)
    labels, best, likely = kept.label_map(how)
    assert np.array_equal(labels, expected.numpy())
    assert np.array_equal(kept.full_size_labels(how), expected.numpy())
    assert np.array_equal(labels >= 0, likely >= how.threshold - 1e-6)
    assert (best >= 0).all()
    assert np.array_equal(best[labels >= 0], labels[labels >= 0])


def test_post_processing_runs_no_model(models, small_nano, image):
    segmenter, _ = models.get(small_nano)
    calls = []
    segmenter.model.register_forward_hook(lambda *_: calls.append(1))
    kept = segment(models, small_nano, image, ["sky", "grass"])
    assert len(calls) == 1
    maps = [kept.label_map(how)[0] for how in SETTINGS]
    kept.full_size_labels(SETTINGS[0])
    assert len(calls) == 1
    assert any((maps[0] != other).any() for other in maps[1:])


def test_visitors_at_once_get_what_each_would_get_alone(models, small_nano, image):
    vocabularies = [["sky", "grass"], ["wall", "sea", "tree"], ["cat"], ["road", "field", "water", "house"]]
    alone = [segment(models, small_nano, image, words) for words in vocabularies]
    found = {}

    def visit(index):
        for _ in range(3):
            found[index] = segment(models, small_nano, image, vocabularies[index])

    threads = [threading.Thread(target=visit, args=(index,)) for index in range(len(vocabularies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, expected in enumerate(alone):
        assert found[index].names == vocabularies[index]
        assert torch.equal(found[index].outputs.logits, expected.outputs.logits)
    assert models.get(small_nano)[0].model.config.category_ids is None  # no words are set on the shared model


def test_models_used_longest_ago_are_dropped(small_nano, tmp_path):
    models = Models(keep=2)
    folders = [small_nano]
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(small_nano)
        folders.append(str(tmp_path / name))
    first, _ = models.get(folders[0])
    second, _ = models.get(folders[1])
    assert models.get(folders[0])[0] is first
    models.get(folders[2])
    assert models.get(folders[0])[0] is first
    assert models.get(folders[1])[0] is not second
