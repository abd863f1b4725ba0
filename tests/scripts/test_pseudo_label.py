"""`scripts/pseudo_label.py`: wrong arguments, and a dataset from beginning to end."""

import json

import numpy as np
import pytest
from image_folders import NAMES, save_masked_images, save_tiny_segmenter

from ifseg_hf.data.segmentation import load_segmentation_dataset
from ifseg_hf.modeling import IFSegForSemanticSegmentation
from ifseg_hf.processing import IFSegProcessor
from scripts import load_script


@pytest.fixture(scope="module")
def main():
    return load_script("pseudo_label").main


def test_datasets_of_images_and_of_some_labels(main, tmp_path):
    model = save_tiny_segmenter(tmp_path / "model")
    folder = save_masked_images(tmp_path / "folder", count=2)
    flags = ["--model", model, "--cpu", "--smoothing-neighbors", "2", "--min-confidence", "0.1"]
    images = ["--images", f"{folder}/train/images", "--categories", "cat, cup"]
    assert main([*flags, *images, "--output-dir", str(tmp_path / "one")]) == 0
    assert load_segmentation_dataset(str(tmp_path / "one")).names == ["cat", "cup"]
    masks = ["--masks", f"{folder}/train/masks", "--ignore-index", "9", "--output-dir", str(tmp_path / "masks")]
    assert main([*flags, *images, *masks]) == 0
    assert json.loads((tmp_path / "masks" / "dataset.json").read_text())["pseudo_labels"]["masks"]
    kept = ["--dataset", folder, "--keep-labels", "--unseen", "sea"]
    assert main([*flags, *kept, "--output-dir", str(tmp_path / "two")]) == 0
    metadata = json.loads((tmp_path / "two" / "dataset.json").read_text())
    assert metadata["categories"] == NAMES
    assert metadata["pseudo_labels"]["predicted"] == ["sea"]
    assert metadata["pseudo_labels"]["smoothing_neighbors"] == 2


def test_a_background_is_a_category_of_the_dataset(main, tmp_path):
    model = save_tiny_segmenter(tmp_path / "model")
    folder = save_masked_images(tmp_path / "folder", count=2)
    flags = ["--model", model, "--cpu", "--images", f"{folder}/train/images", "--output-dir"]

    def categories(name: str, *more: str) -> list[str]:
        assert main([*flags, str(tmp_path / name), *more]) == 0
        data = load_segmentation_dataset(str(tmp_path / name))
        assert json.loads((tmp_path / name / "dataset.json").read_text())["categories"] == data.names
        labels = np.concatenate([data.read(sample)[1].ravel() for sample in data.samples])
        assert labels.min() >= 0
        assert labels.max() < len(data.names)
        return data.names

    assert categories("one", "--categories", "cat") == ["cat", "background"]
    assert categories("none", "--categories", "cat", "--background", "none") == ["cat"]
    assert categories("two", "--categories", "cat, cup", "--background", "sky, sea") == ["cat", "cup", "background"]
    own = ["--categories", "Background, cup", "--background", "sky, sea"]
    assert categories("own", *own) == ["Background", "cup"]
    kept = ["--model", model, "--cpu", "--dataset", folder, "--keep-labels", "--unseen", "sea", "--background"]
    assert main([*kept, "grass, wall", "--output-dir", str(tmp_path / "kept")]) == 0
    metadata = json.loads((tmp_path / "kept" / "dataset.json").read_text())
    assert metadata["categories"] == [*NAMES, "background"]
    assert metadata["pseudo_labels"]["predicted"] == ["sea", "background"]


def test_the_models_own_background_is_kept(main, tmp_path):
    model = save_tiny_segmenter(tmp_path / "model")
    processor, segmenter = IFSegProcessor.from_pretrained(model), IFSegForSemanticSegmentation.from_pretrained(model)
    segmenter.set_words(**processor.encode_categories(["cat", "cup"], background=["sky", "sea"]))
    segmenter.save_pretrained(model)
    folder = save_masked_images(tmp_path / "folder", count=1)
    given = ["--model", model, "--cpu", "--images", f"{folder}/train/images", "--categories", "cat, cup"]
    assert main([*given, "--output-dir", str(tmp_path / "out")]) == 0
    assert load_segmentation_dataset(str(tmp_path / "out")).names == ["cat", "cup", "background"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --dataset or --images"),
        (["--dataset", "a", "--images", "b"], "either --dataset or --images"),
        (["--images", "b"], "--images needs --categories"),
        (["--images", "b", "--categories", "cat, cup", "--keep-labels"], "--keep-labels and --unseen need the labels"),
        (["--dataset", "a", "--masks", "b"], "--masks needs --images"),
        (["--images", "b", "--categories", "cat, cup", "--ignore-index", "9"], "--ignore-index is for --masks"),
    ],
)
def test_flags_that_contradict_each_other(main, arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--model", "m", "--output-dir", "out", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "nowhere"], "no folder"),
        (["--dataset", "coco-stuff"], "data_dir"),
        (["--images", "nowhere", "--categories", "cat, cup"], "nowhere can't be read"),
        (["--images", ".", "--categories", "cat, cat"], "given twice"),
        (["--dataset", ".", "--min-confidence", "2"], "min_confidence=2.0"),
    ],
)
def test_errors_are_one_line(main, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--model", "m", "--output-dir", "out", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
