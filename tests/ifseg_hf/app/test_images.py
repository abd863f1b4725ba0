"""Uploaded images: limits and plain errors."""

import numpy as np
import pytest
from PIL import Image

from ifseg_hf.app import images
from ifseg_hf.app.images import PageError, fit, read_upload


@pytest.fixture
def turned(tmp_path):
    """The path of a JPEG of 300 x 200 pixels that a camera held upright turned by a quarter."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[274] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    return tmp_path / "turned.jpg"


def test_an_image_is_read_upright_and_unchanged(turned):
    upload = read_upload(turned)
    assert upload.image.size == (200, 300)
    assert upload.image.mode == "RGB"
    assert upload.note == ""


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_a_large_image_is_reduced_with_a_sentence(turned, monkeypatch, kind):
    file = turned
    if kind == "png":
        file = turned.with_suffix(".png")
        with Image.open(turned) as image:
            image.save(file, exif=image.getexif())
    monkeypatch.setattr(images, "READ_PIXELS", 6000)
    upload = read_upload(file)
    width, height = upload.image.size
    assert 5000 < width * height <= 6000
    assert width / height == pytest.approx(2 / 3, rel=0.02)
    assert upload.note == f"The image has 0.1 megapixels; this page reduced it to {width} x {height} pixels."


def test_fifty_megapixels_are_reduced(tmp_path):
    file = tmp_path / "wall.png"
    Image.new("L", (8660, 5774), 100).save(file, compress_level=1)
    upload = read_upload(file)
    assert upload.image.width * upload.image.height <= images.READ_PIXELS
    assert upload.note.startswith("The image has 50 megapixels; ")


def test_too_many_pixels_are_refused_before_decoding(tmp_path, monkeypatch):
    file = tmp_path / "bomb.png"
    Image.new("1", (20000, 20000)).save(file)
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("decoded"))
    with pytest.raises(PageError, match=r'^"bomb\.png" has more than 100 megapixels: make the image smaller'):
        read_upload(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1e6)  # of which Pillow itself refuses twice as many
    with pytest.raises(PageError, match="has more than 100 megapixels"):
        read_upload(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"Dear diary", '"a.jpg" is not an image: choose a JPEG, PNG or WebP file.'), (None, '"a.jpg" cannot be read')],
)
def test_a_wrong_file_is_one_sentence(turned, content, message):
    file = turned.with_name("a.jpg")
    file.write_bytes(turned.read_bytes()[:2000] if content is None else content)
    with pytest.raises(PageError) as caught:
        read_upload(file)
    assert str(caught.value).startswith(message)
    assert str(caught.value).count(". ") == 0


def test_fit_keeps_small_images():
    image = Image.new("RGB", (30, 20))
    assert fit(image, 600) is image
    assert fit(image, 599).size == (29, 19)
