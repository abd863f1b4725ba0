"""`scripts/pseudo_label.py`: what it refuses at once, and a data set from beginning to end."""

import importlib.util
import json
from pathlib import Path

import pytest
from image_folders import NAMES, save_masked_photos, save_tiny_segmenter

from ifseg_hf.data.segmentation import load_segmentation_dataset

SCRIPT = Path(__file__).parents[2] / "scripts" / "pseudo_label.py"


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("pseudo_label", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_a_data_set_of_photos_and_one_of_some_labels(main, tmp_path):
    model = save_tiny_segmenter(tmp_path / "model")
    photos = save_masked_photos(tmp_path / "photos", count=2)
    flags = ["--model", model, "--cpu", "--smoothing-neighbors", "2", "--min-confidence", "0.1"]
    images = ["--photos", f"{photos}/train/images", "--categories", "cat, cup"]
    assert main([*flags, *images, "--output-dir", str(tmp_path / "one")]) == 0
    assert load_segmentation_dataset(str(tmp_path / "one")).names == ["cat", "cup"]
    kept = ["--dataset", photos, "--keep-labels", "--unseen", "sea"]
    assert main([*flags, *kept, "--output-dir", str(tmp_path / "two")]) == 0
    told = json.loads((tmp_path / "two" / "dataset.json").read_text())
    assert told["categories"] == NAMES
    assert told["pseudo_labels"]["guessed"] == ["sea"]
    assert told["pseudo_labels"]["smoothing_neighbors"] == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "either --dataset or --photos"),
        (["--dataset", "a", "--photos", "b"], "either --dataset or --photos"),
        (["--photos", "b"], "give --categories"),
        (["--photos", "b", "--categories", "cat, cup", "--keep-labels"], "no labels for --keep-labels"),
    ],
)
def test_flags_that_contradict_each_other(main, arguments, told, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--model", "m", "--output-dir", "out", *arguments])
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--dataset", "nowhere"], "no folder"),
        (["--dataset", "coco-stuff"], "data_dir"),
        (["--photos", "nowhere", "--categories", "cat, cup"], "no photo"),
        (["--photos", ".", "--categories", "cat, cat"], "given twice"),
        (["--dataset", ".", "--min-confidence", "2"], "min_confidence=2.0"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(main, arguments, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--model", "m", "--output-dir", "out", *arguments]) == 1
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
