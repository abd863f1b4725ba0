"""Places of words on their regions, and the words drawn there."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ifseg_hf.visualization.overlays import overlay
from ifseg_hf.visualization.region_labels import draw_labels, label_positions


def disc(size: tuple[int, int], centre: tuple[float, float], radius: float) -> np.ndarray:
    """Bool (H, W): a disc."""
    y, x = np.mgrid[: size[1], : size[0]]
    return (x - centre[0]) ** 2 + (y - centre[1]) ** 2 <= radius**2


def test_a_word_stands_in_the_middle_of_a_disc():
    mask = np.zeros((200, 300), int)
    mask[disc((300, 200), (80, 120), 50)] = 1
    (x, y) = label_positions(mask, {1: (40, 12)})[1]
    assert abs(x - 80) < 2
    assert abs(y - 120) < 2


def test_a_word_stands_in_the_widest_of_several_regions():
    mask = np.zeros((100, 300), int)
    mask[10:90, 5:60] = 1  # larger, but narrower than the word
    mask[40:60, 150:260] = 1
    ((x, y),) = label_positions(mask, {1: (80, 12)}).values()
    assert 150 + 40 <= x <= 260 - 40
    assert 46 <= y <= 54


def test_a_region_with_a_hole_keeps_its_word_out_of_the_hole():
    mask = np.ones((120, 240), int)
    mask[disc((240, 120), (120, 60), 25)] = 0
    ((x, y),) = label_positions(mask, {1: (60, 14)}).values()
    box = mask[round(y - 7) : round(y + 7), round(x - 30) : round(x + 30)]
    assert box.size == 14 * 60
    assert box.all()


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (1000, 333), (3000, 2000), (200, 1000)])
def test_boxes_lie_within_regions_of_any_shape(size):
    """Also where the mask is sampled, since it is large."""
    rng = np.random.default_rng(size[0])
    blobs = [disc(size, rng.uniform((0, 0), size), rng.uniform(0.1, 0.3) * min(size)) for _ in range(8)]
    mask = np.full(size[::-1], 8)
    for i, blob in enumerate(blobs):
        mask[blob] = i
    boxes = dict.fromkeys(range(9), (size[0] // 8, size[1] // 25))
    found = label_positions(mask, boxes)
    assert len(found) > 3
    for i, (x, y) in found.items():
        w, h = boxes[i]
        left, top = round(x - w / 2), round(y - h / 2)
        assert left >= 0
        assert top >= 0
        box = mask[top : top + h, left : left + w]
        assert box.shape == (h, w)
        assert (box == i).all()


def test_small_and_absent_regions_get_no_word():
    mask = np.zeros((100, 100), int)
    mask[:10, :10] = 1
    assert set(label_positions(mask, {0: (30, 10), 1: (30, 10), 2: (30, 10)})) == {0}
    assert label_positions(mask, {0: (101, 10)}) == {}
    assert label_positions(np.full((5, 5), -1), {0: (1, 1)}) == {}


def test_only_the_region_changes_where_its_word_is_drawn(tmp_path):
    """Pixels that differ from the overlay without labels have the labelled category."""
    image = Image.new("RGB", (480, 360), (128, 128, 128))
    mask = np.zeros((360, 480), int)
    mask[200:, :] = 1
    mask[200:, 300:] = 2
    mask[:60, 200:300] = 3
    names = ["sky", "grass", "road", "a name that is far too long for its region"]
    with_labels, without = (np.asarray(overlay(image, mask, names, legend=False, labels=x)) for x in (True, False))
    changed = (with_labels != without).any(-1)
    assert set(np.unique(mask[changed])) == {0, 1, 2}
    # White text with a dark outline.
    assert ((with_labels == 255).all(-1) & changed).sum() > 50
    assert ((with_labels < 60).all(-1) & changed).sum() > 50


def test_small_images_are_not_hidden_by_words():
    image = Image.new("RGB", (80, 60), (128, 128, 128))
    with_labels, without = (overlay(image, np.zeros((60, 80)), ["sky"], legend=False, labels=x) for x in (True, False))
    assert np.array_equal(with_labels, without)


def test_words_in_any_script_stay_within_their_regions():
    from ifseg_hf.visualization.fonts import choose_font

    image = Image.new("RGB", (400, 300), (90, 90, 90))
    mask = np.full((300, 400), -1)
    mask[100:200, 100:300] = 0
    for name in ("jgÅẞ", "دریا", "木", "\udc80", ".", " "):
        font, drawable = choose_font([name], 24)
        drawn = image.copy()
        draw_labels(drawn, mask, {0: drawable[name]}, font)
        changed = (np.asarray(drawn) != np.asarray(image)).any(-1)
        assert (mask[changed] == 0).all()
        assert changed.any() == bool(name.strip())
        assert ImageDraw.Draw(drawn).textlength(drawable[name], font) < 200
