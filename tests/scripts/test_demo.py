"""scripts/demo.py: its pictures, the picture that README and model card open with, and images of its user."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ifseg_hf.visualization.colors import word_colors
from ifseg_hf.visualization.overlays import stacked
from scripts import load_script

ROOT = Path(__file__).parents[2]
main = load_script("demo").main


@pytest.mark.parametrize("card", ["README.md", "ifseg_hf/nano/README.md"])
def test_readme_and_card_open_with_the_picture_of_make_pictures(card):
    text = (ROOT / card).read_text("utf-8")
    title = re.search(r"^# .*\n\n!\[(?P<alt>[^\]]{20,})\]\((?P<file>[^)]+)\)\n\n", text, re.MULTILINE)
    assert title is not None
    written = re.search(r"^pictures:.*\n\t.*demo\.py --picture (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert (ROOT / card).parent / title["file"] == ROOT / written[1]
    with Image.open(ROOT / written[1]) as picture:
        assert picture.width > 1000
        assert (ROOT / written[1]).stat().st_size < 300_000


def test_a_row_shows_the_image_before_and_after():
    pixels = np.full((300, 600, 3), 128, np.uint8)
    masks = {"before": np.zeros((300, 600), int), "after": np.ones((300, 600), int)}
    row = load_script("demo").compared(pixels, masks, ["sky", "road"], width=400)
    assert 3 * 400 < row.width < 3 * 400 + 100
    assert row.height > 200
    colors = {tuple(color) for color in np.asarray(row).reshape(-1, 3).tolist()}
    assert {(128, 128, 128), *word_colors(["sky", "road"])} <= colors  # the image, and the swatches of the legends
    full = load_script("demo").compared(pixels, masks, ["sky", "road"])
    assert full.width > 3 * 600


def test_stacked_images_keep_their_pixels():
    first, second = Image.new("RGB", (30, 10), (1, 2, 3)), Image.new("RGB", (20, 15), (4, 5, 6))
    sheet = stacked([first, second])
    assert sheet.size == (30, 25)
    assert sheet.getpixel((29, 9)) == (1, 2, 3)
    assert sheet.getpixel((19, 24)) == (4, 5, 6)
    assert sheet.getpixel((20, 10)) == (255, 255, 255)


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
