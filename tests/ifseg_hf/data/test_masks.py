"""Masks with values or colours as datasets have them, through `dataset.json`."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ifseg_hf.data.image_files import SampleError
from ifseg_hf.data.masks import mask_labels, read_mask_metadata
from ifseg_hf.data.segmentation import load_segmentation_dataset

PALETTE = {"128,64,128": "road", "#4682B4": "sky", "(0, 0, 0)": None, "107 142 35": "tree", "70,130,181": "sky"}
ROAD, SKY, NONE, TREE, OTHER_SKY = [128, 64, 128], [70, 130, 180], [0, 0, 0], [107, 142, 35], [70, 130, 181]


@pytest.fixture
def labels_of(tmp_path):
    """A function that returns the labels of a mask in a folder with a `dataset.json`."""
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()

    def read(mask: Image.Image, **metadata) -> list:
        Image.new("RGB", mask.size).save(tmp_path / "images" / "a.png")
        mask.save(tmp_path / "masks" / "a.png")
        (tmp_path / "dataset.json").write_text(json.dumps(metadata))
        data = load_segmentation_dataset(str(tmp_path))
        image, labels = data.read(data.samples[0])
        assert labels.dtype == np.int64
        assert labels.shape == image.shape[:2]
        return [data.names[label] if label >= 0 else label for label in labels.ravel().tolist()]

    return read


def test_colors_stand_for_categories(labels_of):
    colors = np.array([[ROAD, SKY, NONE], [TREE, OTHER_SKY, ROAD]], np.uint8)
    expected = ["road", "sky", -100, "tree", "sky", "road"]
    mask = Image.fromarray(colors)
    assert labels_of(mask, palette=PALETTE) == expected
    assert labels_of(mask.convert("RGBA"), palette=PALETTE) == expected
    assert labels_of(mask.quantize(8), palette=PALETTE) == expected  # a PNG with a palette
    assert labels_of(mask, palette=PALETTE, categories=["tree", "sky", "road"]) == expected


def test_categories_give_the_order_of_the_colors_names():
    assert read_mask_metadata({"palette": PALETTE}).names == ["road", "sky", "tree"]
    found = read_mask_metadata({"palette": PALETTE, "categories": ["tree", "sky", "road"]})
    assert found.names == ["tree", "sky", "road"]


def test_black_and_white_masks(labels_of):
    mask = Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8))
    expected = ["background", "road", "road", "background"]
    assert labels_of(mask, categories={"0": "background", "255": "road"}) == expected
    assert labels_of(mask, categories={"255": "road"}, ignore_index=0) == [-100, "road", "road", -100]
    black_and_white = {"0,0,0": "background", "255,255,255": "road"}
    assert labels_of(mask, palette=black_and_white) == expected
    assert labels_of(mask.convert("1"), palette=black_and_white) == expected
    assert labels_of(mask.convert("1"), categories=["background", "road"]) == expected


def test_several_values_can_be_ignored(labels_of):
    mask = Image.fromarray(np.array([[0, 7, 8], [11, 255, 0]], np.uint8))
    expected = [-100, "road", "sidewalk", "building", -100, -100]
    names = {"7": "road", "8": "sidewalk", "11": "building"}
    assert labels_of(mask, categories=names, ignore_index=[0, 255]) == expected
    listed = [f"name {value}" for value in range(1, 12)]
    found = labels_of(mask, categories=listed, ignore_index=[0, 255])
    assert found == [-100, "name 7", "name 8", "name 11", -100, -100]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"palette": ["road"]}, 'has a "palette" that should be {"R,G,B": "name"}'),
        ({"palette": {}}, 'has a "palette" that should be'),
        ({"palette": {"red": "road"}}, 'has the colour "red" in "palette": write "128,64,128" or "#804080"'),
        ({"palette": {"1,2,256": "road"}}, 'has the colour "1,2,256"'),
        ({"palette": {"1,2,3": "road", "#010203": "sky"}}, 'has the colour 1,2,3 twice in "palette"'),
        ({"palette": {"1,2,3": ["road"]}}, r"has the name \['road'\] in \"palette\""),
        ({"palette": {"1,2,3": None}}, "There is no category"),
        ({"palette": PALETTE, "categories": ["road", "sky"]}, "should list the same names"),
        ({"palette": PALETTE, "categories": {"0": "road"}}, "should list the same names"),
        ({"palette": PALETTE, "ignore_index": 0}, "colours of unlabelled pixels the name null"),
        ({"categories": ["road"], "ignore_index": [0, "x"]}, r"ignore_index=\[0, 'x'\], which should hold an integer"),
        ({"categories": ["road"], "ignore_index": True}, "ignore_index=True"),
        ({"categories": ["road"], "ignore_index": 2**40}, "up to 65535"),
        ({"categories": {"99999": "road"}}, "names the mask value 99999: values are from 0 to 65535"),
        ({"categories": {"7": "road", "07": "sky"}}, "names a mask value twice among 7, 07"),
        ({"categories": {"7": ["road"]}}, r"\['road'\] is not a name"),
    ],
)
def test_wrong_metadata_is_named(metadata, message, labels_of):
    with pytest.raises(ValueError, match=f"dataset.json .*{message}") as error:
        labels_of(Image.new("L", (2, 2)), **metadata)
    assert "\n" not in str(error.value)


def test_a_key_that_stands_twice_is_named(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "dataset.json").write_text('{"categories": {"7": "road", "7": "sky"}}')
    with pytest.raises(ValueError, match=r'dataset.json .*"7" stands twice'):
        load_segmentation_dataset(str(tmp_path))


@pytest.mark.parametrize(
    ("mask", "metadata", "message"),
    [
        (Image.new("RGB", (2, 2), (1, 2, 3)), {"palette": PALETTE}, r"colours .*: 1,2,3 \(4 pixels\)\. Add them to"),
        (Image.new("RGB", (2, 2)), {"categories": ["road"]}, 'mode RGB.*"palette": {"128,64,128": "road"}'),
        (Image.new("I;16", (2, 2)), {"palette": PALETTE}, "mode I;16, without colours"),
        (Image.new("L", (2, 2), 3), {"categories": {"7": "road"}}, r"values .*: 3 \(4 pixels\)\. .*ignore_index"),
    ],
)
def test_wrong_pixels_are_named_with_the_file(mask, metadata, message, labels_of):
    with pytest.raises(SampleError, match=f"masks/a.png has .*{message}") as error:
        labels_of(mask, **metadata)
    assert "\n" not in str(error.value)


def test_values_beyond_16_bits_are_named():
    found = read_mask_metadata({"categories": ["road"]})
    with pytest.raises(ValueError, match=r"-1 \(1 pixels\), 70000 .* from 0 to 65535: convert the mask"):
        mask_labels(Image.fromarray(np.array([[-1, 70000]], np.int32)), found.labels)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_colors_and_values_give_the_same_labels(data):
    """A mask of any values, and the same mask in any distinct colours."""
    values = data.draw(st.lists(st.integers(0, 65535), min_size=1, max_size=12, unique=True))
    colors = data.draw(
        st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=len(values), max_size=len(values), unique=True)
    )
    ignored = data.draw(st.sets(st.sampled_from(values), max_size=len(values) - 1))
    pixels = np.array(data.draw(st.lists(st.integers(0, len(values) - 1), min_size=6, max_size=6))).reshape(2, 3)
    names = {value: f"name {value}" for value in values if value not in ignored}
    by_value = read_mask_metadata({"categories": {str(v): n for v, n in names.items()}, "ignore_index": [*ignored]})
    palette = {
        ("{},{},{}" if value % 2 else "#{:02x}{:02X}{:02x}").format(*color): names.get(value)
        for value, color in zip(values, colors, strict=True)
    }
    by_color = read_mask_metadata({"palette": palette, "categories": by_value.names})
    assert by_color.names == by_value.names
    grey = Image.fromarray(np.array(values, np.uint16)[pixels])
    colored = Image.fromarray(np.array(colors, np.uint8)[pixels])
    expected = [
        [-100 if values[i] in ignored else by_value.names.index(f"name {values[i]}") for i in row] for row in pixels
    ]
    assert mask_labels(grey, by_value.labels).tolist() == expected
    assert mask_labels(colored, by_color.labels, by_color.colors).tolist() == expected
