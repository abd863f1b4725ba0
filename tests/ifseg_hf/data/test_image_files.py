"""The one reader of folders: sub-folders, names of Cityscapes, hidden files, and names that occur twice."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from ifseg_hf.data.image_files import list_images, read_names
from ifseg_hf.data.segmentation import load_segmentation_dataset


def touch(folder, *files):
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()


def test_images_of_sub_folders_are_listed_by_name(tmp_path):
    touch(tmp_path, "b.JPG", "a/z.png", "a/b.webp", "notes.txt", "._b.jpg", ".hidden/c.jpg", "a/.DS_Store")
    assert list(list_images(tmp_path)) == ["a/b", "a/z", "b"]
    assert list_images(tmp_path)["a/z"] == str(tmp_path / "a" / "z.png")
    assert list(list_images(tmp_path, [".webp"])) == ["a/b"]


def test_linked_folders_are_listed(tmp_path):
    touch(tmp_path, "elsewhere/x.png", "images/y.png")
    (tmp_path / "images" / "more").symlink_to(tmp_path / "elsewhere")
    assert list(list_images(tmp_path / "images")) == ["more/x", "y"]


@pytest.mark.parametrize("files", [("a.jpg", "a.png"), ("b/a.jpg", "b/a.jpeg"), ("a.png", "a_leftImg8bit.png")])
def test_two_images_of_one_name_are_refused_by_both(files, tmp_path):
    touch(tmp_path, *files)
    first, second = map(re.escape, sorted(files))
    with pytest.raises(ValueError, match=f"two images called .*a: {first} and {second}|{second} and {first}"):
        list_images(tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere can't be read: No such file"):
        list_images(tmp_path / "nowhere")


def test_images_and_masks_pair_as_in_cityscapes(tmp_path):
    stem = "aachen/aachen_000000_000019"
    for folder in ("images", "masks"):
        (tmp_path / folder / "aachen").mkdir(parents=True)
    Image.new("RGB", (2, 1)).save(tmp_path / "images" / f"{stem}_leftImg8bit.png")
    Image.fromarray(np.array([[0, 1]], np.uint8)).save(tmp_path / "masks" / f"{stem}_gtFine_labelIds.png")
    touch(tmp_path / "masks", f"{stem}_gtFine_color.png", f"{stem}_gtFine_instanceIds.png")
    (tmp_path / "dataset.json").write_text(json.dumps({"categories": ["road", "car"]}))
    data = load_segmentation_dataset(str(tmp_path))
    (sample,) = data.samples
    assert sample["id"] == stem
    assert data.read(sample)[1].tolist() == [[0, 1]]
    touch(tmp_path / "masks", f"{stem}_gtFine_labelTrainIds.png")  # a second mask
    with pytest.raises(ValueError, match=r"labelIds.*labelTrainIds"):
        load_segmentation_dataset(str(tmp_path))


def test_splits_may_be_files_of_names(tmp_path):
    touch(tmp_path, *(f"{folder}/{name}.png" for folder in ("images", "masks") for name in ("a", "b", "town/c")))
    (tmp_path / "dataset.json").write_text(json.dumps({"categories": ["road", "car"]}))
    (tmp_path / "train.txt").write_text("town/c.png\n\na\n")
    (tmp_path / "val.txt").write_text("b\n")
    assert load_segmentation_dataset(str(tmp_path), split="train").samples["id"] == ["town/c", "a"]
    assert load_segmentation_dataset(str(tmp_path)).samples["id"] == ["b"]
    with pytest.raises(ValueError, match=r'no split "test" in .*: choose from train, val'):
        load_segmentation_dataset(str(tmp_path), split="test")


@pytest.mark.parametrize(("text", "message"), [("a\na.jpg\n", "lists a twice"), (" \n", "lists no image")])
def test_wrong_split_files_are_named(text, message, tmp_path):
    (tmp_path / "val.txt").write_text(text)
    with pytest.raises(ValueError, match=rf"val\.txt {message}"):
        read_names(tmp_path / "val.txt")
