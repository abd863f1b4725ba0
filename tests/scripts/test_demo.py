"""scripts/demo.py with images of its user."""

import numpy as np
import pytest
from PIL import Image

from scripts import load_script

main = load_script("demo").main


@pytest.fixture
def images(tmp_path):
    """A damaged image, and two of one stem in different folders."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        Image.fromarray(pixels).save(tmp_path / folder / "image.png")
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes((tmp_path / "first" / "image.png").read_bytes()[:60])
    return [damaged, tmp_path / "first" / "image.png", tmp_path / "second" / "image.png"]


def arguments(images, output, *more: str) -> list[str]:
    files = [part for image in images for part in ("--image", str(image))]
    return [*files, "--categories", "cat, sky", "--steps", "1", "--output-dir", str(output), *more]


def test_a_damaged_image_is_reported_before_tuning(images, tmp_path, capsys):
    output = tmp_path / "output"
    for given, more in ((images, []), (images[:1], ["--on-error", "skip"])):
        assert main(arguments(given, output, *more)) == 1
        error = capsys.readouterr().err
        assert error.startswith("demo.py: ")
        assert str(images[0]) in error
        assert not output.exists()


@pytest.mark.slow
def test_a_damaged_image_is_skipped_if_asked(images, tmp_path, capsys):
    output = tmp_path / "output"
    assert main(arguments(images, output, "--on-error", "skip")) == 1
    captured = capsys.readouterr()
    assert captured.err.count("demo.py: ") == 1
    assert str(images[0]) in captured.err
    for name in ("image", "image-2"):
        assert (output / f"{name}.png").is_file()
        assert f"{name}.png" in captured.out
