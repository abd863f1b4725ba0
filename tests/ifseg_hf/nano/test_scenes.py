"""Scenes: images are inside their boxes, and a scene depends on its seed alone."""

import io
import json
import random

import numpy as np
import pytest
from PIL import Image

from ifseg_hf.nano import scenes

COLOURS = {"red thing": (250, 10, 10), "green thing": (10, 250, 10), "blue thing": (10, 10, 250)}


def plain_images(each: int = 4) -> scenes.NamedImages:
    """Images of one colour for each name."""
    labels = np.arange(3 * each) % 3
    pixels = np.array(list(COLOURS.values()), np.uint8)[labels][:, None, None].repeat(64, 1).repeat(64, 2)
    return scenes.NamedImages(pixels, labels, list(COLOURS))


def half_streets() -> scenes.Streets:
    """Two street images: sky above, road below, a pole in front."""
    mask = np.zeros((2, 180, 240), np.uint8)
    mask[:, 90:] = 1
    mask[:, 60:120, 110:130] = 2
    images = np.array([(120, 120, 250), (90, 90, 90), (200, 180, 20)], np.uint8)[mask]
    return scenes.Streets(images, mask, ["sky", "road", "pole"], 11)


def write_images(folder, count: int = 10, size: int = 64):
    """Writes a parquet file as `datasets` does."""
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rows = []
    for i in range(count):
        file = io.BytesIO()
        Image.new("RGB", (size, size), list(COLOURS.values())[i % 3]).save(file, "png")
        rows.append({"image": {"bytes": file.getvalue(), "path": None}, "label": i % 3})
    features = {"label": {"names": list(COLOURS), "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    table = arrow.Table.from_pylist(rows)
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    folder.mkdir(exist_ok=True)
    parquet.write_table(table, folder / "images.parquet")
    return folder


def test_images_are_decoded_once(tmp_path):
    folder = write_images(tmp_path / "images", 5)
    images = scenes.load_named_images(folder, tmp_path / "cache")
    assert images.names == list(COLOURS)
    assert images.labels.tolist() == [0, 1, 2, 0, 1]
    assert images.pixels.shape == (5, 64, 64, 3)
    assert tuple(images.pixels[1, 0, 0]) == COLOURS["green thing"]
    written = (tmp_path / "cache" / "images.npy").stat().st_mtime_ns
    assert len(scenes.load_named_images(folder, tmp_path / "cache")) == 5
    assert (tmp_path / "cache" / "images.npy").stat().st_mtime_ns == written


def test_a_folder_without_images_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no parquet files"):
        scenes.load_named_images(tmp_path, tmp_path)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_rectangles_tile_the_square(count):
    parts = scenes.rectangles(random.Random(count), count)
    assert len(parts) == count
    assert sum((right - left) * (bottom - top) for left, top, right, bottom in parts) == pytest.approx(1)
    assert all(right - left > 0.05 and bottom - top > 0.05 for left, top, right, bottom in parts)


def test_reading_order_is_by_rows():
    boxes = np.array([[0.5, 0.5, 1, 1], [0, 0.5, 0.5, 1], [0.5, 0, 1, 0.5], [0, 0, 0.5, 0.5]], np.float32)
    assert scenes.reading_order(boxes) == [3, 2, 1, 0]


def test_mosaics_show_what_their_boxes_name():
    maker = scenes.SceneMaker(plain_images(), None)
    scene = maker.mosaic(random.Random(0), 60, scenes.cells(3))
    assert scene.image.shape == (60, 60, 3)
    assert len(scene.labels) == 9
    for (left, top, right, bottom), label in zip(scene.boxes, scene.labels, strict=True):
        middle = scene.image[round((top + bottom) * 30), round((left + right) * 30)]
        assert tuple(middle) == list(COLOURS.values())[label]


def test_street_boxes_are_filled_by_their_name():
    streets = half_streets()
    boxes = scenes.street_boxes(streets, sides=(24, 54))
    assert set(boxes[:, 4].tolist()) == {0, 1, 2}
    for image, left, top, side, name in boxes.tolist():
        share = (streets.masks[image, top : top + side, left : left + side] == name).mean()
        assert share >= (0.35 if streets.names[name] in scenes.THIN else 0.7)
        assert side > 24 or streets.names[name] in scenes.THIN


@pytest.mark.parametrize("antialias", [True, False])
def test_street_views_show_what_their_boxes_name(antialias):
    maker = scenes.SceneMaker(plain_images(), half_streets(), antialias=antialias)
    assert maker.names == [*COLOURS, "sky", "road", "pole"]
    colour = {3: (120, 120, 250), 4: (90, 90, 90)}
    seen = 0
    for seed in range(20):
        scene = maker.street(random.Random(seed), 96)
        assert scene.image.shape == (96, 96, 3)
        assert len(scene.labels) == len(scene.boxes) <= 6
        assert (scene.boxes >= 0).all()
        assert (scene.boxes <= 1).all()
        for (left, top, right, bottom), label in zip(scene.boxes, scene.labels, strict=True):
            if label in colour:
                part = scene.image[round(top * 96) : round(bottom * 96), round(left * 96) : round(right * 96)]
                seen += 1
                assert np.abs(np.median(part, (0, 1)) - colour[label]).max() <= 2
    assert seen


def test_a_scene_is_a_function_of_its_seed():
    maker = scenes.SceneMaker(plain_images(), half_streets())
    for seed in range(5):
        one, two = (maker.draw(random.Random(seed), 64) for _ in range(2))
        assert (one.image == two.image).all()
        assert (one.boxes == two.boxes).all()
        assert one.labels == two.labels


def test_masks_of_evaluation_scenes_are_correct():
    images = plain_images()
    words = ["blue thing", "red thing"]
    first, second = (list(scenes.evaluation_scenes(images, words, 6, seed=1)) for _ in range(2))
    for (image, target), (again, _) in zip(first, second, strict=True):
        assert (image == again).all()
        assert image.shape == (128, 128, 3)
        for i, word in enumerate(words):
            assert (image[target == i] == COLOURS[word]).all()
    assert len({np.count_nonzero(target) for _, target in first}) > 1
