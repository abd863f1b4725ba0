"""`background`: words that are joined to the prompt and merged into one label."""

import numpy as np
import pytest
import torch
from checkpoints import small_model
from hypothesis import given
from hypothesis import strategies as st

from ifseg_hf.modeling import IFSegForSemanticSegmentation
from ifseg_hf.modeling.merged_labels import merge_logits, one_hot_labels
from ifseg_hf.processing import IFSegProcessor, IFSegSegmenter
from ifseg_hf.processing.background_ifseg import BACKGROUND_WORDS, background_words

REST = ["wall", "grass"]


@pytest.fixture
def segmenter(small_processor) -> IFSegSegmenter:
    small_processor.tokenizer.model_max_length = 256
    model = small_model(vocab_size=len(small_processor.tokenizer), max_position_embeddings=256)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    yield IFSegSegmenter(model, small_processor)
    small_processor.tokenizer.model_max_length = 64


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return coarse.repeat(16, 0).repeat(20, 1)


def test_words_are_joined_and_have_one_label(small_processor):
    encoded = small_processor.encode_categories(["cat", "sky"], background=REST)
    plain = small_processor.encode_categories(["cat", "sky", *REST])
    assert encoded["id2label"] == {0: "cat", 1: "sky", 2: "background"}
    assert encoded["prompt_ids"] == plain["prompt_ids"]
    assert encoded["category_ids"] == encoded["word_ids"] == plain["category_ids"]
    assert encoded["category_labels"] == encoded["word_categories"] == [0, 1, 2, 2]
    assert encoded["background"] == REST


def test_own_words_are_left_out_and_own_background_is_kept(small_processor):
    encoded = small_processor.encode_categories(["Background", "Wall", "cat"], background=[*REST, "background"])
    assert encoded["id2label"] == {0: "Background", 1: "Wall", 2: "cat"}
    assert encoded["background"] == ["grass"]
    assert encoded["category_labels"] == [0, 1, 2, 0]
    hierarchy = {"animal": ["cat", "dog"], "above": ["sky"]}
    encoded = small_processor.encode_categories(hierarchy, background=["dog", "grass"])
    assert encoded["background"] == ["grass"]
    assert encoded["word_categories"] == [0, 0, 1, 2]
    assert len(encoded["category_ids"]) == 3
    assert len(encoded["word_ids"]) == 4


def test_default_list_and_wrong_lists():
    assert background_words("default", ["sky"]) == [word for word in BACKGROUND_WORDS if word != "sky"]
    assert background_words(None, ["sky"]) is background_words("none", ["sky"]) is background_words([], ["sky"]) is None
    assert len(set(BACKGROUND_WORDS)) == len(BACKGROUND_WORDS)
    for wrong, message in (
        ("sky", 'background="sky": give "default", "none" or a list'),
        (["sky"], "All background words are categories"),
        (["a", "a"], '"a" is twice among the background words'),
        ({"sky": ["a"]}, "background words must be a list"),
    ):
        with pytest.raises(ValueError, match=message):
            background_words(wrong, ["sky"])


@given(
    seed=st.integers(0, 2**31),
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=8),
    scale=st.sampled_from([0.1, 1.0, 100.0]),
)
def test_probability_of_a_label_is_the_sum_over_its_categories(seed, labels, scale):
    logits = torch.randn(2, len(labels), 2, 3, generator=torch.Generator().manual_seed(seed)).double() * scale
    merged = merge_logits(logits, one_hot_labels(labels, 4, logits.device))
    expected = torch.zeros(2, 4, 2, 3).double().index_add(1, torch.tensor(labels), logits.softmax(1))
    torch.testing.assert_close(merged.softmax(1), expected)
    assert merged.isfinite().all()


def test_gradient_of_merged_logits():
    logits = torch.randn(2, 4, 1, 2, dtype=torch.float64, requires_grad=True)
    mask = one_hot_labels([0, 1, 1, 3], 4, logits.device)
    assert torch.autograd.gradcheck(lambda x: merge_logits(x, mask)[:, [0, 1, 3]], logits)


def test_tensors_and_the_models_own_words_give_the_same(segmenter, image):
    model, processor = segmenter.model, segmenter.processor
    inputs = processor(images=image, categories=["cat", "dog"], background=REST, return_tensors="pt")
    model.set_words(**processor.encode_categories(["cat", "dog"], background=REST))
    with torch.no_grad():
        passed, own = model(**inputs).logits, model(**processor(images=image, return_tensors="pt")).logits
    assert own.shape[1] == len(model.config.id2label) == 3
    torch.testing.assert_close(passed, own)


def test_lists_of_several_lengths_give_what_they_would_alone(segmenter, image):
    model, processor = segmenter.model, segmenter.processor
    lists, images = [["cat"], ["cat", "dog", "sky"]], [image, image[:40, :60]]
    for background in (REST, "default"):
        inputs = processor(images=images, categories=lists, background=background, return_tensors="pt")
        with torch.no_grad():
            together = model(**inputs)
        for index, names in enumerate(lists):
            single = processor(images=images[index], categories=names, background=background, return_tensors="pt")
            with torch.no_grad():
                alone = model(**single).logits[0]
            h, w = alone.shape[1:]
            found = together.logits[index, :, :h, :w]
            torch.testing.assert_close(found[: len(names) + 1], alone)
            assert (found[len(names) + 1 :] < -1e30).all()


def test_a_saved_model_merges_without_a_word(segmenter, image, tmp_path):
    segmenter.set_words(["cat", "dog"], background="default")
    pipe = segmenter.processor.pipeline(segmenter.model)
    expected = pipe(image)
    assert {found["label"] for found in expected} <= {"cat", "dog", "background"}
    pipe.save_pretrained(tmp_path)
    processor = IFSegProcessor.from_pretrained(tmp_path)
    model = IFSegForSemanticSegmentation.from_pretrained(tmp_path)
    loaded = processor.pipeline(model)
    assert loaded(image) == expected
    assert model.config.background == [*BACKGROUND_WORDS]
    assert loaded(image, background="none") == loaded(image, categories=["cat", "dog"])
    assert loaded(image, prompt="what?")  # other prompt, same words
    words = IFSegSegmenter(model, loaded).encode_words(prompt="what?")
    assert words["id2label"] == model.config.id2label
    assert words["background"] == model.config.background


def test_the_processor_has_a_default_list(small_processor, tmp_path):
    processor = IFSegProcessor(small_processor.image_processor, small_processor.tokenizer, background_words=REST)
    processor.save_pretrained(tmp_path)
    loaded = IFSegProcessor.from_pretrained(tmp_path)
    assert loaded.background_words == REST
    assert loaded.encode_categories(["cat"], background="default")["background"] == REST


def test_word_maps_of_background_words_have_its_label(segmenter):
    segmenter.set_words(["cat"], background=REST)
    model = segmenter.model
    grid = model.config.grid_size
    word_map = torch.randint(3, (2, grid, grid))
    labels = torch.tensor(model.config.word_categories)[word_map]
    outputs = model(word_map=word_map, labels=labels)
    assert outputs.logits.shape[1] == 2
    outputs.loss.backward()
    assert outputs.loss.isfinite()
    with pytest.raises(ValueError, match="labels holds 2, but there are 2 categories"):
        model(word_map=word_map, labels=torch.full_like(labels, 2))


def test_contradicting_words_are_refused(segmenter):
    words = segmenter.encode_words(["cat"], background=REST)
    for change, message in (
        ({"background": None}, "background and category_labels must be given together"),
        ({"category_labels": [0, 1]}, "must have a label for each of the 3 categories"),
        ({"category_labels": [0, 2, 2]}, "must have a label for each of the 3 categories"),
        ({"background": ["a", "b", "c", "d"]}, "background has 4 words"),
    ):
        with pytest.raises(ValueError, match=message):
            segmenter.model.set_words(**{**words, **change})


def test_background_needs_categories(small_processor, image):
    with pytest.raises(ValueError, match="background joins words to categories"):
        small_processor(images=image, background="default")
    with pytest.raises(ValueError, match="text is for generation, background for segmentation"):
        small_processor(images=image, text="what?", background="default")
