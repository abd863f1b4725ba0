"""Inference in crops: every patch is covered, and gets the mean of the outputs of the crops that contain it."""

import numpy as np
import pytest
import torch
from checkpoints import padded_images, small_model
from PIL import Image

from ifseg_hf.processing import IFSegImageProcessor, IFSegSegmenter, sliding_window_outputs
from ifseg_hf.processing.sliding_window_ifseg import window_starts


@pytest.fixture(scope="module")
def model():
    return small_model()  # patches of 16 pixels, image_size 64


def pixels_of(height, width):
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("patches", "expected"), [(1, [0]), (4, [0]), (5, [0, 1]), (7, [0, 2, 3]), (8, [0, 2, 4])])
def test_windows_cover_everything_and_end_with_the_pixels_of(patches, expected):
    assert window_starts(patches, 4, 2) == expected
    covered = {patch for start in expected for patch in range(start, min(start + 4, patches))}
    assert covered == set(range(patches))


@pytest.mark.parametrize("size", [(64, 64), (40, 30), (10, 64), (64, 33)])
def test_images_smaller_than_a_crop_are_segmented_whole(model, size):
    with torch.no_grad():
        whole = model(pixel_values=pixels_of(*size))
    crops = sliding_window_outputs(model, pixels_of(*size))
    torch.testing.assert_close(crops.logits, whole.logits)
    torch.testing.assert_close(crops.image_features, whole.image_features)


@pytest.mark.parametrize("size", [(64, 160), (100, 75), (130, 97)])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_logits_are_the_mean_over_the_crops(model, size, batch_size):
    """Compared with crops cut and summed one by one, pixel by pixel."""
    pixels, (height, width) = pixels_of(*size), size
    rows, columns = -(-height // 16), -(-width // 16)
    sums, count = torch.zeros(3, rows, columns), torch.zeros(rows, columns)
    for y in sorted({*range(0, max(rows - 4, 0), 2), max(rows - 4, 0)}):
        for x in sorted({*range(0, max(columns - 4, 0), 2), max(columns - 4, 0)}):
            with torch.no_grad():
                logits = model(pixel_values=pixels[:, :, y * 16 : y * 16 + 64, x * 16 : x * 16 + 64]).logits[0]
            sums[:, y : y + 4, x : x + 4] += logits
            count[y : y + 4, x : x + 4] += 1
    assert count.min() >= 1
    found = sliding_window_outputs(model, pixels, stride=42, batch_size=batch_size)
    torch.testing.assert_close(found.logits[0], sums / count, atol=1e-5, rtol=1e-5)


def test_images_of_several_sizes_get_what_each_gets_alone(model):
    images, pixel_values, pixel_mask = padded_images()
    together = sliding_window_outputs(model, pixel_values, pixel_mask, crop=32)
    for index, alone in enumerate(images):
        expected = sliding_window_outputs(model, alone[None], crop=32).logits[0]
        rows, columns = expected.shape[1:]
        torch.testing.assert_close(together.logits[index, :, :rows, :columns], expected, atol=1e-5, rtol=1e-5)
        assert together.patch_mask[index].sum() == rows * columns
        assert together.patch_mask[index, :rows, :columns].all()


def test_absent_categories_are_never_predicted(model):
    words = {"input_ids": torch.tensor([[0, 9, 5, 8, 2]]), "category_ids": torch.tensor([[[5], [8], [1]]])}
    words["category_mask"] = torch.tensor([[[1], [1], [0]]])
    outputs = sliding_window_outputs(model, pixels_of(64, 128), **words)
    assert outputs.logits.argmax(1).max() < 2
    maps = IFSegImageProcessor().post_process_semantic_segmentation(outputs, [(60, 120)])
    assert maps[0].shape == (60, 120)
    assert maps[0].max() < 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop": 40}, "crop=40: must be a multiple of the model's patches of 16"),
        ({"crop": 0}, "crop=0"),
        ({"stride": 8}, "stride=8: must be from 16"),
        ({"crop": 32, "stride": 48}, "to crop=32"),
        ({"input_ids": torch.zeros(2, 3)}, "same words for all images"),
    ],
)
def test_wrong_arguments_are_named(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        sliding_window_outputs(model, pixels_of(64, 64), **arguments)


# Through segmenter and pipeline ---------------------------------------------------------------------------------------


@pytest.fixture
def image():
    coarse = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((150, 70), Image.Resampling.BICUBIC)


@pytest.fixture
def tuned(small_processor):
    model = small_model(vocab_size=len(small_processor.tokenizer))
    with torch.no_grad():  # so that several categories win somewhere
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.set_words(**small_processor.encode_categories(["cat", "dog", "sky"]))
    return model.eval()


def scores_of(segments):
    return {segment["label"]: segment["score"] for segment in segments}


def test_pipeline_slides_on_request_and_by_default_of_processor(small_processor, tuned, image, tmp_path):
    pipe = small_processor.pipeline(tuned)
    whole, slide = pipe(image), pipe(image, inference="slide")
    assert scores_of(whole) != scores_of(slide)

    inputs = small_processor(images=image, return_tensors="pt")
    outputs = IFSegSegmenter(tuned, small_processor, "slide")(inputs)
    (expected,) = small_processor.post_process_semantic_segmentation(outputs, [(70, 150)])
    for segment in slide:
        index = tuned.config.label2id[segment["label"]]
        assert np.array_equal(np.asarray(segment["mask"]) > 0, (expected == index).numpy())

    small_processor.image_processor.sliding_window = 64
    small_processor.image_processor.smoothing_iterations = 0
    small_processor.save_pretrained(tmp_path)
    loaded = type(small_processor).from_pretrained(tmp_path)
    assert (loaded.image_processor.sliding_window, loaded.image_processor.smoothing_iterations) == (64, 0)
    pipe = loaded.pipeline(tuned)
    unsmoothed = scores_of(pipe(image, inference="slide", smoothing_iterations=0))
    assert scores_of(pipe(image)) == unsmoothed
    assert scores_of(pipe(image, inference="whole", smoothing_iterations=25)) == scores_of(whole)
    (labels,) = loaded.post_process_semantic_segmentation(outputs, [(70, 150)])
    (expected,) = loaded.post_process_semantic_segmentation(outputs, [(70, 150)], smoothing_iterations=0)
    assert torch.equal(labels, expected)


def test_another_kind_of_inference_is_refused(small_processor, tuned, image):
    with pytest.raises(ValueError, match='inference="sliding": choose "whole" or "slide"'):
        small_processor.pipeline(tuned)(image, inference="sliding")
