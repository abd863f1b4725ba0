"""The segmenter: whole images or crops, smoothing, words in the model's own prompt."""

import pytest
import torch

from ifseg_hf.processing import IFSegProcessor, IFSegSegmenter, patch_scores, sliding_window_outputs

NAMES = ["cat", "dog", "sky"]


def test_segments_as_model_and_post_processing_do(segmenter, images):
    assert not segmenter.model.training
    with torch.no_grad():
        outputs = segmenter.model(**segmenter.processor(images=images, return_tensors="pt"))
    sizes = [image.shape[:2] for image in images]
    for smoothing in ((None, None), (2, 1), (None, 0)):
        expected = segmenter.image_processor.post_process_semantic_segmentation(outputs, sizes, *smoothing)
        maps = segmenter.segment(images, *smoothing)
        assert all(torch.equal(*pair) for pair in zip(maps, expected, strict=True))


def test_smoothing_is_the_image_processors_unless_given(segmenter, images):
    outputs = segmenter(segmenter.preprocess(images))
    assert segmenter.smoothing == (3, 25)
    segmenter.image_processor.smoothing_iterations = 0
    assert segmenter.smoothing == (3, 0)
    for given, used in (((None, None), (3, 0)), ((2, None), (2, 0)), ((2, 4), (2, 4))):
        pairs = zip(segmenter.patch_scores(outputs, *given), patch_scores(outputs, *used), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)


def test_crops_are_taken_where_the_processor_says_so(segmenter, images):
    inputs, model, processor = segmenter.preprocess(images), segmenter.model, segmenter.processor
    crops = sliding_window_outputs(model, **inputs)
    assert segmenter.inference == "whole"
    assert not torch.equal(segmenter(inputs).logits, crops.logits)
    assert torch.equal(IFSegSegmenter(model, processor, "slide")(inputs).logits, crops.logits)
    processor.image_processor.sliding_window = 32
    crops = sliding_window_outputs(model, **inputs, crop=32)
    assert IFSegSegmenter(model, processor).inference == "slide"
    assert torch.equal(IFSegSegmenter(model, processor)(inputs).logits, crops.logits)
    assert torch.equal(IFSegSegmenter(model, processor, "whole")(inputs).logits, segmenter(inputs).logits)
    with pytest.raises(ValueError, match='inference="sliding": choose "whole" or "slide"'):
        IFSegSegmenter(model, processor, "sliding")


def test_words_passed_are_words_set(segmenter, images):
    inputs = segmenter.preprocess(images)
    words = segmenter.encode_words(["grass", "concrete wall"])
    passed = segmenter(inputs, segmenter.word_inputs(words)).logits
    assert segmenter.model.config.id2label == dict(enumerate(NAMES))
    segmenter.set_words(["grass", "concrete wall"])
    assert torch.equal(segmenter(inputs).logits, passed)


@pytest.mark.parametrize("prompt", [None, "which things?", "find {categories}", "find {categories} or not"])
def test_other_words_keep_the_models_prompt(segmenter, prompt):
    processor = segmenter.processor
    segmenter.model.set_words(**processor.encode_categories(NAMES, prompt))
    segmenter.set_words(["wall", "grass"])
    assert segmenter.model.config.prompt_ids == processor.encode_categories(["wall", "grass"], prompt)["prompt_ids"]
    segmenter.set_words(prompt="what?")
    after = segmenter.model.config.prompt.partition("{categories}")[2]
    assert segmenter.model.config.prompt == f"what?{{categories}}{after}"
    assert segmenter.model.config.id2label == {0: "wall", 1: "grass"}


def test_a_stored_question_is_completed_by_the_processors_template(segmenter):
    """Configurations of version 0.1.0 hold the question alone."""
    words = segmenter.processor.encode_categories(NAMES)
    segmenter.model.set_words(**{**words, "prompt": "what is the segmentation map of the image? object:"})
    assert segmenter.encode_words(NAMES) == words


def test_a_model_without_a_prompt_takes_the_processors_template(segmenter):
    processor = segmenter.processor
    processor = IFSegProcessor(processor.image_processor, processor.tokenizer, "find {categories}")
    segmenter.model.config.prompt = None
    assert IFSegSegmenter(segmenter.model, processor).encode_words(["cat"])["prompt"] == "find {categories}"


def test_missing_words_and_tokenizer_are_named(segmenter, images):
    segmenter.model.config.category_ids, segmenter.untuned = None, True
    with pytest.raises(ValueError, match="no words yet"):
        segmenter(segmenter.preprocess(images))
    with pytest.raises(ValueError, match="no words yet"):
        segmenter.encode_words(prompt="what?")
    segmenter.processor.tokenizer = None
    with pytest.raises(ValueError, match="need a tokenizer"):
        segmenter.set_words(["cat"])
