"""Colours of words: distances for several kinds of colour vision, and the same colour in every list."""

import itertools
import random

import numpy as np
import pytest

from ifseg_hf.visualization.colors import palette, word_colors

CAMVID = ["sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"]
CITYSCAPES = ["road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"]
CITYSCAPES += ["terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"]
VOC = ["background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"]
VOC += ["dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor"]

# Machado, Oliveira, Fernandes: A Physiologically-based Model for Simulation of Color Vision Deficiency (2009), table 1,
# severity 1.0, for linear RGB.
MACHADO = {
    "normal": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


def cielab(color: tuple[int, ...], vision: str) -> np.ndarray:
    """CIELAB coordinates (D65) of an sRGB colour for a kind of colour vision."""
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in (level / 255 for level in color)]
    linear = np.clip(np.array(MACHADO[vision]) @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    x, y, z = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in xyz / (0.95047, 1, 1.08883))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def smallest_distance(colors, vision: str) -> float:
    """The smallest CIELAB distance of two colours."""
    seen = [cielab(color, vision) for color in colors]
    return min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2))


def test_cielab_of_the_tests_agrees_with_known_values():
    np.testing.assert_allclose(cielab((255, 0, 0), "normal"), [53.24, 80.09, 67.20], atol=0.1)
    np.testing.assert_allclose(cielab((128, 128, 128), "protanopia"), [53.59, 0, 0], atol=0.2)
    red, green = (cielab(color, "deuteranopia") for color in ((200, 60, 60), (110, 120, 50)))
    assert np.linalg.norm(red - green) < 15  # far apart for normal vision


@pytest.mark.parametrize("vision", MACHADO)
def test_colours_differ_for_every_vision(vision):
    assert smallest_distance(palette(32), vision) > 16
    assert smallest_distance(palette(60), vision) > 9
    assert smallest_distance(palette(171), vision) > 4.5


def test_a_longer_palette_begins_with_the_shorter_one():
    assert palette(171)[:30] == palette(30)
    assert palette(171)[:60] == palette(60)
    assert all(isinstance(channel, int) and 0 <= channel <= 255 for color in palette(171) for channel in color)


def test_palette_repeats_after_a_thousand_colours():
    assert len(set(palette(1000))) == 1000
    assert palette(1500)[1000:] == palette(500)
    assert palette(0) == ()


def test_palette_is_never_nearly_black_or_white():
    brightness = np.asarray(palette(171)) @ (0.299, 0.587, 0.114)
    assert brightness.min() > 45
    assert brightness.max() < 230


@pytest.mark.parametrize("words", [CAMVID, CITYSCAPES, VOC])
def test_common_vocabularies_have_their_colours_in_the_table(words):
    colors = word_colors(words)
    assert len(set(colors)) == len(words)
    assert colors == tuple(word_colors([word])[0] for word in words)


def test_frequent_words_have_their_colour_in_every_list():
    rng = random.Random(0)
    words = ["sky", "grass", "road", "tree", "car", "person", "water", "building"]
    alone = dict(zip(words, word_colors(words), strict=True))
    for _ in range(50):
        others = [f"word {rng.randrange(10**6)}" for _ in range(rng.randrange(60))]
        mixed = [*others, *words]
        rng.shuffle(mixed)
        found = dict(zip(mixed, word_colors(mixed), strict=True))
        assert {word: found[word] for word in words} == alone


def test_other_words_keep_their_colour_unless_two_choose_the_same():
    words = [f"word {i}" for i in range(300)]
    alone = {word: word_colors([word])[0] for word in words}
    assert len(set(alone.values())) == 31
    for pair in itertools.pairwise(words):
        first, second = word_colors(pair)
        assert first != second
        assert first == alone[pair[0]] or alone[pair[0]] == alone[pair[1]]
        assert [first == alone[pair[0]], second == alone[pair[1]]].count(True) == (
            1 if alone[pair[0]] == alone[pair[1]] else 2
        )


def test_order_and_repetition_change_no_colour():
    words = [f"word {i}" for i in range(40)] + ["river", "sea", "lake"]
    colors = dict(zip(words, word_colors(words), strict=True))
    shuffled = random.Random(1).sample(words, len(words)) + words[:3]
    assert word_colors(shuffled) == tuple(colors[word] for word in shuffled)
    assert colors["sea"] == word_colors(["sea"])[0]  # the first of the three in the table
    assert len({colors[word] for word in ("sea", "river", "lake")}) == 3


def test_every_word_of_a_long_list_has_another_colour():
    words = [f"word {i}" for i in range(171)]
    assert len(set(word_colors(words))) == 171
    assert len(word_colors([f"word {i}" for i in range(1200)])) == 1200
    assert word_colors([]) == ()


def test_spelling_makes_no_difference():
    assert len({word_colors([word])[0] for word in ("traffic light", "Traffic-Light", "traffic_light ")}) == 1
    assert len(set(word_colors(["Zebra", "zebra"]))) == 2  # two names in one list
    assert len(word_colors(["\udc80", "猫", ""])) == 3
