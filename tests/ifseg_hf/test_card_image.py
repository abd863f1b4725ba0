"""The picture of a model card."""

import numpy as np
import pytest
from hub_client import save_small_processor, save_tuned_model
from PIL import Image
from tiny_model import save_tiny_model

from ifseg_hf.card_image import draw_card_image, read_card_image


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    return save_tuned_model(tmp_path_factory.mktemp("saved") / "tuned", ["cat", "wet grass", "sky"])


def test_the_picture_has_the_image_and_its_segmentation_but_no_metadata(tuned, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((1200, 900))
    exif = image.getexif()
    exif[0x010F] = "a camera"
    exif.get_ifd(0x8825)[1] = "N"  # the place
    image.save(tmp_path / "holiday.jpg", exif=exif)
    with Image.open(draw_card_image(tuned, tmp_path / "holiday.jpg")) as picture:
        assert picture.format == "JPEG"
        assert not picture.getexif()
        assert 2 * 640 < picture.width < 2 * 640 + 200
        assert picture.height > 480
        drawn = np.asarray(picture.convert("RGB"), np.float32)
    # The image, in the left half below its title; its segmentation has other colours.
    small = np.asarray(read_card_image(tmp_path / "holiday.jpg"), np.float32)
    left = (drawn.shape[1] - 2 * 640) // 3
    tops = [y for y in range(20, 90) if np.abs(drawn[y : y + 480, left : left + 640] - small).mean() < 6]
    assert tops
    right = drawn[tops[0] : tops[0] + 480, 2 * left + 640 : 2 * left + 1280]
    assert np.abs(right - small).mean() > 20
    assert b"holiday" not in (tuned / "card_image.jpg").read_bytes()


def test_wrong_images_and_models_are_errors_of_one_line(tuned, tmp_path):
    save_tiny_model(tmp_path / "wordless", tuned=True)
    save_small_processor(tmp_path / "wordless")
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(ValueError, match="was not tuned for any words"):
        draw_card_image(tmp_path / "wordless", tmp_path / "a.png")
    assert not (tmp_path / "wordless" / "card_image.jpg").exists()
    with pytest.raises(ValueError, match="is no image that Pillow can read"):
        draw_card_image(tuned, tmp_path / "text.jpg")
    with pytest.raises(ValueError, match=r'There is no image "nowhere\.jpg" for the model card'):
        draw_card_image(tuned, "nowhere.jpg")
    with pytest.raises(ValueError, match="no model folder"):
        draw_card_image(tmp_path / "nowhere", tmp_path / "a.png")
