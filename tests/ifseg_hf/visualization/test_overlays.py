"""Overlays with labels and legends, mask files and images side by side."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from ifseg_hf.visualization import fonts, overlays
from ifseg_hf.visualization.colors import word_colors
from ifseg_hf.visualization.overlays import overlay, save_mask, shares, side_by_side

NAMES = ["sky", "tree", "road"]
SKY, TREE, ROAD = word_colors(NAMES)


@pytest.fixture
def image():
    values = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture
def mask():
    mask = np.zeros((60, 80), dtype=np.int64)
    mask[:, 40:] = 2
    mask[:6] = -100
    return mask


def test_shares_are_relative_to_all_pixels_and_sorted(mask):
    assert list(shares(mask, NAMES).items()) == [("sky", 0.45), ("road", 0.45)]
    mask[30:] = 1
    assert list(shares(mask, NAMES)) == ["tree", "sky", "road"]


def test_mask_file_holds_indices_colors_and_names(tmp_path, mask):
    save_mask(torch.from_numpy(mask), tmp_path / "mask.png", NAMES)
    with Image.open(tmp_path / "mask.png") as file:
        assert file.mode == "P"
        assert json.loads(file.text["categories"]) == NAMES
        np.testing.assert_array_equal(np.asarray(file), np.where(mask < 0, 255, mask))
        assert file.convert("RGB").getpixel((79, 59)) == ROAD


def test_mask_file_of_255_categories_has_a_palette(tmp_path):
    mask = np.arange(256).reshape(16, 16)
    save_mask(mask, tmp_path / "mask.png", [f"word {i}" for i in range(255)])
    with Image.open(tmp_path / "mask.png") as file:
        assert file.mode == "P"
        np.testing.assert_array_equal(np.asarray(file), mask)


def test_mask_file_of_more_categories_has_16_bits(tmp_path):
    mask = np.array([[0, 255, 256], [299, -100, 300]])
    save_mask(mask, tmp_path / "mask.png", [f"word {i}" for i in range(300)])
    with Image.open(tmp_path / "mask.png") as file:
        np.testing.assert_array_equal(np.asarray(file), [[0, 255, 256], [299, 65535, 65535]])


def test_mask_must_have_two_dimensions(tmp_path):
    with pytest.raises(ValueError, match=r"two dimensions.*\(1, 2, 3\)"):
        save_mask(np.zeros((1, 2, 3)), tmp_path / "mask.png", NAMES)


def test_overlay_without_legend_keeps_size_and_unlabelled_pixels(image, mask):
    result = overlay(image, mask, NAMES, legend=False)
    assert result.size == image.size
    before, after = np.asarray(image), np.asarray(result)
    np.testing.assert_array_equal(after[:5], before[:5])  # row 5 is the boundary
    assert (after[6:, :38] != before[6:, :38]).any()
    assert (after[10:50, 39] == 255).all()


def test_overlay_paints_the_colours_of_the_palette(mask):
    grey = Image.new("RGB", (80, 60), (128, 128, 128))
    result = overlay(grey, mask, NAMES, alpha=1.0, legend=False)
    assert result.getpixel((10, 30)) == SKY
    assert result.getpixel((70, 30)) == ROAD


@pytest.mark.parametrize("size", [(16, 16), (80, 60), (60, 80), (1600, 900)])
@pytest.mark.parametrize("count", [1, 7, 60])
def test_legend_stands_outside_of_the_image(size, count):
    image = Image.new("RGB", size, (128, 128, 128))
    names = [f"a word of some length {i}" for i in range(count)]
    mask = np.random.default_rng(0).integers(0, count, (size[1], size[0]))
    result, bare = overlay(image, mask, names), overlay(image, mask, names, legend=False)
    np.testing.assert_array_equal(np.asarray(result)[: size[1], : size[0]], np.asarray(bare))
    outside = np.asarray(result).copy()
    outside[: size[1], : size[0]] = 255
    colors = {tuple(color) for color in outside.reshape(-1, 3).tolist()}
    present = np.unique(mask)
    assert {word_colors(names)[i] for i in present} <= colors
    # Nothing is cut off: the pixels at the edges are background.
    below = size[0] > size[1]
    assert (outside[-1] == 255).all()
    assert (outside[:, -1] == 255).all()
    assert (result.height > size[1]) if below else (result.width > size[0])


def test_legend_shows_only_categories_in_the_mask(image, mask):
    result = np.asarray(overlay(image, mask, NAMES))
    colors = {tuple(color) for color in result[image.height :].reshape(-1, 3).tolist()}
    assert SKY in colors
    assert ROAD in colors
    assert TREE not in colors


@pytest.mark.parametrize(
    "names",
    [
        ("tree", "free"),
        ("Straße", "Straüe"),
        ("łąka", "łęka"),
        ("мяч", "дом"),
        ("قط", "كل"),
        ("猫犬", "木山"),
        ("🐱", "🐶"),
    ],
)
def test_different_names_look_different_in_any_script(names, image, mask):
    assert not np.array_equal(*(np.asarray(overlay(image, mask * 0, [name])) for name in names))
    assert not np.array_equal(*(np.asarray(side_by_side([image], [name])) for name in names))


def test_names_of_one_beginning_stay_different(image, mask):
    names = [f"{'a very long name ' * 4}{end}" for end in "ab"]
    shown = overlays._shortened(names)
    assert len(set(shown.values())) == 2
    assert all(len(text) <= 40 for text in shown.values())


def test_characters_without_a_glyph_are_escaped(monkeypatch):
    monkeypatch.setattr(fonts, "_SYSTEM_FONTS", ())
    font, drawable = fonts.choose_font(["a b", "猫犬", "\udc80"], 14)
    assert drawable == {"a b": "a b", "猫犬": r"\u732b\u72ac", "\udc80": r"\udc80"}
    assert fonts.missing_characters(font, ["a", "猫", " "]) == ["猫"]


def test_a_given_font_is_preferred(tmp_path, monkeypatch):
    own = tmp_path / "own.ttf"
    own.write_bytes(ImageFont.load_default(14).font_bytes)
    assert fonts.choose_font(["a"], 14, own)[0].path == own
    monkeypatch.setenv("IFSEG_FONT", str(own))
    assert fonts.choose_font(["a"], 14)[0].path == str(own)
    with pytest.raises(ValueError, match=r"The font .*none\.ttf can't be read"):
        fonts.choose_font(["a"], 14, tmp_path / "none.ttf")


def test_overlay_of_an_unlabelled_mask_is_the_image(image):
    result = overlay(image, np.full((60, 80), -100), NAMES)
    np.testing.assert_array_equal(np.asarray(result)[:60, :80], np.asarray(image))


def test_overlay_refuses_a_mask_of_another_size(image):
    with pytest.raises(ValueError, match="40x30 pixels and the image 80x60"):
        overlay(image, np.zeros((30, 40)), NAMES)


def test_overlay_takes_grey_and_transparent_images(image, mask):
    assert overlay(image.convert("L"), mask, NAMES).mode == "RGB"
    assert overlay(image.convert("RGBA"), mask, NAMES).mode == "RGB"


def test_drawings_scale_16_bits(image, mask):
    grey = np.asarray(image.convert("L"))
    sixteen = Image.fromarray(grey.astype(np.uint16) * 257)
    expected = overlay(Image.fromarray(grey), mask * 0 - 1, NAMES, legend=False)
    assert np.array_equal(overlay(sixteen, mask * 0 - 1, NAMES, legend=False), expected)
    assert np.array_equal(side_by_side([sixteen], ["a"]), side_by_side([Image.fromarray(grey)], ["a"]))


def test_overlay_turns_the_image_upright(image, mask):
    turned = image.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6
    assert np.array_equal(overlay(turned, mask, NAMES), overlay(image, mask, NAMES))


def test_side_by_side_shows_every_image(image):
    tall = Image.new("RGB", (20, 90), (1, 2, 3))
    sheet = side_by_side([image, tall], ["before", "a title wider than its image"])
    pixels = np.asarray(sheet)
    assert (pixels == (1, 2, 3)).all(axis=-1).sum() == 20 * 90
    assert sheet.height > 90
    assert sheet.width > 100


def test_side_by_side_needs_a_title_for_each(image):
    with pytest.raises(ValueError, match="title"):
        side_by_side([image], [])
    with pytest.raises(ValueError, match="title"):
        side_by_side([], [])
